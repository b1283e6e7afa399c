"""Show what the model saw at a step: the rows of the batch as text and, optionally, each token's loss before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picolm.csvfile import csv_text
from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.build import open_batches, tokenizer_file
from picolm.train.config import row_length
from picolm.train.evaluate import Rows, token_nats
from picolm.train.history import check_same_data, check_trained, last_step, same_elsewhere
from picolm.train.job import Due, Job
from picolm.train.replay import replay
from picolm.train.text import Text

ROWS_AT_ONCE = 8  # rows per forward pass


@dataclass
class Batch:
    """The batch of R rows of a step.

    where: the place of each row in the data, as text. read: the number of tokens at the start of a row that are not
    predicted. before_RT, after_RT: the loss in nats of each of the T other tokens, before and after the update of the
    step.
    """

    step: int
    rows: Rows
    where: list[str]
    text: Text
    read: int
    before_RT: Tensor | None = None
    after_RT: Tensor | None = None

    def columns(self) -> dict[str, Any]:
        """Return the columns of a table with one line per predicted token: row, source, position, token, text, and the
        losses if they were computed.
        """
        tokens_RT = self.rows.tokens_RS[:, self.read :]
        rows, length = tokens_RT.shape
        labels = self.rows.labels or [""] * rows
        columns: dict[str, Any] = {
            "row": np.repeat(self.rows.numbers, length),
            "source": np.repeat(labels, length),
            "position": np.tile(np.arange(self.read, self.read + length), rows),
            "token": tokens_RT.flatten().numpy(),
            "text": self.text.tokens(tokens_RT.flatten().tolist()),
        }
        losses = {"loss_before": self.before_RT, "loss_after": self.after_RT}
        return columns | {name: nats.flatten().numpy() for name, nats in losses.items() if nats is not None}

    def write(self, path: Path) -> None:
        """Write `columns` to a .csv or .parquet file. Raises PicoError for another suffix."""
        import pandas as pd

        table = pd.DataFrame(self.columns())
        if path.suffix == ".parquet":
            table.to_parquet(path, index=False)
        elif path.suffix == ".csv":
            path.write_text(csv_text(table), encoding="utf-8", errors="backslashreplace", newline="")
        else:
            raise PicoError(f"{path}: the table can be written as .csv or .parquet")


def batch_at(
    run: Run, step: int, overrides: Sequence[str] = (), *, rows: int | None = None, loss: bool = False
) -> Batch:
    """Return the batch of `step`, or its first `rows` rows. loss: replay the step to compute the loss of each token.

    Raises PicoError for a step that was never trained, and if the data are not those of the run.
    """
    check_trained(run, step)
    config = same_elsewhere(run, step, overrides)
    batches = open_batches(config)
    check_same_data(run, batches.fingerprint, config)
    numbers = batches.row_numbers(step)[:rows]
    batch = Batch(
        step=step,
        rows=Rows.take(batches.source, numbers, row_length(config)),
        where=[batches.source.locate(int(number)) for number in numbers],
        text=Text(tokenizer_file(config, batches.source), config.model.vocab_size),
        read=row_length(config) - config.model.max_seq_len,
    )
    if loss:
        _measure(run, batch, overrides)
    return batch


def _measure(run: Run, batch: Batch, overrides: Sequence[str]) -> None:
    """Set the losses of `batch`, computed as in an evaluation; `after_RT` stays None at the last step of the run."""
    measured: dict[int, Tensor] = {}

    def watch(job: Job, at: int) -> None:
        if at not in (batch.step, batch.step + 1):
            return
        with torch.no_grad(), job.fabric.autocast():
            rows = [token_nats(job.model, tokens_BS) for tokens_BS in batch.rows.tokens_RS.split(ROWS_AT_ONCE)]
        measured[at] = torch.cat(rows)

    last = last_step(run)
    steps = [step for step in (batch.step, batch.step + 1) if step <= last]
    replay(run, steps, kinds=Due(), overrides=overrides, watchers=[watch])
    batch.before_RT, batch.after_RT = measured.get(batch.step), measured.get(batch.step + 1)
