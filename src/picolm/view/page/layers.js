// What each layer already knows: the prediction that is read from the residual stream behind it, and how long that stream is.
import { chooser, fixed, make, percent, quoted, svg, whole } from "./dom.js";
import { change, question, run, state } from "./state.js";
import { ask } from "./source.js";
import { saver } from "./plot.js";
import { scaleOf, uniform } from "./text.js";

const WAYS = { likeliest: "prediction", nats: "loss of the next token", norm: "norm of the residual stream" };
const panel = make("div", { className: "layers-panel" });
let found;

export const layersPanel = { key: "layers", title: "Layers", node: panel, show: showLayers, figure: () => lensFigure() };

async function showLayers(signal) {
  if (run().can.lens !== true) return panel.replaceChildren(make("p", { textContent: String(run().can.lens) })), String(run().can.lens);
  found = await ask("layers", { ...question(), step: state.step }, signal);
  const before = panel.querySelector(".scroll")?.scrollLeft ?? 0, most = mostShown();
  const words = { likeliest: scaleOf("0 %", "100 %", "probability of the likeliest next token, as this layer would say it"),
    nats: scaleOf("0", fixed(uniform(run()), 2), "nats of the true next token; a uniform guess is darkest"),
    norm: scaleOf("0", fixed(most, 2), "length of the residual stream (L2)") };
  const scroll = make("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": "Layers by token" }, table(most));
  panel.replaceChildren(
    make("div", { className: "controls" }, chooser("Show", Object.entries(WAYS), state.lens, (lens) => change({ lens })),
      make("span", { className: "end" }, saver(lensFigure, `${run().name} step ${state.step} layers`))),
    words[state.lens] ?? words.likeliest, scroll,
      make("p", { className: "faint",
      textContent: "Read from the bottom up: the embedding, then each layer. The final norm and the unembedding read every one of them as they read the last (logit lens)." }),
  );
  scroll.scrollLeft = before;
  return `layers at step ${whole(state.step)}`;
}

const nameOf = (row) => (row ? `layer ${row - 1}` : "embedding");
const mostShown = () => found.norm.flat().reduce((most, value) => Math.max(most, value), 1e-30);

// What a cell says, how strong it is coloured, and its number.
function cell(row, at, most) {
  if (state.lens === "nats") { const value = found.nats[row][at]; return { word: "", number: fixed(value, 2), value,
    part: value === null ? 0 : value / uniform(run()) }; }
  if (state.lens === "norm") { const value = found.norm[row][at]; return { word: "", number: fixed(value, 2), value, part: value / most }; }
  const value = found.probability[row][at], token = found.likeliest[row][at];
  return { word: token, number: percent(value), value, part: value, hit: found.tokens[at + 1] === token };
}

function table(most) {
  const rows = found.likeliest.map((_, row) => row).reverse();
  const line = (row) => make("tr", {}, make("th", { scope: "row", textContent: nameOf(row) }), ...found.tokens.map((_, at) => {
    const { word, number, value, part, hit } = cell(row, at, most);
    return make("td", { className: [hit && "hit", at === state.token && "chosen"].filter(Boolean).join(" "),
      "--h": `${(100 * Math.min(1, part)).toFixed(1)}%`, data: { row, at, value: value ?? "", word },
      title: `${nameOf(row)}, at ${quoted(found.tokens[at])}${hit ? ": this is the next token" : ""}` },
      ...(word ? [make("span", { textContent: word.replaceAll("\n", "↵") })] : []), make("small", { textContent: number }));
  }));
  const head = make("tr", {}, make("th", { scope: "col", textContent: "after" }),
    ...found.tokens.map((token) => make("th", { scope: "col", textContent: token.replaceAll("\n", "↵") })));
  return make("table", { className: "lens" }, make("tbody", {}, ...rows.map(line)), make("tfoot", {}, head));
}

export function lensFigure() {
  const most = mostShown(), wide = 74, high = 34, left = 84, top = 34, rows = found.likeliest.length, shown = Math.min(24, found.tokens.length);
  const drawn = svg("svg", { viewBox: `0 0 ${left + shown * wide + 10} ${top + (rows + 1) * high}`, width: left + shown * wide + 10,
    height: top + (rows + 1) * high, "font-size": 12, fill: "var(--ink)" });
  drawn.append(svg("text", { x: 10, y: 20, "font-size": 14, "font-weight": 600 }, `${run().name}, step ${whole(state.step)}: ${WAYS[state.lens]}`));
  for (let row = 0; row <= rows; row++) {
    const y = top + row * high, layer = rows - 1 - row;
    drawn.append(svg("text", { x: 10, y: y + 20, fill: "var(--faint)" }, row < rows ? nameOf(layer) : "after"));
    for (let at = 0; at < shown; at++) {
      const x = left + at * wide, { word, number, part } = row < rows ? cell(layer, at, most) : { word: found.tokens[at], number: "", part: 0 };
      if (row < rows) drawn.append(svg("rect", { x, y, width: wide - 2, height: high - 2, rx: 3, fill: "var(--heat)",
        opacity: (Math.min(1, part) * 0.72).toFixed(3) }));
      drawn.append(svg("text", { x: x + 4, y: y + (number ? 14 : 20) }, word.replaceAll("\n", "↵").slice(0, 10)),
        svg("text", { x: x + 4, y: y + 27, "font-size": 10, fill: "var(--faint)" }, number));
    }
  }
  return drawn;
}
