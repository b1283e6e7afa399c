"""A series whose checkpoints are named one by one: folders, and revisions of repositories on the Hub, as `a@rev,b@rev`."""

import re
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from picolm.errors import StoreError
from picolm.readers.hub_series import KeptHeaders, RevisionFiles, heads_of, hub_problems
from picolm.readers.series import Said, Series, step_of
from picolm.store.hub import PLACE
from picolm.store.legacy import LocalFiles, StepFiles
from picolm.store.repository import Branch

_COMMIT = re.compile("[0-9a-f]{40}")


class ListedSeries(Series):
    """Checkpoints at `places`, by step, read-only: each a folder, or `hub:OWNER/NAME@REVISION`."""

    fetched_by_step = True

    def __init__(self, path: Path, places: Mapping[int, str], said: Said | None = None):
        super().__init__(path, places, said=said)
        self._headers = KeptHeaders()
        self._opened: dict[int, RevisionFiles] = {}

    @property
    def name(self) -> str:
        """What the names of all places have in common; that of the last one if they have nothing."""
        names = [Path(place.partition("@")[0]).name for place in self.folders.values()]
        if len(set(names)) == 1:
            return names[0]
        common = takewhile(lambda letters: len(set(letters)) == 1, zip(*names))
        return "".join(letters[0] for letters in common).rstrip("-_.0123456789") or names[-1]

    @property
    def repositories(self) -> set[str]:
        """The repositories on the Hub that steps are in."""
        return {files.repository for step in self.steps if isinstance(files := self._files(step), RevisionFiles)}

    def step_path(self, step: int) -> Path:
        return Path(self.folders[step])

    def _files(self, step: int) -> StepFiles:
        match = PLACE.fullmatch(self.folders[step])
        if match is None:
            return LocalFiles(Path(self.folders[step]))
        if step not in self._opened:
            repository, revision = match[1], match[2] or "main"
            commit = heads_of(Branch(repository)).get(revision, revision)
            if not _COMMIT.fullmatch(commit):
                raise StoreError(f"{self.folders[step]}: there is no such branch, tag or commit")
            self._opened[step] = RevisionFiles(Branch(repository, revision), commit)
        return self._opened[step]

    def problems(self, step: int) -> list[str]:
        """Return what is wrong with a step: by its files on this machine, by the Hub's list of files for one on the Hub."""
        files = self._files(step)
        found = hub_problems(files) if isinstance(files, RevisionFiles) else self[step].verify()
        return [*found, *self.doubts.get(step, [])]

    def __reduce__(self) -> tuple[Any, ...]:
        return ListedSeries, (self.path, self.folders, self.said)


def open_list(text: str) -> ListedSeries:
    """Return the series of the places in a text, separated by commas. Raises StoreError where one has no step in its name.

    The step is in the revision, else in the name of the repository or folder.
    """
    places = [
        place if place.startswith("hub:") or not text.startswith("hub:") else f"hub:{place}"
        for place in text.split(",")
    ]
    steps: dict[int, str] = {}
    for place in places:
        before, _, revision = place.partition("@")
        step = step_of(revision) if revision and step_of(revision) is not None else step_of(Path(before).name)
        if step is None:
            raise StoreError(
                f"{place}: no step in its name; name the places in a series.yaml, as `steps: {{{place}: 1000}}`"
            )
        if step in steps:
            raise StoreError(
                f"{steps[step]} and {place} are both step {step}; name them in a series.yaml with their steps"
            )
        steps[step] = place
    for place in steps.values():
        if not place.startswith("hub:") and not Path(place).is_dir():
            raise StoreError(f"{place}: there is no such folder")
    return ListedSeries(Path(places[-1]), steps)
