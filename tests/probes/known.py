"""A model whose predictions are known, for theorems: a probe is run on it as on that of a checkpoint."""

from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from picolm.observe.passes import Answer, Ask, Pass, answer
from picolm.observe.rows import Rows, digest_of
from picolm.probes import Reading, find_probe
from picolm.probes.probe import Running
from picolm.probes.probe import run as run_probes


class KnownRun:
    """A run of other code that has one step, with a tokenizer or without."""

    path, name, config, steps = "known", "known", {"recorded": {}}, (0,)

    def __init__(self, tokenizer: bytes | None):
        files = [] if tokenizer is None else ["tokenizer.json"]
        self._step = SimpleNamespace(files=files, read=lambda name: tokenizer, path="known/step_0")

    def __getitem__(self, step: int) -> Any:
        return self._step


class Known:
    """The part of a subject that probes of predictions ask. predict: logits [B, T, V] of tokens [B, T]."""

    def __init__(
        self,
        predict: Callable[[Tensor], Tensor],
        vocabulary: int,
        likelihood: str = "exact",
        tokenizer: bytes | None = None,
    ):
        self._predict, self.likelihood = predict, likelihood
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocabulary))
        self.run: Any = KnownRun(tokenizer)
        self.checkpoint = SimpleNamespace(step=1)

    def require(self, *needs: str) -> None:
        pass

    def forward(self, rows: Rows, batch: Sequence[int], needs: Collection[str] = ()) -> Pass:
        tokens_BS = torch.stack([rows.tokens[row] for row in batch])
        return Pass(tokens_BS, self._predict(tokens_BS[:, : rows.inputs(batch[0])]))

    def answer(self, asks: Sequence[Ask], batch_size: int = 8) -> list[Answer]:
        return answer(self, asks, batch_size)  # type: ignore[arg-type]

    def scores(self, rows: Rows) -> list[Tensor]:
        return [self.forward(rows, [row]).nats_BP[0] for row in range(len(rows.tokens))]


def random_model(vocabulary: int, seed: int = 0, tokenizer: bytes | None = None) -> Known:
    """A model whose logits depend on the last two tokens at random."""
    generator = torch.Generator().manual_seed(seed)
    table = 2 * torch.randn(vocabulary, vocabulary, vocabulary, generator=generator, dtype=torch.float64)

    def predict(tokens_BT: Tensor) -> Tensor:
        return table[tokens_BT.roll(1, 1), tokens_BT]

    return Known(predict, vocabulary, tokenizer=tokenizer)


def rows_of_lists(rows: Sequence[Sequence[int]]) -> Rows:
    """Rows of several lengths."""
    tokens = [torch.tensor(row) for row in rows]
    return Rows(tokens, [[len(row) - 2] for row in rows], "observed", True, digest_of(rows))


def readings(name: str, subject: Any, rows: Rows, other: Any = None, **options: Any) -> dict[tuple[str, str], Reading]:
    """Run a probe, and return its readings by name and bin. Raises the error with which it ends."""
    running = Running(find_probe(name), {"subject": subject, "other": other, "rows": rows, "stated": None}, options)
    run_probes([running], subject, batch_size=2)
    if running.failure is not None:
        raise running.failure
    return {(each.name, each.bin): each for each in running.readings}
