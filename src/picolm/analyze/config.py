"""The analysis configuration: which metrics of which components, at which steps, compared with what.

Keys are those of published pico-analyze files, and new ones. Options of a metric are keys of its entry; the signature
of the metric defines them.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from picolm.analyze.components import COMPONENTS
from picolm.analyze.metrics import find_metric
from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.probes import find_probe
from picolm.registry import did_you_mean
from picolm.schema import Key, Place, Rule, Section


class StepRange(Section):
    start: NonNegativeInt = 0
    """First step."""
    end: NonNegativeInt
    """Last step; included if the range meets it, never exceeded."""
    step: PositiveInt
    """Difference between consecutive steps."""


class EachStep(Section):
    every: PositiveInt
    """Analyze the steps that are divisible by this."""


class Suffixes(Section):
    """The layers of a circuit, by role or by module name (default: the roles in the anatomy of the model)."""

    output_layer: str | None = None
    """Output projection, for OV circuits."""
    value_layer: str | None = None
    """Value projection, for OV circuits."""
    query_layer: str | None = None
    """Query projection, for QK circuits."""
    key_layer: str | None = None
    """Key projection, for QK circuits."""


class Component(Section):
    component_name: Annotated[str, Key("component")] = "simple"
    """simple, mlp, attention, embedding, residual, per_head, ov_circuit, qk_circuit, value_circuit, write_read_circuit, or
    my_lab.module:attribute."""
    data_type: str = "weights"
    """weights, gradients, activations, or the name of an optimizer moment such as exp_avg."""
    layer_suffixes: str | tuple[str, ...] | Suffixes | None = None
    """Which modules: roles (attention.value, mlp.output, …) or ends of module names, in whole words. For circuits: a
    mapping with the names of their two layers.
    """
    layers: Literal["all"] | tuple[NonNegativeInt, ...] = "all"
    """Numbers of the blocks, or all."""
    heads: bool = True
    """Measure circuits head by head; false measures the sum over all heads of a layer."""


class Target(Section):
    checkpoint: NonNegativeInt | Literal["first", "last", "previous", "same", "all"] = "same"
    """The step to compare with: a number, first, last, previous, same or all. `all` compares every pair of steps;
    `same` is for comparisons with another run or layer.
    """
    run: Place | None = None
    """Another run to compare with, at the same step unless `checkpoint` gives another one."""
    layer: NonNegativeInt | Literal["same", "all"] = "same"
    """The layer to compare with; `all` compares every pair of layers."""

    @property
    def words(self) -> str:
        """The target as in the table: `last`, `300`, `run wide`, `last run wide`, `layer all`; default: `same`."""
        named = {"checkpoint": "", "run": "run ", "layer": "layer "}
        given = [(prefix, getattr(self, name)) for name, prefix in named.items()]
        return " ".join(f"{prefix}{value}" for prefix, value in given if value not in ("same", None)) or "same"


class Entry(BaseModel):
    """One metric with its components, its options and its target."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    metric_name: Annotated[str, Key("metric")]
    """Name of a metric (`pico list metrics` shows all), or my_lab.module:attribute."""
    data_split: Literal["train", "val", "observed"] | None = None
    """Split of gradients and activations (default: what is observed; else val for metrics of two tensors, since it has the same
    rows at each step, and train for others).
    """
    components: tuple[Component, ...] | None = None
    """What the metric is computed on. Default: activations of ov_circuit and mlp for metrics that need matching rows, of a
    state space model those of ssm.output; weights and gradients of the modules that are captured by default (values,
    outputs, mlp.output) for others.
    """
    target_checkpoint: NonNegativeInt | Literal["first", "last", "previous"] | None = None
    """The step to compare with, a key of published files; `target` can express more."""
    target: Target | None = None
    """What a metric of two tensors compares with (default: the last step)."""
    chance: Annotated[int, Field(ge=2, le=10_000)] | None = None
    """Also compute the chance level of a metric of two tensors from this many permutations of the rows, e.g. 20."""

    @property
    def options(self) -> dict[str, Any]:
        """The metric's own options, as given."""
        return dict(self.model_extra or {})

    @property
    def compared_with(self) -> Target:
        """The target, from `target` or `target_checkpoint` (default: the last step)."""
        if self.target is not None:
            return self.target
        return Target(checkpoint="last" if self.target_checkpoint is None else self.target_checkpoint)


class ProbeEntry(BaseModel):
    """One probe with its rows, its options and its target."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    probe_name: Annotated[str, Key("probe")]
    """Name of a probe (`pico list probes` shows all), or my_lab.module:attribute."""
    rows: Place | tuple[str, ...] | None = None
    """The rows that it asks about, as in `observe.rows` (default: those of `observe`, or the held-out rows of the run)."""
    max_rows: PositiveInt | None = None
    """At most so many of these rows (default: as in `observe.max_rows`; all of a file of token ids that `rows` names)."""
    target: Target | None = None
    """What a probe of two models compares with (default: the last step)."""

    @property
    def of_rows(self) -> dict[str, Any]:
        """What the entry states of its rows, by key."""
        return {key: getattr(self, key) for key in ("rows", "max_rows") if getattr(self, key) is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The probe's own options, as given."""
        return dict(self.model_extra or {})

    @property
    def compared_with(self) -> Target:
        """The target (default: the last step)."""
        return self.target or Target(checkpoint="last")


class Wandb(Section):
    project: str = ""
    """Weights & Biases project."""
    entity: str = ""
    """Weights & Biases entity."""


class PicoReport(Section):
    lab_hash: str = ""
    """Accepted because published files have it; nothing is sent."""
    experiment_name: str = ""
    """Accepted because published files have it; nothing is sent."""
    auto_commit: bool = True
    """Accepted because published files have it; nothing is committed."""


class Monitoring(Section):
    output_dir: Place = "analysis_results"
    """Folder that contains the folders of all analyses."""
    save_to_wandb: bool = False
    """Also log to Weights & Biases (extra `wandb`)."""
    wandb: Wandb = Wandb()
    save_to_picolabs: bool = False
    """Accepted because published files have it; nothing is sent to Pico Labs."""
    pico_report: PicoReport = PicoReport()


class AnalysisConfig(Section):
    """A whole analysis; at least one of `metrics` and `probes` is required."""

    analysis_name: Place = "analysis"
    """Name of the folder for the results."""
    runs: tuple[Place, ...] = ()
    """The runs to read; `--run` on the command line replaces them."""
    steps: Literal["all", "log"] | tuple[NonNegativeInt, ...] | StepRange | EachStep = "all"
    """Which steps: all; log (the first, each next one at least twice the one before, and the last); a list; a range
    {start, end, step}; or {every: k}.
    """
    observe: Observe | None = None
    """Run the model of each step on these rows, and measure its activations and gradients there (default: what is stored)."""
    metrics: tuple[Entry, ...] = ()
    """The metrics to compute."""
    probes: tuple[ProbeEntry, ...] = ()
    """The probes to run: what the model of each step does, and the landscape of its loss."""
    monitoring: Monitoring = Monitoring()

    def problems(self) -> Iterator[Rule]:
        if not self.metrics and not self.probes:
            yield ("metrics", "probes"), "nothing to measure: name metrics or probes"
        for index, each in enumerate(self.probes):
            for keys, message in probe_problems(each):
                yield tuple(f"probes.{index}.{key}" for key in keys), message
        for index, entry in enumerate(self.metrics):
            for keys, message in entry_problems(entry):
                yield tuple(f"metrics.{index}.{key}" for key in keys), message
        if self.observe is not None and (others := sorted({*self.observe.what} - {"activations", "gradients"})):
            yield (
                ("observe.what",),
                f"an analysis measures activations and gradients; `pico observe` writes {', '.join(others)}",
            )
        name = self.analysis_name
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            yield ("analysis_name",), f"{name!r} cannot be the name of a folder"


def entry_problems(entry: Entry) -> Iterator[Rule]:
    """Yield what is wrong with one metric: its name, its options, its components, its target."""
    try:
        metric = find_metric(entry.metric_name)
    except PicoError as error:
        yield ("metric_name",), str(error)
        return
    yield from option_problems(metric, "metric_name", entry)
    compares = entry.target is not None or entry.target_checkpoint is not None
    if metric.arity == 1 and compares:
        key = "target" if entry.target is not None else "target_checkpoint"
        yield (key,), f"{metric.name} measures one tensor and compares with nothing"
    if metric.arity == 1 and entry.chance is not None:
        yield ("chance",), f"{metric.name} measures one tensor and has no chance level"
    if entry.target is not None and entry.target_checkpoint is not None:
        yield ("target", "target_checkpoint"), "give target or target_checkpoint, not both"
    for index, component in enumerate(entry.components or ()):
        yield from component_problems(f"components.{index}", component, metric)


def option_problems(part: Any, name: str, entry: Entry | ProbeEntry) -> Iterator[Rule]:
    """Yield what is wrong with the options of a metric or a probe. name: the key that names it."""
    fields = [*type(entry).model_fields, *part.options]
    for key, value in entry.options.items():
        if key not in part.options:
            there = f" (options of {part.name}: {', '.join(part.options) or 'none'})"
            yield (key,), "unknown key" + (did_you_mean(key, fields) or there)
        elif (complaint := part.options.problem(key, value)) is not None:
            yield (key,), complaint
    for key in part.options.required:
        if key not in entry.options:
            yield (name,), f"{part.name} needs the option {key}"


def probe_problems(entry: ProbeEntry) -> Iterator[Rule]:
    """Yield what is wrong with one probe: its name, its options, its target."""
    try:
        probe = find_probe(entry.probe_name)
    except PicoError as error:
        yield ("probe_name",), str(error)
        return
    yield from option_problems(probe, "probe_name", entry)
    if entry.target is not None and not probe.compares:
        yield ("target",), f"{probe.name} asks one model and compares with nothing"
    if entry.target is not None and entry.target.layer != "same":
        yield ("target.layer",), f"{probe.name} compares whole models"
    if (entry.rows is not None or entry.max_rows is not None) and not {"rows", "stated"} & set(probe.given):
        yield ("rows" if entry.rows is not None else "max_rows",), f"{probe.name} asks about no rows"


def component_problems(where: str, component: Component, metric: Any) -> Iterator[Rule]:
    """Yield what is wrong with one component of a metric."""
    try:
        part = COMPONENTS.get(component.component_name)
    except PicoError as error:
        yield (f"{where}.component_name",), str(error)
        return
    kinds = getattr(part, "kinds", None)
    if kinds is not None and component.data_type not in kinds:
        yield (
            (f"{where}.data_type",),
            (f"{component.component_name} has no {component.data_type}; it gives {', '.join(kinds)}"),
        )
    measured = component.data_type if component.data_type in ("gradients", "activations") else "weights"
    if measured not in metric.of:
        yield (
            (f"{where}.data_type",),
            (f"{metric.name} is not defined for {component.data_type}; it measures {', '.join(sorted(metric.of))}"),
        )
