"""The model of a run while it trains, asked as that of a checkpoint is."""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from picolm.address import Address
from picolm.errors import PicoError
from picolm.models import anatomy_of, find_model
from picolm.observe.architecture import Architecture
from picolm.observe.subject import Subject
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import Missing
from picolm.train.state import weight_address

if TYPE_CHECKING:
    import pyarrow as pa


class LiveArchitecture(Architecture):
    """The architecture of a model that is there."""

    def __init__(self, model: Any):
        self.outline, self.anatomy, self.context = model, anatomy_of(model), model.config.max_seq_len

    def identity(self, step: int) -> str:
        return f"{self.outline.config!r} at step {step}"

    def build(self) -> Any:
        config = self.outline.config
        return find_model(config.model_type)(config).eval()

    def fill(self, model: Any, checkpoint: Checkpoint) -> None:
        model.load_state_dict(self.outline.state_dict())


class LiveCheckpoint(Checkpoint):
    """The weights of a model as they are now, by address; it has no files."""

    def __init__(self, model: nn.Module, run: Run, step: int):
        self.path, self.step = run.step_path(step), step
        self._weights = {weight_address(name): parameter for name, parameter in model.named_parameters()}

    @property
    def meta(self) -> Mapping[str, Any]:
        return {"step": self.step}

    @property
    def files(self) -> Collection[str]:
        return ()

    @property
    def minimum_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights.values())

    def __iter__(self) -> Iterator[Address]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __getitem__(self, address: Address) -> Tensor:
        if address not in self._weights:
            raise Missing(f"the model in training has no {address}")
        return self._weights[address].detach().cpu()

    def read(self, name: str) -> bytes:
        raise Missing(f"the model in training has no {name}")

    def rows(self, split: str) -> "pa.Table":
        raise Missing(f"the model in training has no rows of {split}")

    def digest(self, address: Address) -> str:
        raise Missing("the tensors of a model in training have no digests")

    def location(self, address: Address) -> str:
        return f"{self.path}: in memory"

    def bytes_by_kind(self) -> dict[str, int]:
        return {"weights": self.minimum_bytes}

    def verify(self) -> list[str]:
        return []


class LiveSubject(Subject):
    """The model in training at a step. It is not changed, and its gradients are left as they are."""

    def __init__(self, model: Any, run: Run, step: int):
        """Raises PicoError for a model of which each process holds only a share."""
        if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
            raise PicoError("each process holds a share of the model; ask its checkpoints, with pico analyze")
        self.run, self.checkpoint = run, LiveCheckpoint(model, run, step)
        self.architecture, self._model, self._filled = LiveArchitecture(model), model, step
