// What each head does with each position: attention, or how a state space layer mixes values (signed). All heads small, one large.
import { category, chooser, dark, fixed, make, quoted, roving, shade, svg, whole } from "./dom.js";
import { among, change, question, run, spread, state, stepNumbers } from "./state.js";
import { ask, askHeads, overSteps } from "./source.js";
import { curves, saver } from "./plot.js";
import { orderOf, scaleOf, strip } from "./text.js";

const SCORES = { previous: "previous token", first: "first token", induction: "induction" };
const CURVE_STEPS = 60, LABELLED = 64; // steps of the scores at most; tokens up to which the large pattern names them
const panel = make("div", { className: "heads-panel" });
let found, asked = null, controller, over = { key: "", lines: [] };

export const headsPanel = { key: "heads", title: "Heads", node: panel, show: showHeads, figure: headFigure };

export const whyNoHeads = (of) => (of.can.patterns === true || of.can.mixing === true ? null : `${of.can.patterns}`);

async function showHeads(signal) {
  if (whyNoHeads(run())) return panel.replaceChildren(make("p", { textContent: whyNoHeads(run()) })), whyNoHeads(run());
  const answer = await askHeads({ ...question(), step: state.step }, signal);
  const text = run().likelihood === "bound" ? await ask("text", { ...question(), step: state.step }, signal) : null;
  found = { ...answer, ordered: text?.order ? text : null };
  const { layer, head } = chosenHead(found), length = found.shape[2];
  asked = Math.min(state.token ?? length - 1, length - 1);
  const words = found.kind === "mixing"
    ? "Each small square is the matrix by which a head mixes the values of positions: rows are outputs, columns are inputs; entries are signed."
    : "Each small square is what one head reads: rows are positions that read, columns are positions that are read. Rows of the grid are layers, the first on top.";
  const large = make("div", { className: "large" }), reads = make("div", { className: "reads" });
  panel.replaceChildren(
    make("p", { className: "lead", textContent: words }),
    ...(found.ordered ? [orderStrip(found.ordered)] : []),
    make("div", { className: "two even" }, make("div", {}, grid(found, layer, head), reads), large), make("div", { className: "scores" }),
  );
  drawLarge(layer, head);
  follow(layer, head);
  return `layer ${layer}, head ${head} at step ${whole(state.step)}`;
}

function orderStrip(text) {
  const { values, most } = orderOf(text), title = "Order in which the model would reveal the tokens behind the first, most confident first";
  return make("div", { className: "order numbers" }, make("h4", { textContent: title }),
    strip(text.tokens, values, most, { digits: 0, label: "Order of reveal" }));
}

// The head that is looked at, or the last that there is.
const chosenHead = ({ shape: [layers, heads] }) => ({ layer: Math.min(state.layer, layers - 1), head: Math.min(state.head, heads - 1) });

function matrix(of, layer, head) {
  const [, heads, length] = of.shape, size = length * length, from = (layer * heads + head) * size;
  return of.values.subarray(from, from + size);
}

// The colour of an entry grows with its square root: of a share, or of the part of the largest entry with its sign.
const mostOf = (of, values) => (of.kind === "mixing" ? values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30) : 1);
const tone = (value, most) => Math.sign(value) * Math.sqrt(Math.abs(value) / most);

function painted(of, layer, head) {
  const length = of.shape[2], canvas = make("canvas", { width: length, height: length }), pen = canvas.getContext("2d"),
    picture = pen.createImageData(length, length), values = matrix(of, layer, head), most = mostOf(of, values), light = !dark();
  values.forEach((value, at) => picture.data.set([...shade(tone(value, most), light), 255], at * 4));
  pen.putImageData(picture, 0, 0);
  return canvas;
}

// All heads of an answer, small; the one of a layer and a head is marked.
export function grid(of, layer, head) {
  const [layers, heads] = of.shape;
  const node = make("div", { className: "heads-grid", role: "group", "aria-label": "All heads", "--columns": heads });
  for (let row = 0; row < layers; row++) for (let column = 0; column < heads; column++) {
    const chosen = row === layer && column === head;
    const button = make("button", { type: "button", className: "head", tabIndex: chosen ? 0 : -1, "aria-pressed": chosen,
      "aria-label": `layer ${row}, head ${column}`, title: `layer ${row}, head ${column}`, onclick: () => change({ layer: row, head: column }) },
      painted(of, row, column));
    node.append(button);
  }
  roving(node, () => heads);
  return node;
}

function drawLarge(layer, head) {
  const values = matrix(found, layer, head), length = found.shape[2], most = mostOf(found, values),
    readout = make("p", { className: "readout", "aria-live": "polite" });
  const drawn = drawHead(found, layer, head), box = make("div", { className: "plot" }, drawn);
  drawn.onpointermove = (event) => {
    const { left, width } = drawn.getBoundingClientRect(), scale = drawn.viewBox.baseVal.width / width, { top } = drawn.getBoundingClientRect();
    const key = Math.floor(((event.clientX - left) * scale - drawn.from.x) / drawn.from.cell),
      query = Math.floor(((event.clientY - top) * scale - drawn.from.y) / drawn.from.cell);
    if (query < 0 || key < 0 || query >= length || key >= length) return;
    readout.textContent = `${quoted(found.tokens[query])} (${query + 1}) from ${quoted(found.tokens[key])} (${key + 1}): ${fixed(values[query * length + key], 4)}`;
    if (query !== asked) readOf(query, values, most);
  };
  panel.querySelector(".large").replaceChildren(make("div", { className: "line" }, make("h3", { textContent: `Layer ${layer}, head ${head}` }),
    make("span", { className: "end" }, saver(headFigure, `${run().name} step ${state.step} layer ${layer} head ${head}`))), box,
    legendOf(found, most), readout);
  readOf(asked, values, most);
}

function legendOf(of, most) {
  const node = of.kind === "mixing" ? scaleOf(fixed(-most, 3), fixed(most, 3), "entry of the matrix; the colour grows with the square root of its size", true)
    : scaleOf("0", "1", "share of attention; the colour grows with its square root", false);
  node.classList.add("ramp");
  return node;
}

function readOf(query, values, most) {
  asked = query;
  const place = panel.querySelector(".reads"), focused = place.contains(document.activeElement);
  place.replaceChildren(...readsOf(found, values, most, query, (at) => { if (at !== asked) { change({ token: at }); readOf(at, values, most); } }));
  if (focused) place.querySelector(".tokens").children[query].focus({ preventScroll: true });
}

// The text, coloured by what a head reads for one of its tokens.
function readsOf(of, values, most, query, choose) {
  const length = of.shape[2], row = Array.from(values.subarray(query * length, (query + 1) * length));
  const node = strip(of.tokens, row, -most, { chosen: query, digits: 3, choose, label: "What the head reads" });
  const best = row.reduce((top, value, at) => (Math.abs(value) > Math.abs(row[top]) ? at : top), 0);
  node.querySelectorAll("span").forEach((span) =>
    span.style.setProperty("--h", `${(100 * Math.min(1, Math.abs(tone(row[span.dataset.at], most)))).toFixed(1)}%`));
  return [make("h4",
    { textContent: `At ${quoted(of.tokens[query])} (token ${query + 1}) it reads most from ${quoted(of.tokens[best])} (token ${best + 1}): ${fixed(row[best], 3)}` }), node];
}

export function headFigure() {
  const { layer, head } = chosenHead(found);
  return drawHead(found, layer, head, `${run().name}, step ${whole(state.step)}, layer ${layer}, head ${head}`);
}

// One head of an answer, large, with the tokens beside it where they are few.
function drawHead(of, layer, head, title = null) {
  const length = of.shape[2], named = length <= LABELLED, from = { x: named ? 92 : 12, y: (named ? 92 : 12) + (title ? 24 : 0) };
  const cell = Math.max(2, Math.min(30, 420 / length)), wide = from.x + length * cell + 12, high = from.y + length * cell + 12;
  const drawn = svg("svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "font-size": Math.min(12, Math.max(7, cell)),
    fill: "var(--faint)", role: "img", "aria-label": `Pattern of layer ${layer}, head ${head}` });
  drawn.from = { ...from, cell };
  drawn.append(svg("rect", { x: from.x - 0.5, y: from.y - 0.5, width: length * cell + 1, height: length * cell + 1, fill: "none",
    stroke: "var(--line)" }), svg("image", { href: painted(of, layer, head).toDataURL(), x: from.x, y: from.y, width: length * cell,
    height: length * cell, "image-rendering": "pixelated", preserveAspectRatio: "none" }));
  if (title) drawn.append(svg("text", { x: 12, y: 18, "font-size": 13, fill: "var(--ink)" }, title));
  if (named) of.tokens.forEach((token, at) => {
    const word = token.replaceAll("\n", "↵").trim().slice(0, 12), middle = (at + 0.5) * cell;
    drawn.append(svg("text", { x: from.x - 6, y: from.y + middle + 3, "text-anchor": "end" }, word),
      svg("text", { transform: `translate(${from.x + middle + 3},${from.y - 6}) rotate(-90)` }, word));
  });
  return drawn;
}

// What a side of a comparison shows of an answer: all heads, the chosen one or the last that there is, and what it reads at the token.
export function headsBeside(of) {
  const { layer, head } = chosenHead(of), length = of.shape[2];
  const values = matrix(of, layer, head), most = mostOf(of, values);
  return [grid(of, layer, head), make("h4", { textContent: `Layer ${layer}, head ${head}` }),
    make("div", { className: "large" }, drawHead(of, layer, head)), legendOf(of, most),
    make("div", { className: "reads" }, ...readsOf(of, values, most, Math.min(state.token ?? length - 1, length - 1)))];
}

// Scores of every head over training; those of the chosen one are strong.
function follow(layer, head) {
  const key = JSON.stringify(question()), steps = spread(stepNumbers(), CURVE_STEPS);
  if (key !== over.key) over = { key, lines: [] };
  controller?.abort();
  const { signal } = (controller = new AbortController());
  let waiting = 0;
  const draw = () => { waiting = 0; if (!signal.aborted) drawScores(layer, head); };
  const each = (lines) => { over.lines = [...lines.values()]; waiting ||= requestAnimationFrame(draw); };
  panel.dataset.history = "";
  overSteps("head-scores", question(), steps, signal, each).then(() => (panel.dataset.history = steps.length),
    (error) => { if (error.name !== "AbortError") panel.querySelector(".scores")?.append(make("p",
    { className: "faint", textContent: error.message })); });
}

export const stopScoring = () => controller?.abort();

function drawScores(layer, head) {
  const lines = over.lines.filter((line) => line[state.score]), place = panel.querySelector(".scores"), [layers, heads] = found.shape;
  const tools = make("div", { className: "controls" }, chooser("Score over training", Object.entries(SCORES), state.score,
    (score) => change({ score })));
  if (!over.lines.length) return;
  if (!lines.length) return void place.replaceChildren(tools,
    make("p", { className: "faint", textContent: "This text repeats no token, so there is nothing to be induced; type one that does." }));
  const steps = lines.map((line) => line.step), series = [];
  for (let row = 0; row < layers; row++) for (let column = 0; column < heads; column++) {
    const own = row === layer && column === head;
    series.push({ label: `layer ${row}, head ${column}`, steps, values: lines.map((line) => line[state.score][row][column]),
      colour: own ? "var(--heat)" : category(row), faint: !own });
  }
  const now = lines.find((line) => line.step === state.step)?.[state.score][layer][head];
  const told = make("p", { className: "readout", data: { value: now ?? "" }, textContent: now === undefined ? ""
    : `layer ${layer}, head ${head} at step ${whole(state.step)}: ${fixed(now, 4)}` });
  const unit = found.kind === "mixing" ? "mean entry of the matrix" : "mean share of attention";
  place.replaceChildren(tools, told,
    curves({ title: `${SCORES[state.score]}, ${unit}${among(lines)}`, series, ends: [run().steps[0].step, run().steps.at(-1).step], height: 220,
    name: `${run().name} ${SCORES[state.score]}` }));
}
