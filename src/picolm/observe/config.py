"""What is observed: the rows, and which tensors of which modules at which positions."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

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
    hidden: Annotated[int, Field(ge=0, lt=100)] = 0
    """Percent of the tokens after the first of a row that are hidden from a diffusion model: its noise level. Those of a lower
    level are among those of a higher one. 0 is what training captures, and what is compared with other models.
    """
    batch_size: PositiveInt = 8
    """Rows per forward pass."""

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """Yield each broken rule between keys."""
        if self.hidden and (others := sorted({"gradients", "scores"} & set(self.what))):
            yield (
                ("hidden", "what"),
                f"{others[0]} are of all noise levels together, not of {self.hidden} % hidden; leave them out of `what`",
            )

    @property
    def split(self) -> str:
        """The split of the addresses of what is observed, with the percentage that is hidden: `val_hidden_50`."""
        rows = HELD_OUT if self.rows == HELD_OUT else GIVEN
        return f"{rows}_hidden_{self.hidden}" if self.hidden else rows
