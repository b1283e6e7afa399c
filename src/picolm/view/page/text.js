// The text at a step: each token with its loss, what was predicted in its place, and how that went over all steps.
import { category, chooser, fixed, make, percent, quoted, roving, svg, whole } from "./dom.js";
import { among, change, question, run, runOf, session, spread, state, stepNumbers } from "./state.js";
import { ask, overSteps } from "./source.js";
import { curves, saver } from "./plot.js";

const CURVE_STEPS = 200; // steps of a curve at most: each takes a pass of the model
const NUMBER = 44; // letters of a token that a heading shows

export const uniform = (of) => Math.log(of.vocabulary);

// How strong a value is: 0 to 1 on the scale of a uniform guess, or -1 to 1 for a difference; a negative `most` turns the colours.
const strength = (value, most) => (value === null || value === undefined ? 0 : Number.isFinite(value) ? Math.max(-1, Math.min(1, value / most)) : 1);

// Tokens as text; colour and number of each from `values`. `choose(at)` is called when one gets the pointer or the focus.
export function strip(tokens, values, most, { choose, chosen = null, digits = 2, label = "Tokens" } = {}) {
  const node = make("p", { className: "tokens", role: "group", "aria-label": label });
  node.append(...tokens.map((token, at) => {
    const value = values[at] ?? null, part = strength(value, most);
    const told = value === null ? `${quoted(token)}, no value` : `${quoted(token)}, ${fixed(value, digits)}`;
    const span = make("span", { textContent: token, className: [part < 0 && "cold", /\n/.test(token) && "break",
      at === chosen && "chosen"].filter(Boolean).join(" "), data: { at, ...(value !== null && { n: fixed(value, digits), value }) },
      "aria-label": told, "--h": `${(100 * Math.abs(part)).toFixed(1)}%` });
    if (choose) Object.assign(span, { tabIndex: at === (chosen ?? 0) ? 0 : -1, role: "button", onfocus: () => choose(at),
      onpointerenter: () => choose(at) });
    return span;
  }));
  if (choose) roving(node);
  return node;
}

export function scaleOf(low, high, words, signed = false) {
  return make("p", { className: signed ? "scale signed" : "scale" }, low, make("span", {}), `${high} ${words}`);
}

const COLOURS = { loss: "loss", gain: "gain since a step", difference: "difference to a run", order: "reveal order" };
const panel = make("div", { className: "text-panel" });
let answer, seen, controller, over = { key: "", found: new Map() };

export const textPanel = { key: "text", title: "Text", node: panel, show: showText, figure: () => textFigure() };

async function showText(signal) {
  const asked = { ...question(), step: state.step }, shown = await ask("text", asked, signal), against = await other(signal);
  answer = { ...shown, ...valuesOf(shown, against) };
  const at = state.token ?? firstPredicted(shown);
  seen = Math.min(at, shown.tokens.length - 1);
  const big = make("div", { className: "facts-line" }, make("b", { textContent: `${fixed(shown.mean_nats)} nats` }),
    make("span", { textContent: `per token at step ${whole(state.step)}` }), ...remarks(shown));
  const node = strip(shown.tokens, answer.values, answer.most,
    { chosen: seen, choose, digits: answer.digits, label: `Tokens with their ${COLOURS[state.colour] ?? "loss"}` });
  const facts = make("div", { className: "detail", "aria-live": "polite" }), table = make("div", {}), trend = make("div", { className: "trend" });
  panel.replaceChildren(controls(shown),
    make("div", { className: "two" }, make("div", {}, big, node, answer.legend, make("div", { className: "mean" })),
    make("aside", { "aria-label": "One token" }, facts, table, trend)));
  panel.classList.toggle("numbers", state.numbers);
  drawToken();
  follow();
  return `step ${whole(state.step)}: ${fixed(shown.mean_nats)} nats per token`;
}

function choose(at) {
  if (at === seen) return;
  panel.querySelector(".tokens .chosen")?.classList.remove("chosen");
  panel.querySelector(".tokens").children[at].classList.add("chosen");
  seen = at;
  change({ token: at });
  drawToken();
}

const firstPredicted = (shown) => Math.max(0, shown.nats.findIndex((value) => value !== null));

function remarks(shown) {
  const words = [shown.seen_at !== null && shown.seen_at !== undefined && `seen at step ${whole(shown.seen_at)}`,
    shown.truncated && `cut to the first ${shown.tokens.length} tokens`, shown.likelihood === "bound" && "exact, from left to right"];
  return words.filter(Boolean).map((text) => make("span", { className: "tag", textContent: text }));
}

// When each token is revealed, from 1; the first token is given.
export const orderOf = ({ order }) => ({ values: order.map((place) => (place === null ? null : place + 1)), most: order.length - 1, digits: 0 });

// The answer that a gain or a difference is taken from; null for none.
async function other(signal) {
  if (state.colour === "gain") return ask("text", { ...question(), step: state.from ?? run().steps[0].step }, signal);
  if (state.colour !== "difference" || !runOf(state.other)) return null;
  const of = runOf(state.other), steps = stepNumbers(of).filter((step) => step <= state.step);
  return ask("text", { ...question(of.id), step: steps.at(-1) ?? of.steps[0].step }, signal);
}

function valuesOf(shown, against) {
  const most = uniform(run()), same = against && JSON.stringify(against.tokens) === JSON.stringify(shown.tokens);
  const from = against && `${runOf(against.run).name}, step ${whole(against.step)}`;
  if (against && same) return { values: shown.nats.map((value, at) => (value === null ? null : against.nats[at] - value)), most: -most / 2,
    legend: scaleOf(`+${fixed(most / 2, 2)}`, fixed(-most / 2, 2), `nats gained since ${from}: blue is better, orange is worse`, true) };
  if (state.colour === "order" && shown.order) return { ...orderOf(shown),
    legend: scaleOf("1", String(shown.order.length - 1), "order in which the model would reveal the tokens, most confident first") };
  const why = against ? make("p",
    { className: "faint", textContent: `${from} cuts this text into other tokens, so there is no difference by token; the colour is the loss.` })
    : null;
  return { values: shown.nats, most, legend: make("div", {}, scaleOf("0", fixed(most, 2), "nats, a uniform guess"),
    make("p", { className: "faint", textContent: run().says }), ...(why ? [why] : [])) };
}

function controls(shown) {
  const others = session.runs.filter((each) => each.id !== state.run);
  const ways = Object.entries(COLOURS).filter(([key]) => (key !== "difference" || others.length) && (key !== "order" || shown.order));
  const made = [chooser("Colour", ways, state.colour, (colour) => change({ colour }))];
  if (state.colour === "gain") made.push(chooser("since step", run().steps.map(({ step }) => [step, whole(step)]), state.from ?? run().steps[0].step,
    (from) => change({ from })));
  if (state.colour === "difference") made.push(chooser("to", others.map((each) => [each.id, each.name]), state.other ?? null,
    (id) => change({ other: id })));
  const numbers = make("button",
    { type: "button", textContent: "numbers", "aria-pressed": state.numbers, onclick: () => change({ numbers: !state.numbers }) });
  return make("div", { className: "controls" }, ...made, numbers,
    make("span", { className: "end" }, saver(textFigure, `${run().name} step ${state.step} text`)));
}

function drawToken() {
  const at = seen, facts = panel.querySelector(".detail"), predicted = answer.nats[at] !== null;
  const numbers = predicted
    ? [[fixed(answer.nats[at], 4), "nats"], [percent(answer.probability[at]), "probability"],
      [whole(answer.rank[at] + 1), `rank of ${whole(run().vocabulary)}`], [fixed(answer.entropy?.[at], 2), "nats of entropy"]]
    : [];
  const values = ["nats", "probability", "rank"].map((key) => [key, answer[key][at] ?? ""]);
  facts.replaceChildren(
    make("h3", { textContent: quoted(answer.tokens[at].slice(0, NUMBER)) }),
      make("small", { textContent: `token ${at + 1} of ${answer.tokens.length}` }),
    make("dl", { className: "facts", data: Object.fromEntries(values) },
      ...numbers.map(([value, what]) => make("div", {}, make("dd", { textContent: value }), make("dt", { textContent: what })))),
  );
  const last = at === answer.tokens.length - 1 && answer.next;
  facts.nextSibling.replaceChildren(...(predicted ? [likeliest("Predicted in its place", answer.top[at], answer.tokens[at])]
    : [make("p", { className: "faint", textContent: "Nothing predicts this token." })]),
    ...(last ? [likeliest("After the text", answer.next, null)] : []));
  drawTrend();
}

function likeliest(title, top, truth) {
  const line = ([token, share]) => make("tr", { className: token === truth ? "truth" : "", data: { token, share } },
    make("th", { scope: "row", textContent: quoted(token) }), make("td", { className: "bar" }, make("i", { "--w": `${100 * share}%` })),
    make("td", { className: "number", textContent: percent(share) }));
  return make("table", { className: "likeliest" }, make("caption", { textContent: title }), make("tbody", {}, ...top.map(line)));
}

// The same text at the other steps; what is found stays while only the step changes.
function follow() {
  const key = JSON.stringify(question()), steps = spread(stepNumbers(), CURVE_STEPS);
  if (key !== over.key) over = { key, found: new Map() };
  controller?.abort();
  const { signal } = (controller = new AbortController());
  panel.dataset.history = "";
  let waiting = 0;
  const each = (found) => { over.found = found; waiting ||= requestAnimationFrame(() => { waiting = 0; if (!signal.aborted) drawTrend(); }); };
  overSteps("history", question(), steps, signal, each).then(() => (panel.dataset.history = steps.length),
    (error) => { if (error.name !== "AbortError") panel.querySelector(".trend")?.append(make("p",
    { className: "faint", textContent: error.message })); });
}

export const stopFollowing = () => controller?.abort();

function drawTrend() {
  const trend = panel.querySelector(".trend"), mean = panel.querySelector(".mean"), lines = [...over.found.values()];
  if (!trend || !lines.length) return;
  const steps = lines.map((line) => line.step), one = (label, read) => ({ label, steps, values: lines.map(read), colour: category(0) });
  const ends = [run().steps[0].step, run().steps.at(-1).step];
  mean.replaceChildren(curves({ title: `Loss of this text, nats per token${among(lines)}`, series: [one("mean", (line) => line.mean_nats)], ends, height: 230,
    name: `${run().name} loss of the text` }));
  if (answer.nats[seen] === null) return void trend.replaceChildren();
  const named = quoted(answer.tokens[seen]);
  trend.replaceChildren(
    curves({ title: `Probability of ${named}`, series: [one("probability", (line) => line.probability[seen])], y: { low: 0 }, ends, height: 140 }),
    curves({ title: `Rank of ${named}, 1 is likeliest`, series: [one("rank", (line) => line.rank[seen] + 1)], y: { log: true, low: 1 }, ends,
      height: 140 }),
  );
}

// The tokens as a picture, in lines of one width.
export function textFigure(title = `${run().name}, step ${whole(state.step)}: ${fixed(answer.mean_nats)} nats per token`) {
  return tokensFigure(answer.tokens, answer.values, answer.most, title);
}

export function tokensFigure(tokens, values, most, title) {
  const size = 760, lineHeight = 30, pen = document.createElement("canvas").getContext("2d"), parts = [];
  pen.font = "16px system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif";
  let x = 20, y = 64;
  const lineBreak = () => { x = 20; y += lineHeight; };
  tokens.forEach((token, at) => {
    const word = token.replace(/\n/g, "↵"), width = pen.measureText(word).width;
    if (x + width > size - 20) lineBreak();
    const part = strength(values[at], most);
    parts.push(svg("rect", { x, y: y - 18, width, height: 25, rx: 3, fill: part < 0 ? "var(--cold)" : "var(--heat)",
      opacity: (Math.abs(part) * 0.72).toFixed(3) }));
    const text = svg("text", { x, y, "font-size": 16, fill: "var(--ink)", textLength: width, lengthAdjust: "spacingAndGlyphs" }, word);
    text.setAttributeNS("http://www.w3.org/XML/1998/namespace", "xml:space", "preserve");
    parts.push(text);
    x += width;
    if (token.includes("\n")) lineBreak();
  });
  const heading = svg("text", { x: 20, y: 26, "font-size": 14, "font-weight": 600, fill: "var(--ink)" }, title);
  return svg("svg", { viewBox: `0 0 ${size} ${y + 24}`, width: size, height: y + 24 }, heading, ...parts);
}
