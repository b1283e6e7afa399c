"""Runs made from steps of another run: a fork continues from a step with changes, a collection holds replayed steps."""

import json
from collections.abc import Sequence
from pathlib import Path

from picolm.errors import PicoError
from picolm.schema import flatten, plain, refuse_untrusted
from picolm.store import Run
from picolm.store.checkpoint import stored_weights_digest
from picolm.store.folders import new_folder
from picolm.train.config import TrainConfig
from picolm.train.history import check_trained, config_at, place_of, same_elsewhere
from picolm.train.job import Due
from picolm.train.replay import UNUSED, replay
from picolm.train.state import FORKED, changes, directories

COLLECTED = "replay_of"  # key in environment.json of a collection: the run that its steps belong to
SHAPED = ("model.", "training.optimization.optimizer")  # keys a fork cannot change: the state would no longer fit
# Keys that send data elsewhere. A fork starts with their defaults, because the parent may be somebody else's run.
SENDING = (
    "checkpointing.save_to_hf",
    "checkpointing.hf_checkpoint.repo_id",
    "checkpointing.hf_checkpoint.collection_slug",
    "monitoring.save_to_wandb",
    "monitoring.wandb.project",
    "monitoring.wandb.entity",
)


def fork(run: Run, step: int, name: str, overrides: Sequence[str]) -> TrainConfig:
    """Create a run `name` next to `run`, with the state at `step` as first checkpoint. Returns its configuration.

    overrides: `key=value` pairs; everything except the model and the kind of optimizer may change. The keys in
    `SENDING` are not inherited: they have their defaults unless an override sets them.
    Raises PicoError if an override changes the model or the optimizer, for a name that is taken, and for a step that
    was never trained.
    """
    check_trained(run, step)
    defaults = flatten(plain(TrainConfig()))
    folder = {"checkpointing.run_name": name, "checkpointing.runs_dir": str(run.path.parent)}
    fresh = folder | {key: defaults[key] for key in SENDING}
    words = [f"{key}={json.dumps(value)}" for key, value in fresh.items()]
    config = config_at(run, step, [*words, *overrides])
    refuse_untrusted(config)
    changed = changes(plain(config_at(run, step)), plain(config))
    refused = [key for key in changed if key.startswith(SHAPED)]
    if refused:
        raise PicoError(
            f"{', '.join(refused)}: a fork goes on with the weights and moments of {run.path}; it cannot change them"
        )
    if config.training.max_steps < step:
        raise PicoError(f"training.max_steps is {config.training.max_steps}: there is nothing to do after step {step}")
    parent = {"run": run.name, "path": place_of(run), "step": step, "changed": changed}
    path = Path(config.checkpointing.runs_dir).expanduser() / name
    with new_folder(path, "the fork") as partial:  # kept only if its first step is complete
        made = Run.create(partial, plain(config), {"starts": [], FORKED: parent}, directories(config), name)
        verdict = replay(run, [step], kinds=Due(weights=True, optimizer=True), destination=made, about={FORKED: parent})
        if verdict.stopped is not None:
            raise KeyboardInterrupt
        parent["weights_digest"] = stored_weights_digest(made[step])
        made.write_environment(made.environment | {FORKED: parent})
    return config


def not_inherited(made: Run) -> list[str]:
    """Return the keys of `SENDING` that the parent of a fork had set and the fork did not inherit."""
    defaults, changed = flatten(plain(TrainConfig())), made.environment[FORKED]["changed"]
    return [key for key in SENDING if key in changed and changed[key][1] == defaults[key]]


def collection(run: Run, out: Path, step: int, overrides: Sequence[str]) -> Run:
    """Open the collection at `out`, the run that holds replayed steps of `run`; create it if there is none. Returns it.

    Raises PicoError if `out` holds another run.
    """
    config = same_elsewhere(run, step, overrides)
    refuse_untrusted(config, but=UNUSED)
    if not (out / "run.json").exists():
        environment = {key: value for key, value in run.environment.items() if key not in ("starts", FORKED)}
        source = {"run": run.name, "path": place_of(run)}
        with new_folder(out, "the replayed steps") as partial:
            Run.create(
                partial, plain(config), environment | {COLLECTED: source}, directories(config), out.resolve().name
            )
    found = Run.open(out)
    of = found.environment.get(COLLECTED)
    if of is None or of["run"] != run.name or found.environment.get("data") != run.environment.get("data"):
        raise PicoError(f"{out} holds another run; choose another folder with --out")
    return found
