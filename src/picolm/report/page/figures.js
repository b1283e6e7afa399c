"use strict";
// Figures: offered choices, drawn traces, panels placed in the width that there is. Layout and colours follow panels.py.

const PANELS = { gapX: 66, gapY: 86, title: 48, legendRow: 20, bottom: 52, sides: 76, narrowest: 300, most: 3 };
const PAPER = 680; // width of figures on paper, in pixels
const figures = new Map(); // id -> what a figure shows and how

async function load(node) {
  const spec = JSON.parse(await unpack(node.querySelector("script")));
  for (const trace of spec.data) if (trace.meta?.shown) trace.customdata ??= trace.z ?? trace.y; // what hovering shows: the exact value
  const meta = spec.layout.meta || {};
  const controls = meta.controls || [];
  const chosen = Object.fromEntries(controls.map((control) => [control.key, control.value]));
  const figure = { node, spec, meta, controls, chosen, log: {}, plot: node.querySelector(".plot"), drawn: false };
  figures.set(node.id, figure);
  offer(figure);
  return figure;
}

function offer(figure) {
  const place = figure.node.querySelector(".controls");
  for (const control of figure.controls) {
    const choose = (option) => { figure.chosen[control.key] = option; return draw(figure); };
    place.append(chooser(control, choose));
  }
  for (const axis of figure.meta.log || "") {
    const name = axis === "x" ? "log steps" : "log values";
    const button = make("button", { type: "button", textContent: name, title: "logarithmic axis; zero has no place on it" });
    figure.log[axis] = (figure.meta.logged || "").includes(axis);
    button.setAttribute("aria-pressed", figure.log[axis]);
    button.onclick = () => {
      figure.log[axis] = !figure.log[axis];
      button.setAttribute("aria-pressed", figure.log[axis]);
      draw(figure);
    };
    place.append(button);
  }
  const save = (format) => make("button", { type: "button", textContent: format, title: `Save as ${format}`, onclick: () => saveImage(figure, format.toLowerCase()) });
  place.append(make("span", { className: "group end" }, make("span", { textContent: "Save" }), save("SVG"), save("PNG")));
}

function chooser(control, choose) {
  if (control.kind === "slider") {
    const shown = make("output", { textContent: control.options[control.value] });
    const slider = make("input", { type: "range", min: 0, max: control.options.length - 1, value: control.value });
    slider.setAttribute("aria-label", control.label);
    slider.setAttribute("aria-valuetext", shown.textContent);
    slider.oninput = () => {
      shown.textContent = control.options[slider.value];
      slider.setAttribute("aria-valuetext", shown.textContent);
      choose(Number(slider.value));
    };
    return make("label", { className: "group" }, make("span", { textContent: control.label }), slider, shown);
  }
  const group = make("div", { className: "group" }, make("span", { textContent: control.label }));
  if (control.options.length > 3) {
    const select = make("select", { onchange: () => choose(select.selectedIndex) });
    select.append(...control.options.map((option) => make("option", { textContent: option })));
    select.selectedIndex = control.value;
    select.setAttribute("aria-label", control.label);
    group.append(select);
    return group;
  }
  const buttons = control.options.map((option, place) => make("button", { type: "button", textContent: option, onclick: () => press(place) }));
  const mark = (place) => buttons.forEach((button, other) => button.setAttribute("aria-pressed", other === place));
  const press = (place) => { mark(place); choose(place); };
  mark(control.value);
  group.role = "group";
  group.setAttribute("aria-label", control.label);
  group.append(make("span", { className: "segments" }, ...buttons));
  return group;
}

// Draw the traces that belong to the choices; each group of lines has one entry in the legend (`show` in panels.py).
function show(figure) {
  const named = new Set();
  for (const trace of figure.spec.data) {
    const meta = trace.meta || {};
    trace.visible = Object.entries(meta.shown || {}).every(([key, option]) => (figure.chosen[key] ?? option) === option);
    if (trace.type !== "scatter" || meta.quiet || !meta.shown) continue;
    trace.showlegend = trace.visible && !named.has(trace.legendgroup);
    if (trace.visible) named.add(trace.legendgroup);
  }
}

function paint(trace, look) {
  const meaning = trace.meta && trace.meta.colour;
  if (trace.type !== "scatter" || !trace.meta) return;
  let shade = look.faint;
  if (meaning && "depth" in meaning) shade = look.depth[Math.round(meaning.depth * (look.depth.length - 1))];
  if (meaning && "category" in meaning) shade = look.category[meaning.category % look.category.length];
  if (trace.meta.band) return void (trace.fillcolor = faded(shade, 0.18));
  trace.line = { ...trace.line, color: shade };
  trace.marker = { ...trace.marker, color: shade };
}

function faded(shade, opacity) {
  const parts = shade.startsWith("#") ? [1, 3, 5].map((at) => parseInt(shade.slice(at, at + 2), 16)) : shade.match(/\d+/g);
  return `rgba(${parts.join(", ")}, ${opacity})`;
}

// A heatmap is as high as its rows need (`_row_height` in panels.py).
function rowHeight(traces, meta) {
  const drawn = traces.filter((trace) => trace.type === "heatmap" && trace.visible).map((trace) => trace.y.length);
  return drawn.length ? Math.min(680, Math.max(220, 22 * Math.max(...drawn) + 40)) : meta.row;
}

// A title of two lines where one would be too long (`fit` in panels.py).
function fit(title, width) {
  const at = title.lastIndexOf(" · ");
  return title.includes("<br>") || title.length * 6.6 <= width + 46 || at < 0 ? title : `${title.slice(0, at)}<br>${title.slice(at + 3)}`;
}

// Panels in as many columns as there is room for (`arrange` in panels.py).
function arrange(layout, traces, meta, width, above) {
  const columns = Math.min(PANELS.most, meta.panels, Math.max(1, Math.floor(width / PANELS.narrowest)));
  const rows = Math.ceil(meta.panels / columns), row = rowHeight(traces, meta);
  const innerWidth = width - PANELS.sides, innerHeight = rows * row + (rows - 1) * PANELS.gapY;
  const cell = (innerWidth - (columns - 1) * PANELS.gapX) / columns;
  const clip = (at) => Math.min(1, Math.max(0, at));
  for (let index = 0; index < meta.panels; index++) {
    const left = (index % columns) * (cell + PANELS.gapX), top = Math.floor(index / columns) * (row + PANELS.gapY);
    const number = index ? index + 1 : "", across = layout["xaxis" + number], up = layout["yaxis" + number];
    across.domain = [clip(left / innerWidth), clip((left + cell) / innerWidth)];
    up.domain = [clip(1 - (top + row) / innerHeight), clip(1 - top / innerHeight)];
    if (meta.sharedY) up.title = { text: index % columns ? "" : meta.y };
  }
  for (const trace of meta.panels > 1 ? traces : []) { // a colour bar stands beside its panel
    if (trace.type !== "heatmap") continue;
    const number = (trace.yaxis || "y").slice(1), up = layout["yaxis" + number].domain;
    trace.colorbar = { ...trace.colorbar, x: layout["xaxis" + number].domain[1], y: (up[0] + up[1]) / 2, len: up[1] - up[0] };
  }
  for (const note of layout.annotations || []) note.text = fit(note.text, cell);
  const names = traces.filter((trace) => trace.showlegend === true).map((trace) => trace.name);
  const entry = 8 + Math.round(6.4 * Math.max(0, ...names.map((name) => name.length)));
  const lines = names.length > 1 ? Math.ceil(names.length / Math.max(1, Math.floor(innerWidth / (entry + 46)))) : 0;
  const top = above + lines * PANELS.legendRow + ((layout.annotations || []).length ? PANELS.title : 8);
  layout.height = innerHeight + top + PANELS.bottom;
  layout.margin = { ...layout.margin, t: top, b: PANELS.bottom };
  layout.showlegend = names.length > 1;
  layout.legend = { ...layout.legend, entrywidth: entry, y: 1 - above / layout.height };
}

function layoutOf(figure, width, look, above) {
  const layout = structuredClone(figure.spec.layout);
  layout.template = look.template;
  layout.width = width;
  for (const control of figure.controls) if (control.y) layout.yaxis.title.text = control.y[figure.chosen[control.key]];
  for (const key of Object.keys(layout)) {
    const axis = key.match(/^([xy])axis\d*$/);
    if (axis && axis[1] in figure.log && (figure.log[axis[1]] || layout[key].type === "log")) layout[key].type = figure.log[axis[1]] ? "log" : "linear";
  }
  if (figure.meta.panels) arrange(layout, figure.spec.data, { ...figure.meta, y: figure.spec.layout.yaxis.title?.text }, width, above);
  return layout;
}

function draw(figure, width = figure.plot.clientWidth) {
  const look = themes[theme()];
  show(figure);
  for (const trace of figure.spec.data) paint(trace, look);
  const layout = layoutOf(figure, width, look, 0);
  delete layout.title;
  figure.drawn = true;
  figure.plot.style.minHeight = `${layout.height || 400}px`;
  return Plotly.react(figure.plot, figure.spec.data, layout, { displayModeBar: false, responsive: false });
}

async function saveImage(figure, format) {
  const width = Math.max(720, figure.plot.clientWidth), look = themes.light;
  const layout = layoutOf(figure, width, look, 40);
  const data = figure.spec.data.map((trace) => ({ ...trace }));
  for (const trace of data) paint(trace, look);
  const url = await Plotly.toImage({ data, layout }, { format, width, height: layout.height, scale: format === "png" ? 2 : 1 });
  offerFile(url, `${figure.node.dataset.file}.${format}`);
}

function offerFile(url, name) {
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
