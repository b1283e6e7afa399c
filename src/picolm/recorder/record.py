"""The recorder: what a step of any loop was, kept as a checkpoint of a Pico run.

Step n is the state after n updates, with the gradient of the update that follows, as in the training of Pico. Recording reads
only: with it or without it, the loop ends with the same bytes.
"""

import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture.taps import Captured, Taps, capture, is_first, place_in_batch, world_size
from picolm.errors import PicoError
from picolm.models import Anatomy
from picolm.recorder import subject
from picolm.registry import did_you_mean
from picolm.store import Run
from picolm.store.writer import BackgroundWriter
from picolm.train.config import RECORDED, TrainConfig
from picolm.train.devices import hardware, package_versions, reshard
from picolm.train.job import Due, Plan, taps_of
from picolm.train.metrics import norm
from picolm.train.state import State, retention

OPTIONS = (
    "save_every_n_steps",
    "save_schedule",
    "save_weights",
    "save_optimizer",
    "save_learning_dynamics",
    "keep",
    "save_in_background",
    "learning_dynamics",
)
_ENDLESS = 2**62  # no step of a loop whose end is not known


class Recorder:
    """Records a training loop as a Pico run.

        with Recorder("runs/mine", model, optimizer, save_every_n_steps=100) as recorder:
            for n in range(1000):
                with recorder.step(n, rows):
                    loss = model(rows, targets)
                    loss.backward()
                recorder.log(n, {"train/loss": loss})
                optimizer.step()
                optimizer.zero_grad()

    At steps that are due it keeps weights, optimizer state, the gradients that the block leaves in the parameters, and
    activations of its forward passes. At the end of the `with` it saves the weights after the last update. In a distributed
    loop every process makes a Recorder and calls the same methods; the first one writes.
    """

    def __init__(
        self,
        place: str | Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        log_every_n_steps: int = 100,
        last: int | None = None,
        scaler: Any = None,
        clipped: bool = False,
        files: Mapping[str, str | bytes] | None = None,
        **options: Any,
    ):
        """Create the run at `place`, or open the one that an earlier start of the same loop has recorded there.

        model: as the loop calls it: wrapped in DDP or compiled, or sharded by FSDP2. last: the number of the last step, which is
        saved whatever the cadence is. scaler: the GradScaler of the loop, whose scale is taken out of gradients. clipped: the
        blocks clip gradients before they end, which manifests and the names of metrics say. files: further files of each step
        with weights, by name, such as tokenizer.json. options: keys of the section `checkpointing`, with the same meaning and
        defaults (save_every_n_steps, save_schedule, keep, learning_dynamics: {layer_suffixes, positions, what, …}, …). Raises
        PicoError for options that are not right and for a place that holds another run; StoreError for one that cannot be
        written.
        """
        self._settings = _settings(options, log_every_n_steps, last)
        self._plan = Plan(self._settings)
        self._outer, self._model = model, subject.unwrapped(model)
        optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._state, self._scaler, self._clipped = State(self._model, optimizers), scaler, clipped
        self._files, self._taps = dict(files or {}), self._make_taps()
        self._next: int | None = None
        self._stack = ExitStack()
        self._run: Run | None = None
        self._writer: BackgroundWriter | None = None
        if is_first():
            self._run = self._open(Path(place))
            self._stack.enter_context(self._run.lock())
            self._writer = self._stack.enter_context(BackgroundWriter(self._run, retention(self._settings, self._run)))

    @contextmanager
    def step(self, number: int, rows: Tensor | Sequence[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Record step `number`: put its forward and backward passes, of all micro-batches, inside the block.

        rows: the token ids of this process, [B, T], or one such tensor for each micro-batch. Where they are not given, they are
        those that the model is called with, unless they are appended to the list that is yielded. Raises PicoError if the block
        leaves no gradients, or a module did not run as often as the others.
        """
        self._begin(number)
        due = self._plan.due(number)
        given = [] if rows is None else [rows] if isinstance(rows, Tensor) else list(rows)
        with self._captured(number, given) if due.dynamics else nullcontext(Captured()) as captured:
            yield given
        self._next = number + 1
        if not (due.log or due.checkpoint):
            return
        total = norm(p.grad for p in self._model.parameters() if p.grad is not None) * self._unscale
        if due.log:
            self.log(number, {"grad_norm_clipped" if self._clipped else "grad_norm": total, **self._rates()})
        if due.checkpoint:
            self._save(number, due, captured, given, {} if self._clipped else {"gradient_norm": total})

    def log(self, number: int, values: Mapping[str, float | Tensor], *, always: bool = False) -> None:
        """Append numbers of a step to metrics.jsonl, by name, if logging is due. Reports draw `train/loss` (nats per token).

        always: also at steps where it is not due. A tensor is read only when it is logged.
        """
        self._begin(number)
        if self._run is not None and (always or self._plan.due(number).log):
            read = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
            numbers = {name: float(value) for name, value in read.items()}
            self._run.append_metrics({"step": number} | numbers)

    def close(self, finished: bool = True) -> None:
        """Wait until everything is written. finished: save the weights and optimizer state after the last update first."""
        if finished and self._next is not None:
            self._save(self._next, Due(weights=True, optimizer=True), Captured(), [], {})
            self._next = None
        self._stack.close()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, failed: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if failed is None:
            self.close()
        else:
            self._stack.__exit__(failed, error, trace)

    @contextmanager
    def _captured(self, number: int, given: list[Tensor]) -> Iterator[Captured]:
        compiled = self._taps.activations and subject.is_compiled(self._outer)
        taps = replace(self._taps, activations=self._taps.activations and not compiled)
        with subject.calls(self._outer) as seen, capture(taps, split="train", step=number, order=None) as captured:
            yield captured
        if not given:
            given += [call.rows for call in seen if call.rows is not None]
        if compiled:
            if not seen:
                raise PicoError(
                    "a compiled model was not called in the block; give the Recorder the model that is called"
                )
            taps = replace(self._taps, gradients=False)
            with capture(taps, split="train", step=number, order=None) as activations:
                subject.again(self._model, seen)
            reshard(self._model)
            captured |= activations
            captured.lengths = activations.lengths
        if self._taps.gradients and all(p.grad is None for p in self._model.parameters()):
            raise PicoError(f"step {number}: the block left no gradients; call loss.backward() inside of it")
        if (factor := self._unscale) != 1:
            captured.update({a: tensor * factor for a, tensor in captured.items() if a.kind == "gradients"})

    def _save(self, number: int, due: Due, captured: Captured, rows: list[Tensor], meta: Mapping[str, Any]) -> None:
        tensors: dict[Address, Tensor] = dict(captured)
        if due.weights:
            tensors |= self._state.weights()
        if due.optimizer:
            tensors |= self._state.moments()
        table = self._table(rows) if due.dynamics else {}
        if self._writer is None:
            return
        own = {address._replace(module=subject.own_name(address.module)): held for address, held in tensors.items()}
        self._writer.submit(
            number,
            own,
            meta={
                "step": number,
                "resumable": False,
                "recorded": True,
                "capture": self._positions(number, captured),
                **meta,
            },
            texts=self._texts(due),
            tables={"train": table} if table else {},
            parameters=[subject.own_name(name) for name in self._model.state_dict()],
            about={"gradients": "clipped"} if self._clipped else {},
            replace=True,  # an earlier start of the loop may have been here
        )
        if not self._settings.checkpointing.save_in_background:
            self._writer.wait()

    def _positions(self, number: int, captured: Captured) -> dict[str, list[int] | None] | None:
        if not captured.lengths:
            return None
        found = [self._taps.positions_at(number, length) for length in sorted(captured.lengths)]
        if all(positions == found[0] for positions in found):
            return {"positions": found[0]}
        if isinstance(self._taps.positions, str) and self._taps.positions != "last":
            raise PicoError(
                f"learning_dynamics.positions: {self._taps.positions} means other positions in rows of {min(captured.lengths)} "
                f"and of {max(captured.lengths)} inputs; name them, or take the last one"
            )
        return {"positions": [-1] if self._taps.positions == "last" else [int(p) for p in self._taps.positions]}

    def _table(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """Return the rows of all processes as columns, in the order of the activations; {} where none are known."""
        own = [row.tolist() for micro_batch in rows for row in micro_batch]
        placed = [(place_in_batch(number), row) for number, row in enumerate(own)]
        if world_size() > 1:
            pieces: list[Any] | None = [None] * world_size() if is_first() else None
            dist.gather_object(placed, pieces)
            placed = [pair for piece in pieces or [] for pair in piece]
        limit = self._settings.checkpointing.learning_dynamics.max_rows
        kept = [row for place, row in sorted(placed) if limit is None or place < limit]
        return {"input_ids": kept} if kept else {}

    def _texts(self, due: Due) -> dict[str, str | bytes]:
        known, config = subject.anatomy(self._model), self._config_text()
        texts: dict[str, str | bytes] = {} if known == Anatomy() else {"anatomy.json": known.to_json()}
        return texts | ({"config.json": config} if config else {}) | self._files if due.weights else texts

    def _config_text(self) -> str:
        """Return the config.json of a model of transformers, empty for another one."""
        config: Any = getattr(self._model, "config", None)
        return str(config.to_json_string(use_diff=False)) if hasattr(config, "to_json_string") else ""

    def _begin(self, number: int) -> None:
        """At the first step of this start, drop what an earlier start has logged from there on."""
        if self._next is None:
            self._next = number
            if self._run is not None:
                self._run.truncate_metrics(number - 1)

    @property
    def _unscale(self) -> float:
        return 1.0 if self._scaler is None else 1.0 / float(self._scaler.get_scale())

    def _rates(self) -> dict[str, float]:
        groups = [group for optimizer in self._state.optimizers for group in optimizer.param_groups]
        rates = {f"lr/group {number}": float(group["lr"]) for number, group in enumerate(groups) if "lr" in group}
        return {"lr": next(iter(rates.values()), math.nan)} | (rates if len(set(rates.values())) > 1 else {})

    def _make_taps(self) -> Taps:
        dynamics = self._settings.checkpointing.learning_dynamics
        suffixes = dynamics.layer_suffixes if "layer_suffixes" in dynamics.model_fields_set else None
        return taps_of(dynamics, subject.modules_to_capture(self._model, suffixes, dynamics.layers), seed=0)

    def _open(self, place: Path) -> Run:
        config = self._config_text()
        stated = {"model": json.loads(config)} if config else {}
        if not (place / "run.json").exists():
            environment = {
                "python": platform.python_version(),
                "packages": package_versions(),
                "hardware": hardware(),
                "world_size": world_size(),
                "model": {"parameters": sum(parameter.numel() for parameter in self._model.parameters())},
            }
            return Run.create(place, {RECORDED: {"by": "picolm.Recorder"}, **stated}, environment)
        run = Run.open(place)
        if RECORDED not in run.config:
            raise PicoError(f"{place} holds a run that was not recorded from a loop; choose another place")
        return run


def _settings(options: Mapping[str, Any], log_every_n_steps: int, last: int | None) -> TrainConfig:
    """Return the settings as a configuration. Raises PicoError for an unknown option or a value that cannot be."""
    for name in options:
        if name not in OPTIONS:
            raise PicoError(
                f"Recorder: there is no option {name!r}{did_you_mean(name, OPTIONS)} (there are: {', '.join(OPTIONS)})"
            )
    dynamics = options.get("learning_dynamics") or {}
    if held_out := [name for name in ("eval_data", "batch_size") if name in dynamics]:
        raise PicoError(f"Recorder: learning_dynamics.{held_out[0]}: `pico observe` computes what held-out rows give")
    try:
        return TrainConfig.model_validate(
            {
                "checkpointing": options,
                "training": {"max_steps": _ENDLESS if last is None else last},
                "monitoring": {"logging": {"log_every_n_steps": log_every_n_steps}},
            }
        )
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(map(str, found["loc"][1:] if found["loc"][0] == "checkpointing" else found["loc"][-1:]))
        raise PicoError(f"Recorder: {key}: {found['msg']}") from error
