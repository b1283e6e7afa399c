"""The training loop: forward, backward, capture, save, update. Step n means the state after n updates and its batch n."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from picolm.address import Address
from picolm.capture import capture
from picolm.capture.taps import Order, summed
from picolm.errors import PicoError
from picolm.models import Loss
from picolm.train import noise, report
from picolm.train.devices import keeps_shards, only_deterministic, reshard
from picolm.train.evaluate import Evaluation, evaluate
from picolm.train.job import Due, Job
from picolm.train.metrics import UpdateSize, norm


class Gradient(NamedTuple):
    """The loss and gradient of one step, before clipping. finite: whether both the loss and the norm are finite."""

    loss: float
    norm: float
    clip_coefficient: float
    finite: bool


def train(job: Job) -> None:
    """Train `job` up to its last step, or until a stop is requested. Raises PicoError after too many skipped updates."""
    state, stopping = job.state, False
    for step in range(state.step, job.plan.last + 1):
        stopping = job.stop.agreed(job.device) or too_many_skipped(job)
        if job.writer is not None:
            job.writer.check()
        due = job.plan.when_stopping(step) if stopping else job.plan.due(step)
        with job.stopwatch.time("data"):
            micro_batches = job.batches(step)
        with watch(job, step, due, micro_batches) as captured:
            loss = accumulate(job, step, micro_batches, job.batches.rank_rows(step), job.tokens_per_step, due)
        gradient = measure(job, loss)
        state_metrics = report.state(job, due)
        for watcher in job.watchers:
            watcher(job, step)
        if due.dynamics:
            captured |= held_out(job, step)
        if due.evaluation and not stopping:
            report.evaluation(job, step, evaluation(job))
        if due.checkpoint:
            with job.stopwatch.time("save"):
                report.save(job, step, due, captured, gradient)
        sizes = None
        if step < job.plan.last and not stopping:
            sizes = update(job, step, gradient, due)
        report.step(job, step, due, gradient, state_metrics, sizes)
        if stopping:
            break
    if job.writer is not None:
        job.writer.wait()
    if stopping and job.stop.received is None:
        raise PicoError(report.skipped_too_many(job))


def accumulate(
    job: Job, step: int, micro_batches: Sequence[Tensor], order: Order, tokens: int, due: Due | None = None
) -> Tensor:
    """Run forward and backward on every micro-batch. Returns the mean loss in nats per predicted token.

    The mean is over all tokens that the model reports as predicted, in all micro-batches of all processes. Afterwards
    the parameters hold the gradients of this mean. The loss is NaN if no token was predicted.
    order: for each micro-batch, the indices of its rows in the global batch; one without indices is not counted.
    tokens: the number of targets in all rows; gradients are divided by it first and rescaled once the predicted tokens
    are counted. due: what is due at this step; None for held-out rows, which are captured but not trained on.
    """
    world, nats, split = job.fabric.world_size, torch.zeros((), device=job.device), "train" if due else "val"
    predicted = 0.0
    if due:
        job.stopwatch.small = None
    for index, (tokens_BS, places) in enumerate(zip(micro_batches, order, strict=True)):
        last, counts = index == len(micro_batches) - 1, float(len(places) > 0)
        alone = world == 1 or keeps_shards(job.fabric)
        measured = bool(due and due.log and index == 0 and not (last and alone))  # the same on all processes
        with (
            job.fabric.no_backward_sync(job.model, enabled=not (last or keeps_shards(job.fabric))),
            own_gradients(job, enabled=measured and last) as squares,
        ):
            with job.stopwatch.time("forward" if due else "capture"):
                loss = forward(job, step, places, tokens_BS, split, compiled=job.compiled and due is not None)
            with job.stopwatch.time("backward" if due else "capture"), only_deterministic(job.exact):
                job.fabric.backward(loss.nats * (counts * world / tokens))  # DDP averages over processes
        nats = nats + counts * loss.nats.detach()
        predicted += counts * float(loss.tokens)
        if measured:
            own = math.sqrt(sum(map(float, squares))) if last else norm(job.gradients())
            # Rescale from a share of the global mean to the mean of this micro-batch; NaN if it predicted no token.
            own *= tokens / (world * float(loss.tokens)) if loss.tokens else math.nan
            job.stopwatch.small = small_batch(job, len(tokens_BS), own)
    total: Any = job.fabric.all_reduce(nats, reduce_op="sum")
    predicted = summed(torch.tensor(predicted, dtype=torch.float64), job.device).item() if world > 1 else predicted
    if due:
        job.stopwatch.predicted = predicted
    if predicted not in (tokens, 0):
        torch._foreach_mul_(job.gradients(), tokens / predicted)
    return total / predicted if predicted else torch.full_like(total, math.nan)


@contextmanager
def own_gradients(job: Job, enabled: bool) -> Iterator[list[Tensor]]:
    """Collect the squared norms of this process's gradients inside the block, before DDP averages over processes.

    Yields the list that they are appended to, one scalar tensor per parameter.
    """
    squares: list[Tensor] = []
    hooks = [
        parameter.register_hook(lambda gradient: squares.append(gradient.detach().float().square().sum()))
        for parameter in job.state.model.parameters()
        if enabled and parameter.requires_grad
    ]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()


def small_batch(job: Job, rows: int, own: float) -> tuple[int, float]:
    """Return the number of rows of one micro-batch and its gradient norm, as the root mean square over processes.

    A sharded model has already averaged its gradient over all processes, so the rows of all processes count. Otherwise
    `own` is the norm of this process's gradient.
    """
    if job.fabric.world_size == 1 or keeps_shards(job.fabric):
        return rows * job.fabric.world_size, own
    squared: Any = job.fabric.all_reduce(torch.tensor(own * own, device=job.device), reduce_op="mean")
    return rows, math.sqrt(squared)


def forward(
    job: Job, step: int, places: Sequence[int] | np.ndarray, tokens_BS: Tensor, split: str, *, compiled: bool
) -> Loss:
    """Return the loss of one micro-batch, computed in the precision of the run. Its randomness depends only on the
    seed, the row, and in training on the step.
    """
    seed, rows = job.config.training.seeds.noise, [int(place) for place in places] or [-1]
    if split == "train":
        drawn = noise.of_training(seed, step, rows, job.config.data.dataloader.batch_size, job.device)
    else:
        drawn = noise.of_split(seed, split, rows, job.device)
    torch.manual_seed(drawn.seeds[0])  # for models that use the global generator, so that its state need not be saved
    loss = job.model.compiled_loss if compiled else job.model.loss
    # On one device Fabric applies autocast to `forward` only, not to other methods.
    with job.fabric.autocast(), only_deterministic(job.exact):
        return loss(tokens_BS.to(job.device, non_blocking=True), drawn)


@contextmanager
def watch(job: Job, step: int, due: Due, micro_batches: Sequence[Tensor]) -> Iterator[dict[Address, Tensor]]:
    """Capture the training batch if a capture is due. Yields a dict that holds the captured tensors after the block.

    Gradients are read after backward, before clipping. Hooks inside a compiled loss would split its graph differently
    and change its rounding, so the run would no longer end with the same bytes. With a compiled loss, the activations
    therefore come from a second forward pass of the same weights that is not compiled. So they do for a model that hides
    tokens: from a pass in which none is hidden.
    """
    if not due.dynamics:
        yield {}
        return
    order = job.batches.rank_rows(step)
    again = job.taps.activations and (job.compiled or job.reads_without_noise)
    with job.stopwatch.time("capture"):
        taps = replace(job.taps, activations=job.taps.activations and not again)
        with capture(taps, split="train", step=step, order=order) as captured:
            yield captured
        if again:
            captured |= activations(job, step, "train", order, micro_batches)


def activations(
    job: Job, step: int, split: str, order: Order, micro_batches: Sequence[Tensor]
) -> dict[Address, Tensor]:
    """Return the activations of a forward pass of its own over some micro-batches, without what the model hides of them."""
    taps = replace(job.taps, gradients=False)
    with capture(taps, split=split, step=step, order=order) as captured, torch.no_grad():
        for places, tokens_BS in zip(order, micro_batches, strict=True):
            if job.reads_without_noise:
                with job.fabric.autocast(), only_deterministic(job.exact):
                    job.model.without_noise(tokens_BS.to(job.device, non_blocking=True))
            else:
                forward(job, step, places, tokens_BS, split, compiled=False)
    reshard(job.model)
    return captured


def held_out(job: Job, step: int) -> dict[Address, Tensor]:
    """Return the same captures on the fixed held-out rows; empty if there are none. The gradients of the training batch
    are put back afterwards.
    """
    if job.captured_rows is None:
        return {}
    rank, world = job.fabric.global_rank, job.fabric.world_size
    size = job.config.checkpointing.learning_dynamics.batch_size
    order, micro_batches = zip(*job.captured_rows.micro_batches(size, rank, world))
    kept = [parameter.grad for parameter in job.state.model.parameters()]
    job.state.model.zero_grad()
    again = job.taps.activations and job.reads_without_noise
    taps = replace(job.taps, activations=job.taps.activations and not again)
    with capture(taps, split="val", step=step, order=order) as captured:
        accumulate(job, step, micro_batches, order, job.captured_rows.tokens_RS[:, job.tokens_read :].numel())
    for parameter, gradient in zip(job.state.model.parameters(), kept):
        parameter.grad = gradient
    if again:
        captured |= activations(job, step, "val", order, micro_batches)
    return captured


def measure(job: Job, loss: Tensor) -> Gradient:
    """Return the loss, gradient norm and clip coefficient as numbers.

    Normally this is the only place in a step that waits for the device.
    """
    total, value, limit = norm(job.gradients()), loss.item(), job.config.training.optimization.grad_clip_norm
    coefficient = 1.0 if limit is None else min(1.0, limit / (total + 1e-6))
    return Gradient(value, total, coefficient, math.isfinite(value) and math.isfinite(total))


def update(job: Job, step: int, gradient: Gradient, due: Due) -> UpdateSize | None:
    """Update the parameters from `step` to `step + 1`. Returns an UpdateSize if logging is due, else None.

    If the loss or the gradient is not finite, the update is skipped and counted.
    """
    state = job.state
    sizes = UpdateSize(state.model) if due.log else None
    with job.stopwatch.time("update"):
        if gradient.finite:
            if gradient.clip_coefficient < 1:
                torch._foreach_mul_(job.gradients(), gradient.clip_coefficient)
            job.set_rates(step)
            for optimizer in state.optimizers:
                optimizer.step()
        state.model.zero_grad()  # also parameters that belong to no optimizer
    state.skipped_updates += not gradient.finite
    state.skipped_in_a_row = 0 if gradient.finite else state.skipped_in_a_row + 1
    state.step = step + 1
    if not gradient.finite:
        report.skipped(job, step, gradient)
    return sizes


def evaluation(job: Job) -> dict[str, float]:
    """Run the configured evaluations on the model in training. Returns their results by name."""
    with job.stopwatch.time("evaluation"):
        size = job.config.evaluation.paloma.batch_size
        context = Evaluation(
            model=job.model,
            rows=job.evaluated_rows,
            batch_size=size,
            token_bytes_V=job.text.token_bytes_V,
            rank=job.fabric.global_rank,
            world=job.fabric.world_size,
            device=job.device,
            text=job.text,
            settings=job.config.evaluation,
            run=job.run,
            step=job.state.step,
            last=job.config.training.max_steps,
        )
        with job.fabric.autocast():
            return evaluate(job.config.evaluation.metrics or (), context)


def too_many_skipped(job: Job) -> bool:
    """Return whether too many updates in a row were skipped."""
    most = job.config.training.max_skipped_steps if job.most_skipped is None else job.most_skipped
    return job.state.skipped_in_a_row > 0 and job.state.skipped_in_a_row >= most
