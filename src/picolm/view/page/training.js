// How the training went, with the playhead on every curve; and the batch of the step as text.
import { category, fixed, make, whole } from "./dom.js";
import { run, runOf, state } from "./state.js";
import { ask, look, saved } from "./source.js";
import { curves } from "./plot.js";
import { scaleOf, strip, uniform } from "./text.js";

const FIRST = ["train/loss", "lr", "grad_norm", "tokens_per_s"]; // what is open at once
const ROWS = 4;
const LOGARITHMIC = /perplexity|noise_scale/;
const panel = make("div", { className: "training-panel" });
let told = null; // {run, answer}: asked again when a line is logged

export const trainingPanel = { key: "training", title: "Training", node: panel, show: showTraining };

export const stale = (id) => { if (told?.run === id) told = null; };

async function showTraining(signal) {
  if (run().can.training !== true) return panel.replaceChildren(make("p", { textContent: String(run().can.training) })), String(run().can.training);
  const answer = told?.run === state.run ? told.answer : await look("training", { run: state.run }, signal);
  told = { run: state.run, answer };
  const opened = new Set([...panel.querySelectorAll("details[open]")].map((node) => node.dataset.key));
  const first = answer.series.filter(({ name }) => FIRST.includes(name)), rest = answer.series.filter(({ name }) => !FIRST.includes(name));
  const parts = [["Training", first, true], ["More of the log", rest, false], ["Evaluations", answer.evaluations, answer.evaluations.length < 5]];
  const groups = parts.filter(([, series]) => series.length).map(([title, series, open]) =>
    group(title, series.map(single), open || opened.has(title)));
  groups.push(...answer.analyses.map((each) =>
    group(`${each.metric}, ${each.place}`,
    [() => curves({ title: each.metric, series: each.series.map((one, at) => ({ ...one, colour: category(at), faint: each.series.length > 12 })),
    name: `${run().name} ${each.metric}` })], answer.analyses.length < 4 || opened.has(`${each.metric}, ${each.place}`))));
  const batch = make("section", { className: "batch" });
  if (panel.dataset.run === String(state.run)) batch.append(...(panel.querySelector(".batch")?.childNodes ?? []));
  panel.dataset.run = state.run;
  panel.replaceChildren(...groups, batch);
  if (run().can.batch === true && !saved) await showBatch(batch, signal);
  return `training, playhead at step ${whole(state.step)}`;
}

function group(title, draws, open) {
  const grid = make("div", { className: "charts" }),
    node = make("details", { open, data: { key: title } }, make("summary", { textContent: `${title} (${draws.length})` }), grid);
  const fill = () => { if (node.open && !grid.childElementCount) grid.append(...draws.map((draw) => draw())); };
  node.ontoggle = fill;
  fill();
  return node;
}

const single = ({ name, unit, steps, values }) => () =>
  curves({ title: unit ? `${name}, ${unit}` : name, series: [{ label: name, steps, values, colour: category(0) }],
  y: { log: LOGARITHMIC.test(name) }, name: `${runOf(state.run).name} ${name}` });

async function showBatch(place, signal) {
  const answer = await ask("batch", { run: state.run, step: state.step, rows: ROWS }, signal);
  const most = uniform(run()), next = answer.after_step;
  const row = (each) => {
    const better = each.after === null ? []
      : [make("span", { textContent: ` · at step ${whole(next)}: ` }), make("b", { textContent: fixed(each.after) }),
      make("span", { textContent: ` nats (${each.after < each.before ? "" : "+"}${fixed(each.after - each.before)})` })];
    return make("article", { className: "row", data: { row: each.row, before: each.before, after: each.after ?? "" } },
      make("h4", { textContent: [`row ${whole(each.row)}`, each.source].filter(Boolean).join(" · ") }),
      make("p", { className: "losses" }, `at step ${whole(state.step)}: `, make("b", { textContent: fixed(each.before) }), " nats", ...better),
      strip(each.tokens, each.nats_before, most, { label: `Tokens of row ${each.row}` }));
  };
  const words = next === null ? "the newest step with weights, so what it did is not known yet"
    : `its losses with the weights of step ${whole(state.step)}, and of step ${whole(next)}, the next with weights`;
  place.replaceChildren(make("h3", { textContent: `The batch of step ${whole(state.step)}` }),
    make("p", { className: "lead", textContent: `The first ${answer.rows.length} rows that make update ${whole(state.step + 1)}; ${words}.` }),
    scaleOf("0", fixed(most, 2), "nats before, a uniform guess"), ...answer.rows.map(row));
}
