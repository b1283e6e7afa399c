// Curves over steps, all with the same playhead; and figures as files.
import { brief, make, svg, whole } from "./dom.js";
import { change, place, run, nearest, state } from "./state.js";

const EDGE = { left: 52, right: 14, top: 10, bottom: 24 };
const LEGEND = 7; // with more curves than this the legend says only how many there are

// series: [{label, steps, values, colour, faint}]. y: {log, low, high}. Returns a figure with its legend and what hovering says.
// by tokens: the steps of the series are numbers of tokens; `playhead` is where it stands then.
export function curves({ title, series, y = {}, height = 190, ends = null, name = title, by = "step", playhead = state.step }) {
  const shown = series.map((each) => ({ ...each, points: pointsOf(each, y.log) })).filter((each) => each.points.length);
  const node = make("figure", { className: "curves", data: { name } });
  const readout = make("p", { className: "readout" });
  const box = make("div", { className: "plot", role: "img" });
  const head = make("div", { className: "line" }, make("h4", { textContent: title }),
    make("span", { className: "end" }, saver(() => drawCurves(shown, y, 720, 300, ends, playhead, title), name)));
  node.append(head, legend(shown, by, playhead), box, readout);
  const draw = () => {
    box.replaceChildren(drawCurves(shown, y, Math.max(260, box.clientWidth || 560), height, ends, playhead));
    box.setAttribute("aria-label", describe(title, shown));
  };
  box.onpointermove = (event) => hover(event, box, readout, shown, by);
  box.onpointerleave = () => { readout.textContent = ""; box.querySelector(".hair")?.remove(); };
  box.onclick = (event) => { const step = stepUnder(event, box, shown); if (step !== null) change({ step: nearest(run(), step, by).step }); };
  requestAnimationFrame(draw);
  return node;
}

const pointsOf = ({ steps, values }, log) => steps.map((step, at) => [step, values[at]]).filter(([, value]) => Number.isFinite(value)
  && (!log || value > 0));
const closest = (points, step) =>
  points.reduce((best, point) => (Math.abs(place(point[0]) - place(step)) < Math.abs(place(best[0]) - place(step)) ? point : best), points[0]);

function legend(shown, by, playhead) {
  if (shown.length > LEGEND) return make("p", { className: "readout", textContent: `${shown.length} curves; the chosen one is drawn strong` });
  const entries = shown.map((each) => {
    const [step, value] = closest(each.points, playhead ?? 0);
    return make("li", { data: { step, value } }, make("i", { "--swatch": each.colour }), make("span", { textContent: each.label }),
      make("b", { textContent: brief(value) }),
      make("small", { textContent: step === playhead ? "" : `at ${by === "tokens" ? `${whole(step)} tokens` : `step ${whole(step)}`}` }));
  });
  return make("ul", { className: "legend" }, ...entries);
}

function describe(title, shown) {
  const told = shown.slice(0, LEGEND).map(({ label, points }) =>
    `${label} from ${brief(points[0][1])} at step ${points[0][0]} to ${brief(points.at(-1)[1])} at step ${points.at(-1)[0]}`);
  return `${title}: ${told.join("; ")}`;
}

function scales(shown, y, size, height, ends) {
  const steps = ends ?? [Math.min(...shown.map(({ points }) => points[0][0])), Math.max(...shown.map(({ points }) => points.at(-1)[0]))];
  const values = shown.flatMap(({ points }) => points.map(([, value]) => value)), up = y.log ? Math.log10 : (value) => value;
  let low = y.low ?? values.reduce((a, b) => Math.min(a, b), Infinity), high = y.high ?? values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!(high > low)) [low, high] = y.log ? [low / 2, high * 2] : [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  const [first, last] = steps.map(place), across = last > first ? last - first : 1;
  return {
    steps, low, high,
    x: (step) => EDGE.left + ((place(step) - first) / across) * (size - EDGE.left - EDGE.right),
    y: (value) => height - EDGE.bottom - ((up(value) - up(low)) / (up(high) - up(low))) * (height - EDGE.top - EDGE.bottom),
  };
}

export function stepTicks([first, last]) {
  if (state.scale !== "log") return valueTicks(first, last, false).map(Math.round);
  const found = [first];
  for (let ten = 1; ten <= last; ten *= 10) if (ten > first) found.push(ten);
  return place(last) - place(found.at(-1)) > 0.12 * (place(last) - place(first)) ? [...found, last] : [...found.slice(0, -1), last];
}

function valueTicks(low, high, log) {
  if (log && high / low >= 10) {
    const found = [], every = Math.ceil(Math.log10(high / low) / 5);
    for (let power = Math.ceil(Math.log10(low)); power <= Math.log10(high); power += every) found.push(10 ** power);
    return found;
  }
  const rough = (high - low) / 4, ten = 10 ** Math.floor(Math.log10(rough)), unit = [1, 2, 5, 10].find((each) => each * ten >= rough) * ten;
  const found = [];
  for (let at = Math.ceil(low / unit - 1e-9); at * unit <= high + unit * 1e-9; at++) found.push(+(at * unit).toPrecision(12));
  return found;
}

function drawCurves(shown, y, size, height, ends, playhead, title = "") {
  const drawn = svg("svg", { viewBox: `0 0 ${size} ${height}`, width: size, height, "font-size": 11, fill: "var(--faint)" });
  if (!shown.length) return drawn.append(svg("text", { x: 12, y: 40 }, "nothing to draw yet")), drawn;
  const at = scales(shown, y, size, height, ends);
  drawn.at = at;
  for (const value of valueTicks(at.low, at.high, y.log)) drawn.append(svg("line",
    { x1: EDGE.left, x2: size - EDGE.right, y1: at.y(value), y2: at.y(value), stroke: "var(--line)" }),
    svg("text", { x: EDGE.left - 6, y: at.y(value) + 4, "text-anchor": "end" }, brief(value)));
  for (const step of stepTicks(at.steps)) drawn.append(svg("text",
    { x: at.x(step), y: height - 6, "text-anchor": step === at.steps[1] ? "end" : "middle" }, brief(step)));
  for (const each of [...shown].sort((a, b) => !!b.faint - !!a.faint)) {
    const path = each.points.map(([step, value], number) => `${number ? "L" : "M"}${at.x(step).toFixed(1)},${at.y(value).toFixed(1)}`).join("");
    drawn.append(svg("path", { d: path, fill: "none", stroke: each.colour, "stroke-width": each.faint ? 1 : 2, opacity: each.faint ? 0.35 : 1,
      "stroke-linejoin": "round" }));
    if (each.points.length === 1) drawn.append(svg("circle", { cx: at.x(each.points[0][0]), cy: at.y(each.points[0][1]), r: 3, fill: each.colour }));
  }
  if (playhead !== null && playhead >= at.steps[0]
    && playhead <= at.steps[1]) drawn.append(svg("line", { class: "playhead", x1: at.x(playhead), x2: at.x(playhead), y1: EDGE.top - 6,
    y2: height - EDGE.bottom, stroke: "var(--heat)", "stroke-width": 2 }));
  if (title) drawn.append(svg("text", { x: EDGE.left, y: 9, fill: "var(--ink)" }, title));
  return drawn;
}

function stepUnder(event, box, shown) {
  const drawn = box.firstElementChild;
  if (!drawn?.at) return null;
  const wide = drawn.getBoundingClientRect(), x = ((event.clientX - wide.left) / wide.width) * drawn.viewBox.baseVal.width;
  const steps = shown.flatMap(({ points }) => points.map(([step]) => step));
  return steps.reduce((best, step) => (Math.abs(drawn.at.x(step) - x) < Math.abs(drawn.at.x(best) - x) ? step : best), steps[0]);
}

function hover(event, box, readout, shown, by) {
  const step = stepUnder(event, box, shown);
  if (step === null) return;
  const drawn = box.firstElementChild, strong = shown.filter((each) => !each.faint).slice(0, LEGEND);
  drawn.querySelector(".hair")?.remove();
  drawn.append(svg("line", { class: "hair", x1: drawn.at.x(step), x2: drawn.at.x(step), y1: EDGE.top, y2: drawn.viewBox.baseVal.height - EDGE.bottom,
    stroke: "var(--faint)", "stroke-dasharray": "3 3" }));
  const told = strong.flatMap(({ label, points }) => { const here = points.find(([other]) => other === step); return here
    ? [`${label} ${brief(here[1])}`] : []; });
  readout.textContent = `${by === "tokens" ? `${whole(step)} tokens` : `step ${whole(step)}`}: ${told.join(" · ")}`;
}

// Buttons that save a figure; `build` returns its SVG, which is drawn in the light theme whatever the page has.
export function saver(build, name) {
  const save = async (format) =>
    offerFile(format === "svg" ? svgFile(build) : await pngFile(build), `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 80)}.${format}`);
  const button = (format) => make("button",
    { type: "button", textContent: format.toUpperCase(), title: `Save this figure as ${format.toUpperCase()}`, onclick: () => save(format) });
  return make("span", { className: "savers" }, button("svg"), button("png"));
}

function svgText(build) {
  const root = document.documentElement, before = root.dataset.theme;
  root.dataset.theme = "light";
  try {
    const drawn = build(), look = getComputedStyle(root);
    drawn.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    drawn.setAttribute("font-family", "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif");
    drawn.prepend(svg("rect", { width: "100%", height: "100%", fill: "var(--card)" }));
    const text = new XMLSerializer().serializeToString(drawn).replace(/var\((--\w+)\)/g, (_, key) => look.getPropertyValue(key).trim());
    return { text, width: Number(drawn.getAttribute("width")), height: Number(drawn.getAttribute("height")) };
  } finally {
    root.dataset.theme = before;
  }
}

const svgFile = (build) => new Blob([svgText(build).text], { type: "image/svg+xml" });

export async function canvasOf(build, scale = 2) {
  const { text, width, height } = svgText(build), picture = new Image(), url = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  picture.src = url;
  await picture.decode();
  URL.revokeObjectURL(url);
  const canvas = make("canvas", { width: width * scale, height: height * scale });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas;
}

const pngFile = async (build) => { const canvas = await canvasOf(build); return new Promise((done) => canvas.toBlob(done, "image/png")); };

export function offerFile(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
