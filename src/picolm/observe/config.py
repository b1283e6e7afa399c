"""What is observed: the rows, and which tensors of which modules at which positions."""

from typing import Literal

from pydantic import PositiveInt

from picolm.schema import Place, Section

Kind = Literal["activations", "gradients", "patterns", "logits", "scores"]
HELD_OUT = "val"  # the rows that a run holds out itself, and the name of their split
GIVEN = "observed"  # the split of all other rows


class Observe(Section):
    """The rows that each model is run on, and what is read from it."""

    rows: Place | tuple[str, ...] = HELD_OUT
    """val (the held-out rows of the run), a file of texts (.txt, .jsonl, .parquet with a column `text`, …), a file of token
    ids (.npy, or a column of a parquet file, as FILE.parquet:COLUMN), or a list of prompts.
    """
    what: tuple[Kind, ...] = ("activations", "gradients")
    """activations, gradients (of the mean loss over all rows), and for `pico observe` also patterns (of attention), logits, and
    scores (nats of each predicted token).
    """
    modules: tuple[str, ...] | None = None
    """Modules: roles (attention.value, mlp.output, …) or the last parts of module names, as whole words (default: those that are
    captured in training, as far as it is known what they are called).
    """
    layers: Literal["all"] | tuple[int, ...] = "all"
    """Numbers of the blocks, or all; modules outside of the blocks are not affected."""
    positions: Literal["last", "all"] | tuple[int, ...] = "last"
    """Positions whose activations, patterns and logits are read: last, all, or a list (negative: from the end)."""
    max_rows: PositiveInt | None = None
    """At most so many rows (default: all that are held out, all prompts, 64 of a file)."""
    length: PositiveInt | None = None
    """Predicted tokens of a row of a text (default: 512, or the context of the model if that is less)."""
    batch_size: PositiveInt = 8
    """Rows per forward pass."""

    @property
    def split(self) -> str:
        """The split of the addresses of what is observed."""
        return HELD_OUT if self.rows == HELD_OUT else GIVEN
