"""One forward pass over some rows, and the questions that share it.

Legend: B rows of a pass, T positions that the model computes, P of them whose next token is in the row, V vocabulary, H width of
the residual stream, N query heads, L blocks, F width inside of the MLP.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from picolm.observe.rows import Rows

if TYPE_CHECKING:
    from picolm.observe.subject import Subject

Read = Callable[..., Mapping[str, Tensor]]


PART = 2**20  # logits that probes read at one time, 4 MiB in float32


class Ask(NamedTuple):
    """What a probe asks of a forward pass over rows.

    read: a function of a `Pass` that returns tensors [B, …] by name. needs: what the pass has to keep: `hidden`, `patterns`,
    `mixing`, `mlp`.
    beside: other subjects that run on the same rows; `read` is given the pass of each, after that of the subject itself.
    """

    rows: Rows
    read: Read
    needs: frozenset[str] = frozenset()
    beside: tuple["Subject", ...] = ()


Answer = dict[str, list[Tensor]]
"""By name, what was read of each row."""


class Pass:
    """A forward pass over B rows of one length; what follows from it is computed when it is first read.

    tokens_BS: the rows. logits_BTV: at each position that the model computes.
    hidden: the residual stream [B, T, H] before the first block and after each block, as asked for; patterns: the attention
    weights of each block, [B, N, T, T]; mlp: the hidden activations of the MLP of each block, [B, T, F].
    mixing: a `Mixing` of each block of a state space model.
    """

    def __init__(
        self,
        tokens_BS: Tensor,
        logits_BTV: Tensor,
        hidden: Sequence[Tensor] = (),
        patterns: Sequence[Tensor] = (),
        mlp: Sequence[Tensor] = (),
        mixing: Sequence[Any] = (),
    ):
        self.tokens_BS, self.logits_BTV = tokens_BS, logits_BTV
        self.hidden, self.patterns, self.mlp, self.mixing = list(hidden), list(patterns), list(mlp), list(mixing)
        self._shorter: dict[int, Pass] = {}

    def until(self, size: int) -> "Pass":
        """Return the pass at the first positions of its rows, which in a causal model are those of shorter rows.

        Asked of models with attention, which have no `mixing`.
        """
        if size == self.logits_BTV.shape[1]:
            return self
        return self._shorter.setdefault(
            size,
            Pass(
                self.tokens_BS,
                self.logits_BTV[:, :size],
                [each[:, :size] for each in self.hidden],
                [each[..., :size, :size] for each in self.patterns],
                [each[:, :size] for each in self.mlp],
            ),
        )

    def of_rows(self, rows: slice) -> "Pass":
        """Return the pass of some of its rows."""
        return Pass(
            self.tokens_BS[rows],
            self.logits_BTV[rows],
            [each[rows] for each in self.hidden],
            [each[rows] for each in self.patterns],
            [each[rows] for each in self.mlp],
            [type(each)(*(tensor[rows] for tensor in each)) for each in self.mixing],
        )

    @cached_property
    def targets_BP(self) -> Tensor:
        """The next token of each position that has one in its row."""
        return self.tokens_BS[:, 1 : self.logits_BTV.shape[1] + 1]

    @cached_property
    def log_probs_BPV(self) -> Tensor:
        """Log-probabilities of the next token, float32 or float64."""
        logits_BPV = self.logits_BTV[:, : self.targets_BP.shape[1]]
        return logits_BPV.to(torch.promote_types(logits_BPV.dtype, torch.float32)).log_softmax(-1)

    @cached_property
    def nats_BP(self) -> Tensor:
        """-ln p of each next token."""
        return -self.log_probs_BPV.gather(-1, self.targets_BP[..., None]).squeeze(-1)

    @cached_property
    def likeliest_BP(self) -> Tensor:
        """The id of the likeliest next token."""
        return self.log_probs_BPV.argmax(-1)


def answer(subject: "Subject", asks: Sequence[Ask], batch_size: int = 8) -> list[Answer]:
    """Return what is read of each row, for each ask. Asks of the same rows share their forward passes, also where one reads
    the rows whole and another only predicts their last token.

    Raises PicoError where the model of a subject does not give what is needed.
    """
    found: list[Answer] = [{} for _ in asks]
    sets: dict[str, list[int]] = {}
    for place, ask in enumerate(asks):
        sets.setdefault(ask.rows.whole_of or ask.rows.identity, []).append(place)
    for places in sets.values():
        rows = min((asks[place].rows for place in places), key=lambda rows: rows.has_targets)  # the longest
        needs = frozenset[str]().union(*(asks[place].needs for place in places))
        subjects = dict.fromkeys([subject, *(each for place in places for each in asks[place].beside)])
        for batch in rows.batches(batch_size):
            whole = {each: each.forward(rows, batch, needs) for each in subjects}
            for part in _parts(whole.values()):
                passes = {each: of_all.of_rows(part) for each, of_all in whole.items()}
                for place in places:
                    size = asks[place].rows.inputs(batch[0])
                    of = [passes[each].until(size) for each in (subject, *asks[place].beside)]
                    for name, tensor in asks[place].read(*of).items():
                        found[place].setdefault(name, []).extend(tensor.cpu())
    return found


def _parts(passes: Collection[Pass]) -> Iterator[slice]:
    """Yield the rows that are read at one time: so few that their numbers stay in the cache from one probe to the next."""
    rows = max(len(each.logits_BTV) for each in passes)
    size = max(1, PART // max(each.logits_BTV[0].numel() for each in passes))
    yield from (slice(first, first + size) for first in range(0, rows, size))


@contextmanager
def residual_stream(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list to which a forward pass inside of the block adds the input of the first block and the output of each."""

    def add_output(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with inputs_of(blocks[:1]) as found, _removed([block.register_forward_hook(add_output) for block in blocks]):
        yield found


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yield a list to which a forward pass inside of the block adds the input of each module."""
    found: list[Tensor] = []

    def add_input(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(arguments[0] if arguments else options["hidden_states"])

    with _removed([module.register_forward_pre_hook(add_input, with_kwargs=True) for module in modules]):
        yield found


@contextmanager
def _removed(hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
