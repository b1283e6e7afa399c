"""Record a run of transformers' Trainer: `Trainer(…, callbacks=[RecorderCallback("runs/mine")])`."""

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from picolm.errors import PicoError
from picolm.readers.series import LOGGED
from picolm.recorder.record import Recorder


class RecorderCallback(TrainerCallback):
    """Records the steps of a Trainer; arguments as those of `Recorder`.

    Gradients are those that the optimizer gets: of all micro-batches, after the clipping that `max_grad_norm` asks for, which the
    manifest of each step notes; `max_grad_norm=0` asks for none.
    """

    def __init__(self, place: str | Path, **options: Any):
        self._place, self._options = place, options
        self._recorder: Recorder | None = None
        self._step: AbstractContextManager[Any] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the Recorder. Raises PicoError where activations are asked for that `torch_compile` hides."""
        what = (self._options.get("learning_dynamics") or {}).get("what", ("activations", "gradients"))
        if args.torch_compile and "activations" in what:
            raise PicoError(
                "torch_compile: the Trainer compiles its model out of sight of callbacks, so activations cannot be captured; "
                "record with learning_dynamics={'what': ['gradients']}, or compile the model before it is given to the Trainer"
            )
        self._recorder = Recorder(
            self._place,
            kwargs["model"],
            kwargs["optimizer"],
            log_every_n_steps=int(args.logging_steps) if args.logging_steps >= 1 else 100,
            last=state.max_steps,
            clipped=bool(args.max_grad_norm),
            files=_tokenizer(kwargs.get("processing_class")),
            **self._options,
        )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to record the step after `global_step` updates."""
        if self._recorder is not None:
            self._step = self._recorder.step(state.global_step)
            self._step.__enter__()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record what all micro-batches of the step have left."""
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(None, None, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the loss, the mean over the steps since it was logged before, and the norm of the gradient before clipping.

        The Trainer counts the update that it has made; the loss and the gradient are those of the step before it.
        """
        numbers = {key: value for key, value in (logs or {}).items() if type(value) in (int, float)}
        own = {} if args.max_grad_norm else {"grad_norm"}  # the Recorder logs it, and the rate of the step
        named = {LOGGED.get(key, f"trainer/{key}"): value for key, value in numbers.items() if key not in own}
        named.pop("lr", None)
        if self._recorder is not None and named:
            self._recorder.log(max(state.global_step - 1, 0), named, always=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the state after the last update."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()


def _tokenizer(given: Any) -> dict[str, str | bytes]:
    """Return the files of the Trainer's tokenizer, none where it has none that is read without code."""
    if not hasattr(given, "backend_tokenizer"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        given.save_pretrained(folder)
        found = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
        return {file.name: file.read_bytes() for file in found if file.is_file()}
