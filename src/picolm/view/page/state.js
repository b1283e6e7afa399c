// What is looked at. It is written into the fragment of the address, which so is a link to all of it.
import { whole } from "./dom.js";
import { look, savedState } from "./source.js";

export const DEFAULT_TEXT = "The people of the United States of America, and the government of the people.";
const START = { run: 0, step: null, text: null, row: null, panel: "text", token: null, layer: 0, head: 0, scale: "log", by: "step", colour: "loss",
  from: null, other: null, score: "previous", lens: "likeliest", numbers: false, sides: null, beside: "text" };
const NUMBERS = new Set(["run", "step", "token", "layer", "head", "from", "other"]);
export const state = { ...START };
export const session = { runs: [] };
const listeners = [], ADDRESS_EACH = 200; // milliseconds
let writing = null;

export const onChange = (listener) => listeners.push(listener);

export function change(parts) {
  const changed = Object.keys(parts).filter((key) => JSON.stringify(state[key]) !== JSON.stringify(parts[key]));
  if (!changed.length) return;
  Object.assign(state, parts);
  write();
  listeners.forEach((listener) => listener(changed));
}

// Browsers refuse an address that changes too often; the frame of a notebook has none that could be changed.
function write() {
  writing ??= setTimeout(flush, ADDRESS_EACH);
}

export function flush() {
  clearTimeout(writing);
  writing = null;
  if (location.protocol !== "about:") history.replaceState(null, "", `#${fragment()}`);
}

export function fragment() {
  const parts = new URLSearchParams();
  for (const [key, value] of Object.entries(state)) {
    if (value === null || (value === START[key] && key !== "run" && key !== "panel")) continue;
    parts.set(key, key === "row" ? `${value.split}:${value.step}:${value.index}` : String(value));
  }
  return parts.toString();
}

function parsed(words) {
  const found = { ...START };
  for (const [key, value] of new URLSearchParams(words)) {
    if (NUMBERS.has(key) && /^\d{1,12}$/.test(value)) found[key] = Number(value);
    else if (key === "numbers") found.numbers = value === "true";
    else if (key === "row" && /^(train|val):\d+:\d+$/.test(value)) {
      const [split, step, index] = value.split(":");
      found.row = { split, step: Number(step), index: Number(index) };
    } else if (key in START && !NUMBERS.has(key) && key !== "row") found[key] = value;
  }
  return found;
}

export async function open() {
  const found = await look("session");
  Object.assign(session, found);
  restore(location.hash.slice(1) || savedState);
}

export function restore(words) {
  Object.assign(state, parsed(words));
  if (!run()) state.run = session.runs[0]?.id ?? 0;
  if (run() && !stepOf(run(), state.step)) state.step = state.step === null ? run().steps.at(-1)?.step ?? null : nearest(run(), state.step).step;
  if (state.text === null && state.row === null && run()) {
    const { val, train } = run().rows;
    if (run().can.text === true) state.text = DEFAULT_TEXT;
    else if (val.rows) state.row = { split: "val", step: val.steps[0], index: 0 };
    else if (train.rows) state.row = { split: "train", step: train.steps[0], index: 0 };
  }
}

export const runOf = (id) => session.runs.find((each) => each.id === id);
export const run = () => runOf(state.run);
export const stepOf = (of, step) => of.steps.find((each) => each.step === step);
export const tokensAt = (of, entry) => entry.tokens ?? (of.tokens_per_step ? entry.step * of.tokens_per_step : null);

// The text or row that is asked about, with the run: the beginning of every question.
export const question = (id = state.run) => ({ run: id, ...(state.row ? { row: state.row } : { text: state.text ?? "" }) });

// The step of a run that is nearest to a number of steps, or of tokens.
export function nearest(of, wanted, by = "step") {
  const size = (entry) => (by === "tokens" ? tokensAt(of, entry) ?? entry.step : entry.step);
  return of.steps.reduce((best, entry) => (Math.abs(size(entry) - wanted) < Math.abs(size(best) - wanted) ? entry : best), of.steps[0]);
}

// Where a step stands on an axis: the logarithm is that of step + 1, so that step 0 has a place.
export const place = (step) => (state.scale === "log" ? Math.log10(step + 1) : step);

// At most `count` of the steps, at equal distances on the axis, first and last among them: enough for a curve.
export function spread(steps, count) {
  if (steps.length <= count) return steps;
  const low = place(steps[0]), high = place(steps.at(-1)), chosen = new Set([steps[0], steps.at(-1)]);
  let at = 0;
  for (let number = 1; number < count - 1; number++) {
    const wanted = low + ((high - low) * number) / (count - 1);
    while (at + 1 < steps.length && Math.abs(place(steps[at + 1]) - wanted) <= Math.abs(place(steps[at]) - wanted)) at++;
    chosen.add(steps[at]);
  }
  return [...chosen].sort((a, b) => a - b);
}

// What a title says of a curve that leaves steps out.
export const among = (steps, of = run()) => (steps.length < of.steps.length ? `, at ${whole(steps.length)} of ${whole(of.steps.length)} steps` : "");

export const stepNumbers = (of = run()) => of.steps.map((entry) => entry.step);
