"use strict";
// Tables of any length: filtered, sorted, shown page by page, saved as CSV.

const sheets = new Map();
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

// Text that a spreadsheet would take for a formula begins with an apostrophe, as in csvfile.py; numbers stay numbers.
const guarded = (text) => (/^'*[=+\-@\t\r\n＝＋－＠]/.test(text) && !/^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(text) ? `'${text}` : text);

function csvOf(sheet) {
  const quote = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const written = (column, row) => quote(column.words ? guarded(cell(column, row)) : cell(column, row));
  const lines = [sheet.names.map(guarded).map(quote).join(",")];
  for (const row of sheet.order) lines.push(sheet.names.map((name) => written(sheet.data.columns[name], row)).join(","));
  return lines.join("\n") + "\n";
}

function saveTable(sheet) {
  const url = URL.createObjectURL(new Blob([csvOf(sheet)], { type: "text/csv" }));
  offerFile(url, `${sheet.node.dataset.file}.csv`);
  setTimeout(() => URL.revokeObjectURL(url), 60000);
}
