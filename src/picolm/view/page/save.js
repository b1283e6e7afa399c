// What one takes away: the page itself, a link, an animation. Pictures of single figures are saved beside them.
import { chooser, make, whole } from "./dom.js";
import { change, fragment, question, run, spread, state, stepNumbers } from "./state.js";
import { saved, send } from "./source.js";
import { canvasOf, offerFile } from "./plot.js";

const FRAMES = 120; // of an animation at most
const panel = make("div", { className: "save-panel" });
const wanted = { steps: "16", panels: new Set(["text", "heads", "layers", "training"]), figure: "text", format: "webp", milliseconds: "400" };
const progress = { page: "", animation: "" };
let moving = null; // {panels, settled}: what draws the frames

export const savePanel = { key: "save", title: "Take away", node: panel, show: showSave };

export const drawnBy = (panels, settled) => (moving = { panels, settled });

async function showSave() {
  panel.replaceChildren(linkCard(), ...(saved ? [] : [pageCard(), animationCard()]));
  return "link, page and animation";
}

function card(title, words, ...parts) {
  return make("section", { className: "take" }, make("h3", { textContent: title }), make("p", { className: "faint", textContent: words }), ...parts);
}

function linkCard() {
  const address = `${location.href.split("#")[0]}#${fragment()}`;
  const field = make("input", { type: "search", readOnly: true, value: address, "aria-label": "Link" }),
    told = make("output", { "aria-live": "polite" });
  const copy = make("button", { type: "button", textContent: "Copy link", onclick: async () => {
    field.select();
    told.textContent = await navigator.clipboard.writeText(address).then(() => "copied", () => "press Ctrl+C to copy");
  } });
  return card("A link to this state", "Run, step, text, panel and choices stand in the address; it works while this server runs.",
    make("div", { className: "controls" }, field, copy, told));
}

const chosenSteps = () => { const steps = stepNumbers(); return wanted.steps === "this" ? [state.step] : wanted.steps === "all" ? steps
  : spread(steps, Number(wanted.steps)); };

function pageCard() {
  const count = stepNumbers().length,
    choices = [["this", "this step"], ["16", "16 steps"], ["all", `all ${whole(count)} steps`]].filter(([key]) => key !== "16" || count > 16);
  if (!choices.some(([key]) => key === wanted.steps)) wanted.steps = "all";
  const boxes = [["text", "Text"], ["heads", "Heads"], ["layers", "Layers"], ["training", "Training"]].map(([key, words]) =>
    make("label", { className: "group" },
    make("input", { type: "checkbox", checked: wanted.panels.has(key),
    onchange: (event) => wanted.panels[event.target.checked ? "add" : "delete"](key) }), words));
  const save = async () => {
    const [first] = wanted.panels, shown = fragment().replace("panel=save", `panel=${first ?? "text"}`);
    const body = { ...question(), steps: chosenSteps(), panels: [...wanted.panels], state: shown };
    offerFile(await (await send("save", body)).blob(), `${fileName()}.html`);
    return "saved";
  };
  return card("Save as page", "One HTML file with this text at these steps, which opens anywhere without a server or a network.",
    make("div", { className: "controls" }, chooser("Steps", choices, wanted.steps, (steps) => (wanted.steps = steps)), ...boxes),
    action("page", "Save as page", save));
}

const fileName = () => `${run().name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60)}-microscope`;

function animationCard() {
  const pick = (key) => (value) => (wanted[key] = value);
  return card("Animation of the timeline", `One frame for each step, at most ${FRAMES}.`, make("div", { className: "controls" },
    chooser("Figure", [["text", "text"], ["heads", "head"], ["layers", "layers"]], wanted.figure, pick("figure")),
    chooser("Format", [["webp", "WebP"], ["gif", "GIF"]], wanted.format, pick("format")),
    chooser("Each frame", [["200", "0.2 s"], ["400", "0.4 s"], ["1000", "1 s"]], wanted.milliseconds, pick("milliseconds"))),
    action("animation", "Make animation", animate));
}

// A button and how far it has come, which is kept while the panel is drawn anew.
function action(key, words, act) {
  const begin = async () => {
    say(key, "working…");
    say(key, await act().catch((error) => error.message));
  };
  return make("div", { className: "controls" }, make("button", { type: "button", textContent: words, onclick: begin }),
    make("output", { "aria-live": "polite", data: { of: key }, textContent: progress[key] }));
}

function say(key, words) {
  progress[key] = words;
  const told = panel.querySelector(`output[data-of="${key}"]`);
  if (told) told.textContent = words;
}

// The slider goes through the steps; each frame is the figure that the panel shows then.
async function animate() {
  const before = { step: state.step, panel: state.panel }, steps = spread(stepNumbers(), FRAMES), frames = [];
  const own = moving.panels.find(({ key }) => key === wanted.figure);
  try {
    for (const [at, step] of steps.entries()) {
      change({ panel: own.key, step });
      await moving.settled();
      frames.push(await canvasOf(own.figure, 1));
      say("animation", `${at + 1} of ${steps.length} frames`);
    }
  } finally {
    change(before);
  }
  const wide = Math.max(...frames.map(({ width }) => width)), high = Math.max(...frames.map(({ height }) => height));
  const body = { frames: frames.map((frame) => framed(frame, wide, high)), milliseconds: Number(wanted.milliseconds), format: wanted.format };
  offerFile(await (await send("animation", body)).blob(), `${fileName()}.${wanted.format}`);
  return "saved";
}

function framed(frame, width, height) {
  const canvas = make("canvas", { width, height }), pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, width, height);
  pen.drawImage(frame, 0, 0);
  return canvas.toDataURL("image/png");
}
