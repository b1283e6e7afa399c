// Where answers come from: the server, or the table of a saved page. Panels do not know which.
import { byId } from "./dom.js";

const table = byId("data") ? JSON.parse(byId("data").textContent) : null;
const KEPT = 400; // answers that the page keeps, so that going back on the slider asks nobody
const kept = new Map();
export const saved = table !== null;
export const savedState = table?.state ?? "";

export class Refused extends Error {}

// Whether such questions can be answered: in a saved page, some of those that were saved.
export const holds = (endpoint) => !saved || Object.keys(table.answers).some((key) => key.startsWith(`${endpoint} `));

// The name of a question: the same words as on the server, keys in order, and without what only says which part is wanted.
export function keyOf(endpoint, body) {
  const sorted = (value) => (value && typeof value === "object" && !Array.isArray(value)
    ? Object.fromEntries(Object.keys(value).sort().map((key) => [key, sorted(value[key])])) : value);
  const { steps, rows, ...rest } = body;
  for (const key of Object.keys(rest)) if (rest[key] === null || rest[key] === undefined) delete rest[key];
  return `${endpoint} ${JSON.stringify(sorted(rest))}`;
}

function fromTable(endpoint, body) {
  const found = table.answers[keyOf(endpoint, body)];
  if (found === undefined) throw new Refused("this was not saved with the page");
  return found;
}

async function request(endpoint, body, signal, get = false) {
  const given = get ? { signal } : { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal };
  const query = get ? `?${new URLSearchParams(body)}` : "";
  const response = await fetch(`api/${endpoint}${query}`, given);
  if (!response.ok) throw new Refused((await response.json().catch(() => ({}))).error ?? `the server answered ${response.status}`);
  return response;
}

function keep(key, value) {
  kept.delete(key);
  kept.set(key, value);
  if (kept.size > KEPT) kept.delete(kept.keys().next().value);
  return value;
}

export const forget = () => kept.clear();

export async function ask(endpoint, body, signal) {
  if (saved) return fromTable(endpoint, body);
  const key = keyOf(endpoint, body);
  return kept.has(key) ? keep(key, kept.get(key)) : keep(key, await (await request(endpoint, body, signal)).json());
}

export async function look(endpoint, query = {}, signal) {
  return saved ? fromTable(endpoint, query) : (await request(endpoint, query, signal, true)).json();
}

export const send = async (endpoint, body) => request(endpoint, body);

// What every head does with every position: {shape: [L, N, T, T], kind, tokens, values: Float32Array}.
export async function askHeads(body, signal) {
  const key = keyOf("heads", body);
  if (kept.has(key)) return keep(key, kept.get(key));
  const buffer = saved ? await unpacked(fromTable("heads", body).packed) : await (await request("heads", body, signal)).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true), header = JSON.parse(new TextDecoder().decode(buffer.slice(4, 4 + size)));
  return keep(key, { ...header, values: new Float32Array(buffer.slice(4 + size)) });
}

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function* lines(endpoint, body, signal) {
  const reader = (await request(endpoint, body, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const parts = (rest + (value ?? "")).split("\n");
    rest = done ? "" : parts.pop();
    for (const part of parts) if (part.trim()) yield JSON.parse(part);
    if (done) return;
  }
}

// One line for each of these steps as they come; `each(found)` is told of every one, a Map from steps to lines. Steps that were
// asked before are not asked again.
export async function overSteps(endpoint, body, steps, signal, each) {
  const key = `over ${keyOf(endpoint, body)}`, known = keep(key, kept.get(key) ?? new Map());
  const told = () => each(new Map(steps.filter((step) => known.has(step)).map((step) => [step, known.get(step)])));
  if (saved) for (const line of fromTable(endpoint, body)) known.set(line.step, line);
  told();
  const missing = steps.filter((step) => !known.has(step));
  if (saved || !missing.length) return;
  for await (const line of lines(endpoint, { ...body, steps: missing }, signal)) {
    if (line.step === undefined) throw new Refused(line.error);
    if (!line.error) known.set(line.step, line);
    told();
  }
}
