// What happens while one looks: lines that a training logs, new steps, its end. The browser connects again by itself.
import { byId, brief, fixed, whole } from "./dom.js";
import { change, flush, restore, run, runOf, session, state } from "./state.js";
import { forget, look, saved } from "./source.js";
import { addSteps, drawTimeline, replayed } from "./timeline.js";
import { stale } from "./training.js";

const SOON = 1000; // milliseconds in which new lines and steps are drawn together
const REST = 100; // times as long as drawing took, the page is at rest before it draws again: 1 % of one core of a busy machine
let waiting = null, free = 0, from = null; // from: the step that is left for the newest one

const say = (words, kind = "") => { byId("live").textContent = words; byId("live").dataset.kind = kind; };

export function describeLive() {
  const of = runOf(state.run);
  if (!of || saved) return say("");
  if (of.gone) return say(`${of.name} was deleted; what is shown here was read before.`, "gone");
  if (of.newest) return say(`${of.live ? "live" : "ended"} · step ${whole(of.newest.step)}${lossOf(of.newest)}`, of.live ? "live" : "ended");
  say(of.live ? "live · waiting for the next line" : of.ended ? "the training ended" : "", of.live ? "live" : "ended");
}

function lossOf(line) {
  const speed = line.tokens_per_s === undefined ? "" : ` · ${brief(line.tokens_per_s)} tokens/s`;
  return line["train/loss"] === undefined ? speed : ` · loss ${fixed(line["train/loss"])}${speed}`;
}

const told = {
  metrics({ run, lines }, page) {
    const of = runOf(run);
    if (!of || !lines.length) return;
    of.newest = lines.findLast((line) => line["train/loss"] !== undefined) ?? lines.at(-1);
    stale(run);
    if (run === state.run && state.panel === "training") page.draw();
  },
  steps({ run, steps }, page) {
    stale(run);
    if (!runOf(run)) return;
    if (!runOf(run).steps.length) return page.again(); // only now it is known what its model can do
    from = addSteps(run, steps) ?? from;
    if (run === state.run) page.draw();
  },
  gone({ run }) { if (runOf(run)) Object.assign(runOf(run), { gone: true, live: false }); },
  live({ run, live }) { const of = runOf(run); if (of) Object.assign(of, { live, ended: of.live && !live, gone: false }); },
  replay: replayed,
};

export function followLive(refresh, settled) {
  describeLive();
  if (saved) return;
  const page = { draw: () => paced(refresh, settled), again: () => again(refresh) };
  const source = new EventSource("api/events");
  let lost = false;
  source.onmessage = (event) => {
    const message = JSON.parse(event.data);
    told[message.type]?.(message, page);
    describeLive();
  };
  source.onerror = () => { lost = true; say("the server does not answer; trying again", "gone"); };
  source.onopen = async () => {
    if (lost) await again(refresh); // what was missed meanwhile
    lost = false;
    describeLive();
  };
}

// Draws what is new, and goes to the newest step if the page stands on the one before; seldom enough that the training is not slowed.
function paced(refresh, settled) {
  waiting ??= setTimeout(async () => {
    waiting = null;
    const began = performance.now();
    if (from !== null && from === state.step) change({ step: run().steps.at(-1).step });
    else refresh();
    from = null;
    await settled();
    const now = performance.now();
    free = now + (run()?.live ? REST * (now - began) : 0);
  }, Math.max(SOON, free - performance.now()));
}

async function again(refresh) {
  const fresh = await look("session");
  for (const of of fresh.runs) if (runOf(of.id)) Object.assign(runOf(of.id), of);
  session.version = fresh.version;
  forget();
  stale(state.run);
  flush();
  restore(location.hash.slice(1));
  drawTimeline();
  refresh();
}
