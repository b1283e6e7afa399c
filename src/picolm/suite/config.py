"""The configuration of a suite, and its members: one base training configuration, and a matrix of what differs from it.

A suite compares models, so what is not meant to differ must not: the data, their order and the settings of the optimizer are
held equal over all members unless they are an axis of the matrix by their own name.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from picolm.analyze.config import AnalysisConfig
from picolm.provenance import refuse_untrusted
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
    validate,
)  # fmt: skip
from picolm.train.config import TrainConfig, schema_for

SEED = "seed"  # the axis that is called so draws other initial weights, and nothing else
AXIS_KEYS = {SEED: "training.seeds.init"}
# A step gives the same result, beyond rounding, with any number of micro-batches.
FREE = ("training.optimization.gradient_accumulation_steps",)

Group = Mapping[str, Any]
Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class SuiteConfig(Section):
    """A whole suite. Files are named relative to the file of the suite."""

    suite_name: Place
    """Name of the suite, of its folder, and the beginning of the names of its runs."""
    base: Place
    """The training configuration that all members have in common."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Keys that differ from the base in all members."""
    matrix: dict[str, dict[str, dict[str, Any]] | Values] = Field(default_factory=dict)
    """What differs between members: an axis is a key with a list of values (`seed` for the initial weights), or a name with
    named groups of keys. Every combination is a member."""
    run_name: Place | None = None
    """Names of the runs, with each axis in braces, for example `mine-{size}-{seed}` (default: suite_name and all axes)."""
    same: tuple[str, ...] = (
        "data", "training.seeds.data", "training.optimization", "training.max_steps", "model.vocab_size",
        "model.max_seq_len",
    )  # fmt: skip
    """Keys, with all below them, that must be equal in all members unless they are an axis themselves."""
    analysis: Place | None = None
    """The analysis of all members; null for none."""
    output_dir: Place = "suites"
    """Folder of all suites: configurations, logs, tables and the report."""
    flops_per_s: Annotated[float, Field(gt=0)] | None = None
    """Model FLOP/s of one device, for estimates of time before a member has been trained."""
    slurm: dict[str, Any] = Field(default_factory=dict)
    """Parameters of submitit for each job, such as slurm_partition and timeout_min; nodes and tasks are those of the members."""

    @property
    def folder(self) -> Path:
        """Where everything but the runs goes."""
        return Path(self.output_dir).expanduser() / self.suite_name

    def problems(self) -> Iterator[Rule]:
        name = self.suite_name
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            yield ("suite_name",), f"{name!r} cannot be the name of a folder"
        for axis, values in self.matrix.items():
            labels = [label(axis, value) for value in values]
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
    """One run of a suite. labels: where it stands on each axis."""

    name: str
    labels: dict[str, str]
    config: TrainConfig

    @property
    def path(self) -> Path:
        """The folder of its run."""
        return Path(self.config.checkpointing.runs_dir).expanduser() / self.name


class Override(NamedTuple):
    """A key of a member that differs from the base, and where the file of the suite says so."""

    key: str
    value: Any
    origin: KeyPath


class Suite(NamedTuple):
    """A suite whose every member has been checked."""

    config: SuiteConfig
    members: list[Member]
    analysis: AnalysisConfig | None


def load_suite(file: str | Path, overrides: Iterable[str] = ()) -> Suite:
    """The suite in `file` with `key=value` overrides. Raises ConfigError with the problems of it and of all its members."""
    document = read_document(Path(file))
    for override in overrides:
        document.override(override)
    config = validate(document, SuiteConfig)
    problems: list[Problem] = []
    members = list(_members(config, document, problems))
    analysis = _analysis(config, Path(file).parent, problems)
    if not problems:
        problems += _clashes(config, members, document)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return Suite(config, members, analysis)


def label(axis: str, value: Any) -> str:
    """A value of an axis as it stands in names and tables."""
    return value if isinstance(value, str) else json.dumps(value)


def _members(config: SuiteConfig, document: Document, problems: list[Problem]) -> Iterator[Member]:
    """Every combination of the matrix; one that is wrong adds its problems instead."""
    base = Path(document.name).parent / config.base
    axes = [list(values) for values in config.matrix.values()]
    for chosen in product(*axes):
        labels = {axis: label(axis, value) for axis, value in zip(config.matrix, chosen)}
        name = _run_name(config, labels)
        assigned = [*_overrides(config, labels, chosen), Override("checkpointing.run_name", name, ("run_name",))]
        words = [f"{override.key}={json.dumps(override.value)}" for override in assigned]
        try:
            member = load(base, schema_for, *((words,) if document.own else ((), None, words)))
            refuse_untrusted(member)  # what is written for `pico train` is taken for the user's own
            yield Member(name, labels, member)
        except ConfigError as error:
            problems += [_in_suite(problem, assigned, document) for problem in error.problems]


def _overrides(config: SuiteConfig, labels: Mapping[str, str], chosen: Iterable[Any]) -> Iterator[Override]:
    for key, value in flatten(config.overrides).items():
        yield Override(key, value, ("overrides", *key.split(".")))
    for (axis, text), value in zip(labels.items(), chosen):
        group = config.matrix[axis]
        if not isinstance(group, Mapping):
            yield Override(AXIS_KEYS.get(axis, axis), value, ("matrix", axis))
            continue
        for key, each in flatten(group[text]).items():
            yield Override(key, each, ("matrix", axis, text, *key.split(".")))


def _run_name(config: SuiteConfig, labels: Mapping[str, str]) -> str:
    if config.run_name is None:
        parts = [
            text if isinstance(config.matrix[axis], Mapping) else _short(axis) + text for axis, text in labels.items()
        ]
        return re.sub(r"[/\0\s]+", "_", "-".join([config.suite_name, *parts]))
    name = config.run_name
    for axis, text in labels.items():
        name = name.replace(f"{{{axis}}}", text)
    return name


def _short(axis: str) -> str:
    """`lr` of `training.optimization.lr`."""
    return axis.rsplit(".", 1)[-1]


def _in_suite(problem: Problem, assigned: list[Override], document: Document) -> Problem:
    """A problem of a member, with the line of the suite's file where a key comes from there."""
    for override in reversed(assigned):
        if problem.path == override.key or problem.path.startswith(override.key + "."):
            return Problem(_place(document, override.origin), ".".join(override.origin), problem.message)
    return problem


def _place(document: Document, origin: KeyPath) -> str:
    """The line of a key, however deep it is nested and whether it is written with dots or not."""
    known = {".".join(map(str, path)): place for path, place in document.places.items()}
    ends = range(len(origin), 0, -1)
    return next((known[path] for end in ends if (path := ".".join(map(str, origin[:end]))) in known), document.name)


def _analysis(config: SuiteConfig, beside: Path, problems: list[Problem]) -> AnalysisConfig | None:
    """The analysis, whose table goes into the folder of the suite."""
    if config.analysis is None:
        return None
    try:
        return load(
            beside / config.analysis, AnalysisConfig, [f"monitoring.output_dir={json.dumps(str(config.folder))}"]
        )
    except ConfigError as error:
        problems += error.problems
        return None


def _clashes(config: SuiteConfig, members: list[Member], document: Document) -> Iterator[Problem]:
    """Names that are not unique, and what differs between members though it must not."""
    names = [member.name for member in members]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        text = f"several members are called {', '.join(doubled)}; put every axis into the name: "
        braces = "-".join(f"{{{axis}}}" for axis in config.matrix)
        yield Problem(_place(document, ("run_name",)), "run_name", text + f"{config.suite_name}-{braces}")
    axes = {AXIS_KEYS.get(axis, axis) for axis in config.matrix}
    for key, values in differing(members).items():
        held = any(key == prefix or key.startswith(prefix + ".") for prefix in config.same)
        if held and key not in axes and key not in FREE:
            text = f"{key} differs between members ({', '.join(map(json.dumps, values))}) and has to be the same; "
            yield Problem(
                _origin(config, key, document), key,
                text + f"make it an axis of its own (`{key}: […]`), or take it out of `same`",
            )  # fmt: skip


def _origin(config: SuiteConfig, key: str, document: Document) -> str:
    """The line of the first group that sets a key."""
    for axis, group in config.matrix.items():
        for text, keys in group.items() if isinstance(group, Mapping) else ():
            if key in flatten(keys):
                return _place(document, ("matrix", axis, text, *key.split(".")))
    return document.name


def differing(members: Iterable[Member]) -> dict[str, list[Any]]:
    """Dotted keys whose values are not the same in all members, with those values; names of runs aside."""
    flat = [flatten(plain(member.config)) for member in members]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key != "checkpointing.run_name"]
    values = {
        key: [json.loads(text) for text in dict.fromkeys(json.dumps(each.get(key)) for each in flat)] for key in keys
    }
    return {key: found for key, found in values.items() if len(found) > 1}
