"""Sections: behaviour and landscape, the readings of probes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import pandas as pd
from markupsafe import Markup

from picolm.errors import PicoError
from picolm.probes import PROBES
from picolm.report import plot
from picolm.report.material import Analysis, Material
from picolm.report.plot.readings import depth, probes, read, select_probe, shape_of
from picolm.report.plot.series import of_probes
from picolm.report.section import SECTIONS, Drawing, Section, html
from picolm.store.checkpoint import SealedCheckpoint

MOST_REASONS = 3


class Picture(NamedTuple):
    """A picture of one probe beside those that all have. draws: readings with bins that it shows, which need no other figure."""

    function: Callable[..., Any]
    caption: str
    draws: tuple[str, ...] = ()


PICTURES: dict[str, list[Picture]] = {
    "induction": [
        Picture(
            plot.induction,
            "Look for a drop of the loss on the second copy while that on the first stays; for a head that looks at the previous "
            "token and rises before it; and for heads that light up in the map at the same time. The outline is the interval in "
            "which the induction loss drops most steeply against the logarithm of the step. Steps stand at equal distances.",
        )
    ],
    "ngram": [
        Picture(
            plot.ngrams,
            "A model first comes close to the frequencies of single tokens, then to those of pairs: the curve of unigrams falls "
            "and rises again, and that of bigrams crosses it (marked). A curve that rises shows that the model goes beyond it.",
        )
    ],
    "memorization": [
        Picture(
            plot.memorization,
            "Each line is the loss of the same training rows at all steps, by the batches that first held them; its thick part "
            "is where they are seen. Memorization is a fall below the dashed line of rows not seen just there, and forgetting "
            "the way back to it. Where all lines fall together the model learns what rows share.",
            ("band_loss",),
        ),
        Picture(
            plot.canaries,
            "A diamond is a batch that holds the canary. Look for how far the loss falls after each one, and how fast it comes "
            "back. Exposure is the rank of its loss among random rows: at its upper end no random row is likelier.",
            ("canary_loss", "exposure"),
        ),
    ],
    "token_curves": [
        Picture(
            plot.acquisition,
            "Each row is a token: the lower its surprisal (dark), the better the model predicts it. Tokens at the top are "
            "acquired first; those whose age is not known stand at the bottom. A row that becomes bright again is a token that "
            "is forgotten.",
            ("surprisal", "age_of_acquisition", "forgetting", "best", "final"),
        )
    ],
    "calibration": [
        Picture(
            plot.reliability,
            "On the dotted line the model is as right as it is sure; below it is too sure, above too little. Bins without a "
            "position are left out.",
        )
    ],
    "hessian": [
        Picture(
            plot.sharpness,
            "Look for the largest eigenvalue rising to the stability line and staying near it: at the edge of stability. Above "
            "the line, plain gradient descent at this learning rate would not converge.",
            ("eigenvalue",),
        )
    ],
    "adam_hessian": [
        Picture(
            plot.sharpness,
            "The curvature as Adam sees it. Look for the largest eigenvalue rising to the stability line and staying near it: at "
            "the adaptive edge of stability (Cohen et al. 2022).",
            ("eigenvalue",),
        )
    ],
    "barrier": [
        Picture(
            plot.interpolation,
            "The loss on the straight line between two sets of weights, alpha from the first to the other. A hill in the middle "
            "is a barrier; a line without one says that both lie in one valley.",
            ("interpolated_loss", "aligned_interpolated_loss"),
        )
    ],
}
WHOLE = (
    "A faint dotted line is the chance level, where one is known. The band around a run is 1.96 standard errors to both sides; "
    "around the mean of several seeds it is a 95 % interval (Student's t)."
)


@SECTIONS.add("behaviour")
def behaviour(material: Material) -> Section | None:
    """Return figures of what the model does, from the probes of this kind; None without any."""
    lead = "What the model of each step does, when it is asked. Under each figure stands what its numbers are."
    return _section(material, "behaviour", "Behaviour", lead)


@SECTIONS.add("landscape")
def landscape(material: Material) -> Section | None:
    """Return figures of the loss around the weights, from the probes of this kind; None without any."""
    lead = "The shape of the loss around the weights of each step. Under each figure stands what its numbers are."
    return _section(material, "landscape", "Landscape", lead)


def _section(material: Material, family: str, title: str, lead: str) -> Section | None:
    items = [
        item
        for analysis in material.analyses
        for own in [analysis.table[of_probes(analysis.table) & (analysis.table["kind"] == family)]]
        for probe, options in probes(own)
        for item in _items(material, Analysis(analysis.place, own), probe, options)
    ]
    return Section(title, items, lead) if items else None


def _items(material: Material, analysis: Analysis, probe: str, options: str) -> Iterator[Drawing | Markup]:
    """Yield all figures of a probe: its own pictures, the readings of the whole model, of layers and heads, and of bins."""
    rows = select_probe(analysis.table, probe, options)
    found = read(rows)
    yield from _failures(rows[~rows.index.isin(found.index)], probe)
    there, drawn = found[found["value"].notna()], set[str]()
    for picture in PICTURES.get(probe, ()):
        with suppress(PicoError):  # the table has not what it draws
            known: dict[str, Any] = {"words": words(material, found)} if picture.function is plot.acquisition else {}
            known |= {"name": probe} if picture.function is plot.sharpness else {}
            made = picture.function(analysis.table, options=options, **known)
            yield Drawing(made, _call(picture.function.__name__, analysis, options), picture.caption)
            drawn |= {f"{probe}.{name}" for name in picture.draws}
    groups, about = material.groups, summary(probe)
    for function, caption in ((plot.probe, WHOLE), (plot.probe_layers, ""), (plot.probe_heatmap, "")):
        with suppress(
            PicoError
        ):  # the probe gives nothing of the whole model; or of a layer; or of several layers and steps
            made = function(analysis.table, probe, options, **({"groups": groups} if function is plot.probe else {}))
            yield Drawing(made, _call(function.__name__, analysis, options, probe), f"{about} {caption}".strip())
    for metric, own in found.groupby("metric", sort=False):
        yield from _of_reading(analysis, str(metric), own, options, groups, there, drawn)


def _of_reading(
    analysis: Analysis,
    metric: str,
    rows: pd.DataFrame,
    options: str,
    groups: Mapping[str, str],
    there: pd.DataFrame,
    drawn: set[str],
) -> Iterator[Drawing]:
    """Yield the figures of one reading alone: by bin, compared between all steps, and of several runs."""
    if shape_of(rows) == "bin":
        if metric not in drawn:
            yield Drawing(
                plot.bins(analysis.table, metric, options, groups=groups), _call("bins", analysis, options, metric)
            )
        return
    with suppress(PicoError):  # it does not compare all steps with each other
        yield Drawing(plot.steps(analysis.table, metric, options), _call("steps", analysis, options, metric))
    if (depth(rows) == "layer").any() and there["run"].nunique() > 1:
        made = plot.compare(analysis.table, metric, options, groups=groups)
        yield Drawing(made, _call("compare", analysis, options, metric))


def words(material: Material, rows: pd.DataFrame) -> dict[str, str]:
    """Return the text of each token that is a bin of the rows, if the first run that has a tokenizer knows it."""
    from picolm.train.text import Text

    numbers = [bin for bin in rows["bin"].dropna().unique() if str(bin).isdigit()]
    for run in material.runs:
        with suppress(PicoError, OSError):
            checkpoint = run[max(run.steps)]
            if isinstance(checkpoint, SealedCheckpoint) and "tokenizer.json" in checkpoint.files:
                text = Text(checkpoint.locate("tokenizer.json"), int(run.config["model"]["vocab_size"]))
                return dict(zip(numbers, text.tokens(list(map(int, numbers)))))
    return {}


def summary(probe: str) -> str:
    """Return the summary of a probe, from its docstring."""
    return PROBES.get(probe).summary if probe in PROBES else ""


def _failures(rows: pd.DataFrame, probe: str) -> Iterator[Markup]:
    """Yield a notice on the steps at which a probe could not be run, and why."""
    for number, (reason, own) in enumerate(rows.groupby(rows["reason"].fillna("nothing was found"), sort=False)):
        steps = ", ".join(f"{step:,}" for step in sorted(own["step"].unique())[:6])
        more = own["step"].nunique() - 6
        runs = f" of {', '.join(own['run'].unique()[:4])}" if rows["run"].nunique() > 1 else ""
        where = f"step {steps}" + (f" and {more} more" if more > 0 else "") + runs
        if number < MOST_REASONS:
            yield html("<p class='notice'>{} gives nothing at {}: {}</p>", probe, where, reason)


def _call(function: str, analysis: Analysis, options: str, name: str = "") -> str:
    """Return the Python call that draws a figure alone."""
    words = [
        f"load({analysis.place!r})",
        *([repr(name)] if name else []),
        *([f"options={options!r}"] if options else []),
    ]
    return f"plot.{function}({', '.join(words)})"
