// What each layer already knows: the prediction that is read from the residual stream behind it, and how long that stream is.
import { chooser, fixed, make, percent, quoted, svg, whole } from "./dom.js";
import { change, question, run, state } from "./state.js";
import { ask } from "./source.js";
import { saver } from "./plot.js";
import { scaleOf, uniform } from "./text.js";

const WAYS = { likeliest: "prediction", nats: "loss of the next token", norm: "norm of the residual stream" };
const MOST_DRAWN = 128; // tokens of the picture; the page shows all
const panel = make("div", { className: "layers-panel" });
let found;

export const layersPanel = { key: "layers", title: "Layers", node: panel, show: showLayers, figure: () => lensFigure() };

async function showLayers(signal) {
  if (run().can.lens !== true) return panel.replaceChildren(make("p", { textContent: String(run().can.lens) })), String(run().can.lens);
  found = await ask("layers", { ...question(), step: state.step }, signal);
  const before = panel.querySelector(".scroll")?.scrollLeft ?? 0;
  panel.replaceChildren(
    make("div", { className: "controls" }, chooserOfLens(),
      make("span", { className: "end" }, saver(lensFigure, `${run().name} step ${state.step} layers`))),
    ...layersBeside(found, run()),
    make("p", { className: "faint",
      textContent: "Read from the bottom up: the embedding, then each layer. The final norm and the unembedding read every one of them as they read the last (logit lens)." }),
  );
  panel.querySelector(".scroll").scrollLeft = before;
  return `layers at step ${whole(state.step)}`;
}

export const chooserOfLens = () => chooser("Show", Object.entries(WAYS), state.lens, (lens) => change({ lens }));

// The table of an answer about a model, with what its colours mean.
export function layersBeside(answer, of) {
  const most = mostShown(answer);
  const words = { likeliest: ["0\u00a0%", "100\u00a0%", "probability of the likeliest next token, as this layer would say it"],
    nats: ["0", fixed(uniform(of), 2), "nats of the true next token; a uniform guess is darkest"],
    norm: ["0", fixed(most, 2), "length of the residual stream (L2)"] };
  return [scaleOf(...(words[state.lens] ?? words.likeliest)),
    make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": `Layers by token of ${of.name}` }, table(answer, of, most))];
}

const nameOf = (row) => (row ? `layer ${row - 1}` : "embedding");
const mostShown = (answer) => answer.norm.flat().reduce((most, value) => Math.max(most, value), 1e-30);

// What a cell says, how strong it is coloured, and its number.
function cell(answer, of, row, at, most) {
  if (state.lens === "nats") { const value = answer.nats[row][at]; return { word: "", number: fixed(value, 2), value,
    part: value === null ? 0 : value / uniform(of) }; }
  if (state.lens === "norm") { const value = answer.norm[row][at]; return { word: "", number: fixed(value, 2), value, part: value / most }; }
  const value = answer.probability[row][at], token = answer.likeliest[row][at];
  return { word: token, number: percent(value), value, part: value, hit: answer.tokens[at + 1] === token };
}

function table(answer, of, most) {
  const rows = answer.likeliest.map((_, row) => row).reverse();
  const line = (row) => make("tr", {}, make("th", { scope: "row", textContent: nameOf(row) }), ...answer.tokens.map((_, at) => {
    const { word, number, value, part, hit } = cell(answer, of, row, at, most);
    return make("td", { className: [hit && "hit", at === state.token && "chosen"].filter(Boolean).join(" "),
      "--h": `${(100 * Math.min(1, part)).toFixed(1)}%`, data: { row, at, value: value ?? "", word },
      title: `${nameOf(row)}, at ${quoted(answer.tokens[at])}${hit ? ": this is the next token" : ""}` },
      ...(word ? [make("span", { textContent: word.replaceAll("\n", "↵") })] : []), make("small", { textContent: number }));
  }));
  const head = make("tr", {}, make("th", { scope: "col", textContent: "after" }),
    ...answer.tokens.map((token) => make("th", { scope: "col", textContent: token.replaceAll("\n", "↵") })));
  return make("table", { className: "lens" }, make("tbody", {}, ...rows.map(line)), make("tfoot", {}, head));
}

export function lensFigure() {
  const most = mostShown(found), wide = 74, high = 34, left = 84, top = 34, rows = found.likeliest.length,
    shown = Math.min(MOST_DRAWN, found.tokens.length), cut = shown < found.tokens.length ? `, the first ${shown} of ${found.tokens.length} tokens` : "";
  const drawn = svg("svg", { viewBox: `0 0 ${left + shown * wide + 10} ${top + (rows + 1) * high}`, width: left + shown * wide + 10,
    height: top + (rows + 1) * high, "font-size": 12, fill: "var(--ink)" });
  drawn.append(svg("text", { x: 10, y: 20, "font-size": 14, "font-weight": 600 }, `${run().name}, step ${whole(state.step)}: ${WAYS[state.lens]}${cut}`));
  for (let row = 0; row <= rows; row++) {
    const y = top + row * high, layer = rows - 1 - row;
    drawn.append(svg("text", { x: 10, y: y + 20, fill: "var(--faint)" }, row < rows ? nameOf(layer) : "after"));
    for (let at = 0; at < shown; at++) {
      const x = left + at * wide, { word, number, part } = row < rows ? cell(found, run(), layer, at, most) : { word: found.tokens[at], number: "", part: 0 };
      if (row < rows) drawn.append(svg("rect", { x, y, width: wide - 2, height: high - 2, rx: 3, fill: "var(--heat)",
        opacity: (Math.min(1, part) * 0.72).toFixed(3) }));
      drawn.append(svg("text", { x: x + 4, y: y + (number ? 14 : 20) }, word.replaceAll("\n", "↵").slice(0, 10)),
        svg("text", { x: x + 4, y: y + 27, "font-size": 10, fill: "var(--faint)" }, number));
    }
  }
  return drawn;
}
