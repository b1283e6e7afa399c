"""An opened run: its steps, and its model, which is filled with the weights of the step in question.

The run is read, never written. One model of it is in memory at a time.
"""

import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch

from picolm.errors import StoreError
from picolm.observe.rows import TOKENIZER
from picolm.observe.subject import Subject, threads_of
from picolm.readers.checkpoint import SeriesCheckpoint
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import Missing, SealedCheckpoint, stored_weights_digest
from picolm.store.manifest import CONFIG, MANIFEST
from picolm.view.cached import Answers
from picolm.view.refusal import Refused
from picolm.view.words import Words

SPLITS = ("train", "val")


class Step(NamedTuple):
    """A step with weights. digest: of the weights, None where it takes reading them. splits: whose rows it keeps."""

    digest: str | None
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A text as token ids. truncated: to the context of the model. seen_at: the step at which a row of training was read."""

    ids: list[int]
    truncated: bool = False
    seen_at: int | None = None


class Viewed:
    """An opened run.

    replayed: a run that holds steps of it that were made again, see `replaying`. asking: to be held while its model is used.
    """

    def __init__(self, number: int, run: Run, place: str, kept: Answers | None = None):
        """kept: where the digests of steps are kept, since reading a thousand manifests takes seconds."""
        self.number, self.run, self.place, self._kept = number, run, place, kept or Answers()
        self.replayed: Run | None = None
        self.asking = threading.RLock()
        self._listing, self._making = threading.Lock(), threading.RLock()
        self._known: dict[int, tuple[object, Step | None]] = {}
        self._damaged = set[int]()
        self._subject: Subject | None = None
        self._words: Words | None = None
        self._made_of: object = None
        self._filled: tuple[int, str] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the folder of the run was deleted."""
        return not self.place.startswith("hub:") and not self.run.path.exists()

    def steps(self) -> dict[int, Step]:
        """Return the steps with weights, ascending, also those that were made again. Reads only what changed meanwhile."""
        with self._listing:
            self._known = {number: self._look(number) for number in self.run.step_directories()}
            found = {number: step for number, (_, step) in self._known.items() if step is not None}
        for number in self.replayed or ():
            if number not in found and self.replayed is not None:
                found[number] = Step(stored_weights_digest(self.replayed[number]))
        return dict(sorted(found.items()))

    def made_again(self) -> set[int]:
        """Return the steps that are there only because they were made again."""
        return set(self.replayed or ()) - set(self.run.step_directories())

    def damaged(self) -> list[int]:
        """Return the steps whose folder is there and cannot be opened, as `steps` found it."""
        return sorted(self._damaged & set(self.run.step_directories()))

    def _look(self, number: int) -> tuple[object, Step | None]:
        """Return what identifies the files of a step, and the step; None for one that is damaged or has no weights."""
        identity: object = None
        with suppress(OSError):  # other formats have no manifest
            state = (self.run.step_path(number) / MANIFEST).lstat()
            identity = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        known = self._known.get(number)
        if known is not None and known[0] == identity and known[1] is not None:
            return known
        try:
            found = self._summarized(number, identity)
            self._damaged.discard(number)
        except StoreError:
            found = None
            self._damaged.add(number)
        return identity, found

    def _summarized(self, number: int, identity: object) -> Step | None:
        """Return a step, from what is kept of its manifest where that did not change. Raises StoreError for a damaged one."""
        key = f"step\n{self.run.path.resolve()}\n{number}\n{identity}"
        if identity is not None and (kept := self._kept.get(key)) is not None:
            digest, *splits = kept.decode().split()
            return Step(digest, tuple(splits))
        found = _summary(self.run[number])
        if found is not None and found.digest is not None and identity is not None:
            self._kept.put(key, " ".join([found.digest, *found.splits]).encode())
        return found

    def checkpoint(self, step: int) -> Checkpoint:
        """Return a step with weights, also one that was made again. Raises Refused: 404, 410 or 422."""
        if self.is_gone:
            raise Refused(f"the run {self.run.name} is gone: its folder was deleted or moved", 410)
        try:
            again = self.replayed if self.replayed is not None and step in self.replayed else None
            return (again if again is not None and step not in self.run.step_directories() else self.run)[step]
        except Missing as error:
            raise Refused(str(error), 404) from error
        except StoreError as error:
            raise Refused(str(error), 422) from error

    @property
    def subject(self) -> Subject:
        """The model of the run. Raises PicoError where there is none."""
        with self._making:
            made_of = self._configuration()
            if self._subject is None or made_of != self._made_of:  # another run may stand in its place now
                self._subject, self._words, self._made_of = Subject(self.run, self._newest()), None, made_of
            return self._subject

    def _configuration(self) -> object:
        """Return what identifies the file of the configuration; None without one."""
        try:
            state = (self.run.path / CONFIG).lstat()
            return state.st_ino, state.st_size, state.st_mtime_ns
        except OSError:
            return None

    def _newest(self) -> Checkpoint:
        for number in reversed(self.run.step_directories()):
            if self._look(number)[1] is not None:
                return self.run[number]
        raise Refused("no step with weights is saved yet", 404)

    @property
    def words(self) -> Words:
        """The tokenizer of the run."""
        with self._making:
            checkpoint, size = self.subject.checkpoint, int(self.subject.architecture.outline.config.vocab_size)
            if self._words is None:
                content = checkpoint.read(TOKENIZER) if TOKENIZER in checkpoint.files else None
                self._words = Words(content, size, f"{checkpoint.path}/{TOKENIZER}")
            return self._words

    def digest(self, step: int) -> str:
        """Return the digest of the weights of a step. Raises Refused where there is none."""
        known = self._look(step)[1]
        found = known.digest if known is not None else None
        found = found or stored_weights_digest(self.checkpoint(step))
        if found is None:
            raise Refused(f"step {step} of {self.run.name} was saved without weights", 404)
        return found

    def key(self, step: int) -> str:
        """Return what else than the question an answer of a step depends on, as text."""
        identity = self.subject.architecture.identity(step)
        return repr((self.digest(step), identity, self.words.digest, torch.__version__, threads_of(self.run)))

    def at(self, step: int) -> Subject:
        """Return the model with the weights of a step. To be called, and used, while `asking` is held."""
        checkpoint, digest = self.checkpoint(step), self.digest(step)
        if self._filled is not None and self._filled[0] == step and self._filled[1] != digest:
            self._subject = None  # the step was replaced by another one
        self._filled = step, digest
        return self.subject.at(checkpoint)

    def row(self, split: str, step: int, index: int) -> Asked:
        """Return a row that a step keeps. Raises Refused where there is none."""
        checkpoint = self.checkpoint(step)
        rows = checkpoint.rows(split)
        if not 0 <= index < len(rows):
            raise Refused(f"step {step} keeps {len(rows)} rows of {split}; there is no row {index}", 404)
        ids = rows.column("input_ids")[index].as_py()
        return self.cut(ids, 1, step if split == "train" else None)

    def text(self, text: str) -> Asked:
        """Return a text as the run's tokenizer reads it, cut to the context. Raises PicoError for one that cannot be read."""
        ids = self.words.encode(text)
        if not ids:
            raise Refused("the text has no tokens; write something")
        return self.cut(ids, 0)

    def cut(self, ids: list[int], beyond: int, seen_at: int | None = None) -> Asked:
        """Return ids cut to the context; the last one of a row, which is only predicted, may be beyond it."""
        model = self.subject.architecture
        most = model.context + min(beyond, model.outline.row_length(0))
        return Asked(ids[:most], len(ids) > most, seen_at)


def _summary(checkpoint: Checkpoint) -> Step | None:
    """Return a step; None without weights. Of a series of checkpoints, which are weights, nothing is read."""
    if not isinstance(checkpoint, SealedCheckpoint):
        return Step(None) if isinstance(checkpoint, SeriesCheckpoint) or checkpoint.select(kind="weights") else None
    weights = stored_weights_digest(checkpoint)
    return None if weights is None else Step(weights, tuple(split for split in SPLITS if checkpoint.rows_file(split)))
