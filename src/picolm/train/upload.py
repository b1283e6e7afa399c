"""Steps of a training that go to the Hub as they are saved: what `checkpointing.save_to_hf` asks for."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from picolm.errors import PicoError
from picolm.schema import flatten, plain
from picolm.store import Run
from picolm.store.card import model_card
from picolm.store.outbox import Outbox, Uploader
from picolm.store.repository import Branch
from picolm.store.roworder import lookup
from picolm.store.upload import Sender
from picolm.train.config import REPOSITORY, TrainConfig


def sender(
    run: Run, repository: str, branch: str | None = None, *, private: bool = False, collection: str | None = None
) -> Sender:
    """What sends steps of a run to a branch (default: the name of the run), with a card that says how it was configured."""
    name = branch or run.name
    changed = {key: value for key, (value, _) in differences(run.config).items()}
    describe = partial(model_card, run, repository, name, differences=changed)
    return Sender(run, Branch(repository, name), describe, private, collection)


def destination(run: Run, repository: str | None, branch: str | None) -> tuple[str, str]:
    """Repository and branch to send a run to: as asked, else where it was sent before, else as it is configured."""
    if type(run) is not Run:
        raise PicoError(f"{run.path}: only runs of picolm are sent; this one was written by another tool")
    before = Outbox(run).place.removeprefix("hub:").partition("@")
    configured = lookup(run.config, "checkpointing.hf_checkpoint.repo_id", "") or ""
    repository = repository or before[0] or str(configured)
    if not REPOSITORY.fullmatch(repository):
        raise PicoError(
            f"{run.path}: where to? give --repo-id OWNER/NAME" + (f", not {repository!r}" if repository else "")
        )
    return repository, branch or (before[2] if repository == before[0] else "") or run.name


def differences(config: Mapping[str, Any], schema: type[TrainConfig] = TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The keys of a configuration whose values are not the defaults of `schema`: (value, default)."""
    defaults = flatten(plain(schema()))
    return {
        key: (value, defaults.get(key))
        for key, value in flatten(config).items()
        if key not in defaults or defaults[key] != value
    }


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
    there = [step for step in run.steps if last is not None and step <= last]
    uploader = Uploader(sender(run, place.repo_id, collection=place.collection_slug), there, impatient)
    stack.callback(uploader.close)
    return uploader.add
