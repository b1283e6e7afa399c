"""The training state at step n: weights, optimizer moments and a few counters. All else is a function of the step.

The state of random generators is not part of it: each step uses generators derived from (seed, step). A run is created,
or resumed from its latest complete checkpoint, bit for bit.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from picolm.address import Address
from picolm.capture.taps import laid_out_like, whole_tensors
from picolm.errors import PicoError
from picolm.models import MODELS
from picolm.schema import declared_keys, flatten, on_resume, plain
from picolm.store import Checkpoint, Directories, Run
from picolm.store.manifest import OPTIMIZER, WEIGHTS
from picolm.store.writer import Retention
from picolm.train.config import TrainConfig, completed, schema_for, with_roles
from picolm.train.metrics import Meters

log = logging.getLogger("picolm")


@dataclass
class State:
    """The state after `step` updates. `model` and `optimizers` are not wrapped by Fabric.

    Methods return complete tensors, never shards, for any number of processes. All processes must call `weights` and
    `moments` together; if the model is sharded, only the first process receives the tensors.
    """

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    meters: Meters = field(default_factory=Meters)
    own_rates: bool = True  # False for runs of earlier versions: every parameter group had the rate of the schedule

    def weights(self) -> dict[Address, Tensor]:
        """Return the parameters and persistent buffers by address."""
        return whole_tensors({weight_address(name): tensor for name, tensor in self.model.state_dict().items()})

    def moments(self) -> dict[Address, Tensor]:
        """Return the optimizer state of each parameter by address, except for scalars (see `meta`)."""
        held = {
            Address(kind, "", weight_address(name).module): value
            for name, kind, value in self._optimizer_entries()
            if value.ndim
        }
        return whole_tensors(held)

    def meta(self) -> dict[str, Any]:
        """Return the counters and the optimizer scalars as JSON values, for `restore`."""
        scalars = {f"{kind}.{name}": value.item() for name, kind, value in self._optimizer_entries() if not value.ndim}
        return {
            "step": self.step,
            "skipped_updates": self.skipped_updates,
            "skipped_in_a_row": self.skipped_in_a_row,
            "optimizer_scalars": scalars,
            "meters": self.meters.meta(),
            "own_rates": self.own_rates,
        }

    def restore(self, tensors: Mapping[Address, Tensor], meta: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint. Raises PicoError if its tensors do not fit this model or its optimizers."""
        self.restore_weights(tensors)
        self._restore_moments(tensors, meta["optimizer_scalars"])
        self.step = meta["step"]
        self.skipped_updates = meta["skipped_updates"]
        self.skipped_in_a_row = meta["skipped_in_a_row"]
        self.meters.restore(meta["meters"])
        self.own_rates = meta.get("own_rates", False)

    def restore_weights(self, tensors: Mapping[Address, Tensor]) -> None:
        """Load only the weights of a checkpoint. Raises PicoError if they do not fit this model."""
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                whole = _fitting(tensors, weight_address(name), tensor.shape).to(tensor.device, tensor.dtype)
                tensor.copy_(laid_out_like(whole, tensor))

    def _restore_moments(self, tensors: Mapping[Address, Tensor], scalars: Mapping[str, float]) -> None:
        held: dict[str, dict[str, Tensor]] = {}
        for key, value in scalars.items():
            kind, _, name = key.partition(".")
            held.setdefault(name, {})[kind] = torch.tensor(value, dtype=torch.float32)
        names = {weight_address(name).module: name for name, _ in self.model.named_parameters()}
        for address in tensors:
            if address.kind != "weights" and not address.split and address.module in names:
                held.setdefault(names[address.module], {})[address.kind] = tensors[address]
        optimizer_of = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for name, parameter in self.model.named_parameters():
            if name in held:
                if parameter not in optimizer_of:
                    raise PicoError(
                        f"the checkpoint holds {', '.join(held[name])} of {name}, a parameter that no optimizer has now: "
                        "it was made with another optimizer; choose another checkpointing.run_name"
                    )
                state = {kind: value.to(parameter.device, copy=True) for kind, value in held[name].items()}
                optimizer_of[parameter].state[parameter] = {
                    kind: laid_out_like(value, parameter) if value.ndim else value for kind, value in state.items()
                }

    def _optimizer_entries(self) -> list[tuple[str, str, Tensor]]:
        """Return (parameter name, kind, value) of every tensor in the optimizer state, in the order of the parameters."""
        held = {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}
        return [
            (name, kind, value)
            for name, parameter in self.model.named_parameters()
            for kind, value in held.get(parameter, {}).items()
            if isinstance(value, Tensor)
        ]


def outline(config: Any, most: int, where: str) -> Any:
    """Return the model of `config` on the meta device, where it takes no memory for any size in the configuration.

    most: the number of stored tensors. where: the checkpoint, for messages. Raises PicoError if the model has clearly
    more tensors than `most`, or cannot be built.
    """
    try:
        with torch.device("meta"), bounded(most, where):
            return MODELS.get(config.model_type)(config)
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PicoError(f"{where}: the model of the configuration cannot be built: {reason}") from error


@contextmanager
def bounded(most: int, where: str) -> Iterator[None]:
    """Raise PicoError when clearly more parameters are registered in the block than `most`, the number of stored tensors."""
    registered = 0

    def count(module: torch.nn.Module, name: str, parameter: Any) -> None:
        nonlocal registered
        registered += 1
        if registered > 2 * most + 100:  # tied parameters are registered more than once
            raise PicoError(
                f"{where}: the configuration describes a model of more tensors than the {most} that there are"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def check_sizes(config: Any, checkpoint: Checkpoint) -> list[str]:
    """Compare the shapes of the model of `config` with a checkpoint. Returns the names in the state_dict of the model.

    Reads no weights and takes no memory for the model. Raises PicoError if a stored tensor has another shape.
    """
    stored = checkpoint.select(kind="weights")
    entries = outline(config, len(stored), str(checkpoint.path)).state_dict()
    for name, shape in ((name, tuple(entry.shape)) for name, entry in entries.items()):
        address = weight_address(name)
        if address in stored and shape != checkpoint.shape(address):
            raise PicoError(
                f"{checkpoint.path}: {name} is stored as {list(checkpoint.shape(address))}; the model section of the "
                f"configuration describes {list(shape)}"
            )
    return list(entries)


def weight_address(parameter_name: str) -> Address:
    """Return the address of a parameter: the name of its module, plus the parameter's own name unless that is `weight`."""
    return Address("weights", "", parameter_name.removesuffix(".weight"))


def _fitting(tensors: Mapping[Address, Tensor], address: Address, shape: torch.Size) -> Tensor:
    if address not in tensors:
        raise PicoError(f"the checkpoint does not hold {address}: it was made by another model")
    if tensors[address].shape != shape:
        raise PicoError(
            f"{address} has shape {tuple(tensors[address].shape)} in the checkpoint and {tuple(shape)} in this model; "
            "use the model section of the run's training_config.yaml, or another checkpointing.run_name"
        )
    return tensors[address]


FORKED = "forked_from"  # key in environment.json: the run and step that the first checkpoint of a fork comes from
_DECLARED = declared_keys(TrainConfig)


def open_run(config: TrainConfig, environment: dict[str, Any], stack: ExitStack, writes: bool) -> Run:
    """Open the folder of the run, or create it. Returns the run, locked until `stack` closes if this process `writes`.

    Raises PicoError if the folder holds another experiment, or holds a run and auto_resume is false.
    """
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
    """Load the newest complete resumable checkpoint into `state`. Returns its step, or None for a start from step 0.

    If this process `writes`, it also applies retention and records the start in the run. Raises PicoError for a fork
    without its first checkpoint.
    """
    checkpoint, problems = run.latest_whole(accept=resumable)
    for problem in problems:
        log.warning("Damaged checkpoint: %s", problem)
    if checkpoint is not None:
        state.restore(checkpoint, checkpoint.meta)
        if state.skipped_in_a_row >= config.training.max_skipped_steps:
            state.skipped_in_a_row = 0  # these skipped updates stopped the run, so counting starts again
        log.info("Continuing %s from step %d.", run.path, checkpoint.step)
        if writes:  # the process may have been killed after a save, before retention was applied
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
    if writes and not finished:  # a finished run is not changed
        _record_start(run, config, environment, state.step)
    return checkpoint.step if checkpoint is not None else None


def last_finite(run: Run, before: int) -> Checkpoint | None:
    """Return the newest resumable checkpoint before step `before` with a finite loss and gradient norm, or None."""

    def accept(checkpoint: Checkpoint) -> bool:
        finite = all(math.isfinite(float(checkpoint.meta.get(name) or 0.0)) for name in ("loss", "gradient_norm"))
        return checkpoint.step < before and resumable(checkpoint) and finite

    found, _ = run.latest_whole(False, accept)
    return found


def resumable(checkpoint: Checkpoint) -> bool:
    """Return whether training can resume from a checkpoint: it still holds both weights and optimizer state."""
    return bool(checkpoint.meta.get("resumable")) and not {WEIGHTS, OPTIMIZER} & checkpoint.dropped


def retention(config: TrainConfig, run: Run) -> Retention:
    """Return the retention of a run: the rules of `checkpointing.keep` for its older checkpoints."""
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
    known = (before := before or {}).get("fingerprint")  # a fork that has not started yet has none
    if known and known != now["fingerprint"]:
        canaries = " and data.canaries to the same rows" if config.data.canaries else ""
        raise PicoError(
            f"{run.path} was trained on other data: fingerprint {known[:12]}… ({before.get('rows')} rows of "
            f"{before.get('name')}), now {now['fingerprint'][:12]}… ({now['rows']} rows of {now['name']}). Point "
            f"data.dataset.name to the same data{canaries}, or choose another checkpointing.run_name"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (value before, value now)} for the values that differ, except keys that are ignored or kept on resume.

    A key that is missing in `before` counts as its default: `before` was written by a version without the key.
    """
    old, new = completed(before, schema_for(now)), with_roles(flatten(now))
    keys = [key for key in dict.fromkeys([*flatten(before), *new]) if on_resume(key, _DECLARED) in ("noted", "refused")]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def changes_of_experiment(changed: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Return the changes that are not allowed within a run, because they make another experiment."""
    return {key: pair for key, pair in changed.items() if on_resume(key, _DECLARED) == "refused"}


def _record_start(run: Run, config: TrainConfig, environment: dict[str, Any], step: int) -> None:
    """Record the time, the environment and the changed keys of this start in the run. Deletes metrics from `step` on,
    which training writes again.
    """
    changed = changes(run.config, plain(config))
    for key, (old, new) in changed.items():
        log.warning("%s was %r in this run until now and is %r from step %d on.", key, old, new, step)
    then, now = run.environment.get("hardware", {}).get("threads"), environment["hardware"]["threads"]
    if step and then and then != now:
        log.info(
            "This run was computed with %d thread(s) until now and is with %d from step %d on: sums on a CPU round "
            "differently. OMP_NUM_THREADS=%d keeps its bits.", then, now, step, then,
        )  # fmt: skip
    kept = {key: value for key, value in run.environment.items() if key == FORKED}
    starts = run.environment.get("starts") or []
    start = {"step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "changed": changed}
    run.write_environment(kept | environment | {"starts": [*starts, start | {"packages": environment["packages"]}]})
    run.write_config(_with_folders_of(run, plain(config)))
    run.truncate_metrics(step - 1)


def _with_folders_of(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """Put the folder names that the run was created with into `config`; log each change. Returns `config`."""
    chosen = config["checkpointing"]
    for section, names in ((chosen, asdict(run.directories)), (chosen["evaluation"], asdict(run.directories))):
        for key, name in names.items():
            if key in section and section[key] != name:
                log.info("%s stays %r, not %r: folders get their names when a run is created.", key, name, section[key])
                section[key] = name
    return config
