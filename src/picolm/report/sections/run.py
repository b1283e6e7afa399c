"""Section: what was trained, on what data, how it differs from the default configuration, and its provenance."""

import math
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from picolm.analyze.heads import read_anatomy, stated_anatomy
from picolm.console import duration
from picolm.errors import PicoError, StoreError
from picolm.models import Anatomy
from picolm.readers.series import Series
from picolm.report.material import Material
from picolm.report.render import render
from picolm.report.section import SECTIONS, Section
from picolm.schema import flatten
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.listing import BOUND, damaged

EXPECTED = {"run_name", "runs_dir"}  # differ from the default in every run, so not shown
FEW = 3  # up to this many runs, differences from the default configuration are unfolded


@SECTIONS.add("run")
def run(material: Material) -> Section | None:
    """Return a card for each run."""
    few = len(material.runs) <= FEW
    cards = [card(name, opened, few) for name, opened in material.named.items()]
    for name, opened in material.named.items():
        for step, problem in damaged(opened).items():
            material.tell(f"Step {step} of {name} is left out: {problem}")
    return Section("The run" if len(cards) == 1 else "The runs", cards) if cards else None


def card(name: str, opened: Run, unfolded: bool = True) -> Markup:
    """Return the facts of a run, its configuration (differences from the defaults first) and provenance, as HTML."""
    config, environment = flatten(_config(opened)), _environment(opened)
    last = opened.latest()
    entries = list(opened.read_metrics(("train/loss", BOUND, "train/perplexity", "tokens", "tokens_per_s")))
    return render(
        "run.html",
        name=name,
        open=unfolded,
        sentence=_sentence(config, last),
        facts=_facts(config, entries, _parameters(environment, last)),
        differences=_differences(opened),
        config=config,
        parent=environment.get("forked_from") or environment.get("replay_of"),
        provenance=_provenance(environment, opened, last),
    )


def _config(opened: Run) -> dict[str, Any]:
    try:
        return opened.config
    except StoreError:
        return {}  # runs written by other programs may have none


def _environment(opened: Run) -> dict[str, Any]:
    try:
        return opened.environment
    except StoreError:
        return {}


def _sentence(config: dict[str, Any], last: Checkpoint | None) -> str:
    model, data = config.get("model.model_type", "a model"), config.get("data.dataset.name")
    anatomy = _anatomy(config, last)
    numbers = {"layers": anatomy.layers, "dimensions": anatomy.width, "heads": anatomy.heads}
    shape = [f"{number:,} {words}" for words, number in numbers.items() if number is not None]
    trained = f", trained to step {last.step:,}" if last is not None else ", not trained yet"
    return f"{model} of {', '.join(shape) or 'unknown shape'}{trained}" + (f" on {data}" if data else "")


def _anatomy(config: dict[str, Any], last: Checkpoint | None) -> Anatomy:
    section = {key.removeprefix("model."): value for key, value in config.items() if key.startswith("model.")}
    try:
        return stated_anatomy(section, "") if last is None else read_anatomy(last, section, str(last.path))
    except PicoError:
        return Anatomy()  # written by another program, without a description


def _facts(config: dict[str, Any], entries: list[dict[str, Any]], parameters: int) -> list[tuple[str, str, str]]:
    """Return (value, what it is, a remark) for all that is known. parameters: their number, 0 for an unknown one."""
    losses = [(entry["step"], entry["train/loss"], entry) for entry in entries if "train/loss" in entry]
    tokens = [(entry["tokens"], entry["step"]) for entry in entries if "tokens" in entry]
    speeds = [
        (entry["tokens"], entry["tokens_per_s"]) for entry in entries if "tokens" in entry and "tokens_per_s" in entry
    ]
    facts: list[tuple[str, str, str]] = []
    if parameters:
        facts.append((f"{parameters:,}", "parameters", ""))
    if tokens:
        rows, length = config.get("data.dataloader.batch_size"), config.get("model.max_seq_len")
        each = f", {rows * length:,} in each" if isinstance(rows, int) and isinstance(length, int) else ""
        facts.append((f"{max(tokens)[0]:,}", "tokens trained on", f"by step {max(tokens)[1]:,}{each}"))
    if losses:
        step, loss, entry = losses[-1]
        known = loss < 700 and "train/perplexity" in entry  # a loss that is not a likelihood has no perplexity
        perplexity = f"perplexity {math.exp(loss):,.1f}, at step {step:,}" if known else f"at step {step:,}"
        what = "bound of the training loss" if BOUND in entry else "training loss"
        facts.append((f"{loss:.3f}", f"{what}, nats per token", perplexity))
    if len(speeds) > 1:
        seconds = sum((after - before) / speed for (before, _), (after, speed) in pairwise(speeds) if speed > 0)
        facts.append((duration(seconds), "of training", "from the logged speeds"))
        middle = sorted(speed for _, speed in speeds)[len(speeds) // 2]
        facts.append((f"{middle:,.0f}", "tokens per second", "median"))
    return facts


def _parameters(environment: dict[str, Any], last: Checkpoint | None) -> int:
    """Return the number of parameters as recorded by the run: tied ones, which are stored under two names, count once."""
    recorded = (environment.get("model") or {}).get("parameters")
    if isinstance(recorded, int):
        return recorded
    if not isinstance(last, SealedCheckpoint):
        return 0
    return sum(math.prod(last.record(address).shape) for address in last.select(kind="weights"))


def _differences(opened: Run) -> list[tuple[str, Any, Any]]:
    """Return (key, value, default); empty if the defaults are not available (the architecture is not installed or not
    trusted), or are not those of this model (a series of transformers).
    """
    from picolm.schema import mark_untrusted
    from picolm.train.config import differences, schema_for

    config = _config(opened)
    if isinstance(opened, Series):
        return []
    try:
        found = differences(config, schema_for(mark_untrusted(config, str(opened.path))))
    except (PicoError, ValueError):
        return []
    return [(key, *pair) for key, pair in found.items() if key.rpartition(".")[2] not in EXPECTED]


def _provenance(environment: dict[str, Any], opened: Run, last: Checkpoint | None) -> list[tuple[str, str]]:
    lines = [(name, version) for name, version in (environment.get("packages") or {}).items()]
    packages = ", ".join(f"{name} {version}" for name, version in lines)
    hardware = environment.get("hardware") or {}
    devices = ", ".join(map(str, hardware.get("gpus") or [])) or hardware.get("cpu", "")
    seeds = ", ".join(f"{name} {seed}" for name, seed in (environment.get("seeds") or {}).items())
    data = environment.get("data") or {}
    starts = [f"step {start.get('step')} at {start.get('time')}" for start in environment.get("starts") or []]
    digest = last.manifest.digest if isinstance(last, SealedCheckpoint) else ""
    found = {
        "place": str(opened.path),
        "python": environment.get("python", ""),
        "versions": packages,
        "hardware": f"{devices}, {environment.get('world_size', 1)} process(es)" if devices else "",
        "seeds": seeds,
        "data": f"{data.get('rows', 0):,} rows, fingerprint {data.get('fingerprint')}" if data else "",
        "tokenizer (sha-256)": environment.get("tokenizer_sha256") or "",
        "started": "; ".join(starts),
        f"digest of step {last.step}" if last is not None else "digest": digest,
    }
    return [(key, str(value)) for key, value in found.items() if value]
