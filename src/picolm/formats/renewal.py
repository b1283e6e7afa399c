"""Update the modelling code in checkpoints, which transformers runs to load them (`trust_remote_code`)."""

from collections.abc import Callable, Iterator, Sequence

from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.sample import config_of
from picolm.train.state import outline


def renew_steps(
    run: Run, steps: Sequence[int] | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[int, list[str]]]:
    """Write the current modelling files of the architecture into each step; yield (step, names of changed files).

    steps: None for all steps with modelling code. Raises PicoError if the run or the architecture has none, or if a
    step is damaged, missing or without modelling code; the steps before it are updated then.
    """
    config = config_of(run).model
    holding = [step for step in run.steps if any(name.endswith(".py") for name in run[step].files)]
    most = max((len(run[step].select(kind="weights")) for step in holding), default=0)
    texts = outline(config, most, str(run.path)).modelling_files()
    if not texts:
        raise PicoError(f"{run.path}: {config.model_type} brings no modelling code for transformers")
    chosen = list(steps) if steps is not None else holding
    if not chosen:
        raise PicoError(f"{run.path}: no checkpoint holds modelling code")
    for done, step in enumerate(chosen):
        progress(done, len(chosen))
        yield step, run.renew(step, texts)
    progress(len(chosen), len(chosen))
