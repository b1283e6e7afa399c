"""The mean loss of fixed rows as a function of the parameters: its value, its gradient, and products with its Hessian.

Everything is a vector of all parameters, in the order of the model; float64 unless asked otherwise. Legend: D parameters.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from picolm.errors import PicoError
from picolm.models import NextToken
from picolm.models.attention import twice_differentiable
from picolm.observe.rows import Rows

if TYPE_CHECKING:
    from picolm.observe.subject import Subject


class Surface:
    """The loss of a model on rows, in nats per predicted token, around the weights of a step.

    names: of the parameters, as in the model; sizes: their numbers of entries, in the order of the vectors.
    """

    def __init__(self, subject: "Subject", rows: Rows, dtype: torch.dtype = torch.float64, batch_size: int = 8):
        """Build a model of its own. Raises PicoError for prompts, and for a model that does not predict the next token."""
        subject.require("logits")
        if not rows.has_targets:
            raise PicoError(
                "prompts have no tokens to predict, so there is no loss; give a file of texts or of token ids"
            )
        self._subject, self._rows, self._batch_size = subject, rows, batch_size
        self.model = subject.fresh().to(dtype)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        self.sizes = [p.numel() for p in self.parameters]
        self.start_D = parameters_to_vector(self.parameters).detach().clone()

    def move(self, place_D: Tensor) -> None:
        """Set the parameters."""
        vector_to_parameters(place_D, self.parameters)

    def loss(self, rows: Sequence[int] | None = None) -> float:
        """Return the mean loss at the present parameters. rows: numbers of the rows (default: all)."""
        with torch.no_grad():
            return sum(float(nats) for nats, _ in self._losses(rows)) / self._predicted(rows)

    def gradient(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the gradient of the mean loss, [D]. rows: numbers of the rows (default: all)."""
        total_D = torch.zeros_like(self.start_D)
        for nats, _ in self._losses(rows):
            total_D += parameters_to_vector(torch.autograd.grad(nats, self.parameters))
        return total_D / self._predicted(rows)

    def hessian_product(self, vector_D: Tensor) -> Tensor:
        """Return the product of the Hessian of the mean loss of all rows with a vector, [D]."""
        total_D = torch.zeros_like(self.start_D)
        with twice_differentiable():
            for nats, _ in self._losses(None):
                slope = torch.autograd.grad(nats, self.parameters, create_graph=True)
                along = parameters_to_vector(slope) @ vector_D
                total_D += parameters_to_vector(torch.autograd.grad(along, self.parameters))
        return total_D / self._predicted(None)

    def parts(self, vector_D: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter, and its share of a vector."""
        yield from zip(self.names, vector_D.split(self.sizes))

    def _losses(self, rows: Sequence[int] | None) -> Iterator[tuple[Tensor, int]]:
        """Yield the nats of each batch and their number."""
        chosen = set(range(len(self._rows.tokens)) if rows is None else rows)
        for batch in self._rows.batches(self._batch_size):
            if kept := [row for row in batch if row in chosen]:
                loss = NextToken.loss(self.model, torch.stack([self._rows.tokens[row] for row in kept]))
                yield loss.nats, loss.tokens

    def _predicted(self, rows: Sequence[int] | None) -> int:
        return sum(map(self._rows.inputs, range(len(self._rows.tokens)) if rows is None else rows))
