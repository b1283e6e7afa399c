"use strict";
// The page's own script. Data lie in inert script elements, compressed; figures are drawn when they come into view.
// Text of runs is only ever set as textContent, or given to Plotly escaped (see look.py).

let themes, ready;

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

let chosen; // the reader's, while the page is on paper, which is light

function onPaper(begin) {
  if (begin) chosen ??= theme();
  document.documentElement.dataset.theme = begin ? "light" : (chosen ?? theme());
  if (!begin) chosen = undefined;
  for (const figure of figures.values()) if (begin || figure.drawn) draw(figure, begin ? PAPER : undefined);
}

async function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(dark.matches ? "dark" : "light");
  dark.onchange = () => setTheme(dark.matches ? "dark" : "light");
  document.getElementById("theme").onclick = () => setTheme(theme() === "dark" ? "light" : "dark");
  document.getElementById("print").onclick = () => print();
  document.querySelectorAll(".texts").forEach(offerSteps);
  themes = JSON.parse(await unpack(document.getElementById("themes")));
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
