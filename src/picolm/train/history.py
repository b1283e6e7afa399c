"""The history of a run: its configuration at each step, its recorded digests, and the checkpoints to replay from."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from picolm.errors import PicoError
from picolm.schema import load, plain
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import stored_weights_digest
from picolm.store.manifest import CONFIG
from picolm.train import devices
from picolm.train.config import TrainConfig, schema_for
from picolm.train.state import changes, resumable

# Keys that set where to compute or what to record, and do not change the result of training.
ELSEWHERE = (
    "training.fabric.",
    "training.deterministic",
    "data.dataset.name",
    "data.dataset.cache_dir",
    "data.canaries",  # files may have moved; the fingerprint of the data tells other rows, or steps, from these
    "data.tokenizer.name",
    "checkpointing.learning_dynamics.",
    "monitoring.",
)


class Segment(NamedTuple):
    """A range of steps of a run, first to last, that were trained with one configuration."""

    config: TrainConfig
    first: int
    last: int


def own_run(place: str) -> Run:
    """Return the run at `place`. Raises PicoError if another tool wrote it: such runs lack what a replay needs."""
    run = Run.open(place)
    if type(run) is not Run:
        raise PicoError(f"{place}: only runs of picolm can be trained on exactly; this one was written by another tool")
    return run


def last_step(run: Run) -> int:
    """Return the last step that has a checkpoint or a line of metrics; 0 if there is none."""
    return max([*run.steps, *(entry["step"] for entry in run.read_metrics(("step",))), 0])


def check_trained(run: Run, step: int) -> None:
    """Raise PicoError for a step that the run never reached."""
    last = last_step(run)
    if not 0 <= step <= last:
        raise PicoError(f"{run.path} has been trained up to step {last}; there is no step {step} to make again")


def check_same_data(run: Run, fingerprint: str, config: TrainConfig) -> None:
    """Raise PicoError if the data are not those that the run was trained on, or if the run does not record its data."""
    before = (run.environment.get("data") or {}).get("fingerprint")
    if before is None:
        raise PicoError(
            f"{run.path}: environment.json says nothing of the data of the run; it cannot be trained on exactly"
        )
    if fingerprint != before:
        canaries = " and the same canaries with data.canaries=…" if config.data.canaries else ""
        raise PicoError(
            f"{run.path} was trained on other data than {config.data.dataset.name} holds now (fingerprint {before[:12]}…, "
            f"now {fingerprint[:12]}…); name the same data with data.dataset.name=…{canaries}"
        )


def origin(run: Run, step: int) -> Checkpoint:
    """Return the newest complete checkpoint at or before `step` that training can resume from.

    Raises PicoError if there is none.
    """
    found, problems = run.latest_whole(accept=lambda checkpoint: checkpoint.step <= step and resumable(checkpoint))
    if found is None:
        damaged = "".join(f"\n  {problem}" for problem in problems)
        raise PicoError(f"{run.path} has no whole checkpoint with optimizer state up to step {step}{damaged}")
    return found


def stored_with(run: Run, overrides: Sequence[str], recorded: Sequence[str] = ()) -> TrainConfig:
    """Return the stored configuration of a run, changed by two lists of `key=value` pairs, `overrides` last.

    `recorded` comes from the run, `overrides` from the user. Names of code are trusted only in `overrides`.
    """
    return load(run.path / CONFIG, schema_for, overrides, within=run.path, recorded=recorded)


def config_at(run: Run, step: int, overrides: Sequence[str] = ()) -> TrainConfig:
    """Return the configuration that was used for the update from `step`, with `key=value` overrides.

    Each start of a run records the keys that it changed; the changes of later starts are undone.
    """
    starts = run.environment.get("starts") or []
    undone: dict[str, Any] = {}
    for start in reversed(starts[_deciding(starts, step) + 1 :]):
        undone |= {key: old for key, (old, _) in start.get("changed", {}).items()}
    return stored_with(run, overrides, [f"{key}={json.dumps(value)}" for key, value in undone.items()])


def same_elsewhere(run: Run, step: int, overrides: Sequence[str]) -> TrainConfig:
    """Return `config_at`, with overrides only for where to compute and what to record. Raises PicoError for other keys."""
    config = config_at(run, step, overrides)
    changed = changes(plain(config_at(run, step)), plain(config)) if overrides else {}
    refused = [key for key in changed if not key.startswith(ELSEWHERE)]
    if refused:
        raise PicoError(
            f"{', '.join(refused)}: a step is made again as it was; for something else from there on, see `pico fork`"
        )
    return config


def segments(run: Run, first: int, last: int, overrides: Sequence[str] = ()) -> Iterator[Segment]:
    """Yield the segments from `first` to `last`, each with one configuration. Neighbours share the step between them."""
    starts = run.environment.get("starts") or []
    turns = sorted({start["step"] for start in starts if first < start["step"] < last})
    changed = [step for step in turns if _deciding(starts, step) != _deciding(starts, step - 1)]
    for start, end in zip([first, *changed], [*changed, last]):
        yield Segment(same_elsewhere(run, start, overrides), start, end)


def recorded_digests(run: Run) -> dict[int, str]:
    """Return the digest of the weights by step, for all steps where it was logged or the weights are stored."""
    logged = {entry["step"]: entry["weights_digest"] for entry in run.read_metrics(("weights_digest",))}
    stored = {step: stored_weights_digest(run[step]) for step in run}
    return dict(sorted((logged | {step: digest for step, digest in stored.items() if digest}).items()))


def _deciding(starts: Sequence[dict[str, Any]], step: int) -> int:
    """Return the index of the start that made the update from `step`: the latest one at or before it; -1 if none."""
    return max((i for i, start in enumerate(starts) if start["step"] <= step), default=-1)


def parse_steps(text: str) -> list[int]:
    """Return the steps named by `7`, `5,9,20`, `100:200` (both ends included) or `100:200:10`.

    Raises PicoError for anything else.
    """
    try:
        if ":" in text:
            first, last, *every = map(int, text.split(":"))
            (stride,) = every or [1]
            steps = list(range(first, last + 1, stride)) if stride > 0 else []
        else:
            steps = sorted({int(word) for word in text.split(",")})
    except ValueError:
        steps = []
    if not steps or steps[0] < 0:
        raise PicoError(f"{text!r} names no steps; expected N, N,M,… , FIRST:LAST or FIRST:LAST:EVERY")
    return steps


def relative_difference(weights: dict[Any, Any], checkpoint: Checkpoint) -> float:
    """Return norm(W - W_stored) / norm(W_stored) over all weights together, computed in float64."""
    change = size = 0.0
    for address, tensor in weights.items():
        stored = checkpoint[address].double()
        change += float((tensor.detach().cpu().double() - stored).square().sum())
        size += float(stored.square().sum())
    return math.sqrt(change / size) if size else math.inf


def circumstances(run: Run) -> str:
    """Return one line with the packages and hardware that differ from those of the run: why bits may differ."""
    then: dict[str, Any] = run.environment
    now: dict[str, dict[str, Any]] = {"packages": devices.package_versions(), "hardware": devices.hardware()}
    message = [
        f"{name}: {before} then, {after} now"
        for part in ("packages", "hardware")
        for name, after in now[part].items()
        if (before := (then.get(part) or {}).get(name)) != after
    ]
    return "; ".join(message) if message else "The packages and the hardware are those of the run."


def place_of(run: Run) -> str:
    """Return the absolute path of a run, for the records of runs made from it."""
    return str(Path(run.path).resolve())
