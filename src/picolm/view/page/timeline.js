// The slider over all steps that have weights, what is marked on it, and the player.
import { byId, chooser, make, svg, whole } from "./dom.js";
import { change, nearest, place, run, session, state, stepOf, tokensAt } from "./state.js";
import { look, saved, send } from "./source.js";
import { stepTicks } from "./plot.js";

const HEIGHT = 46, SIDE = 14, PAUSE = 650; // pixels, pixels, milliseconds between steps while it plays
const WORDS = { spike: "loss spike", interruption: "interruption", configuration: "configuration changed", damaged: "damaged step" };
let playing = null, awaited = null;

const wide = () => byId("track").clientWidth || 600;
const ends = () => [run().steps[0].step, Math.max(run().steps.at(-1).step, ...(run().marks ?? []).map((mark) => mark.step))];
const across = (step) => { const [first,
  last] = ends().map(place); return SIDE + ((place(step) - first) / (last - first || 1)) * (wide() - 2 * SIDE); };

export function drawTimeline() {
  const of = run(), track = byId("track");
  track.querySelector("svg")?.remove();
  if (!of?.steps.length) return void (byId("where").textContent = "no step with weights yet");
  const drawn = svg("svg", { viewBox: `0 0 ${wide()} ${HEIGHT}`, width: wide(), height: HEIGHT, "font-size": 11, fill: "var(--faint)",
    "aria-hidden": "true" });
  drawn.append(svg("line", { x1: SIDE, x2: wide() - SIDE, y1: 18, y2: 18, stroke: "var(--line)", "stroke-width": 4, "stroke-linecap": "round" }));
  for (const entry of of.steps) drawn.append(svg("line", { x1: across(entry.step), x2: across(entry.step), y1: entry.evaluated ? 9 : 12, y2: 24,
    stroke: entry.replayed ? "var(--heat)" : "var(--faint)", "stroke-width": 1.5, "stroke-dasharray": entry.replayed ? "2 2" : "none" }));
  for (const mark of of.marks ?? []) drawn.append(svg("path", { d: `M${across(mark.step) - 4},0h8l-4,7z`, fill: "var(--heat)" },
    svg("title", {}, `${WORDS[mark.kind] ?? mark.kind} at step ${mark.step}: ${mark.note}`)));
  for (const step of stepTicks([ends()[0], of.steps.at(-1).step])) drawn.append(svg("text", { x: across(step), y: 41, "text-anchor": "middle" },
    tick(step)));
  drawn.append(svg("circle", { id: "knob", cy: 18, r: 8, fill: "var(--accent)", stroke: "var(--card)", "stroke-width": 2 }));
  track.append(drawn);
  showMarks();
  showPlace();
}

const tick = (step) => { const tokens = run().tokens_per_step; return state.by === "tokens" && tokens
  ? new Intl.NumberFormat("en", { notation: "compact" }).format(step * tokens) : whole(step); };

// The knob, and in words where it stands.
export function showPlace() {
  const entry = run() && stepOf(run(), state.step), track = byId("track");
  if (!entry) return;
  byId("knob")?.setAttribute("cx", across(entry.step));
  const tokens = tokensAt(run(), entry), kinds = [entry.replayed ? "made by replay" : "saved", entry.evaluated && "evaluated"].filter(Boolean);
  byId("where").replaceChildren(make("b", { textContent: `step ${whole(entry.step)}` }),
    make("span", { textContent: [tokens !== null && `${whole(tokens)} tokens`, ...kinds].filter(Boolean).join(" · ") }));
  const attributes = { "aria-valuemin": run().steps[0].step, "aria-valuemax": run().steps.at(-1).step, "aria-valuenow": entry.step,
    "aria-valuetext": byId("where").innerText.replace("\n", ", ") };
  for (const [key, value] of Object.entries(attributes)) track.setAttribute(key, value);
  byId("ordinal").textContent = `${run().steps.indexOf(entry) + 1} of ${run().steps.length}`;
}

function showMarks() {
  const marks = run().marks ?? [],
    list = marks.map((mark) => make("li", {}, make("b", { textContent: `step ${whole(mark.step)}` }), ` ${WORDS[mark.kind] ?? mark.kind}`,
    mark.note ? `: ${mark.note}` : ""));
  byId("marks").hidden = !marks.length;
  byId("marks").querySelector("summary").textContent = `${marks.length} ${marks.length === 1 ? "mark" : "marks"}`;
  byId("marks").querySelector("ul").replaceChildren(...list);
}

export function move(by) {
  const steps = run().steps, at = steps.findIndex((entry) => entry.step === state.step) + by;
  change({ step: steps[Math.min(steps.length - 1, Math.max(0, at))].step });
}

function keys(event) {
  const steps = run()?.steps.length ?? 0, ten = Math.max(1, Math.round(steps / 10));
  const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: ten, PageDown: -ten, Home: -steps, End: steps }[event.key];
  if (event.key === " ") play(!playing);
  else if (by !== undefined) move(by);
  else return;
  event.preventDefault();
}

function drag(event) {
  if (!run()?.steps.length || (event.type === "pointermove" && !event.buttons)) return;
  if (event.type === "pointerdown") byId("track").setPointerCapture(event.pointerId);
  const x = event.clientX - byId("track").getBoundingClientRect().left;
  change({ step: run().steps.reduce((best, { step }) => (Math.abs(across(step) - x) < Math.abs(across(best) - x) ? step : best),
    run().steps[0].step) });
}

// Goes from step to step, each shown before the next; from the beginning where it stands at the end.
export async function play(on, shown = playing?.shown) {
  byId("play").textContent = on ? "❚❚ Pause" : "▶ Play";
  byId("play").setAttribute("aria-pressed", on);
  const own = (playing = on ? { shown } : null);
  if (on && state.step === run().steps.at(-1).step) change({ step: run().steps[0].step });
  while (own && playing === own) {
    await Promise.all([own.shown?.(), new Promise((done) => setTimeout(done, PAUSE))]);
    if (playing !== own) return;
    if (state.step === run().steps.at(-1).step) return void play(false);
    move(1);
  }
}

export function startTimeline(shown) {
  const track = byId("track");
  track.onkeydown = keys;
  track.onpointerdown = track.onpointermove = drag;
  byId("play").onclick = () => play(!playing, shown);
  byId("back").onclick = () => move(-1);
  byId("next").onclick = () => move(1);
  byId("scales").replaceChildren(
    chooser("Axis", [["log", "log"], ["linear", "linear"]], state.scale, (scale) => change({ scale })),
    chooser("by", [["step", "step"], ["tokens", "tokens"]], state.by, (by) => change({ by })),
  );
  addEventListener("resize", drawTimeline);
  byId("replay").hidden = saved;
  byId("replay").querySelector("form").onsubmit = askReplay;
}

// A step that was not saved is made again; what that takes is said first.
async function askReplay(event) {
  event.preventDefault();
  const step = Number(event.target.elements.wanted.value), told = byId("replay").querySelector("output"), of = state.run;
  if (stepOf(run(), step)) return void change({ step });
  try {
    const cost = await look("replay", { run: of, step });
    const begin = make("button", { type: "button", textContent: "Make it", onclick: async () => {
      told.textContent = `Step ${step} is being made…`;
      await send("replay", { run: of, step }).catch((error) => (told.textContent = error.message));
    } });
    told.replaceChildren(`Step ${step} is ${cost.updates} updates after step ${cost.from}: about ${Math.max(1, Math.round(cost.seconds))} s. `,
      begin);
    begin.focus();
  } catch (error) {
    told.textContent = error.message;
  }
}

export function replayed(told) {
  const words = { running: `Step ${told.step}: ${told.done} of ${told.of} updates`, done: `Step ${told.step} is made.`, failed: told.error };
  byId("replay").querySelector("output").textContent = words[told.state] ?? "";
  if (told.state !== "done") return;
  awaited = { run: told.run, step: told.step };
  showAwaited();
}

// A step that was made again is gone to as soon as it is known, which may be a moment later.
function showAwaited() {
  if (awaited?.run !== state.run || !stepOf(run(), awaited.step)) return false;
  change({ step: awaited.step });
  awaited = null;
  return true;
}

// The steps of a run grew, or one was replaced. Returns the step that is shown if it was the newest one until now, else null.
export function addSteps(id, steps) {
  const of = session.runs.find((each) => each.id === id);
  const atEnd = id === state.run && state.step === (of.steps.at(-1)?.step ?? null);
  const known = new Map([...of.steps, ...steps].map((entry) => [entry.step, entry]));
  of.steps = [...known.values()].sort((a, b) => a.step - b.step);
  of.last_step = Math.max(of.last_step, of.steps.at(-1)?.step ?? 0);
  if (id !== state.run) return null;
  drawTimeline();
  return !showAwaited() && atEnd ? state.step : null;
}

export const stepAt = (of, by) => (by === "tokens" ? nearest(of, tokensAt(run(), stepOf(run(), state.step)) ?? state.step, "tokens")
  : nearest(of, state.step));
