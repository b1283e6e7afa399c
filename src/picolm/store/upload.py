"""Steps of a run, sent to a branch on the Hub: commits in a chain, the last of which says that a step is whole.

A step is several commits, one for each artefact, with the titles of published runs. Each names the commit it follows, so two
senders cannot mix their steps; what is there already is not sent again; and what a lost answer or a kill left half done is
taken up where it stands, because all that is known of it is asked of the Hub.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from picolm.errors import StoreError
from picolm.network import has_moved, persist, prepare_repository, send
from picolm.store import hub, layout
from picolm.store.card import FILE, kept_by_hand, with_front_matter
from picolm.store.files import disk_errors, written_aside
from picolm.store.hub import Whole, whole_body, whole_steps
from picolm.store.journal import Journal
from picolm.store.layout import MANIFEST, METRICS, OPTIMIZER, STATE, WEIGHTS, inside, step_directory, step_of
from picolm.store.manifest import Manifest
from picolm.store.records import identity
from picolm.store.repository import Branch, Commit
from picolm.store.run import Run
from picolm.store.sealed import SealedCheckpoint
from picolm.store.selection import chosen, origin, united
from picolm.trusted import read_bytes, read_text, require_regular

log = logging.getLogger("picolm")

_ATTEMPTS = 5
FOLDER = ".hub"  # in the run: what waits to be sent
_RESULTS = layout.Directories.eval_results_dir

Files = dict[str, Path | bytes]


class Damaged(StoreError):
    """A step that cannot be sent, now or later, because it is not what was written."""


class Sender:
    """Sends steps of one run to one branch. Everything raises StoreError.

    describe: makes the text of the card from the commits of the steps that are there. private: only for a repository that
    there is not yet. collection: the slug of one that the repository is added to.
    """

    def __init__(
        self,
        run: Run,
        branch: Branch,
        describe: Callable[[Mapping[int, str]], str],
        private: bool = False,
        collection: str | None = None,
    ):
        self.run, self.branch = run, branch
        self._describe, self._private, self._collection = describe, private, collection
        self.there: dict[int, Whole] = {}

    def open(self) -> None:
        """Make the branch unless it is there, look at what it holds, and send what describes the run."""
        prepare_repository(self.branch.repository, self.branch.name, "model", self._private, StoreError)
        self._check_same_run(self._look()[0].sha)
        names = (layout.CONFIG, layout.ENVIRONMENT, layout.RUN)
        about = {name: inside(self.run.path, name) for name in names if os.path.lexists(self.run.path / name)}
        for path in about.values():
            require_regular(path)
        self._send(f"Saving {hub.CONFIGURATION} -- Step 0", dict(about))
        if self._collection:
            self._collect(self._collection)

    def send(self, checkpoint: SealedCheckpoint, only: Collection[str] = ()) -> bool:
        """Send a step, or parts of it, beside those that are there; whether there was anything to send."""
        whole = self.there.get(checkpoint.step)
        if whole is not None and whole.digest == checkpoint.manifest.digest:
            return False
        for _ in range(_ATTEMPTS - 1):
            try:
                return self._attempt(checkpoint, only)
            except StoreError as error:
                if not has_moved(error):
                    raise
        return self._attempt(checkpoint, only)

    def renew(self, checkpoint: SealedCheckpoint) -> None:
        """Make a step that is there the newest commit of the branch, so far as its files are here."""
        commits = self._look()
        present = self._manifest(self.there[checkpoint.step].commit)
        if (
            present
            and origin(present) == origin(checkpoint.manifest)
            and present.files.keys() <= checkpoint.files.keys()
        ):
            self._commit(checkpoint, present, commits)

    def send_card(self) -> None:
        """Describe the run on its branch, and on the first page of the repository where nobody else did."""
        text = self._describe({step: whole.commit for step, whole in self.there.items()})
        for branch in dict.fromkeys([self.branch, Branch(self.branch.repository)]):
            page = branch.find(FILE, branch.commits()[0].sha)
            before = read_text(page) if page else ""
            if not kept_by_hand(before, self.branch.place):
                send(
                    branch.repository, branch.name, "model", "Saving Model Card",
                    {FILE: with_front_matter(text, before).encode()}, StoreError,
                )  # fmt: skip

    def _look(self) -> list[Commit]:
        commits = self.branch.commits()
        self.there = whole_steps(commits)
        return commits

    def _attempt(self, checkpoint: SealedCheckpoint, only: Collection[str]) -> bool:
        commits = self._look()
        manifest = self._wanted(checkpoint, only)
        if manifest is None:
            return False
        if problems := checkpoint.verify():
            raise Damaged(f"step {checkpoint.step} is not sent: {problems[0]}")
        self._commit(checkpoint, manifest, commits)
        return True

    def _commit(self, checkpoint: SealedCheckpoint, manifest: Manifest, commits: list[Commit]) -> None:
        step, head = checkpoint.step, commits[0].sha
        stale = self._stale(head, manifest)
        if not any(commit.title.startswith(f"Saving {hub.TOKENIZER} ") for commit in commits):
            words: Files = {name: checkpoint.locate(name) for name in manifest.files if name in layout.TOKENIZER}
            head = self._send(f"Saving {hub.TOKENIZER} -- Step 0", words, head) if words else head
        *artefacts, (last, files) = self._artefacts(checkpoint, manifest).items()
        for kind, part in artefacts:
            head = self._send(f"Saving {kind} -- Step {step}", part, head)
        files |= {MANIFEST: manifest.to_bytes()} | self._records()
        body = whole_body(step, manifest.digest)
        try:
            head = self._send(f"Saving {last} -- Step {step}", files, head, body, stale)
        finally:
            (self.run.path / FOLDER / METRICS).unlink(missing_ok=True)
        self.there[step] = Whole(head, manifest.digest)

    def _wanted(self, checkpoint: SealedCheckpoint, only: Collection[str]) -> Manifest | None:
        """What the step on the Hub will hold; None when it holds that already, or more."""
        manifest, whole = chosen(checkpoint, only), self.there.get(checkpoint.step)
        present = self._manifest(whole.commit) if whole is not None else None
        if present is None or origin(present) != origin(manifest):
            return manifest  # another state of that number, trained again: the newest counts
        together = united(present, manifest)
        if together.files == present.files:
            return None
        if gone := together.files.keys() - checkpoint.files.keys():
            raise StoreError(
                f"step {checkpoint.step}: the Hub has {', '.join(sorted(gone))}, which is not here any more, and lacks "
                "other files that are; push it to another --branch"
            )
        return together

    def _artefacts(self, checkpoint: SealedCheckpoint, manifest: Manifest) -> dict[str, Files]:
        """The files of a step by the titles of their commits, in the order in which they are sent."""
        parts: dict[str, Files] = {}
        for name in manifest.files:
            parts.setdefault(_artefact(name, manifest), {})[name] = checkpoint.locate(name)
        rest = parts.pop(hub.MODEL, {})
        name = f"{self.run.directories.eval_results_dir}/{step_directory(checkpoint.step)}.json"
        results = inside(self.run.path, name)
        found: dict[str, Files] = {}
        if os.path.lexists(results):
            require_regular(results)
            found[hub.EVALUATION] = {f"{_RESULTS}/{results.name}": results}
        if WEIGHTS in manifest.files:
            return {**parts, **found, hub.MODEL: rest}
        last = list(parts)[-1] if parts else hub.FABRIC
        return {**found, **parts, last: {**parts.get(last, {}), **rest}}

    def _records(self) -> Files:
        """The metrics so far, and the evaluations of steps that have no checkpoint."""
        files: Files = {}
        if os.path.lexists(self.run.path / METRICS):
            files[METRICS] = self._metrics()
        steps = set(self.run.step_directories())
        for path in inside(self.run.path, self.run.directories.eval_results_dir).glob("step_*.json"):
            if (step := step_of(path.stem)) is not None and step not in steps:
                require_regular(path)
                files[f"{_RESULTS}/{path.name}"] = path
        return files

    def _metrics(self) -> Path:
        """Return a copy of the metrics as they are now: they grow while they are sent, and their last line may be half a line."""
        with disk_errors("a copy of the metrics", self.run.path):
            folder = inside(self.run.path, FOLDER)
            folder.mkdir(exist_ok=True)
            with written_aside(folder / METRICS) as aside:
                Journal(inside(self.run.path, METRICS)).copy_whole_lines(aside)
        return folder / METRICS

    def _stale(self, head: str, manifest: Manifest) -> list[str]:
        """Files of the step that the branch shows now and that this one has not."""
        shown = self._manifest(head)
        return sorted(shown.files.keys() - manifest.files.keys()) if shown is not None else []

    def _manifest(self, commit: str) -> Manifest | None:
        path = self.branch.find(MANIFEST, commit)
        return Manifest.from_bytes(read_bytes(path), f"{self.branch.place}: {MANIFEST}") if path else None

    def _check_same_run(self, head: str) -> None:
        """Refuse a branch that holds another run: steps of two would be taken for one."""
        path, here = self.branch.find(layout.RUN, head), self.run.path / layout.RUN
        if path is not None:
            created, name = identity(read_bytes(path))
            found = f"{name!r}, made {created}"
            another = (created, name) != identity(read_bytes(here) if os.path.lexists(here) else b"")
        else:
            found = "of pico-train"
            another = any(" -- Step " in commit.title for commit in self.branch.commits())
        if another:
            raise StoreError(f"{self.branch.place} holds another run already ({found}); choose another --branch")

    def _send(self, title: str, files: Files, parent: str | None = None, body: str = hub.PART, delete: Any = ()) -> str:
        return send(
            self.branch.repository, self.branch.name, "model", title, files, StoreError,
            body=body, delete=delete, parent=parent,
        )  # fmt: skip

    def _collect(self, slug: str) -> None:
        from huggingface_hub import HfApi

        def add() -> None:
            HfApi().add_collection_item(slug, self.branch.repository, "model", exists_ok=True)

        try:
            persist(add, f"collection {slug}", StoreError, deed="added to on")
        except StoreError as error:
            log.warning("%s is not in the collection: %s", self.branch.repository, error)


def _artefact(name: str, manifest: Manifest) -> str:
    """The title that a file of a step is sent under."""
    if name == OPTIMIZER or (name == STATE and OPTIMIZER in manifest.files):
        return hub.FABRIC
    folder, _, file = name.rpartition("/")
    return hub.CAPTURES.get(file.split("_")[0], hub.MODEL) if folder else hub.MODEL
