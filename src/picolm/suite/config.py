"""The configuration of a suite, and its members: a base training configuration, and a matrix of differences from it.

A suite compares models, so only the intended keys may differ: the data, their order and the settings of the optimizer
must be equal in all members unless they are an axis of the matrix themselves.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from picolm.analyze.config import AnalysisConfig
from picolm.schema import (
    ConfigError,
    Document,
    KeyPath,
    Place,
    Problem,
    Rule,
    Section,
    flatten,
    load,
    plain,
    read_document,
    refuse_untrusted,
    resolve,
    validate,
)
from picolm.train.config import TrainConfig, schema_for

SEED = "seed"  # this axis changes the initial weights, and nothing else
AXIS_KEYS = {SEED: "training.seeds.init"}
# A step gives the same result, up to rounding, with any number of micro-batches.
FREE = ("training.optimization.gradient_accumulation_steps",)

Group = Mapping[str, Any]
Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class SuiteConfig(Section):
    """The configuration of a suite. `base` and `analysis` are paths relative to its file."""

    suite_name: Place
    """Name of the suite and of its folder. By default, the names of its runs begin with it."""
    base: Place
    """Training configuration that all members share."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the base in all members."""
    matrix: dict[str, dict[str, dict[str, Any]] | Values] = Field(default_factory=dict)
    """Differences between members. An axis is a key with a list of values (`seed` for the initial weights), or a name
    with named groups of keys. Every combination is a member."""
    run_name: Place | None = None
    """Name of each run, with axes in braces, for example `mine-{size}-{seed}` (default: suite_name and all axes)."""
    same: tuple[str, ...] = (
        "data", "training.seeds.data", "training.optimization", "training.max_steps", "model.vocab_size",
        "model.max_seq_len",
    )  # fmt: skip
    """Keys, with all below them, that must be equal in all members unless they are an axis themselves."""
    analysis: Place | None = None
    """Analysis configuration for all members; null for no analysis."""
    output_dir: Place = "suites"
    """Folder of all suites, for configurations, logs, tables and reports. Runs are stored elsewhere."""
    slurm: dict[str, Any] = Field(default_factory=dict)
    """Parameters of submitit for each job, such as slurm_partition and timeout_min. By default, nodes and tasks are
    those of the member."""

    @property
    def folder(self) -> Path:
        """The folder of everything but the runs."""
        return Path(self.output_dir).expanduser() / self.suite_name

    def problems(self) -> Iterator[Rule]:
        name = self.suite_name
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            yield ("suite_name",), f"{name!r} cannot be the name of a folder"
        for axis, values in self.matrix.items():
            labels = [label(value) for value in values]
            if not labels:
                yield ("matrix",), f"the axis {axis!r} has no values"
            if doubled := {text for text in labels if labels.count(text) > 1}:
                yield (f"matrix.{axis}",), f"{', '.join(sorted(doubled))} stands there twice"
        wanted = set(re.findall(r"\{([^{}]*)\}", self.run_name or ""))
        for unknown in sorted(wanted - set(self.matrix)):
            yield (
                ("run_name",),
                (f"{{{unknown}}} is no axis of the matrix (there are: {', '.join(self.matrix) or 'none'})"),
            )


class Member(NamedTuple):
    """One run of a suite. labels: its value on each axis, as text."""

    name: str
    labels: dict[str, str]
    config: TrainConfig

    @property
    def path(self) -> Path:
        """The folder of its run."""
        return Path(self.config.checkpointing.runs_dir).expanduser() / self.name


class Setting(NamedTuple):
    """A key of a member that differs from the base. place: the line in the suite's file that sets it."""

    key: str
    value: Any
    place: str


class Suite(NamedTuple):
    """A suite; all its members have been checked."""

    config: SuiteConfig
    members: list[Member]
    analysis: AnalysisConfig | None


def load_suite(file: str | Path, overrides: Iterable[str] = ()) -> Suite:
    """Return the suite in `file`, with `key=value` overrides.

    Raises ConfigError with its problems and those of all members.
    """
    document = read_document(Path(file))
    for override in overrides:
        document.override(override)
    config = validate(document, SuiteConfig)
    members: list[Member] = []
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for chosen in product(*(list(values) for values in config.matrix.values())):
        settings = [*_settings(document, config.overrides, ("overrides",)), *_chosen(document, config, chosen)]
        places = {setting.key: setting.place for setting in settings} | places
        try:
            members.append(_member(document, config, dict(zip(config.matrix, map(label, chosen))), settings))
        except ConfigError as error:
            problems += error.problems
    analysis = _analysis(config, Path(file).parent, problems)
    if not problems:
        problems += _clashes(config, members, document, places)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Suite(config, members, analysis)


def label(value: Any) -> str:
    """Return the text for a value of an axis in names and tables."""
    return value if isinstance(value, str) else json.dumps(value)


def _settings(document: Document, values: Mapping[str, Any], path: KeyPath, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings in `values`, which is at `path` in the suite's file; its keys are nested or have dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(document, value, (*path, key), f"{prefix}{key}.")
        else:
            yield Setting(f"{prefix}{key}", value, document.place_of((*path, key)))


def _chosen(document: Document, config: SuiteConfig, chosen: Iterable[Any]) -> Iterator[Setting]:
    """Yield the keys that one combination of the matrix sets."""
    for (axis, group), value in zip(config.matrix.items(), chosen):
        if isinstance(group, Mapping):
            yield from _settings(document, group[value], ("matrix", axis, value))
        else:
            yield Setting(AXIS_KEYS.get(axis, axis), value, document.place_of(("matrix", axis)))


def _member(document: Document, config: SuiteConfig, labels: dict[str, str], settings: Iterable[Setting]) -> Member:
    """Return the member: the base with `settings`.

    Raises ConfigError that names the line in the suite's file for a wrong setting.
    """
    name = _run_name(config, labels)
    own = read_document(Path(document.name).parent / config.base, document.within)
    for key, value, place in (*settings, Setting("checkpointing.run_name", name, document.place_of(("run_name",)))):
        own.assign(tuple(key.split(".")), value, place)
    member = resolve(own, schema_for)
    refuse_untrusted(member)  # `pico train` trusts the file that is written for it
    return Member(name, labels, member)


def _run_name(config: SuiteConfig, labels: Mapping[str, str]) -> str:
    name = config.run_name
    if name is None:  # `lr0.1` for the axis training.optimization.lr; a group has a name already
        short = {axis: "" if isinstance(config.matrix[axis], Mapping) else axis.rsplit(".", 1)[-1] for axis in labels}
        return re.sub(r"[/\0\s]+", "_", "-".join([config.suite_name, *(short[a] + text for a, text in labels.items())]))
    for axis, text in labels.items():
        name = name.replace(f"{{{axis}}}", text)
    return name


def _analysis(config: SuiteConfig, beside: Path, problems: list[Problem]) -> AnalysisConfig | None:
    """Return the analysis, with its table in the folder of the suite, None without one.

    Its errors are added to `problems`.
    """
    if config.analysis is None:
        return None
    folder = f"monitoring.output_dir={json.dumps(str(config.folder))}"
    try:
        return load(beside / config.analysis, AnalysisConfig, [folder])
    except ConfigError as error:
        problems += error.problems
        return None


def _clashes(
    config: SuiteConfig, members: list[Member], document: Document, places: Mapping[str, str]
) -> Iterator[Problem]:
    """Yield a problem for names that are not unique, and for keys that differ between members but must not."""
    names = [member.name for member in members]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        braces = "-".join([config.suite_name, *(f"{{{axis}}}" for axis in config.matrix)])
        text = f"several members are called {', '.join(doubled)}; put every axis into the name: {braces}"
        yield Problem(document.place_of(("run_name",)), "run_name", text)
    axes = {AXIS_KEYS.get(axis, axis) for axis in config.matrix}
    for key, values in differing(members).items():
        held = any(key == prefix or key.startswith(prefix + ".") for prefix in config.same)
        if held and key not in axes and key not in FREE:
            text = f"{key} differs between members ({', '.join(map(json.dumps, values))}) and has to be the same"
            text += f"; make it an axis of its own (`{key}: […]`), or take it out of `same`"
            yield Problem(places.get(key, document.name), key, text)


def differing(members: Iterable[Member]) -> dict[str, list[Any]]:
    """Return the dotted keys that are not equal in all members, with their values; without the names of runs."""
    flat = [flatten(plain(member.config)) for member in members]
    found = {}
    for key in dict.fromkeys(key for each in flat for key in each if key != "checkpointing.run_name"):
        values = dict.fromkeys(json.dumps(each.get(key)) for each in flat)
        if len(values) > 1:
            found[key] = list(map(json.loads, values))
    return found
