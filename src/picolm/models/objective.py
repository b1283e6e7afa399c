"""What the loss of a model means, and how likely a model finds a text.

A model says which rows it needs, what it predicted of them, and whether its likelihood is exact, a bound, or none. Whoever
trains, scores or generates asks the model, and never shifts tokens or logits itself. What is random in it (masks, noise levels)
comes from `Noise`.

Legend: B rows, S tokens of a row, T = S - 1 predicted tokens, V vocabulary, N pieces of text.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from .generate import generate

Likelihood = Literal["exact", "bound", "none"]


class Loss(NamedTuple):
    """What `Model.loss` returns: nats is the differentiable sum over all predicted tokens, tokens their number."""

    nats: Tensor
    tokens: int


class Piece(NamedTuple):
    """A row of token ids, int64 [S], whose last `scored` ones are asked for, given those before them."""

    tokens: Tensor
    scored: int


class Score(NamedTuple):
    """How likely a model finds the scored tokens of N pieces.

    nats: for each piece, one number per scored token: -ln p of the token given those before it, or, where it is a bound,
    terms whose sum is at least -ln p of all of them. exact: whether it is no bound. draws: random draws that a bound is
    averaged over, 0 where nothing is random. standard_error: [N], of the sums of the pieces over these draws; NaN for one draw.
    likeliest: bool [N], whether each scored token is the likeliest one in its place; None where the model cannot tell.
    """

    nats: list[Tensor]
    standard_error: Tensor
    draws: int
    exact: bool
    likeliest: Tensor | None = None


class NextToken:
    """The objective of a causal language model: to predict each token from those before it.

    For an `nn.Module` whose `forward(tokens_BT)` returns the logits of the next token at every position, [B, T, V]. One that
    keeps what it computed of earlier positions overrides `new_cache`, and its `forward(tokens_BT, cache)` continues it.
    """

    likelihood: ClassVar[Likelihood] = "exact"
    config: Any

    @staticmethod
    def row_length(length: int) -> int:
        """Return the tokens of a row with `length` predicted ones: the first one is only read."""
        return length + 1

    def loss(self: Any, tokens_BS: Tensor, noise: object = None) -> Loss:
        """Return the sum of -ln p(token | tokens before it) over all but the first position. Nothing is random."""
        logits_PV, targets_P = self(tokens_BS[:, :-1]).flatten(0, 1), tokens_BS[:, 1:].flatten()
        exact = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        return Loss(cross_entropy(exact, targets_P, reduction="sum"), targets_P.numel())

    def predictions(self: Any, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Return -ln p of each token given those before it, float32 or float64, and whether it is the likeliest, [B, T]."""
        logits_BTV, targets_BT1 = self(tokens_BS[:, :-1]), tokens_BS[:, 1:, None]
        exact = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        nats_BT = -exact.log_softmax(-1).gather(-1, targets_BT1).squeeze(-1)
        return nats_BT, exact.argmax(-1) == targets_BT1.squeeze(-1)

    @torch.no_grad()
    def score(self: Any, pieces: Sequence[Piece], *, draws: int = 1, noise: object = None) -> Score:
        """Return the exact score of the pieces. Rows are padded on the right, which no earlier position sees."""
        device = next(self.parameters()).device
        tokens_NS = pad_sequence([piece.tokens for piece in pieces], batch_first=True).to(device)
        nats_NT, likeliest_NT = self.predictions(tokens_NS)
        ends = [len(piece.tokens) - 1 for piece in pieces]
        where = [slice(end - piece.scored, end) for end, piece in zip(ends, pieces)]
        return Score(
            nats=[nats_T[scored] for nats_T, scored in zip(nats_NT, where)],
            standard_error=torch.zeros(len(pieces)),
            draws=0,
            exact=True,
            likeliest=torch.stack([likeliest_T[scored].all() for likeliest_T, scored in zip(likeliest_NT, where)]),
        )

    def new_cache(self) -> Any:
        """Return what keeps the state after the tokens so far, for `forward` to continue; None: the model keeps nothing."""
        return None

    def generate(self, prompt_BT: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Return the prompt and what the model makes of it; options as in `generate.generate`."""
        return generate(self, prompt_BT, max_new_tokens, context=self.config.max_seq_len, **options)


class Noise:
    """The random numbers for the B rows of one micro-batch; each call continues the streams of the call before.

    Each row has its own generator, seeded by the step and the row's place in the global batch. So a row gets the same
    numbers for any number of micro-batches and processes. They are drawn on the CPU, so they are the same on any device.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        step_seed: int | None = None,
        places: Sequence[int] = (),
        rows: int = 0,
    ):
        """seeds: of each row. step_seed: of what the R `rows` of the global batch of a step share; places: where these B are in
        it. Without a step_seed, the rows share nothing.
        """
        self.device, self.seeds = device, list(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shared = None if step_seed is None else torch.Generator().manual_seed(step_seed)
        self._places_B, self._rows = torch.tensor(places, dtype=torch.long), rows

    def uniform(self, *shape: int) -> Tensor:
        """Return uniform float32 numbers in [0, 1), [B, *shape]."""
        return self._each(lambda generator: torch.rand(shape, generator=generator))

    def stratified(self) -> Tensor:
        """Return a uniform float64 number in [0, 1) for each row, [B].

        Of all R rows of the global batch, each interval [i/R, (i + 1)/R) gets exactly one, in random order: means over the rows
        vary less than those of independent numbers. Rows that share nothing get independent numbers.
        """
        own_B = self._each(lambda generator: torch.rand((), generator=generator)).double()
        if self._shared is None:
            return own_B
        strata_B = torch.randperm(self._rows, generator=self._shared)[self._places_B].to(self.device)
        return (strata_B + own_B) / self._rows

    def normal(self, *shape: int) -> Tensor:
        """Return normal float32 numbers of mean 0 and variance 1, [B, *shape]."""
        return self._each(lambda generator: torch.randn(shape, generator=generator))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return uniform int64 numbers in [0, high), [B, *shape]."""
        return self._each(lambda generator: torch.randint(high, shape, generator=generator))

    def permutations(self, lengths: Sequence[int]) -> list[Tensor]:
        """Return for each row a random permutation of 0 … length - 1, int64."""
        each = zip(lengths, self._generators, strict=True)
        return [torch.randperm(length, generator=generator).to(self.device) for length, generator in each]

    def _each(self, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        return torch.stack([draw(generator) for generator in self._generators]).to(self.device)
