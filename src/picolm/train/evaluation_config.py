"""The `evaluation` section of a training configuration: which evaluations to run during training, and on which data."""

from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, PositiveInt

from picolm.data import is_own_source
from picolm.schema import Key, Place, Section


class Paloma(Section):
    dataset_name: Annotated[Place, Key("data source", is_code=is_own_source)] = "auto"
    """Source of the rows to evaluate; `auto`: the held-out rows of the data, or pico-lm/pretokenized-paloma-tinsy for
    pico-lm/pretokenized-dolma."""
    dataset_split: str = "val"
    """Split of this data set (not used with `auto`)."""
    max_length: PositiveInt | None = None
    """Number of tokens of each row to evaluate (default: model.max_seq_len)."""
    batch_size: PositiveInt = 16
    """Rows per forward pass."""
    max_rows: PositiveInt | None = None
    """Evaluate at most this many rows, the first ones of each source in equal numbers; null: all rows."""


class MinimalPairs(Section):
    path: Place = ""
    """A .jsonl file of sentence pairs in the format of BLiMP (sentence_good, sentence_bad), or a folder of them."""
    group_by: str = "UID"
    """Field that names the phenomenon of a pair; UID gives the 67 groups of BLiMP, linguistics_term gives 12."""
    batch_size: PositiveInt = 64
    """Sentences per forward pass."""


class Harness(Section):
    tasks: tuple[str, ...] = ()
    """Names of tasks of lm-evaluation-harness."""
    include_path: Annotated[Place | None, Key("folder of tasks, whose files may name functions", is_code=bool)] = None
    """Folder with YAML files of your own tasks."""
    limit: PositiveInt | None = None
    """Largest number of documents to use of each task, for a quick look (the results then describe only this part)."""
    num_fewshot: NonNegativeInt | None = None
    """Number of solved examples before each question (default: set by the task)."""
    batch_size: PositiveInt = 16
    """Rows per forward pass."""


class Evaluation(Section):
    metrics: Annotated[tuple[str, ...] | None, Key("evaluation")] = ("paloma",)
    """Evaluations to run: paloma (perplexity by source), minimal_pairs, lm_eval (needs the extra `lm_eval`), a probe
    (`pico list probes`), or my_lab.module:attribute; null or empty: none."""
    every_n_steps: PositiveInt | None = None
    """Steps between evaluations (default: at each checkpoint)."""
    draws: Annotated[PositiveInt, Key(since="0.2")] = 8
    """Number of random draws over which a bound of a likelihood is averaged; no effect if the likelihood is exact."""
    final_draws: Annotated[PositiveInt, Key(since="0.2")] = 64
    """Number of draws at the last step of the run, whose results are compared."""
    paloma: Paloma = Paloma()
    minimal_pairs: MinimalPairs = MinimalPairs()
    lm_eval: Harness = Harness()
    probes: Annotated[dict[str, dict[str, Any]], Key(since="0.2")] = Field(default_factory=dict)
    """Options of the probes among `metrics`, by name: `{induction: {length: 16}}`."""
