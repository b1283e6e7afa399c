"""Record a run of Lightning's Trainer: `Trainer(…, callbacks=[RecorderCallback("runs/mine")])`."""

from contextlib import AbstractContextManager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from picolm.errors import PicoError
from picolm.recorder.record import Recorder
from picolm.recorder.subject import token_ids

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback


class RecorderCallback(Callback):
    """Records the steps of a Lightning module; arguments as those of `Recorder`.

    model: the name of the attribute that holds the language model (`model`); the whole module without it. Gradients are those of
    all micro-batches, before Lightning clips them. The rows are the first tensor of token ids in a batch, or its `input_ids`.
    """

    def __init__(self, place: str | Path, model: str = "", **options: Any):
        self._place, self._attribute, self._options = place, model, options
        self._recorder: Recorder | None = None
        self._step: AbstractContextManager[Any] | None = None
        self._rows: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the Recorder. Raises PicoError for a module with several optimizers, whose steps are not one sequence."""
        if len(trainer.optimizers) != 1:
            raise PicoError(f"a module with {len(trainer.optimizers)} optimizers cannot be recorded by this callback")
        model = attrgetter(self._attribute)(pl_module) if self._attribute else pl_module
        last = trainer.estimated_stepping_batches
        self._recorder = Recorder(
            self._place,
            model,
            trainer.optimizers[0],
            log_every_n_steps=trainer.log_every_n_steps or 100,
            last=int(last) if 0 < last < 2**62 else None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **self._options,
        )

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a step with its first micro-batch, and note the rows of each."""
        if self._recorder is None:
            return
        if self._step is None:
            self._step = self._recorder.step(trainer.global_step)
            self._rows = self._step.__enter__()
        rows = _rows(batch)
        if rows is not None:
            self._rows.append(rows)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Record what all micro-batches of the step have left."""
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss of the step that has just ended, that of its last micro-batch."""
        done = trainer.global_step - 1
        if self._recorder is not None and self._step is None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if isinstance(loss, Tensor):
                self._recorder.log(done, {"train/loss": loss.detach() * trainer.accumulate_grad_batches})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the state after the last update."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()


def _rows(batch: Any) -> Tensor | None:
    held = [batch.get("input_ids")] if hasattr(batch, "get") else batch if isinstance(batch, list | tuple) else [batch]
    return token_ids(held)
