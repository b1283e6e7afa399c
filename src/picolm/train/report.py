"""Write the results of a step: its metrics, its checkpoint, its evaluation, and messages if something went wrong."""

import itertools
import logging
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from picolm.address import Address
from picolm.data.embedded import unigram_entropy
from picolm.store import Checkpoint
from picolm.store.checkpoint import weights_digest
from picolm.store.listing import BOUND, loss_line
from picolm.store.manifest import CONFIG
from picolm.train.config import row_length
from picolm.train.evaluate import Rows
from picolm.train.job import Due, Job
from picolm.train.metrics import UpdateSize, norm
from picolm.train.resources import load_average, usable_cpus
from picolm.train.state import last_finite

log = logging.getLogger("picolm")

SAFE_RATE = 1e-3  # a learning rate at which models of these sizes train with each of the optimizers
MOST_TOKENS_COUNTED = 50_000_000  # largest corpus for which a run ends with the unigram entropy: about a second


def state(job: Job, due: Due) -> dict[str, Any]:
    """Return the metrics of the weights of a step: their norm and digest, if due. Must be called before the update."""
    metrics: dict[str, Any] = {}
    if due.log:
        metrics["weight_norm"] = norm(parameter.detach() for parameter in job.state.model.parameters())
    if due.digest:
        with job.stopwatch.time("digest"):
            weights = job.state.weights()  # gathered from all processes
            metrics["weights_digest"] = weights_digest(weights) if job.fabric.is_global_zero else ""
    return metrics


def step(
    job: Job, number: int, due: Due, gradient: Any, state_metrics: dict[str, Any], sizes: UpdateSize | None
) -> None:
    """Record a step and, if due, log its metrics. sizes: None if there was no update or no logging is due."""
    meters = job.state.meters
    if meters.observe_loss(gradient.loss):
        log.warning(
            "Step %d: the loss jumped to %.4f, over 6 standard deviations above its recent mean.", number, gradient.loss
        )
    rate = job.learning_rate(number)
    job.stopwatch.steps += 1
    job.progress.advance(number, gradient.loss, rate)
    if not due.log:
        for logger in job.loggers if state_metrics else ():
            logger.log(number, state_metrics)
        return
    if job.stopwatch.small is not None:
        meters.observe_noise(*job.stopwatch.small, job.config.data.dataloader.batch_size, gradient.norm)
    metrics = _quantities(job, number, gradient, rate, sizes) | state_metrics | _speed(job)
    for logger in job.loggers:
        logger.log(number, metrics)
    job.progress.line(number, job.plan.last, metrics)


def _quantities(job: Job, number: int, gradient: Any, rate: float, sizes: UpdateSize | None) -> dict[str, Any]:
    loss = gradient.loss
    metrics: dict[str, Any] = {
        "train/loss": loss,
        "lr": rate,
        "tokens": number * job.tokens_per_step,
        "grad_norm": gradient.norm,
        "clip_coefficient": gradient.clip_coefficient,
        "loss_spikes": job.state.meters.spikes,
        "skipped_updates": job.state.skipped_updates,
    }
    if job.state.model.likelihood == "exact":  # otherwise the loss is a bound of the likelihood or unrelated to it
        metrics["train/perplexity"] = math.inf if loss > 700 else math.exp(loss)
        metrics |= _bits_per_byte(job, number, loss)
    elif job.state.model.likelihood == "bound":
        metrics[BOUND] = loss
    if job.rates_differ:
        metrics |= {f"lr/{name}": value for name, value in job.group_rates(number).items()}
    metrics |= _noise(job)
    if sizes is not None:
        metrics |= {f"update_ratio/{group}": ratio for group, ratio in sizes.ratios().items()}
    return metrics


def _bits_per_byte(job: Job, number: int, loss: float) -> dict[str, float]:
    """Return the loss in bits per byte of the predicted text; if it is unknown, log the reason once and return nothing."""
    text_bytes = job.text.target_bytes(job.batches(number), job.tokens_read)
    if text_bytes is not None:
        total: Any = job.fabric.all_reduce(torch.tensor(text_bytes, device=job.device), reduce_op="sum")
        text_bytes = int(total)
    if text_bytes is not None and text_bytes < 0:
        job.say_once(
            "A batch holds tokens for what the tokenizer does not know, whose bytes are not known: no bits per byte."
        )
    elif text_bytes and job.stopwatch.predicted == job.tokens_per_step:
        return {"train/bits_per_byte": loss * job.tokens_per_step / (math.log(2) * text_bytes)}
    elif text_bytes:
        job.say_once(
            "The model does not predict every token, so the bytes behind its loss are not known: no bits per byte."
        )
    return {}


def _noise(job: Job) -> dict[str, float]:
    """Return the gradient noise scale S / G2 and its two parts; log once why any of them is missing."""
    meters = job.state.meters
    if meters.noise is None or meters.signal is None:
        job.say_once(_why_no_noise(job))
        return {}
    parts = {"noise_scale/S": meters.noise, "noise_scale/G2": meters.signal}
    scale = meters.noise_scale()
    if scale is None:
        job.say_once(
            "noise_scale = S / G2 is left out where the average of S or of G2 is not above 0: the gradients logged so far "
            "do not tell the signal from the noise. Both parts are logged."
        )
    return parts if scale is None else {"noise_scale": scale} | parts


def _why_no_noise(job: Job) -> str:
    if job.config.training.optimization.gradient_accumulation_steps > 1:
        return "No noise_scale yet: no micro-batch that was logged had a finite gradient and predicted tokens."
    if job.fabric.world_size == 1:
        return (
            "No noise_scale: it compares gradients of two batch sizes, and here the only micro-batch is the whole batch. "
            "Set training.optimization.gradient_accumulation_steps to 2 or more."
        )
    return (
        "No noise_scale: a sharded model (fsdp2) averages its gradients over the processes while it goes backward. Set "
        "training.optimization.gradient_accumulation_steps to 2 or more."
    )


def _speed(job: Job) -> dict[str, float]:
    seconds, steps, phases = job.stopwatch.report()
    if job.device.type == "cpu" and job.loggers:
        step_s = sum(phases.get(phase, 0.0) for phase in ("forward", "backward", "update"))
        message = job.pace.observe(step_s, job.stopwatch.cpus, load_average(), usable_cpus())
        if message is not None:
            job.say_once(message)
    tokens_per_s = steps * job.tokens_per_step / seconds
    flops_per_s = tokens_per_s * job.state.model.flops_per_token(job.config.model.max_seq_len)
    speed = {"tokens_per_s": tokens_per_s, "flops_per_s": flops_per_s}
    speed["share_of_peak"] = flops_per_s / (job.peak_flops * job.fabric.world_size)
    return speed | {f"time/{phase}_s": duration for phase, duration in phases.items()}


def save(job: Job, number: int, due: Due, captured: dict[Address, Tensor], gradient: Any) -> None:
    """Give the due parts of a step to the writer. Does nothing at the step that the run resumed from, which is on disk."""
    if number == job.continued_from:
        return
    tensors = dict(captured)
    if due.weights:
        tensors |= job.state.weights()  # gathered from all processes
    if due.optimizer:
        tensors |= job.state.moments()
    if job.writer is None:
        return
    meta = job.state.meta() | {
        "resumable": due.weights and due.optimizer,
        "loss": gradient.loss,
        "gradient_norm": gradient.norm,
        "clip_coefficient": gradient.clip_coefficient,
        "learning_rate": job.learning_rate(number),
        "capture": _positions(job, number) if due.dynamics else None,
    }
    if job.rates_differ:
        meta["learning_rates"] = job.group_rates(number)
    job.writer.submit(
        number,
        tensors,
        meta=meta,
        texts={name: text for name, text in job.texts.items() if due.weights or name == "anatomy.json"},
        tables=_tables(job, number) if due.dynamics else {},
        weight_prefix=job.state.model.state_prefix,
        parameters=list(job.state.model.state_dict()),
        about=job.about,
        replace=True,  # an existing step is damaged, or later than the checkpoint that this run resumed from
    )
    if not job.config.checkpointing.save_in_background:
        job.writer.wait()


def _positions(job: Job, number: int) -> dict[str, list[int] | None]:
    """Return the recorded positions of a step, for training and held-out rows (which may be shorter); None means all."""
    positions = {"positions": job.taps.positions_at(number, job.config.model.max_seq_len)}
    if job.captured_rows is not None:
        positions["val_positions"] = job.taps.positions_at(
            number, job.captured_rows.tokens_RS.shape[1] - job.tokens_read
        )
    return positions


def _tables(job: Job, number: int) -> dict[str, dict[str, Any]]:
    limit = job.config.checkpointing.learning_dynamics.max_rows
    numbers = job.batches.row_numbers(number)[:limit]
    train = Rows.take(job.batches.source, numbers, row_length(job.config))
    tables = {"train": train, "val": job.captured_rows}
    return {split: _columns(job, rows, limit) for split, rows in tables.items() if rows is not None}


def _columns(job: Job, rows: Rows, limit: int | None) -> dict[str, Any]:
    tokens_RS = rows.tokens_RS[:limit]
    columns: dict[str, Any] = {"row": np.asarray(rows.numbers)[:limit], "input_ids": tokens_RS.numpy().astype(np.int32)}
    if rows.labels is not None:
        columns["source"] = rows.labels[:limit]
    decoded = job.text.decode(tokens_RS)
    return columns | ({"text": decoded} if decoded is not None else {})


def evaluation(job: Job, number: int, results: dict[str, float]) -> None:
    """Write the results of an evaluation to the run and to the loggers."""
    if job.writer is None or job.run is None or not results:
        return
    kept = job.run.evaluation(number) if number == job.continued_from else None  # else of weights that are gone
    job.run.write_evaluation(number, (kept or {}) | results)
    for logger in job.loggers:
        logger.log(number, {f"val/{name}": value for name, value in results.items()})
    job.progress.say(
        f"step {number}: " + ", ".join(f"{name} {value:.3f}" for name, value in results.items() if "/" not in name)
    )


def skipped(job: Job, number: int, gradient: Any) -> None:
    """Log that an update was skipped, why, and which rows its batch had."""
    rows = job.batches.row_numbers(number).tolist()
    reason = f"loss {gradient.loss}, gradient norm {gradient.norm}"
    if not job.stopwatch.predicted:
        reason = "the model predicted no token of the batch"
    log.warning(
        "Step %d: %s; the update is skipped (%d in a row). Rows of the batch: %s.",
        number, reason, job.state.skipped_in_a_row, _ranges(rows),
    )  # fmt: skip
    for logger in job.loggers:
        logger.log(number, {"skipped": True, "rows": rows})


def skipped_too_many(job: Job) -> str:
    """Return the error message of a run that stops after too many skipped updates, with commands to continue it."""
    step = job.state.step
    message = f"{job.state.skipped_in_a_row} updates in a row had a non-finite loss or gradient; stopped at step {step}"
    if job.run is None:
        return message
    path = Path(job.run.path)
    resume = f"pico train {shlex.quote(str(path / CONFIG))}"
    found = last_finite(job.run, step)
    return (
        f"{message}, which is saved in {path}. metrics.jsonl names the rows of their batches.{_fork(job, path, found)}\n"
        f"To continue from step {step}, without these batches:\n  {resume}\n"
        "A longer training.optimization.lr_warmup_steps or training.fabric.precision=32-true may help too"
    )


def _fork(job: Job, path: Path, found: Checkpoint | None) -> str:
    """Return the part of the message with the command that forks from a step with a finite loss, or an empty string."""
    if found is None:
        return ""
    rate = min(job.config.training.optimization.lr / 10, SAFE_RATE)
    names = (f"{path.name}-{number}" for number in itertools.count(2))
    name = next(name for name in names if not path.with_name(name).exists())
    return (
        f"\nTo start a new run from step {found.step}, the last saved one with a finite loss, with a smaller learning rate:"
        f"\n  pico fork {shlex.quote(str(path))} --step {found.step} --run-name {shlex.quote(name)} "
        f"training.optimization.lr={rate:.1g}"
    )


def _ranges(rows: list[int]) -> str:
    consecutive = len(rows) > 1 and rows == list(range(rows[0], rows[0] + len(rows)))
    return (
        f"{rows[0]} to {rows[-1]}" if consecutive else ", ".join(map(str, rows[:16])) + (" …" if len(rows) > 16 else "")
    )


def log_summary(job: Job) -> None:
    """Stop the progress bar and log what was trained, where it is stored, and which commands to use next."""
    job.progress.__exit__(None, None, None)
    if job.writer is None or job.run is None:
        return
    path, steps = job.run.path, job.run.steps
    if job.stop.received is not None:
        log.info("Stopped at step %d of %d; everything is saved in %s.", job.state.step, job.plan.last, path)
        log.info("To go on: give the same command again.")
        return
    log.info("Trained %d steps; %d checkpoints are in %s.", job.state.step, len(steps), path)
    losses = [entry["train/loss"] for entry in job.run.read_metrics(("train/loss",))]
    source = job.batches.source
    if losses and len(source) * source.row_length <= MOST_TOKENS_COUNTED:
        log.info(
            "%s in nats per token: %.3f at the start, %.3f now. A uniform guess has ln(%d) = %.3f, the best guess that "
            "ignores the context (the unigram entropy of the corpus) %.3f.",
            "Bound of the loss" if job.state.model.likelihood == "bound" else "Loss",
            losses[0], losses[-1], job.config.model.vocab_size, math.log(job.config.model.vocab_size), unigram_entropy(source),
        )  # fmt: skip
    if losses:
        log.info("%s", loss_line(job.run))
    log.info("See what they hold:   pico list %s", path)
    log.info("See it think:         pico view %s", path)
    log.info("Let the model write:  pico generate %s --prompt 'The'", path)
