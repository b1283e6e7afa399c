"""Opening the folder of a run: a new one, or one that goes on from its latest whole checkpoint with identical results."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from picolm.errors import PicoError
from picolm.schema import flatten, plain
from picolm.store import Checkpoint, Directories, Run
from picolm.store.layout import OPTIMIZER, WEIGHTS
from picolm.store.retention import Retention
from picolm.train.config import TrainConfig
from picolm.train.state import State

log = logging.getLogger("picolm")

# What makes another experiment of a run. Where the data lie may change; what they are is told by their fingerprint.
FIXED = ("model.", "data.", "training.seeds.", "training.optimization.optimizer")
FREE = ("data.dataset.name", "data.dataset.cache_dir", "data.tokenizer.name", "model.batch_size")
FORKED = "forked_from"  # in the environment of a run: the run and step that its first checkpoint comes from
UNIMPORTANT = ("checkpointing.runs_dir", "checkpointing.run_name")


def open_run(config: TrainConfig, environment: dict[str, Any], stack: ExitStack, writes: bool) -> Run:
    """The folder of the run, locked for this process where it `writes`. Raises PicoError where it holds another experiment."""
    path = Path(config.checkpointing.runs_dir).expanduser() / str(config.checkpointing.run_name)
    if not (path / "run.json").exists():
        if writes:
            Run.create(path, plain(config), environment | {"starts": []}, directories(config))
    elif not config.checkpointing.training.auto_resume:
        raise PicoError(
            f"{path} holds a run already and checkpointing.training.auto_resume is false; choose another "
            "checkpointing.run_name, or let it continue"
        )
    run = Run.open(path)
    _check_same_experiment(run, config, environment)
    if writes:
        stack.enter_context(run.lock())
    return run


def restore(config: TrainConfig, environment: dict[str, Any], run: Run, state: State, writes: bool) -> int | None:
    """Bring `state` to the newest whole checkpoint that training can go on from; returns its step, None for a fresh start."""
    checkpoint, problems = run.latest_whole(accept=resumable)
    for problem in problems:
        log.warning("Damaged checkpoint: %s", problem)
    if checkpoint is not None:
        state.restore(checkpoint, checkpoint.meta)
        log.info("Continuing %s from step %d.", run.path, checkpoint.step)
        if writes:  # a kill between a save and what follows it, perhaps the last one
            retention(config, run).apply(checkpoint.step)
    elif FORKED in run.environment:
        raise PicoError(
            f"{run.path} is a fork whose first checkpoint is not there or not whole; delete the folder and fork again"
        )
    elif problems or run.steps:
        log.warning(
            "%s holds no whole checkpoint with weights and optimizer state; starting again from step 0.", run.path
        )
    finished = checkpoint is not None and checkpoint.step >= config.training.max_steps
    if writes and not finished:  # a finished run is left as it is
        _record_start(run, config, environment, state.step)
    return checkpoint.step if checkpoint is not None else None


def resumable(checkpoint: Checkpoint) -> bool:
    """Whether training can go on from it: it was saved with weights and optimizer state, and still has them."""
    return bool(checkpoint.meta.get("resumable")) and not {WEIGHTS, OPTIMIZER} & checkpoint.dropped


def retention(config: TrainConfig, run: Run) -> Retention:
    """What becomes of the older checkpoints of a run."""
    return Retention(run, plain(config.checkpointing.keep), resumable)


def directories(config: TrainConfig) -> Directories:
    names = config.checkpointing
    return Directories(
        checkpoints_dir=names.checkpoints_dir,
        learning_dynamics_dir=names.learning_dynamics_dir,
        eval_results_dir=names.evaluation.eval_results_dir,
        logs_dir=names.logs_dir,
    )


def _check_same_experiment(run: Run, config: TrainConfig, environment: Mapping[str, Any]) -> None:
    changed = changes(run.config, plain(config))
    refused = changes_of_experiment(changed)
    if refused:
        lines = [f"  {key}: {old!r} in the run, {new!r} now" for key, (old, new) in refused.items()]
        raise PicoError(
            f"{run.path} is another experiment; these keys cannot change within a run:\n" + "\n".join(lines) + "\n"
            "Choose another checkpointing.run_name, or put these values back"
        )
    before, now = run.environment.get("data"), environment["data"]
    if before and before["fingerprint"] != now["fingerprint"]:  # a fork that has not started yet has none
        raise PicoError(
            f"{run.path} was trained on other data: fingerprint {before['fingerprint'][:12]}… ({before['rows']} rows of "
            f"{before['name']}), now {now['fingerprint'][:12]}… ({now['rows']} rows of {now['name']}). Point "
            "data.dataset.name to the same data, or choose another checkpointing.run_name"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ: (before, now)."""
    old, new = flatten(before), flatten(now)
    keys = [key for key in dict.fromkeys([*old, *new]) if key not in UNIMPORTANT]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def changes_of_experiment(changed: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Those of the changes that a run cannot go on with."""
    return {key: pair for key, pair in changed.items() if key.startswith(FIXED) and key not in FREE}


def _record_start(run: Run, config: TrainConfig, environment: dict[str, Any], step: int) -> None:
    """Note when, where and with which changed keys this process took over; drop the metrics that will be made again."""
    changed = changes(run.config, plain(config))
    for key, (old, new) in changed.items():
        log.warning("%s was %r in this run until now and is %r from step %d on.", key, old, new, step)
    kept = {key: value for key, value in run.environment.items() if key == FORKED}
    starts = run.environment.get("starts", [])
    start = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed}
    run.write_environment(kept | environment | {"starts": [*starts, start | {"packages": environment["packages"]}]})
    run.write_config(plain(config))
    run.truncate_metrics(step - 1)
