// Two or more runs or steps, side by side on the same text; those that follow go with the one slider.
import { category, chooser, fixed, make, whole } from "./dom.js";
import { among, change, question, run, runOf, session, spread, state, stepNumbers, stepOf, tokensAt } from "./state.js";
import { ask, askHeads, overSteps } from "./source.js";
import { stepAt } from "./timeline.js";
import { curves } from "./plot.js";
import { headsBeside, whyNoHeads } from "./heads.js";
import { chooserOfLens, layersBeside } from "./layers.js";
import { scaleOf, strip, uniform } from "./text.js";

const CURVE_STEPS = 60;
const VIEWS = { text: "text", heads: "heads", layers: "layers" };
const panel = make("div", { className: "compare-panel" });
let controller, curvesOf = new Map();

export const comparePanel = { key: "compare", title: "Compare", node: panel, show: showCompare };

// Written in the address as run:step, run:f for one that follows the slider.
function sides() {
  const given = (state.sides ?? "").split(",").map((word) => word.match(/^(\d+):(f|\d+)$/)).filter((match) => match && runOf(Number(match[1])));
  if (given.length) return given.map(([, id, step]) => ({ id: Number(id), step: step === "f" ? null : Number(step) }));
  const others = session.runs.filter(({ id }) => id !== state.run);
  return [{ id: state.run, step: null },
    ...(others.length ? others.map(({ id }) => ({ id, step: null })) : [{ id: state.run, step: run().steps[0].step }])];
}

const store = (list) => change({ sides: list.map(({ id, step }) => `${id}:${step ?? "f"}`).join(",") });

async function showCompare(signal) {
  const list = sides(), places = list.map(({ id, step }) => (stepOf(runOf(id), step) ?? stepAt(runOf(id), state.by)).step);
  const answers = [], view = state.beside in VIEWS ? state.beside : "text";
  for (const [at, { id }] of list.entries()) answers.push(await answerOf(view, id, places[at], signal));
  const add = make("button", { type: "button", textContent: "Add a side",
    onclick: () => store([...list, { id: state.run, step: run().steps[0].step }]) });
  const cards = make("div", { className: "sides" }, ...list.map((side, at) => card(list, side, at, places[at], answers[at])));
  panel.replaceChildren(make("p",
    { className: "lead", textContent: `The same text, to every side. A side that follows shows the step nearest to the slider, by ${state.by}.` }),
    make("div", { className: "controls" }, chooser("Compare", Object.entries(VIEWS), view, (beside) => change({ beside })),
      view === "layers" ? chooserOfLens() : null),
    cards, make("div", { className: "controls" }, add), make("div", { className: "together" }));
  follow(list);
  return list.map(({ id }, at) => `${runOf(id).name} at step ${whole(places[at])}: ${fixed(answers[at].mean_nats)} nats`).join("; ");
}

// What a side shows: its text, and the heads or layers where they are asked for; `error` says why one of them cannot be had.
async function answerOf(view, id, step, signal) {
  const asked = { ...question(id), step }, of = runOf(id), why = { heads: whyNoHeads(of), layers: of.can.lens === true ? null : of.can.lens }[view];
  const seen = {};
  try {
    Object.assign(seen, await ask("text", asked, signal));
    if (why) return { ...seen, error: String(why) };
    if (view === "heads") seen.body = headsBeside(await askHeads(asked, signal));
    if (view === "layers") seen.body = layersBeside(await ask("layers", asked, signal), of);
    return seen;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    return { ...seen, error: error.message };
  }
}

function card(list, side, at, step, answer) {
  const of = runOf(side.id), replace = (next) => store(list.map((each, other) => (other === at ? next : each)));
  const runs = make("select", { "aria-label": `Run of side ${at + 1}`, onchange: () => replace({ id: Number(runs.value), step: null }) },
    ...session.runs.map(({ id, name }) => make("option", { value: id, textContent: name, selected: id === side.id })));
  const steps = make("select", { "aria-label": `Step of side ${at + 1}`,
    onchange: () => replace({ id: side.id, step: steps.value === "f" ? null : Number(steps.value) }) },
    make("option", { value: "f", textContent: "follows the slider", selected: side.step === null }),
      ...of.steps.map((entry) => make("option",
      { value: entry.step, textContent: `step ${whole(entry.step)}`, selected: entry.step === side.step })));
  const gone = make("button", { type: "button", textContent: "Remove", disabled: list.length < 2,
    onclick: () => store(list.filter((_, other) => other !== at)) });
  const tokens = tokensAt(of, stepOf(of, step)), where = `step ${whole(step)}${tokens === null ? "" : ` · ${whole(tokens)} tokens`}`;
  const loss = answer.tokens ? [make("div", { className: "facts-line" }, make("b", { textContent: `${fixed(answer.mean_nats)} nats` }),
    make("span", { textContent: "per token" }))] : [];
  const body = answer.error ? [make("p", { className: "notice", textContent: answer.error })] : answer.body ?? [
    strip(answer.tokens, answer.nats, uniform(of), { label: `Tokens of side ${at + 1}` }), scaleOf("0", fixed(uniform(of), 2), "nats, a uniform guess")];
  const order = of.likelihood === "bound" ? [make("span", { className: "tag", textContent: "exact, from left to right" })] : [];
  return make("article", { className: "side", data: { run: side.id, step, mean: answer.mean_nats ?? "" }, "--swatch": category(at) },
    make("div", { className: "controls" }, runs, steps, gone), make("p", { className: "faint" }, where, " ", ...order), ...loss, ...body);
}

async function follow(list) {
  controller?.abort();
  const { signal } = (controller = new AbortController()), ids = [...new Set(list.map(({ id }) => id))];
  curvesOf = new Map();
  panel.dataset.history = "";
  try {
    for (const id of ids) await overSteps("history", question(id), spread(stepNumbers(runOf(id)), CURVE_STEPS), signal,
      (found) => { curvesOf.set(id, [...found.values()]); if (!signal.aborted) drawTogether(list, ids); });
    panel.dataset.history = ids.length;
  } catch (error) {
    if (error.name !== "AbortError") panel.querySelector(".together")?.append(make("p", { className: "faint", textContent: error.message }));
  }
}

export const stopComparing = () => controller?.abort();

function drawTogether(list, ids) {
  const size = (of, step) => (state.by === "tokens" ? tokensAt(of, stepOf(of, step)) ?? step : step);
  const one = (id) => {
    const of = runOf(id), lines = curvesOf.get(id) ?? [];
    return { label: `${of.name}${among(lines, of)}`, colour: category(list.findIndex((side) => side.id === id)),
      steps: lines.map((line) => size(of, line.step)), values: lines.map((line) => line.mean_nats) };
  };
  panel.querySelector(".together")?.replaceChildren(curves({ title: `Loss of this text by ${state.by}, nats per token`, series: ids.map(one),
    height: 230, by: state.by, playhead: size(run(), state.step) }));
}
