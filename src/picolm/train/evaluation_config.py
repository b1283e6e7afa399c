"""The `evaluation` section of a training configuration: what is measured on the live model, and on what."""

from typing import Annotated

from pydantic import NonNegativeInt, PositiveInt

from picolm.data import is_own_source
from picolm.provenance import NamesCode
from picolm.schema import Place, Section


class Paloma(Section):
    dataset_name: Annotated[Place, NamesCode("data source", is_code=is_own_source)] = "auto"
    """Rows to evaluate on; `auto`: the held-out part of the data, else pico-lm/pretokenized-paloma-tinsy."""
    dataset_split: str = "val"
    """Split of that data set."""
    max_length: PositiveInt | None = None
    """Tokens of a row that are used (default: model.max_seq_len)."""
    batch_size: PositiveInt = 16
    """Rows per forward pass."""
    max_rows: PositiveInt | None = None
    """Use only the first rows, spread over the sources."""


class MinimalPairs(Section):
    path: Place = ""
    """A .jsonl file of sentence pairs as BLiMP's (sentence_good, sentence_bad), or a folder of them."""
    group_by: str = "UID"
    """The field that names the phenomenon of a pair; linguistics_term makes BLiMP's twelve groups of its 67."""
    batch_size: PositiveInt = 64
    """Sentences per forward pass."""


class Harness(Section):
    tasks: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by name."""
    include_path: Annotated[
        Place | None, NamesCode("folder of tasks, whose files may name functions", is_code=bool)
    ] = None
    """A folder with the YAML files of your own tasks."""
    limit: PositiveInt | None = None
    """Use only so many documents of each task (for a quick look: the figures are then of that part)."""
    num_fewshot: NonNegativeInt | None = None
    """Worked examples before each question (default: what the task says)."""
    batch_size: PositiveInt = 16
    """Rows per forward pass."""


class Evaluation(Section):
    metrics: Annotated[tuple[str, ...] | None, NamesCode("evaluation")] = ("paloma",)
    """Evaluations to run: paloma (perplexity by source), minimal_pairs, lm_eval (extra `lm_eval`), or
    my_lab.module:attribute; null or empty for none."""
    every_n_steps: PositiveInt | None = None
    """Steps between evaluations (default: at each checkpoint)."""
    draws: PositiveInt = 8
    """Random draws that a bound of a likelihood is averaged over; a model whose likelihood is exact needs none."""
    paloma: Paloma = Paloma()
    minimal_pairs: MinimalPairs = MinimalPairs()
    lm_eval: Harness = Harness()
