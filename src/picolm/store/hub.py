"""Runs on the Hugging Face Hub: a branch is a run, and the titles of its commits say what they hold.

    Saving HF Model -- Step N                          model.safetensors, config.json
    Saving Learning Dynamics Data (train) -- Step N    learning_dynamics/train_…; (val) likewise
    Saving Evaluation Results -- Step N                eval_results/step_N.json
    Saving Training Config -- Step 0                   training_config.yaml

The files of step N are those of the commits with its number; of commits with the same title, the newest counts. A step
in Pico's own format ends with a commit that holds all of it, including its manifest.json, and whose message says so
(`whole_body`): a step is not visible while it is being uploaded. A commit that holds a manifest.json, on a branch
without such messages, is a step in Pico's format as well.

The list of commits is kept in the cache folder, and only new commits are requested. A file is downloaded into the Hub's
own cache, only once: when it is read, or earlier by `prefetch`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from picolm.address import Address
from picolm.errors import StoreError
from picolm.network import is_offline
from picolm.store.checkpoint import Checkpoint, Missing, SealedCheckpoint
from picolm.store.files import load_json
from picolm.store.legacy import DYNAMICS, SPLITS, LegacyCheckpoint, capture_meta
from picolm.store.manifest import CONFIG, MANIFEST, METRICS, Directories, step_directory
from picolm.store.records import Journal, parse_config
from picolm.store.repository import Branch, Commit
from picolm.store.roworder import RowOrder, lookup
from picolm.store.run import OPENERS, Run
from picolm.trusted import TEXT_BYTES, read_bytes

PLACE = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@(.+))?")
_NUMBER = "(0|[1-9][0-9]{0,17})"  # a longer number is not a step: anybody can choose a title
_TITLE = re.compile(rf"Saving (.+) -- Step {_NUMBER}")
_WHOLE = re.compile(
    rf"(?<![0-9])Step {_NUMBER} is whole with this commit; its manifest has the digest ([0-9a-f]{{64}})"
)
PART = "A step is whole with the commit that says so."
MODEL, EVALUATION, CONFIGURATION = "HF Model", "Evaluation Results", "Training Config"
FABRIC, TOKENIZER = "Fabric Checkpoint", "Tokenizer"
CAPTURES = {split: f"Learning Dynamics Data ({split})" for split in SPLITS}
_PARTS = {MODEL, *CAPTURES.values()}
_THREADS = 8


class NoRun(StoreError):
    """The error for a branch whose commits hold no run."""


class Whole(NamedTuple):
    """A complete step in Pico's format: the commit that holds all of it, and the digest of its manifest."""

    commit: str
    digest: str


def whole_body(step: int, digest: str) -> str:
    """Return the text below the title in the message of a step's last commit."""
    return f"Step {step} is whole with this commit; its manifest has the digest {digest}."


def whole_steps(commits: Iterable[Commit]) -> dict[int, Whole]:
    """Return the complete steps in Pico's format among commits, newest first; the newest commit of a step counts."""
    found: dict[int, Whole] = {}
    for commit in commits:
        if match := _WHOLE.search(commit.body):
            found.setdefault(int(match[1]), Whole(commit.sha, match[2]))
    return found


class HubRun(Run):
    """A run on a branch of a repository; read-only."""

    def __init__(self, branch: Branch, commits: list[Commit]):
        super().__init__(Path(branch.place), Directories())
        self.branch, self._history = branch, commits
        self._titled: dict[int, dict[str, str]] = {}  # step -> {what it holds: newest such commit}
        for commit in commits:
            if match := _TITLE.fullmatch(commit.title.strip()):
                self._titled.setdefault(int(match[2]), {}).setdefault(match[1], commit.sha)
        self.whole = whole_steps(commits)
        self._announced = bool(self.whole) or any(PART in commit.body for commit in commits)
        self._known: dict[str, dict[str, str]] = {}

    @property
    def name(self) -> str:
        """The name of the branch, which is that of the run; for the main branch, the name of the repository."""
        return self.branch.name if self.branch.name != "main" else self.branch.repository.split("/")[1]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration as written; empty when it was not uploaded."""
        path = self.branch.find(CONFIG, self._titled.get(0, {}).get(CONFIGURATION, self.head))
        return parse_config(read_bytes(path), str(self.path / CONFIG)) if path else {}

    @property
    def steps(self) -> list[int]:
        """The steps that have anything to read, ascending."""
        return sorted(step for step in {*self._titled, *self.whole} if step in self)

    def step_directories(self) -> list[int]:
        return self.steps

    def __contains__(self, step: object) -> bool:
        if self._announced:
            return step in self.whole
        return isinstance(step, int) and bool(_PARTS & self._titled.get(step, {}).keys())

    def __getitem__(self, step: int) -> Checkpoint:
        if step not in self:
            raise self._no_step(step)
        where = self.path / step_directory(step)
        if self.is_ours:
            found = HubCheckpoint(self.branch, self._newest(step), where, step)
            if step in self.whole and found.manifest.digest != self.whole[step].digest:
                raise StoreError(
                    f"{where}: its commit {self.whole[step].commit[:8]} holds another manifest than it says"
                )
            return found
        names = str(lookup(self.config, "checkpointing.learning_dynamics_dir", DYNAMICS))
        files = HubFiles(self.branch, self._titled[step], where, names, self._known)
        return LegacyCheckpoint(step, files, self._order, names, capture_meta(self.config), self._known)

    def evaluated_steps(self) -> list[int]:
        return self.steps

    def evaluation(self, step: int) -> dict[str, Any] | None:
        commit = self._titled.get(step, {}).get(EVALUATION) or (self.whole and self.head)
        name = f"{self.directories.eval_results_dir}/{step_directory(step)}.json"
        path = self.branch.find(name, commit) if commit else None
        return load_json(read_bytes(path), str(self.path / name)) if path else None

    def read_metrics(self, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the logged lines, as for any run; none for runs of pico-train, which upload none."""
        path = self.branch.find(METRICS, self.head, None) if self.whole else None
        return Journal(path).entries(keys) if path else iter(())

    @property
    def head(self) -> str:
        """The id of the newest commit."""
        return self._history[0].sha

    def commit_of(self, kind: str, step: int) -> str | None:
        """Return the newest commit with this kind and step in its title, None when there is none."""
        return self._titled.get(step, {}).get(kind)

    def prefetch(
        self,
        steps: Iterable[int],
        addresses: Collection[Address],
        *,
        rows: Collection[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Download in parallel, see `Run.prefetch`. Raises the first StoreError; what was downloaded is kept."""
        wanted = [step for step in steps if step in self]
        if wanted:
            self[wanted[0]]  # what is the same for all steps is requested once, not in each thread
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="hub") as pool:
            running = [pool.submit(lambda step: self[step].fetch(addresses, rows), step) for step in wanted]
            try:
                for done, future in enumerate(as_completed(running), start=1):
                    future.result()
                    if progress is not None:
                        progress(done, len(wanted))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def problems(self, step: int) -> list[str]:
        return self[step].verify()

    def lock(self) -> AbstractContextManager[None]:
        raise StoreError(f"{self.path}: a run on the Hub can be read and analyzed, not added to")

    def __reduce__(self) -> tuple[type["HubRun"], tuple[Branch, list[Commit]]]:  # type: ignore[override]
        return HubRun, (self.branch, self._history)  # another process sees the same commits

    @cached_property
    def is_ours(self) -> bool:
        """Whether its steps are in Pico's format; the newest step decides."""
        return bool(self.whole) or self.branch.find(MANIFEST, self._newest(self.steps[-1])) is not None

    @cached_property
    def _order(self) -> RowOrder:
        return RowOrder(self.config, str(self.path))

    def _newest(self, step: int) -> str:
        """Return the newest of the commits that make up a step."""
        if step in self.whole:
            return self.whole[step].commit
        return next(commit for title, commit in self._titled[step].items() if title in _PARTS)


class HubFiles:
    """The files of a step, in the commits that hold them. known: files that were opened in some step of the run."""

    knows_digests: ClassVar[bool] = True

    def __init__(self, branch: Branch, titled: Mapping[str, str], where: Path, dynamics: str, known: Collection[str]):
        self.where = where
        self._branch, self._titled, self._dynamics, self._known = branch, titled, dynamics, known
        self._identities: dict[str, str | None] = {}

    def has(self, name: str) -> bool:
        """Return whether the step has a file; assumed, without a request, when another step of the run has it."""
        return self._commit(name) is not None and (name in self._known or self._identity(name) is not None)

    def find(self, name: str) -> Path | None:
        commit = self._commit(name)
        return self._branch.find(name, commit, None) if commit else None

    def identity(self, name: str) -> str:
        identity = self._identity(name)
        if identity is None:
            raise Missing(f"{self.where} has no file {name!r}")
        return identity

    def sizes(self) -> dict[str, int]:
        commits = {commit for title, commit in self._titled.items() if title in _PARTS}
        shown = {commit: self._branch.entries(commit) for commit in sorted(commits)}
        return {
            name: entry.size
            for commit in shown
            for name, entry in shown[commit].items()
            if self._commit(name) == commit
        }

    def _identity(self, name: str) -> str | None:
        commit = self._commit(name)
        if name not in self._identities and commit is not None:
            self._identities[name] = self._branch.identity(name, commit)
        return self._identities.get(name)

    def _commit(self, name: str) -> str | None:
        """Return the commit that a file belongs to, None when there is none.

        A commit shows all files of the branch, including those of other steps.
        """
        split = next((split for split in SPLITS if name.startswith(f"{self._dynamics}/{split}_")), None)
        return self._titled.get(CAPTURES[split] if split else MODEL)


class HubCheckpoint(SealedCheckpoint):
    """A step in Pico's format, in a commit."""

    def __init__(self, branch: Branch, commit: str, where: Path, step: int):
        self._branch, self.commit = branch, commit
        super().__init__(where)
        if self.step != step:
            raise StoreError(f"{where}: its commit {commit[:8]} holds step {self.step}")

    def locate(self, name: str) -> Path:
        path = self._branch.find(name, self.commit, TEXT_BYTES if name == MANIFEST else self.files[name].bytes)
        if path is None:
            raise StoreError(f"{self.path / name}: not in commit {self.commit[:8]}")
        return path

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        matching = [a for a in self if any(all(map(fnmatchcase, a, pattern)) for pattern in addresses)]
        for name in {self.record(address).file for address in matching} | {self.rows_file(split) for split in rows}:
            if name is not None:
                self.locate(name)


def open_hub(place: str) -> Run | None:
    """Return the run at `hub:OWNER/REPOSITORY@BRANCH`, None for any other place. Raises StoreError without a run.

    Of a place without a branch it is the run on `main`; None where that has none: each branch may be a step of one series.
    """
    if not place.startswith("hub:") or "," in place:  # several places are a list, see readers
        return None
    match = PLACE.fullmatch(place)
    if match is None:
        raise StoreError(f"{place!r} is not of the form hub:OWNER/REPOSITORY@BRANCH")
    try:
        return open_branch(Branch(match[1], match[2] or "main"))
    except NoRun:
        if match[2] is None:
            return None
        raise


def open_branch(branch: Branch) -> Run:
    """Return the run on a branch. Raises NoRun when its commits hold none, StoreError when it cannot be read."""
    commits = branch.commits()
    run = HubRun(branch, commits)
    if not run.steps:
        others = f" (branches: {', '.join(branch.names())})" if not is_offline() else ""
        raise NoRun(
            f"{branch.place}: no run here: none of its {len(commits)} commits is called 'Saving {MODEL} -- Step N' or "
            f"'Saving {CAPTURES['train']} -- Step N'; each run is a branch{others}"
        )
    return run


OPENERS.append(open_hub)
