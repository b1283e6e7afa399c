// The page: which run, text and panel; and that what is shown is always the newest question's answer.
import { byId, dark, make, whole } from "./dom.js";
import { change, flush, onChange, open, restore, run, session, state, stepOf } from "./state.js";
import { Refused, holds, saved } from "./source.js";
import { drawTimeline, play, showPlace, startTimeline } from "./timeline.js";
import { stopFollowing, textPanel } from "./text.js";
import { headsPanel, stopScoring } from "./heads.js";
import { layersPanel } from "./layers.js";
import { trainingPanel } from "./training.js";
import { comparePanel, stopComparing } from "./compare.js";
import { describeLive, followLive } from "./live.js";
import { drawnBy, savePanel } from "./save.js";

const TYPING = 450; // milliseconds after the last letter
const PANELS = [textPanel, headsPanel, layersPanel, trainingPanel, comparePanel, savePanel].filter(({ key }) => key === "save" || holds(key));
const STOPS = { text: stopFollowing, heads: stopScoring, compare: stopComparing };
let controller = null, showing = Promise.resolve(), typing;

const current = () => PANELS.find(({ key }) => key === state.panel) ?? PANELS[0];

function refresh() {
  controller?.abort();
  controller = new AbortController();
  document.body.dataset.busy = "true";
  return (showing = show(controller.signal));
}

async function show(signal) {
  const panel = current();
  try {
    if (!run()) throw new Refused("no run is open");
    if (!stepOf(run(), state.step)) throw new Refused(run().steps.length ? `step ${state.step} is not there`
      : "this run has no step with weights yet; the page goes on by itself when there is one");
    const needsText = !["training", "save"].includes(panel.key);
    if (needsText && !state.row && run().can.text !== true) throw new Refused(`${run().can.text}: choose a row instead of a text`);
    const focused = document.activeElement, words = await panel.show(signal);
    if (signal.aborted) return;
    if (!focused.isConnected) refocus(panel.node, focused);
    trouble("");
    byId("status").textContent = words ?? "";
  } catch (error) {
    if (signal.aborted || error.name === "AbortError") return;
    trouble(error instanceof Refused ? error.message : `The page cannot show this: ${error.message}`);
    if (!(error instanceof Refused)) console.error(error);
  }
  flush();
  document.body.dataset.busy = "false";
  document.body.dataset.shown = `${state.run}:${state.step}:${panel.key}`;
}

// What had the focus was drawn anew: its successor says the same of itself.
function refocus(node, old) {
  const name = (each) => each.dataset.at ?? (each.ariaLabel || each.textContent);
  const group = (each) => each.className.replace(/ ?(cold|chosen)/g, "");
  [...node.querySelectorAll(old.tagName)].find((each) => name(each) === name(old) && group(each) === group(old))?.focus({ preventScroll: true });
}

function trouble(words) {
  byId("trouble").textContent = words;
  byId("trouble").hidden = !words;
  current().node.classList.toggle("outdated", !!words);
}

const settled = async () => { await Promise.resolve(); let last; do { last = showing; await last; } while (last !== showing); };

function follow(changed) {
  if (changed.includes("run")) describeRun();
  if (changed.some((key) => ["run", "scale", "by"].includes(key))) drawTimeline();
  if (changed.includes("step")) showPlace();
  if (changed.includes("panel")) choosePanel();
  if (changed.includes("run") || changed.includes("row") || changed.includes("text")) showQuestion();
  if (changed.some((key) => key !== "token")) refresh();
}

function choosePanel() {
  for (const panel of PANELS) {
    panel.node.hidden = panel !== current();
    panel.tab.setAttribute("aria-selected", panel === current());
    panel.tab.tabIndex = panel === current() ? 0 : -1;
    if (panel !== current()) STOPS[panel.key]?.();
  }
  byId("tabs").scrollLeft = current().tab.offsetLeft - 60;
}

function startPanels() {
  for (const panel of PANELS) {
    panel.tab = make("button", { type: "button", role: "tab", id: `tab-${panel.key}`, "aria-controls": `panel-${panel.key}`,
      textContent: panel.title, onclick: () => change({ panel: panel.key }) });
    Object.assign(panel.node, { id: `panel-${panel.key}`, role: "tabpanel" });
    panel.node.setAttribute("aria-labelledby", panel.tab.id);
    byId("tabs").append(panel.tab);
    byId("panels").append(panel.node);
  }
  byId("tabs").onkeydown = (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    const next = PANELS[(PANELS.indexOf(current()) + by + PANELS.length) % PANELS.length];
    change({ panel: next.key });
    next.tab.focus();
  };
}

function describeRun() {
  const of = run();
  document.title = `${of?.name ?? "no run"} · Pico microscope`;
  byId("name").textContent = of?.name ?? "no run";
  const select = byId("runs");
  select.parentElement.hidden = session.runs.length < 2;
  select.replaceChildren(...session.runs.map(({ id, name }) => make("option", { value: id, textContent: name, selected: id === state.run })));
  const size = of && [of.kind, of.parameters && `${whole(of.parameters)} parameters`, of.layers && `${of.layers} layers`,
    of.heads && `${of.heads} heads`, of.context && `context ${whole(of.context)}`];
  byId("about").textContent = size ? size.filter(Boolean).join(" · ") : "";
  byId("notes").replaceChildren(...(of?.notes ?? []).map((note) => make("li", { textContent: note })));
  describeLive();
}

// The text, or the row, that is asked about.
function showQuestion() {
  const of = run(), kind = byId("kind"), text = byId("text");
  if (!of) return;
  const has = { text: of.can.text === true, train: of.rows.train.rows > 0, val: of.rows.val.rows > 0 };
  for (const option of kind.options) option.disabled = !has[option.value];
  kind.value = state.row?.split ?? "text";
  byId("row-choice").hidden = !state.row;
  text.hidden = !!state.row;
  if (document.activeElement !== text) text.value = state.text ?? "";
  text.readOnly = saved;
  kind.disabled = byId("row-step").disabled = byId("row-index").disabled = saved;
  if (!state.row) return;
  const { steps, rows } = of.rows[state.row.split];
  byId("row-step").replaceChildren(...steps.map((step) =>
    make("option", { value: step, textContent: whole(step), selected: step === state.row.step })));
  Object.assign(byId("row-index"), { max: rows, value: state.row.index + 1 });
  byId("row-of").textContent = `of ${whole(rows)}${state.row.split === "train" ? `, read in update ${whole(state.row.step + 1)}` : ", the same at every step"}`;
}

function startQuestion() {
  byId("kind").onchange = ({ target }) => {
    if (target.value === "text") return change({ row: null, text: state.text ?? "", token: null });
    const { steps } = run().rows[target.value], step = steps.includes(state.step) ? state.step : steps[0];
    change({ row: { split: target.value, step, index: 0 }, token: null });
  };
  byId("text").oninput = ({ target }) => { clearTimeout(typing); typing = setTimeout(() => change({ text: target.value, token: null }), TYPING); };
  byId("row-step").onchange = byId("row-index").onchange = () => {
    const index = Math.min(Math.max(1, Number(byId("row-index").value) || 1), run().rows[state.row.split].rows) - 1;
    change({ row: { ...state.row, step: Number(byId("row-step").value), index }, token: null });
  };
  byId("runs").onchange = ({ target }) => {
    const id = Number(target.value), of = session.runs.find((each) => each.id === id);
    const step = of.steps.reduce((best, entry) => (best === null || Math.abs(entry.step - state.step) < Math.abs(best - state.step) ? entry.step
      : best), null);
    const lacks = state.row ? !of.rows[state.row.split].steps.includes(state.row.step) : of.can.text !== true;
    change({ run: id, step, layer: 0, head: 0, token: null, ...(lacks && of.can.text === true ? { row: null, text: state.text ?? "" } : {}) });
  };
}

function setTheme(name, again = true) {
  document.documentElement.dataset.theme = name;
  byId("theme").textContent = dark() ? "Light" : "Dark";
  if (again) refresh();
}

async function start() {
  const wanted = matchMedia("(prefers-color-scheme: dark)");
  setTheme(wanted.matches ? "dark" : "light", false);
  wanted.onchange = () => setTheme(wanted.matches ? "dark" : "light");
  byId("theme").onclick = () => setTheme(dark() ? "light" : "dark");
  startPanels();
  drawnBy(PANELS, settled);
  await open();
  startTimeline(settled);
  startQuestion();
  describeRun();
  drawTimeline();
  choosePanel();
  showQuestion();
  onChange(follow);
  addEventListener("hashchange",
    () => { restore(location.hash.slice(1)); play(false); describeRun(); drawTimeline(); choosePanel(); showQuestion(); refresh(); });
  followLive(refresh, settled);
  await refresh();
}

start().catch((error) => {
  trouble(`The page cannot start: ${error.message}`);
  throw error;
});
