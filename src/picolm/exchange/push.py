"""Upload a run: a branch of a repository; each step is a chain of commits, and the last one says that it is complete.

A step is one commit per artefact, with the titles of published runs. Each commit names the one it follows, so two
senders cannot mix their steps. The state of a step is asked of the Hub: what is there is not uploaded again, and a step
left incomplete by a lost response or a kill is continued.
"""

import logging
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from picolm.errors import PicoError, StoreError
from picolm.exchange.card import FILE, kept_by_hand, model_card, with_front_matter
from picolm.exchange.commits import commit, has_moved, prepare_repository
from picolm.exchange.outbox import FOLDER, Damaged, Outbox
from picolm.network import persist
from picolm.store import hub
from picolm.store.checkpoint import SealedCheckpoint
from picolm.store.files import disk_errors, replacement
from picolm.store.hub import Whole, whole_body, whole_steps
from picolm.store.manifest import (
    CONFIG,
    ENVIRONMENT,
    MANIFEST,
    METRICS,
    OPTIMIZER,
    RUN,
    STATE,
    TOKENIZER,
    WEIGHTS,
    Directories,
    Manifest,
    inside,
    step_directory,
    step_of,
)
from picolm.store.records import Journal, identity
from picolm.store.repository import Branch, Commit
from picolm.store.roworder import lookup
from picolm.store.run import Run
from picolm.store.selection import check_parts, chosen, origin, united
from picolm.train.config import REPOSITORY, differences
from picolm.trusted import read_bytes, read_text, require_regular

log = logging.getLogger("picolm")

_ATTEMPTS = 5
_RESULTS = Directories.eval_results_dir

Files = dict[str, Path | bytes]


def destination(run: Run, repository: str | None, branch: str | None) -> tuple[str, str]:
    """Return the repository and branch to upload a run to. Raises PicoError.

    Those given are used, else those of the last upload, else those in the configuration of the run.
    """
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


def push(
    sender: "Sender",
    steps: Sequence[int] | None = None,
    only: Collection[str] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[int], list[int]]:
    """Upload steps (None: all, and those in the queue) in order; return the uploaded steps, and the damaged ones.

    only: parts of a step (weights, optimizer, dynamics); none means all. What is on the Hub is not uploaded again, so
    this continues an interrupted push. progress: called with the number of steps done, and of all steps. Raises
    StoreError; steps before the failure stay uploaded.
    """
    check_parts(only)
    outbox = Outbox(sender.run)
    wanted = _wanted(outbox, steps)
    sent, damaged = list[int](), list[int]()
    with outbox.sending():
        sender.open()
        outbox.remember(sender.branch.place)
        for done, (step, checkpoint) in enumerate(wanted.items()):
            progress(done, len(wanted))
            try:
                if sender.send(checkpoint, only):
                    sent.append(step)
                if not only:
                    outbox.release(step)
            except Damaged as error:
                log.warning("%s", error)
                damaged.append(step)
        newest = max(sender.there, default=None)
        if sent and newest is not None and newest != sent[-1] and (last := outbox.checkpoint(newest)):
            sender.renew(last)  # older steps were uploaded late: a branch shows the files of its newest commit
        if sent:
            sender.send_card()
        progress(len(wanted), len(wanted))
    return sent, damaged


def _wanted(outbox: Outbox, steps: Sequence[int] | None) -> dict[int, SealedCheckpoint]:
    run = outbox.run
    numbers = sorted({*run.steps, *outbox.held} if steps is None else set(steps))
    found = {step: checkpoint for step in numbers if (checkpoint := outbox.checkpoint(step)) is not None}
    if steps is not None and (missing := [step for step in numbers if step not in found]):
        there = ", ".join(map(str, run.steps)) or "none"
        raise StoreError(f"{run.path}: has no step {missing[0]} to send (there are: {there})")
    if not found:
        raise StoreError(f"{run.path}: has no steps to send")
    return found


class Sender:
    """An uploader of single steps of a run to a branch, by default the one with its name. Methods raise StoreError.

    private: for a repository that does not exist yet. collection: the slug of a collection to add the repository to.
    there: the complete steps in Pico's format on the branch, when it was last read.
    """

    def __init__(
        self, run: Run, repository: str, branch: str | None = None, private: bool = False, collection: str | None = None
    ):
        self.run, self.branch = run, Branch(repository, branch or run.name)
        self._private, self._collection = private, collection
        self.there: dict[int, Whole] = {}

    def open(self) -> None:
        """Create the branch unless it exists, read what it holds, and upload the files that describe the run."""
        prepare_repository(self.branch.repository, self.branch.name, "model", self._private, StoreError)
        self._refuse_another_run(self._look())
        about: Files = {}
        for name in (CONFIG, ENVIRONMENT, RUN):
            if os.path.lexists(self.run.path / name):
                about[name] = _regular(inside(self.run.path, name))
        self._send(f"Saving {hub.CONFIGURATION} -- Step 0", about)
        if self._collection:
            self._add_to_collection(self._collection)

    def send(self, checkpoint: SealedCheckpoint, only: Collection[str] = ()) -> bool:
        """Upload a step, or parts of it in addition to those there; return whether there was anything to upload."""
        whole = self.there.get(checkpoint.step)
        if whole is not None and whole.digest == checkpoint.manifest.digest:
            return False
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                commits = self._look()
                manifest = self._missing(checkpoint, only)
                if manifest is None:
                    return False
                if problems := checkpoint.verify():
                    raise Damaged(f"step {checkpoint.step} is not sent: {problems[0]}")
                self._send_step(checkpoint, manifest, commits)
                return True
            except StoreError as error:
                if attempt == _ATTEMPTS or not has_moved(error):
                    raise
        raise AssertionError("unreachable")

    def renew(self, checkpoint: SealedCheckpoint) -> None:
        """Make an uploaded step the newest commit of the branch again, if all its files are here."""
        commits = self._look()
        present = self._manifest(self.there[checkpoint.step].commit)
        if (
            present
            and origin(present) == origin(checkpoint.manifest)
            and present.files.keys() <= checkpoint.files.keys()
        ):
            self._send_step(checkpoint, present, commits)

    def send_card(self) -> None:
        """Write the model card to the branch, and to the main branch of the repository.

        A card that was written by hand, or for another branch, is kept.
        """
        steps = {step: whole.commit for step, whole in self.there.items()}
        changed = {key: value for key, (value, _) in differences(self.run.config).items()}
        text = model_card(self.run, self.branch.repository, self.branch.name, steps, changed)
        for branch in dict.fromkeys([self.branch, Branch(self.branch.repository)]):
            page = branch.find(FILE, branch.commits()[0].sha)
            before = read_text(page) if page else ""
            if not kept_by_hand(before, self.branch.place):
                card = with_front_matter(text, before).encode()
                commit(branch.repository, branch.name, "model", "Saving Model Card", {FILE: card}, StoreError)

    def _look(self) -> list[Commit]:
        commits = self.branch.commits()
        self.there = whole_steps(commits)
        return commits

    def _missing(self, checkpoint: SealedCheckpoint, only: Collection[str]) -> Manifest | None:
        """Return the manifest that the step should have on the Hub; None when it has all of that.

        Raises StoreError when the step here lacks files of the step there.
        """
        manifest, whole = chosen(checkpoint, only), self.there.get(checkpoint.step)
        present = self._manifest(whole.commit) if whole is not None else None
        if present is None or origin(present) != origin(manifest):
            return manifest  # another state with that number, trained again: the newest counts
        together = united(present, manifest)
        if together.files == present.files:
            return None
        if gone := together.files.keys() - checkpoint.files.keys():
            raise StoreError(
                f"step {checkpoint.step}: the Hub has {', '.join(sorted(gone))}, which is not here any more, and lacks "
                "other files that are; push it to another --branch"
            )
        return together

    def _send_step(self, checkpoint: SealedCheckpoint, manifest: Manifest, commits: list[Commit]) -> None:
        step, head = checkpoint.step, commits[0].sha
        shown = self._manifest(head)  # files of another step that the branch shows now, and this step does not have
        stale = sorted(shown.files.keys() - manifest.files.keys()) if shown else []
        if not any(each.title.startswith(f"Saving {hub.TOKENIZER} ") for each in commits):
            words: Files = {name: checkpoint.locate(name) for name in manifest.files if name in TOKENIZER}
            head = self._send(f"Saving {hub.TOKENIZER} -- Step 0", words, head) if words else head
        *artefacts, (last, files) = self._artefacts(checkpoint, manifest)
        for kind, part in artefacts:
            head = self._send(f"Saving {kind} -- Step {step}", part, head)
        files = files | self._records() | {MANIFEST: manifest.to_bytes()}
        try:
            body = whole_body(step, manifest.digest)
            head = self._send(f"Saving {last} -- Step {step}", files, head, body, stale)
        finally:
            (self.run.path / FOLDER / METRICS).unlink(missing_ok=True)
        self.there[step] = Whole(head, manifest.digest)

    def _artefacts(self, checkpoint: SealedCheckpoint, manifest: Manifest) -> list[tuple[str, Files]]:
        """Return the files of a step by the titles of their commits, in the order of uploading."""
        parts: dict[str, Files] = {hub.MODEL: {}}
        for name in manifest.files:
            parts.setdefault(_artefact(name, manifest), {})[name] = checkpoint.locate(name)
        rest = parts.pop(hub.MODEL)
        last = hub.MODEL if WEIGHTS in manifest.files else next(reversed(parts), hub.FABRIC)
        rest = parts.pop(last, {}) | rest
        name = f"{step_directory(checkpoint.step)}.json"
        results = inside(self.run.path, f"{self.run.directories.eval_results_dir}/{name}")
        if os.path.lexists(results):
            parts[hub.EVALUATION] = {f"{_RESULTS}/{name}": _regular(results)}
        return [*parts.items(), (last, rest)]

    def _records(self) -> Files:
        """Return the metrics so far, and the evaluations of steps that have no checkpoint."""
        files: Files = {}
        if os.path.lexists(self.run.path / METRICS):
            copy = inside(self.run.path, f"{FOLDER}/{METRICS}")
            with disk_errors("a copy of the metrics", self.run.path), replacement(copy) as temporary:
                Journal(inside(self.run.path, METRICS)).copy_whole_lines(temporary)  # they grow while they are uploaded
            files[METRICS] = copy
        steps = set(self.run.step_directories())
        for path in inside(self.run.path, self.run.directories.eval_results_dir).glob("step_*.json"):
            if (step := step_of(path.stem)) is not None and step not in steps:
                files[f"{_RESULTS}/{path.name}"] = _regular(path)
        return files

    def _manifest(self, sha: str) -> Manifest | None:
        path = self.branch.find(MANIFEST, sha)
        return Manifest.from_bytes(read_bytes(path), f"{self.branch.place}: {MANIFEST}") if path else None

    def _refuse_another_run(self, commits: list[Commit]) -> None:
        """Raise StoreError for a branch that holds another run: the steps of both would seem to be one run."""
        path, here = self.branch.find(RUN, commits[0].sha), self.run.path / RUN
        if path is not None:
            created, name = identity(read_bytes(path))
            found = f"{name!r}, made {created}"
            another = (created, name) != identity(read_bytes(here) if os.path.lexists(here) else b"")
        else:
            found = "of pico-train"
            another = any(" -- Step " in each.title for each in commits)
        if another:
            raise StoreError(f"{self.branch.place} holds another run already ({found}); choose another --branch")

    def _send(
        self, title: str, files: Files, parent: str | None = None, body: str = hub.PART, delete: Collection[str] = ()
    ) -> str:
        where = (self.branch.repository, self.branch.name, "model")
        return commit(*where, title, files, StoreError, body=body, delete=delete, parent=parent)

    def _add_to_collection(self, slug: str) -> None:
        from huggingface_hub import HfApi

        def add() -> None:
            HfApi().add_collection_item(slug, self.branch.repository, "model", exists_ok=True)

        try:
            persist(add, f"collection {slug}", StoreError, verb="added to on")
        except StoreError as error:
            log.warning("%s is not in the collection: %s", self.branch.repository, error)


def _artefact(name: str, manifest: Manifest) -> str:
    """Return the title that a file of a step is uploaded under."""
    if name == OPTIMIZER or (name == STATE and OPTIMIZER in manifest.files):
        return hub.FABRIC
    folder, _, file = name.rpartition("/")
    return hub.CAPTURES.get(file.split("_")[0], hub.MODEL) if folder else hub.MODEL


def _regular(path: Path) -> Path:
    require_regular(path)
    return path
