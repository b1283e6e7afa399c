"""Sending a run, or some of its steps, while somebody waits for it."""

import logging
from collections.abc import Callable, Collection, Sequence

from picolm.errors import StoreError
from picolm.store.outbox import Outbox
from picolm.store.run import Run
from picolm.store.sealed import SealedCheckpoint
from picolm.store.selection import check_parts
from picolm.store.upload import Damaged, Sender

log = logging.getLogger("picolm")


def push(
    sender: Sender,
    steps: Sequence[int] | None = None,
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[int], list[int]]:
    """Send steps (None: all, and those that waited) in order; returns those that were sent, and those that are damaged.

    What is on the Hub is not sent again, so this resumes. progress: called with the steps that are done, and all of them.
    Raises StoreError, having sent what came before.
    """
    check_parts(only)
    outbox = Outbox(sender.run)
    wanted = _wanted(sender.run, outbox, steps)
    sent, damaged = list[int](), list[int]()
    with outbox.sending():
        sender.open()
        outbox.address(sender.branch.place)
        for done, (step, checkpoint) in enumerate(wanted.items()):
            progress(done, len(wanted))
            try:
                if sender.send(checkpoint, only):
                    sent.append(step)
            except Damaged as error:
                log.warning("%s", error)
                damaged.append(step)
                continue
            if not only:
                outbox.remove(step)
        _end_with_the_newest(sender, outbox, sent)
        if sent:
            sender.send_card()
        progress(len(wanted), len(wanted))
    return sent, damaged


def _wanted(run: Run, outbox: Outbox, steps: Sequence[int] | None) -> dict[int, SealedCheckpoint]:
    numbers = sorted({*run.steps, *outbox.steps}) if steps is None else sorted(set(steps))
    found = {step: outbox.checkpoint(step) for step in numbers}
    missing = [step for step, checkpoint in found.items() if checkpoint is None]
    if missing and steps is not None:
        there = ", ".join(map(str, run.steps)) or "none"
        raise StoreError(f"{run.path}: has no step {missing[0]} to send (there are: {there})")
    if len(missing) == len(found):
        raise StoreError(f"{run.path}: has no steps to send")
    return {step: checkpoint for step, checkpoint in found.items() if checkpoint is not None}


def _end_with_the_newest(sender: Sender, outbox: Outbox, sent: list[int]) -> None:
    """Where older steps were sent late, send the last commit of the newest again: a branch shows its newest commit."""
    newest = max(sender.there, default=None)
    checkpoint = outbox.checkpoint(newest) if newest is not None and sent and newest != sent[-1] else None
    if checkpoint is not None:
        sender.renew(checkpoint)
