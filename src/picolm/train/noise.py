"""The noise of models with a random objective, as a function of a seed, what the rows are for, the step, and the row.

In training it differs from step to step. Of rows that are measured at several steps it does not depend on the step: what is
compared is the model, not the draw.
"""

from collections.abc import Sequence
from typing import Any

from picolm.models import Noise
from picolm.seeds import derive


def of_training(seed: int, step: int, places: Sequence[int], rows: int, device: Any = "cpu") -> Noise:
    """Return the noise of some of the `rows` rows of batch `step`. places: where they are in the batch."""
    seeds = [derive(seed, "train row", step, place) for place in places]
    return Noise(seeds, device, step_seed=derive(seed, "train batch", step), places=places, rows=rows)


def of_split(seed: int, split: str, places: Sequence[int], device: Any = "cpu") -> Noise:
    """Return the noise of rows that are captured or observed. places: their places among the rows of the split."""
    return Noise([derive(seed, f"{split} row", place) for place in places], device)


def of_scores(numbers: Sequence[int], device: Any = "cpu") -> Noise:
    """Return the noise of texts that are scored, by their numbers: the same for any run, step, batch size and selection."""
    return Noise([derive(0, "score", number) for number in numbers], device)
