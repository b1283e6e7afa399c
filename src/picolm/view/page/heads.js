// What each head does with each position: attention, or how a state space layer mixes values (signed). All heads small, one large.
import { category, chooser, dark, fixed, make, quoted, roving, shade, svg, whole } from "./dom.js";
import { change, question, run, spread, state, stepNumbers } from "./state.js";
import { ask, askHeads, overSteps } from "./source.js";
import { curves, saver } from "./plot.js";
import { orderOf, scaleOf, strip } from "./text.js";

const SCORES = { previous: "previous token", first: "first token", induction: "induction" };
const CURVE_STEPS = 60, LABELLED = 64; // steps of the scores at most; tokens up to which the large pattern names them
const panel = make("div", { className: "heads-panel" });
let found, asked = null, controller, over = { key: "", lines: [] };

export const headsPanel = { key: "heads", title: "Heads", node: panel, show: showHeads, figure: () => headFigure() };

export const whyNoHeads = (of) => (of.can.patterns === true || of.can.mixing === true ? null : `${of.can.patterns}`);

async function showHeads(signal) {
  if (whyNoHeads(run())) return panel.replaceChildren(make("p", { textContent: whyNoHeads(run()) })), whyNoHeads(run());
  const answer = await askHeads({ ...question(), step: state.step }, signal);
  const text = run().likelihood === "bound" ? await ask("text", { ...question(), step: state.step }, signal) : null;
  found = { ...answer, ordered: text?.order ? text : null };
  const [layers, heads, length] = found.shape, layer = Math.min(state.layer, layers - 1), head = Math.min(state.head, heads - 1);
  asked = Math.min(state.token ?? length - 1, length - 1);
  const words = found.kind === "mixing"
    ? "Each small square is the matrix by which a head mixes the values of positions: rows are outputs, columns are inputs; entries are signed."
    : "Each small square is what one head reads: rows are positions that read, columns are positions that are read. Rows of the grid are layers, the first on top.";
  const large = make("div", { className: "large" }), reads = make("div", { className: "reads" });
  panel.replaceChildren(
    make("p", { className: "lead", textContent: words }),
    ...(found.ordered ? [orderStrip(found.ordered)] : []),
    make("div", { className: "two even" }, make("div", {}, grid(layers, heads, layer, head), reads), large), make("div", { className: "scores" }),
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

function matrix(layer, head) {
  const [, heads, length] = found.shape, size = length * length, from = (layer * heads + head) * size;
  return found.values.subarray(from, from + size);
}

// The colour of an entry grows with its square root: of a share, or of the part of the largest entry with its sign.
const mostOf = (values) => (found.kind === "mixing" ? values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30) : 1);
const tone = (value, most) => Math.sign(value) * Math.sqrt(Math.abs(value) / most);

function painted(values, length, light) {
  const canvas = make("canvas", { width: length, height: length }), pen = canvas.getContext("2d"), picture = pen.createImageData(length, length),
    most = mostOf(values);
  values.forEach((value, at) => picture.data.set([...shade(tone(value, most), light), 255], at * 4));
  pen.putImageData(picture, 0, 0);
  return canvas;
}

function grid(layers, heads, layer, head) {
  const node = make("div", { className: "heads-grid", role: "group", "aria-label": "All heads", "--columns": heads });
  for (let row = 0; row < layers; row++) for (let column = 0; column < heads; column++) {
    const chosen = row === layer && column === head;
    const button = make("button", { type: "button", className: "head", tabIndex: chosen ? 0 : -1, "aria-pressed": chosen,
      "aria-label": `layer ${row}, head ${column}`, title: `layer ${row}, head ${column}`, onclick: () => change({ layer: row, head: column }) },
      painted(matrix(row, column), found.shape[2], !dark()));
    node.append(button);
  }
  roving(node, () => heads);
  return node;
}

function drawLarge(layer, head) {
  const values = matrix(layer, head), length = found.shape[2], most = mostOf(values),
    readout = make("p", { className: "readout", "aria-live": "polite" });
  const drawn = headFigure(layer, head, false), box = make("div", { className: "plot" }, drawn);
  drawn.onpointermove = (event) => {
    const { left, width } = drawn.getBoundingClientRect(), scale = drawn.viewBox.baseVal.width / width, { top } = drawn.getBoundingClientRect();
    const key = Math.floor(((event.clientX - left) * scale - drawn.from.x) / drawn.from.cell),
      query = Math.floor(((event.clientY - top) * scale - drawn.from.y) / drawn.from.cell);
    if (query < 0 || key < 0 || query >= length || key >= length) return;
    readout.textContent = `${quoted(found.tokens[query])} (${query + 1}) from ${quoted(found.tokens[key])} (${key + 1}): ${fixed(values[query * length + key], 4)}`;
    if (query !== asked) readOf(query, values, most);
  };
  const legend = found.kind === "mixing" ? scaleOf(fixed(-most, 3), fixed(most, 3), "entry of the matrix; the colour grows with the square root of its size", true)
    : scaleOf("0", "1", "share of attention; the colour grows with its square root", false);
  legend.classList.add("ramp");
  panel.querySelector(".large").replaceChildren(make("div", { className: "line" }, make("h3", { textContent: `Layer ${layer}, head ${head}` }),
    make("span", { className: "end" }, saver(() => headFigure(layer, head), `${run().name} step ${state.step} layer ${layer} head ${head}`))), box,
    legend, readout);
  readOf(asked, values, most);
}

// The text, coloured by what the head reads for one of its tokens.
function readOf(query, values, most) {
  asked = query;
  const length = found.shape[2], row = Array.from(values.subarray(query * length, (query + 1) * length));
  const place = panel.querySelector(".reads"), focused = place.contains(document.activeElement);
  const node = strip(found.tokens, row, -most,
    { chosen: query, digits: 3, choose: (at) => { if (at !== asked) { change({ token: at }); readOf(at, values, most); } },
    label: "What the head reads" });
  const best = row.reduce((top, value, at) => (Math.abs(value) > Math.abs(row[top]) ? at : top), 0);
  node.querySelectorAll("span").forEach((span) =>
    span.style.setProperty("--h", `${(100 * Math.min(1, Math.abs(tone(row[span.dataset.at], most)))).toFixed(1)}%`));
  place.replaceChildren(make("h4",
    { textContent: `At ${quoted(found.tokens[query])} (token ${query + 1}) it reads most from ${quoted(found.tokens[best])} (token ${best + 1}): ${fixed(row[best], 3)}` }), node);
  if (focused) node.children[query].focus({ preventScroll: true });
}

export function headFigure(layer = Math.min(state.layer, found.shape[0] - 1), head = Math.min(state.head, found.shape[1] - 1), titled = true) {
  const length = found.shape[2], named = length <= LABELLED, from = { x: named ? 92 : 12, y: (named ? 92 : 12) + (titled ? 24 : 0) };
  const cell = Math.max(2, Math.min(30, 420 / length)), wide = from.x + length * cell + 12, high = from.y + length * cell + 12;
  const picture = painted(matrix(layer, head), length, !dark()).toDataURL();
  const drawn = svg("svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, "font-size": Math.min(12, Math.max(7, cell)),
    fill: "var(--faint)", role: "img", "aria-label": `Pattern of layer ${layer}, head ${head}` });
  drawn.from = { ...from, cell };
  drawn.append(svg("rect", { x: from.x - 0.5, y: from.y - 0.5, width: length * cell + 1, height: length * cell + 1, fill: "none",
    stroke: "var(--line)" }), svg("image", { href: picture, x: from.x, y: from.y, width: length * cell, height: length * cell,
    "image-rendering": "pixelated", preserveAspectRatio: "none" }));
  if (titled) drawn.append(svg("text", { x: 12, y: 18, "font-size": 13, fill: "var(--ink)" },
    `${run().name}, step ${whole(state.step)}, layer ${layer}, head ${head}`));
  if (named) found.tokens.forEach((token, at) => {
    const word = token.replaceAll("\n", "↵").trim().slice(0, 12), middle = (at + 0.5) * cell;
    drawn.append(svg("text", { x: from.x - 6, y: from.y + middle + 3, "text-anchor": "end" }, word),
      svg("text", { transform: `translate(${from.x + middle + 3},${from.y - 6}) rotate(-90)` }, word));
  });
  return drawn;
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
    curves({ title: `${SCORES[state.score]}, ${unit}`, series, ends: [run().steps[0].step, run().steps.at(-1).step], height: 220,
    name: `${run().name} ${SCORES[state.score]}` }));
}
