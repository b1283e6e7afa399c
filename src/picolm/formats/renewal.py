"""Renew the modelling code inside checkpoints: what transformers runs when it loads one (`trust_remote_code`)."""

from collections.abc import Callable, Iterator, Sequence

from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.sample import config_of
from picolm.train.state import outline


def renew_steps(
    run: Run, steps: Sequence[int] | None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[int, list[str]]]:
    """Give each step the modelling files that its architecture has now; yield (step, the files that changed).

    steps: None for all that hold modelling code. Raises PicoError for a run without any, and for a step that is damaged, is
    missing or has none; steps before it are renewed then.
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
