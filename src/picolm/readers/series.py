"""A series of checkpoints of transformers: a folder whose subfolders are its steps, as training scripts and the Trainer leave it.

    step100/ · checkpoint-500/ · step-0001000/ · ckpt_010/ · stage1-step100-tokens3B/
        config.json, model.safetensors (or shards with an index, or pytorch_model.bin), trainer_state.json of the Trainer

Checkpoints of nanoGPT, LitGPT and torchtitan are read likewise, see trainers.py. Where the names of folders do not say the steps,
`series.yaml` does: `steps: {start: 0, later/model: 100}`.
"""

import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from picolm.document import parse_yaml
from picolm.errors import FileError, StoreError
from picolm.readers.checkpoint import CONFIG, WEIGHTS, CachedFiles, SeriesCheckpoint
from picolm.readers.families import Family, FamilyForm
from picolm.readers.trainers import NanoGPT, OneFile, foreign_format, is_file_of_nanogpt
from picolm.store.checkpoint import Checkpoint
from picolm.store.legacy import LocalFiles, StepFiles
from picolm.store.manifest import Directories, check_name, inside, natural
from picolm.store.run import Run
from picolm.trusted import check_form, parse_json, read_bytes

log = logging.getLogger("picolm")

LOGGED = {
    "loss": "train/loss",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
}  # Pico's names of what the Trainer logs

SERIES = "series.yaml"
_STEP = re.compile(
    r"(?:^|[-_.])(?:global_?step|step|checkpoint|ckpt|iter)[-_]?(\d{1,15})([kK]?)(?=$|[-_.])|^(\d{1,15})$"
)


class _Logged(BaseModel, extra="allow"):
    step: int


class _TrainerState(BaseModel, extra="allow"):
    """trainer_state.json, as the Trainer of transformers writes it."""

    global_step: int
    log_history: list[_Logged] = []


class _Series(BaseModel, extra="forbid"):
    """series.yaml: the step that each folder holds, how many tokens a step reads, and the parts of an architecture that is not
    known, see `Family`.
    """

    steps: dict[str, Annotated[int, Field(ge=0)]] | None = None
    tokens_per_step: Annotated[int, Field(gt=0)] | None = None
    anatomy: FamilyForm | None = None


class Said(NamedTuple):
    """What the user says of a series: of its architecture (None: what is known of it), and the tokens that a step reads."""

    family: Family | None = None
    tokens_per_step: int | None = None


class Series(Run):
    """A folder of checkpoints of transformers, or of another trainer, read-only.

    folders: that of each step, or its file, relative to the folder.
    is_cache: whether the folder is that of a repository in the cache of huggingface_hub.
    """

    def __init__(self, path: Path, folders: Mapping[int, str], is_cache: bool = False, said: Said | None = None):
        super().__init__(path, Directories())
        self.folders, self.is_cache, self.said = dict(sorted(folders.items())), is_cache, said or Said()
        self._identities: dict[int, dict[str, str]] = {}
        self._headers: MutableMapping[str, dict[str, tuple[int, ...]]] = {}

    @property
    def name(self) -> str:
        return self.path.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration of the last step's model, as its `model` section."""
        return {"model": self._checkpoint(self.steps[-1]).config}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return {}

    @property
    def steps(self) -> list[int]:
        return list(self.folders)

    def step_directories(self) -> list[int]:
        return self.steps

    def step_path(self, step: int) -> Path:
        return inside(self.path, self.folders[step])

    def __getitem__(self, step: int) -> Checkpoint:
        if step not in self.folders:
            raise self._no_step(step)
        return self._checkpoint(step)

    def _checkpoint(self, step: int) -> SeriesCheckpoint:
        files = self._files(step)
        given = step, files, self._identities.setdefault(step, {}), self._headers, self.said.family
        if isinstance(files, OneFile):
            return NanoGPT(*given, file=Path(self.folders[step]).name)
        is_foreign = not any(files.has(name) for name in (*WEIGHTS, CONFIG))
        return ((foreign_format(files) if is_foreign else None) or SeriesCheckpoint)(*given)

    def _files(self, step: int) -> StepFiles:
        where = self.step_path(step)
        if is_file_of_nanogpt(where):
            return OneFile(where)
        return CachedFiles(where, self.path) if self.is_cache else LocalFiles(where)

    def __contains__(self, step: object) -> bool:
        return step in self.folders

    def read_metrics(self, keys: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield what the Trainer logged until its last checkpoint, under the names that Pico logs, and the tokens that were read
        where `tokens_per_step` says so; nothing without either.
        """
        for step, entry in self._logged():
            if self.said.tokens_per_step is not None:
                entry["tokens"] = step * self.said.tokens_per_step
            if entry and (keys is None or any(key in entry for key in keys)):
                yield {"step": step} | {key: value for key, value in entry.items() if keys is None or key in keys}

    def _logged(self) -> Iterator[tuple[int, dict[str, Any]]]:
        file = self._files(self.steps[-1]).find("trainer_state.json")
        if file is None:
            yield from ((step, {}) for step in self.steps)
            return
        for logged in parse_json(read_bytes(file), str(file), _TrainerState).log_history:
            numbers = {key: value for key, value in (logged.model_extra or {}).items() if type(value) in (int, float)}
            yield logged.step, {LOGGED.get(key, f"trainer/{key}"): value for key, value in numbers.items()}

    def problems(self, step: int) -> list[str]:
        """Return what is wrong with a step, and which other steps hold the same weights, or some of the same files."""
        return [*self[step].verify(), *self.doubts.get(step, [])]

    @cached_property
    def doubts(self) -> dict[int, list[str]]:
        """For each step, what is doubtful of it: files of weights that are those of another step, by their digests.

        Of steps with the same file, the last step of the series counts as right, else the earliest one.
        """
        holders: dict[str, dict[int, str]] = {}  # digest -> step -> name of the file
        count: dict[int, int] = {}
        for step in self.steps:
            try:
                own = self._checkpoint(step).identities()
            except (StoreError, FileError):
                continue  # `verify` says why
            count[step] = len(own)
            for name, digest in own.items():
                holders.setdefault(digest, {})[step] = name
        copied: dict[int, dict[int, list[str]]] = {}  # step -> the step that it is like -> names of files
        for steps in holders.values():
            right = self.steps[-1] if self.steps[-1] in steps else min(steps)
            for step, name in steps.items():
                if step != right:
                    copied.setdefault(step, {}).setdefault(right, []).append(name)
        return {step: list(self._copies(step, count[step], others)) for step, others in copied.items()}

    def _copies(self, step: int, count: int, others: Mapping[int, Sequence[str]]) -> Iterator[str]:
        for other, names in others.items():
            last = " (the last one)" if other == self.steps[-1] else ""
            if len(names) == count:
                yield f"{self.step_path(step)}: holds the weights of step {other}{last}, to the byte"
            else:
                yield (
                    f"{self.step_path(step)}: mixes two steps: {', '.join(sorted(names))} of step {other}{last} with "
                    f"{count - len(names)} other file(s)"
                )

    def lock(self) -> AbstractContextManager[None]:
        raise StoreError(
            f"{self.path}: a series of checkpoints of transformers; it can be read and analyzed, not added to"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Series, (self.path, self.folders, self.is_cache, self.said)


def open_series(place: str) -> Run | None:
    """Return the series at `place` (its folder, its series.yaml, or one of its steps), None where there is none.

    Raises StoreError where two folders have the same step, and for what series.yaml says that is not so.
    """
    if "," in place and not Path(place).exists():
        from picolm.readers.listed import open_list

        return open_list(place)
    if place.startswith("hub:"):
        from picolm.readers.hub_series import open_hub_series

        return open_hub_series(place)
    path = Path(place).absolute()
    if path.name == SERIES or is_file_of_nanogpt(path):
        path = path.parent
    if not path.is_dir():
        return None
    if (path / "snapshots").is_dir() and (path / "refs").is_dir():
        return _open_cache(path)
    if _is_checkpoint(path):  # one step of a series
        path = path.parent
    file = path / SERIES
    described = _described(file) if os.path.lexists(file) else _Series()
    said = Said(_family(described, file), described.tokens_per_step)
    if described.steps is not None and any(name.startswith("hub:") for name in described.steps):
        from picolm.readers.listed import ListedSeries

        by_step = _by_step(described.steps, file)
        places = {step: name if name.startswith("hub:") else str(path / name) for step, name in by_step.items()}
        return known(ListedSeries(path, places, said))
    if described.steps is not None:
        return known(Series(path, _by_step(described.steps, file), said=said))
    entries = sorted(
        (entry for entry in path.iterdir() if _is_checkpoint(entry)), key=lambda entry: natural(entry.name)
    )
    numbered = {entry.name: step for entry in entries if (step := _step_at(entry)) is not None}
    if not numbered:
        return None
    if others := [entry.name for entry in entries if entry.name not in numbered]:
        log.warning("%s: %s has no step in its name and is left out (see series.yaml).", path, ", ".join(others))
    return known(Series(path, _by_step(numbered, file), said=said))


def _step_at(path: Path) -> int | None:
    """Return the step of a checkpoint: that in its name, or that which a file of nanoGPT states. Raises StoreError for two."""
    named = step_of(path.stem if is_file_of_nanogpt(path) else path.name)
    if not is_file_of_nanogpt(path):
        return named
    stated = NanoGPT(0, OneFile(path), file=path.name).stated_step
    if None not in (named, stated) and named != stated:
        raise StoreError(f"{path}: is step {stated} by its iter_num; say in {path.parent / SERIES} which step it is")
    return stated if named is None else named


def known(series: "Series") -> "Series":
    """Return the series; log what its architecture lacks where it is not known."""
    try:
        last = series._checkpoint(series.steps[-1])
        kind = None if last.family is not None else last.config.get("model_type")
    except (StoreError, FileError):
        return series  # whoever reads the step is told
    if kind is not None:
        log.warning(
            "%s: the architecture %r is not known: its weights are read by their names. For heads and circuits say in %s what "
            "its parts are called, as `anatomy: {block: 'model.layers.{}', parts: {attention.value: {module: self_attn.v_proj, "
            "cut: kv_heads}, …}}` (docs/how-to/series.md).", series.path, kind, series.path / SERIES,
        )  # fmt: skip
    return series


def _open_cache(path: Path) -> Run | None:
    """Return the series of a repository in the cache of huggingface_hub: each name in `refs` is a step, and names a commit."""
    refs = {file.relative_to(path / "refs").as_posix(): file for file in (path / "refs").rglob("*") if file.is_file()}
    commits = {name: read_bytes(file).decode("ascii", "replace").strip() for name, file in refs.items()}
    there = {name: f"snapshots/{check_name(commit, str(refs[name]))}" for name, commit in commits.items()}
    numbered = {
        folder: step
        for name, folder in sorted(there.items(), key=lambda item: natural(item[0]))
        if (step := step_of(name)) is not None and (path / folder).is_dir()
    }
    return known(Series(path, _by_step(numbered, path / SERIES), is_cache=True)) if numbered else None


def step_of(name: str) -> int | None:
    """Return the step in the name of a folder (`stage1-step32-tokens17B` is 32, `step-480k` is 480000); None for none or two."""
    found = list(_STEP.finditer(name))
    if len(found) != 1:
        return None
    number, thousands, bare = found[0].groups()
    return int(bare) if bare is not None else int(number) * (1000 if thousands else 1)


def _described(file: Path) -> _Series:
    """Return what series.yaml says. Raises ConfigError or StoreError for what cannot be."""
    raw = parse_yaml(read_bytes(file).decode("utf-8", "replace"), str(file))
    check_form(raw, _Series, str(file))
    found = _Series.model_validate(raw)
    names = found.steps or {}
    here = [name for name in names if not name.startswith("hub:")]
    if gone := [name for name in here if not _is_checkpoint(inside(file.parent, check_name(name, str(file))))]:
        raise StoreError(f"{file}: {gone[0]} holds no checkpoint (no {CONFIG} and no weights)")
    return found


def _family(said: _Series, file: Path) -> Family | None:
    return said.anatomy.family(str(file)) if said.anatomy is not None else None


def _by_step(steps: Mapping[str, int], file: Path) -> dict[int, str]:
    """Return the folder of each step. Raises StoreError for two of one step. file: where the user says which is meant."""
    found: dict[int, str] = {}
    for folder, step in steps.items():
        if step in found:
            raise StoreError(
                f"{file.parent}: {found[step]} and {folder} are both step {step}; say in {file} which folder is which step, as "
                f"`steps: {{{found[step]}: {step}, …}}`"
            )
        found[step] = folder
    return found


def _is_checkpoint(path: Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return is_file_of_nanogpt(path)
    if any(os.path.lexists(path / name) for name in (*WEIGHTS, CONFIG)):
        return True
    kind = foreign_format(
        LocalFiles(path)
    )  # a folder with a ckpt.pt is that of all steps, unless its name says the step
    return kind is not None and (kind is not NanoGPT or step_of(path.name) is not None)
