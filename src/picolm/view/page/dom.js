// Nodes, numbers and colours. Text is only ever set as textContent; style only through the object model, as the policy asks.

export function make(tag, properties = {}, ...children) {
  return dress(document.createElement(tag), properties, children);
}

export function svg(tag, properties = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(properties)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function dress(node, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(node.dataset, value);
    else if (key.startsWith("--")) node.style.setProperty(key, value);
    else if (key in node && !key.startsWith("aria")) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

export const byId = (id) => document.getElementById(id);
export const whole = (value) => value.toLocaleString("en");
export const fixed = (value, digits = 3) => (value === null || value === undefined ? "–" : Number.isFinite(value) ? value.toFixed(digits)
  : String(value));
export const percent = (value) => (value >= 0.0995 ? `${(100 * value).toFixed(1)} %` : value >= 0.001 ? `${(100 * value).toFixed(2)} %`
  : `${(100 * value).toPrecision(2)} %`);
export const quoted = (text) => `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;

// Of any size, in few letters: for axes and readouts.
export function brief(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
  if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
  return size !== 0 && size < 1e-3 ? value.toExponential(1) : String(+value.toPrecision(4));
}

// One of several: buttons where there are few, else a list to choose from. Returns the node; `node.mark(value)` shows a choice.
export function chooser(label, options, value, choose) {
  const group = make("div", { className: "group", role: "group", "aria-label": label }, make("span", { textContent: label }));
  if (options.length > 4) {
    const select = make("select", { "aria-label": label, onchange: () => choose(options[select.selectedIndex][0]) });
    select.append(...options.map(([, words]) => make("option", { textContent: words })));
    group.mark = (chosen) => (select.selectedIndex = options.findIndex(([key]) => key === chosen));
    group.append(select);
  } else {
    const buttons = options.map(([key, words]) =>
      make("button", { type: "button", textContent: words, onclick: () => { group.mark(key); choose(key); } }));
    group.mark = (chosen) => options.forEach(([key], at) => buttons[at].setAttribute("aria-pressed", key === chosen));
    group.append(make("span", { className: "segments" }, ...buttons));
  }
  group.mark(value);
  return group;
}

// Arrow keys, Home and End move the focus among the children that can have it; only one of them is a stop of the Tab key.
export function roving(node, columns = () => Infinity) {
  node.addEventListener("keydown", (event) => {
    const items = [...node.querySelectorAll("[tabindex]")], at = items.indexOf(document.activeElement);
    const across = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    const next = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : across === undefined ? -1 : at + across;
    if (at < 0 || !items[next]) return;
    event.preventDefault();
    items[at].tabIndex = -1;
    items[next].tabIndex = 0;
    items[next].focus();
  });
}

export const dark = () => document.documentElement.dataset.theme === "dark";
const mixed = (from, to, part) => from.map((value, at) => Math.round(value + (to[at] - value) * part));
const RAMPS = {
  light: { back: [255, 255, 255], high: [0, 114, 178], top: [6, 32, 66], low: [213, 94, 0], bottom: [92, 32, 0] },
  dark: { back: [23, 28, 38], high: [40, 128, 196], top: [214, 238, 255], low: [205, 98, 40], bottom: [255, 226, 200] },
};

// A colour for -1 to 1, orange to blue over the background; lightness alone tells how far it is from zero.
export function shade(part, light = !dark()) {
  const ramp = RAMPS[light ? "light" : "dark"], size = Math.min(1, Math.abs(part));
  const [middle, end] = part < 0 ? [ramp.low, ramp.bottom] : [ramp.high, ramp.top];
  return size < 0.6 ? mixed(ramp.back, middle, size / 0.6) : mixed(middle, end, (size - 0.6) / 0.4);
}

const CATEGORY = {
  light: ["#0072b2", "#d55e00", "#009e73", "#a8518a", "#b07a00", "#3a93c9", "#1d2433"],
  dark: ["#56b4e9", "#f0854a", "#2fc79a", "#e39ac6", "#e9b949", "#9fd3f2", "#e6eaf2"],
};
export const category = (number) => CATEGORY[dark() ? "dark" : "light"][number % 7];
