"use strict";
// The page's own script. Data lie in inert script elements, compressed; figures are drawn when they come into view.
// Text of runs is only ever set as textContent, or given to Plotly escaped (see look.py).

const PANELS = { gapX: 66, gapY: 86, title: 48, legendRow: 20, bottom: 52, sides: 76, narrowest: 300, most: 3 };
const PAPER = 680; // width of figures on paper, in pixels
const figures = new Map(); // id -> what a figure shows and how
const sheets = new Map();
let rooms, ready;

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};

async function unpack(script) {
  const bytes = Uint8Array.from(atob(script.textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

const theme = () => document.documentElement.dataset.theme;

function setTheme(name) {
  document.documentElement.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = name === "dark" ? "Light" : "Dark";
  redraw();
}

function redraw() {
  for (const figure of figures.values()) if (figure.drawn) draw(figure);
}

// ── figures ──

async function load(node) {
  const spec = JSON.parse(await unpack(node.querySelector("script")));
  for (const trace of spec.data) trace.customdata ??= trace.z ?? trace.y; // what hovering shows: the exact value
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
    button.setAttribute("aria-pressed", false);
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
    if (axis && figure.log[axis[1]]) layout[key].type = "log";
  }
  if (figure.meta.panels) arrange(layout, figure.spec.data, { ...figure.meta, y: figure.spec.layout.yaxis.title?.text }, width, above);
  return layout;
}

function draw(figure, width = figure.plot.clientWidth) {
  const look = rooms[theme()];
  show(figure);
  for (const trace of figure.spec.data) paint(trace, look);
  const layout = layoutOf(figure, width, look, 0);
  delete layout.title;
  figure.drawn = true;
  figure.plot.style.minHeight = `${layout.height || 400}px`;
  return Plotly.react(figure.plot, figure.spec.data, layout, { displayModeBar: false, responsive: false });
}

async function saveImage(figure, format) {
  const width = Math.max(720, figure.plot.clientWidth), look = rooms.light;
  const data = figure.spec.data.map((trace) => ({ ...trace }));
  for (const trace of data) paint(trace, look);
  const layout = layoutOf(figure, width, look, 40);
  const url = await Plotly.toImage({ data, layout }, { format, width, height: layout.height, scale: format === "png" ? 2 : 1 });
  offerFile(url, `${figure.node.dataset.file}.${format}`);
}

function offerFile(url, name) {
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

// ── tables ──

const ROWS = 20; // on one page of a table

async function loadSheet(node) {
  const data = JSON.parse(await unpack(node.querySelector("script")));
  const names = Object.keys(data.columns);
  const sheet = { node, data, names, order: Array.from({ length: data.rows }, (_, row) => row), page: 0, sorted: null, down: false };
  sheets.set(node.id, sheet);
  const search = make("input", { type: "search", placeholder: "words, or for example layer=0 value>0.5" });
  search.setAttribute("aria-label", "Show rows with these words");
  let waiting;
  search.oninput = () => { clearTimeout(waiting); waiting = setTimeout(() => filter(sheet, search.value), 120); };
  const turn = (by, text) => make("button", { type: "button", textContent: text, onclick: () => { sheet.page += by; list(sheet); } });
  [sheet.back, sheet.next, sheet.count] = [turn(-1, "Previous"), turn(1, "Next"), make("span", { role: "status" })];
  const csv = make("button", { type: "button", textContent: "Save as CSV", onclick: () => saveTable(sheet) });
  node.querySelector(".controls").append(search, sheet.back, sheet.next, sheet.count, make("span", { className: "end" }, csv));
  list(sheet);
}

const cell = (column, row) => (column.words ? column.words[column.codes[row]] : column.values[row]);

function matcher(sheet, term) {
  const [, name, sign, wanted] = term.match(/^(\w+)([=<>])(.+)$/) || [];
  const column = sheet.data.columns[name];
  if (column && sign === "=") return (row) => String(cell(column, row) ?? "").toLowerCase() === wanted;
  if (column && sign === ">") return (row) => cell(column, row) !== null && Number(cell(column, row)) > Number(wanted);
  if (column) return (row) => cell(column, row) !== null && Number(cell(column, row)) < Number(wanted);
  const columns = Object.values(sheet.data.columns);
  const found = columns.map((own) => own.words && new Set(own.words.flatMap((word, code) => (word.toLowerCase().includes(term) ? [code] : []))));
  return (row) => columns.some((own, at) => (own.words ? found[at].has(own.codes[row]) : String(own.values[row]) === term));
}

function filter(sheet, text) {
  const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((term) => matcher(sheet, term));
  sheet.order = [];
  for (let row = 0; row < sheet.data.rows; row++) if (tests.every((test) => test(row))) sheet.order.push(row);
  sort(sheet);
}

// Numbers by size, words by alphabet, what is missing last.
function sort(sheet) {
  const column = sheet.data.columns[sheet.sorted];
  if (column) {
    const sign = sheet.down ? -1 : 1;
    const rank = column.words ? ranks(column.words) : null;
    const key = rank ? (row) => rank[column.codes[row]] : (row) => (column.values[row] === null ? NaN : Number(column.values[row]));
    const keys = Float64Array.from({ length: sheet.data.rows }, (_, row) => key(row));
    const missing = (row) => Number.isNaN(keys[row]);
    sheet.order.sort((a, b) => missing(a) - missing(b) || sign * (keys[a] === keys[b] ? 0 : keys[a] < keys[b] ? -1 : 1) || a - b);
  } else sheet.order.sort((a, b) => a - b);
  sheet.page = 0;
  list(sheet);
}

function ranks(words) {
  const sorted = words.map((word, code) => [word, code]).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const rank = new Float64Array(words.length);
  sorted.forEach(([word, code], place) => (rank[code] = word === "" ? NaN : place));
  return rank;
}

function list(sheet) {
  const { order, names, data } = sheet;
  const pages = Math.max(1, Math.ceil(order.length / ROWS));
  sheet.page = Math.min(Math.max(0, sheet.page), pages - 1);
  [sheet.back.disabled, sheet.next.disabled] = [sheet.page === 0, sheet.page === pages - 1];
  const first = sheet.page * ROWS, shown = order.slice(first, first + ROWS);
  const number = (value) => value.toLocaleString("en");
  sheet.count.textContent = order.length ? `${number(first + 1)} to ${number(first + shown.length)} of ${number(order.length)} rows` : "no rows";
  const kind = (name) => (data.columns[name].words ? "" : "number");
  const head = names.map((name) => {
    const heading = make("th", { scope: "col", className: kind(name) });
    const arrow = sheet.sorted !== name ? "" : sheet.down ? " ↓" : " ↑";
    heading.append(make("button", { type: "button", textContent: name + arrow, onclick: () => order_by(sheet, name) }));
    if (arrow) heading.setAttribute("aria-sort", sheet.down ? "descending" : "ascending");
    return heading;
  });
  const line = (row) => make("tr", {}, ...names.map((name) => make("td", { className: kind(name), textContent: cell(data.columns[name], row) ?? "" })));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...shown.map(line)));
  sheet.node.querySelector(".scroll").replaceChildren(table);
}

function order_by(sheet, name) {
  [sheet.sorted, sheet.down] = sheet.sorted !== name ? [name, false] : sheet.down ? [null, false] : [name, true];
  sort(sheet);
  [...sheet.node.querySelectorAll("th button")].find((button) => button.textContent.replace(/ [↑↓]$/, "") === name)?.focus();
}

function csvOf(sheet) {
  const quote = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const lines = [sheet.names.map(quote).join(",")];
  for (const row of sheet.order) lines.push(sheet.names.map((name) => quote(cell(sheet.data.columns[name], row))).join(","));
  return lines.join("\n") + "\n";
}

function saveTable(sheet) {
  const url = URL.createObjectURL(new Blob([csvOf(sheet)], { type: "text/csv" }));
  offerFile(url, `${sheet.node.dataset.file}.csv`);
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}

// ── text ──

function offerSteps(node) {
  const steps = JSON.parse(node.dataset.steps), place = node.querySelector(".controls"), blocks = node.querySelectorAll(".step");
  const choose = (option) => blocks.forEach((block, other) => (block.hidden = other !== option));
  const last = steps.length - 1;
  if (last) place.append(chooser({ kind: "slider", label: "Step", options: steps, value: last }, choose));
  choose(last);
  const numbers = make("button", { type: "button", textContent: "numbers" });
  numbers.setAttribute("aria-pressed", false);
  numbers.onclick = () => numbers.setAttribute("aria-pressed", node.classList.toggle("numbers"));
  place.append(numbers);
}

// ── start ──

let room; // the reader's, while the page is on paper, which is light

function onPaper(begin) {
  if (begin) room ??= theme();
  document.documentElement.dataset.theme = begin ? "light" : (room ?? theme());
  if (!begin) room = undefined;
  for (const figure of figures.values()) if (begin || figure.drawn) draw(figure, begin ? PAPER : undefined);
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.onchange = () => setTheme(dark.matches ? "dark" : "light");
  document.getElementById("theme").onclick = () => setTheme(theme() === "dark" ? "light" : "dark");
  document.getElementById("print").onclick = () => print();
  document.querySelectorAll(".texts").forEach(offerSteps);
  rooms = JSON.parse(await unpack(document.getElementById("rooms")));
  document.head.append(make("script", { textContent: await unpack(document.getElementById("plotly")) }));
  const seen = new IntersectionObserver(watch, { rootMargin: "400px" });
  const nodes = [...document.querySelectorAll(".drawing")];
  for (const node of nodes) await load(node);
  nodes.forEach((node) => seen.observe(node));
  for (const node of document.querySelectorAll(".sheet")) await loadSheet(node);
  addEventListener("beforeprint", () => onPaper(true));
  addEventListener("afterprint", () => onPaper(false));
  let waiting, width = innerWidth;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (width !== (width = innerWidth)) redraw(); }, 150);
  });
}

function watch(entries) {
  for (const { isIntersecting, target } of entries) {
    const figure = figures.get(target.id);
    if (isIntersecting && figure && !figure.drawn) draw(figure);
  }
}

ready = start().catch((error) => {
  const place = document.getElementById("trouble");
  place.textContent = `The figures cannot be drawn: ${error.message}. This page needs a browser of 2023 or later.`;
  place.hidden = false;
  throw error;
});
