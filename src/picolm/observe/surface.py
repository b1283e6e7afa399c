"""The mean loss of fixed rows as a function of the parameters: its value, its gradient, and products with its Hessian.

Everything is a vector of all parameters, in the order of the model; float64 unless asked otherwise. Legend: D parameters.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import parameters_to_vector
from torch.overrides import TorchFunctionMode

from picolm.errors import PicoError
from picolm.models import NextToken
from picolm.models.attention import twice_differentiable
from picolm.observe.rows import Rows
from picolm.observe.subject import with_threads

if TYPE_CHECKING:
    from picolm.observe.subject import Subject

# Of the graphs of gradients, so many bytes are kept from one product with the Hessian to the next; the others are built again.
KEPT_BYTES = 4 * 2**30


class Surface:
    """The loss of a model on rows, in nats per predicted token, around the weights of a step.

    names: of the parameters, as in the checkpoint; sizes: their numbers of entries, in the order of the vectors. start_D: the
    weights of the step.
    """

    def __init__(self, subject: "Subject", rows: Rows, dtype: torch.dtype = torch.float64, batch_size: int = 8):
        """Build a model of its own. Raises PicoError for prompts, and for a model that does not predict the next token."""
        subject.require("logits")
        if not rows.has_targets:
            raise PicoError(
                "prompts have no tokens to predict, so there is no loss; give a file of texts or of token ids"
            )
        for tokens in rows.tokens:
            subject.check_vocabulary(tokens)
        self.run, self._rows, self._batch_size = subject.run, rows, batch_size
        self._where = f"step {subject.checkpoint.step} of {subject.run.name}"
        self.model = subject.fresh().to(dtype)
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.padding_idx = None  # with which the derivative by that row is said to be 0, and is not
        named = [(n, p) for n, p in subject.architecture.body(self.model).named_parameters() if p.requires_grad]
        self.names, self.parameters = [name for name, _ in named], [parameter for _, parameter in named]
        self.sizes = [p.numel() for p in self.parameters]
        self.start_D = parameters_to_vector(self.parameters).detach().clone()
        self._kept: list[tuple[Tensor, ...]] = []
        self._kept_bytes = 0

    def move(self, place_D: Tensor) -> None:
        """Set the parameters. The vector is copied."""
        self._kept, self._kept_bytes = [], 0
        with torch.no_grad():
            for parameter, (_, part_D) in zip(self.parameters, self.parts(place_D)):
                parameter.copy_(part_D.view_as(parameter))

    @with_threads
    def loss(self, rows: Sequence[int] | None = None) -> float:
        """Return the mean loss at the present parameters. rows: their numbers, also repeated (default: all)."""
        with torch.no_grad():
            return sum(float(self._nats(tokens_BS)) for tokens_BS in self._batches(rows)) / self._predicted(rows)

    def finite_loss(self) -> float:
        """Return the mean loss of all rows. Raises PicoError where it is not finite: there is no landscape around it."""
        loss = self.loss()
        if not math.isfinite(loss):
            raise PicoError(f"the loss of {self._where} is {loss}, so there is no landscape around it")
        return loss

    def gradient(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the gradient of the mean loss, [D]. rows: see `loss`."""
        return self.loss_and_gradient(rows)[1]

    @with_threads
    def loss_and_gradient(self, rows: Sequence[int] | None = None) -> tuple[float, Tensor]:
        """Return the mean loss and its gradient, [D], of one pass forward and one backward. rows: see `loss`."""
        total, total_D = 0.0, torch.zeros_like(self.start_D)
        for tokens_BS in self._batches(rows):
            nats = self._nats(tokens_BS)
            total += float(nats.detach())
            total_D += parameters_to_vector(self._slope(nats))
        return total / self._predicted(rows), total_D / self._predicted(rows)

    @with_threads
    def hessian_product(self, vector_D: Tensor) -> Tensor:
        """Return the product of the Hessian of the mean loss of all rows with a vector, [D], or with several, [K, D].

        By the gradient of the gradient (Pearlmutter 1994). Graphs of gradients are kept for the next product, up to KEPT_BYTES.
        """
        total_D, several = torch.zeros_like(vector_D), vector_D.ndim == 2
        shapes = [(*vector_D.shape[:-1], *parameter.shape) for parameter in self.parameters]
        along = [part_D.reshape(shape) for part_D, shape in zip(vector_D.split(self.sizes, -1), shapes)]
        for slope in self._slopes():
            there = [(each, weights) for each, weights in zip(slope, along) if each.requires_grad]
            outputs, weights = zip(*there)
            found = torch.autograd.grad(
                outputs, self.parameters, weights, retain_graph=True, materialize_grads=True, is_grads_batched=several
            )
            total_D += torch.cat([each.flatten(int(several)) for each in found], -1)
        return total_D / self._predicted(None)

    def parts(self, vector_D: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter, and its share of a vector."""
        yield from zip(self.names, vector_D.split(self.sizes))

    def _slopes(self) -> Iterator[tuple[Tensor, ...]]:
        """Yield the gradient of the summed loss of each batch, with its graph."""
        for number, tokens_BS in enumerate(self._batches(None)):
            if number < len(self._kept):
                yield self._kept[number]
                continue
            held = _Held()
            with twice_differentiable(), saved_tensors_hooks(held.pack, held.unpack):
                slope = self._slope(self._nats(tokens_BS), create_graph=True)
            if number == len(self._kept) and self._kept_bytes + held.bytes <= KEPT_BYTES:
                self._kept.append(slope)
                self._kept_bytes += held.bytes
            yield slope

    def _slope(self, nats: Tensor, create_graph: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(nats, self.parameters, create_graph=create_graph, materialize_grads=True)

    def _nats(self, tokens_BS: Tensor) -> Tensor:
        """Return the summed loss of some rows of one length."""
        exact: AbstractContextManager[Any] = _Exact() if self.start_D.dtype == torch.float64 else nullcontext()
        with exact:
            return NextToken.loss(self.model, tokens_BS).nats

    def _batches(self, rows: Sequence[int] | None) -> Iterator[Tensor]:
        """Yield the tokens of each forward pass, [B, S]."""
        tokens = self._rows.tokens if rows is None else [self._rows.tokens[row] for row in rows]
        for batch in replace(self._rows, tokens=tokens).batches(self._batch_size):
            yield torch.stack([tokens[row] for row in batch])

    def _predicted(self, rows: Sequence[int] | None) -> int:
        return sum(map(self._rows.inputs, range(len(self._rows.tokens)) if rows is None else rows))


class _Exact(TorchFunctionMode):
    """Compute in float64 what a model computes in float32 whatever its weights are: norms and softmax of transformers."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def exact(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(exact, args), **{key: exact(value) for key, value in (kwargs or {}).items()})


class _Held:
    """Counts the bytes that a graph keeps, each piece of memory once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(self, tensor: Tensor) -> Tensor:
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())
