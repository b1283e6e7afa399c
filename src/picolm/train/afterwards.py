"""Evaluate existing checkpoints, with the same functions as during training."""

from collections.abc import Callable, Iterator, Sequence

import torch

from picolm.data.tokenizer import check_same
from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.build import evaluated_rows, open_batches
from picolm.train.config import TrainConfig
from picolm.train.devices import compute_dtype, weight_dtype
from picolm.train.evaluate import EVALUATIONS, Evaluation, Rows, evaluate
from picolm.train.history import stored_with
from picolm.train.sample import load_model
from picolm.train.text import Text


def evaluate_steps(
    run: Run,
    steps: Sequence[int] | None,
    overrides: Sequence[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Evaluate checkpoints of a run. Yields (step, results) and adds the results to the file of the step in
    eval_results/, where they replace results of the same name.

    steps: None for all checkpoints with weights. overrides: `key=value` for the keys of evaluation, data.dataset and
    data.tokenizer; other keys would describe another run. progress: callback, called with (steps done, steps in total).
    Computes on CUDA if available, else on the CPU, in the precision of the run, so that results continue the curve
    recorded during training. Raises PicoError for other overrides and if there is nothing to evaluate.
    """
    others = [word for word in overrides if not word.startswith(("evaluation.", "data.dataset.", "data.tokenizer."))]
    if others:
        raise PicoError(
            f"{others[0]}: evaluating changes nothing of a run; only keys of its evaluation section can differ"
        )
    config = stored_with(run, overrides)
    if not config.evaluation.metrics:
        raise PicoError("nothing to evaluate: name evaluations with --metrics, --tasks or --pairs")
    for name in config.evaluation.metrics:
        EVALUATIONS.get(name)  # unknown names fail here, before the model is loaded
    chosen = steps if steps is not None else [step for step in run.steps if run[step].select(kind="weights")]
    rows = _rows(config, run, chosen)
    for done, step in enumerate(chosen):
        progress(done, len(chosen))
        with _autocast(config):
            results = evaluate(config.evaluation.metrics, _evaluation(run, step, config, rows))
        run.write_evaluation(step, (run.evaluation(step) or {}) | results)
        yield step, results
    progress(len(chosen), len(chosen))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(config: TrainConfig) -> torch.autocast:
    precision = config.training.fabric.precision
    return torch.autocast(_device().type, compute_dtype(precision), enabled=precision.endswith("-mixed"))


def _rows(config: TrainConfig, run: Run, steps: Sequence[int]) -> Rows | None:
    if "paloma" not in (config.evaluation.metrics or ()):
        return None
    source = open_batches(config).source
    for file in (run.step_path(step) / "tokenizer.json" for step in steps):
        if file.exists():
            check_same(source, config.data.dataset.name, file, None, f"the run ({file})")
            break
    return evaluated_rows(config, source)


def _evaluation(run: Run, step: int, config: TrainConfig, rows: Rows | None) -> Evaluation:
    device = _device()
    model = load_model(run, step).to(device)
    if next(model.parameters()).dtype != torch.float64:  # float64 weights, for example imported ones, are never rounded
        model = model.to(dtype=weight_dtype(config.training.fabric.precision))
    file = run.step_path(step) / "tokenizer.json"
    text = Text(file if file.exists() else None, config.model.vocab_size)
    return Evaluation(
        model=model,
        rows=rows,
        batch_size=config.evaluation.paloma.batch_size,
        token_bytes_V=text.token_bytes_V,
        rank=0,
        world=1,
        device=device,
        text=text,
        settings=config.evaluation,
        run=run,
        step=step,
        last=config.training.max_steps,
    )
