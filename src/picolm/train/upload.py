"""Steps of a training that go to the Hub as they are saved: what `checkpointing.save_to_hf` asks for."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from picolm.errors import PicoError
from picolm.schema import flatten, plain
from picolm.store import Run
from picolm.store.card import model_card
from picolm.store.outbox import Uploader
from picolm.store.repository import Branch
from picolm.store.upload import Sender
from picolm.train.config import TrainConfig


def sender(
    run: Run, repository: str, branch: str | None = None, *, private: bool = False, collection: str | None = None
) -> Sender:
    """What sends steps of a run to a branch (default: the name of the run), with a card that says how it was configured."""
    name = branch or run.name
    describe = partial(model_card, run, repository, name, differences=differences(run.config))
    return Sender(run, Branch(repository, name), describe, private, collection)


def differences(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration whose values are not the defaults."""
    defaults = flatten(plain(TrainConfig()))
    return {key: value for key, value in flatten(config).items() if key not in defaults or defaults[key] != value}


def start_uploads(
    config: TrainConfig, run: Run, last: int | None, stack: ExitStack, impatient: Callable[[], bool]
) -> Callable[[int], None]:
    """Start to send what waits and what comes; returns what is to be told of each step that is saved.

    last: the step that this run went on from; newer ones will be made again. It ends with `stack`, after a bounded wait.
    """
    checkpointing = config.checkpointing
    if not checkpointing.save_to_hf:
        return lambda step: None
    place = checkpointing.hf_checkpoint
    if "/" not in place.repo_id:
        raise PicoError(
            f"checkpointing.hf_checkpoint.repo_id is {place.repo_id!r}; save_to_hf sends steps to OWNER/NAME on the Hub: "
            "say which"
        )
    there = [step for step in run.steps if last is not None and step <= last]
    uploader = Uploader(sender(run, place.repo_id, collection=place.collection_slug), there, impatient)
    stack.callback(uploader.close)
    return uploader.add
