"""The probes of an analysis at one step: what they are asked on, what they found before, and the rows of the table."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from picolm.address import Address
from picolm.analyze.config import AnalysisConfig, ProbeEntry
from picolm.analyze.pairing import Place, partner_places
from picolm.analyze.reading import Readers
from picolm.analyze.table import MODEL
from picolm.analyze.values import Values
from picolm.analyze.work import Ask, Outcome, chosen_steps
from picolm.errors import PicoError
from picolm.observe.config import Observe
from picolm.observe.optimizer import moments_identity
from picolm.observe.rows import Rows, is_ids
from picolm.observe.subject import threads_of
from picolm.probes import Probe, Reading, find_probe
from picolm.probes.probe import Running, run
from picolm.trusted import open_regular


class Asked(NamedTuple):
    """One probe to run at one step: its entry of the configuration, its rows, the step that it compares with, earlier steps."""

    entry: ProbeEntry
    probe: Probe
    rows: Rows | None
    against: Place | None
    earlier: tuple[int, ...]
    key: str


def probe_step(ask: Ask, readers: Readers, place: Place) -> Outcome:
    """Return the rows of all probes at one step; what was computed now is in `Outcome.readings` by its key."""
    outcome = Outcome()
    if not ask.config.probes:
        return outcome
    asked = list(_asked(ask, readers, place, outcome))
    with closing(Values(ask.values)) as values:
        known = {each.key: values.readings(each.key) for each in asked}
    found = {key: [Reading(*row) for row in json.loads(text)] for key, text in known.items() if text is not None}
    new = [each for each in asked if each.key not in found]
    for group in _groups(new):
        computed = _run(readers, place, group, ask.config, outcome)
        found |= computed
        outcome.readings |= {key: json.dumps(readings) for key, readings in computed.items()}
        outcome.computed += sum(map(len, computed.values()))
    anatomy = readers.subject(place.run).anatomy if found else None
    for each in asked:
        for reading in found.get(each.key, ()):
            module = MODEL if reading.layer is None or anatomy is None else anatomy.block.format(reading.layer)
            outcome.rows.append(_row(each, place, reading, module))
    return outcome


def _asked(ask: Ask, readers: Readers, place: Place, outcome: Outcome) -> Iterator[Asked]:
    """Yield what is to be run at a step. What cannot be is a row with its reason."""
    batch_size = (ask.config.observe or Observe()).batch_size
    for entry in ask.config.probes:
        probe = find_probe(entry.probe_name)
        targets: list[Place | None] = [None]
        if probe.compares:
            of = entry.compared_with.run or place.run
            steps = chosen_steps(ask.config, readers.steps.get(of, []))[0]
            targets = list(partner_places(entry.compared_with, place, steps, False))
        for against in targets:
            try:
                rows = _rows(ask.config, readers, entry, probe, place.run)
                earlier = _earlier(ask.config, readers, place) if "earlier" in probe.given else ()
                key = _key(readers, entry, probe, rows, place, against, earlier, batch_size)
                yield Asked(entry, probe, rows, against, earlier, key)
            except PicoError as error:
                _fail(outcome, entry, probe, place, against, error)


def _rows(config: AnalysisConfig, readers: Readers, entry: ProbeEntry, probe: Probe, run: str) -> Rows | None:
    """Return the rows that a probe asks about, None if it makes its own. Raises PicoError where they are not there."""
    if "rows" not in probe.given and entry.rows is None:
        return None
    asked = config.observe or Observe()
    stated = entry.of_rows
    if isinstance(entry.rows, str) and is_ids(entry.rows):
        stated.setdefault("max_rows", sys.maxsize)  # rows of ids that are stated for one probe are all meant
    return readers.rows(asked.model_copy(update={**stated, "positions": "last", "what": ()}))[run]


def _earlier(config: AnalysisConfig, readers: Readers, place: Place) -> tuple[int, ...]:
    """Return the analyzed steps of a run before a step, those that have weights."""
    steps = sorted(chosen_steps(config, readers.steps[place.run])[0])
    return tuple(step for step in steps if step < place.step and readers.weights_digest(place.run, step) is not None)


def _key(
    readers: Readers,
    entry: ProbeEntry,
    probe: Probe,
    rows: Rows | None,
    place: Place,
    against: Place | None,
    earlier: tuple[int, ...],
    batch_size: int,
) -> str:
    """Return a digest of all that the readings depend on. Raises PicoError for a step without weights."""
    parts: list[Any] = [
        probe.name,
        probe.code,
        [(key, value, _content(value)) for key, value in sorted(entry.options.items())],
        rows and (rows.identity, rows.has_targets),
        [(step, readers.weights_digest(place.run, step)) for step in earlier],
    ]
    for each in filter(None, (place, against)):
        subject = readers.subject(each.run)
        if each.step not in readers.steps[each.run]:
            raise PicoError(f"step {each.step} of {each.run}: there is no such checkpoint")
        checkpoint = readers.runs[each.run][each.step]
        weights = readers.weights_digest(each.run, each.step)
        if weights is None:
            raise PicoError(f"step {each.step} of {each.run} has no weights, so there is no model to ask")
        parts += [weights, subject.architecture.identity(each.step), each.step, repr(readers.runs[each.run].config)]
        parts += [torch.__version__, threads_of(readers.runs[each.run]), batch_size]
        if "optimizer" in probe.needs:
            parts += moments_identity(checkpoint)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _content(value: Any) -> str:
    """Return a digest of the file that an option names (`FILE.npy`, `FILE.parquet:COLUMN`), empty where it names none."""
    for place in (value, value.rpartition(":")[0]) if isinstance(value, str) else ():
        if place and Path(place).is_file():
            with open_regular(Path(place)) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
    return ""


def _groups(asked: Iterable[Asked]) -> list[list[Asked]]:
    """Return the probes that run together: those of one other step, and, with the first of these, those that compare nothing."""
    groups: dict[Place | None, list[Asked]] = {}
    for each in asked:
        groups.setdefault(each.against, []).append(each)
    alone = groups.pop(None, [])
    compared = list(groups.values())
    return [[*alone, *compared[0]], *compared[1:]] if compared else [alone] if alone else []


def _run(
    readers: Readers, place: Place, group: list[Asked], config: AnalysisConfig, outcome: Outcome
) -> dict[str, list[Reading]]:
    """Run probes that share their other step, and return the readings of each by its key."""
    against = next((each.against for each in group if each.against is not None), None)
    subject = readers.subject(place.run).at(_fetched(readers, place))
    other = None if against is None else readers.subject(against.run, beside=True).at(_fetched(readers, against))
    given = {"subject": subject, "other": other}
    running = [
        Running(
            each.probe,
            {
                **given,
                "earlier": each.earlier,
                "rows": each.rows,
                "stated": each.rows if each.entry.rows else None,
            },
            each.entry.options,
        )
        for each in group
    ]
    run(running, subject, (config.observe or Observe()).batch_size)
    for each, done in zip(group, running):
        if done.failure is not None:
            _fail(outcome, each.entry, each.probe, place, each.against, done.failure)
        _check_names(each.probe, done.readings)
    return {each.key: done.readings for each, done in zip(group, running) if done.failure is None}


def _check_names(probe: Probe, readings: Iterable[Reading]) -> None:
    """Raise PicoError for two readings of one name and place, and for a name with and without bins: its mean would be of both."""
    places: set[tuple[Any, ...]] = set()
    for reading in readings:
        place = (reading.name, reading.layer, reading.head, reading.bin)
        if place in places:
            raise PicoError(f"probe {probe.name}: gives {place} twice")
        places.add(place)
    names = {(name, bin != "") for name, _, _, bin in places}
    if mixed := [name for name, has_bin in names if not has_bin and (name, True) in names]:
        raise PicoError(f"probe {probe.name}: gives {mixed[0]} with and without bins")


def _fetched(readers: Readers, place: Place) -> Any:
    checkpoint = readers.runs[place.run][place.step]
    checkpoint.fetch([Address("weights", "", "*")])
    return checkpoint


def _fail(
    outcome: Outcome, entry: ProbeEntry, probe: Probe, place: Place, against: Place | None, error: PicoError
) -> None:
    asked = Asked(entry, probe, None, against, (), "")
    outcome.rows.append(_row(asked, place, Reading("", None, reason=str(error)), MODEL))
    outcome.absent.append(f"{probe.name} of step {place.step} of {place.run}: {error}")


def _row(asked: Asked, place: Place, reading: Reading, module: str) -> dict[str, Any]:
    entry, probe, rows, against, *_ = asked
    quantity = probe.quantity(reading.name)
    split = rows.split if rows is not None else ""
    return {
        "run": place.run,
        "step": place.step,
        "split": split,
        "component": MODEL,
        "kind": probe.family,
        "layer": reading.layer,
        "head": reading.head,
        "module": module,
        "metric": ".".join(filter(None, (probe.name, reading.name))),
        "metric_kind": "quantity",
        "options": " ".join(
            f"{key}={_text(value)}" for key, value in {**entry.of_rows, **dict(sorted(entry.options.items()))}.items()
        ),
        "value": reading.value,
        "standard_error": reading.standard_error,
        "chance": reading.chance,
        **dict.fromkeys(("chance_std", "z", "forced")),
        "against_run": against.run if against else None,
        "against_step": against.step if against else None,
        "against_layer": None,
        "target": entry.compared_with.words if probe.compares else "",
        "reason": reading.reason,
        "note": reading.note,
        "bin": reading.bin,
        "units": quantity.units,
        "definition": quantity.definition,
        "rows": reading.rows or (rows.identity if rows is not None else ""),
        "asked_split": split,
    }


def _text(value: Any) -> str:
    """Return an option as one word of the column `options`, as far as it has no spaces of its own."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def over_steps(config: AnalysisConfig, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of what only all steps of a run together say, from the rows of its steps."""
    for entry in config.probes:
        probe = find_probe(entry.probe_name)
        if probe.afterwards is None:
            continue
        template = _row(Asked(entry, probe, None, None, (), ""), Place("", 0), Reading("", None), MODEL)
        own = [
            row for row in rows if row["metric"].startswith(f"{probe.name}.") and row["options"] == template["options"]
        ]
        for run_name in dict.fromkeys(row["run"] for row in own):
            steps: dict[int, list[dict[str, Any]]] = {}
            for row in own:
                if row["run"] == run_name:
                    steps.setdefault(row["step"], []).append(row)
            found = [(step, [_reading(probe, row) for row in steps[step]]) for step in sorted(steps)]
            first = next(iter(steps.values()))[0]
            for step, reading in probe.afterwards(found):
                reading, quantity = probe.checked(reading), probe.quantity(reading.name)
                about: Mapping[str, Any] = {
                    **reading._asdict(),
                    "units": quantity.units,
                    "definition": quantity.definition,
                }
                changed = {key: about[key] for key in about if key in first and key != "rows"}
                yield {**first, **changed, "step": step, "metric": f"{probe.name}.{reading.name}", "module": MODEL}


def _reading(probe: Probe, row: Mapping[str, Any]) -> Reading:
    keys = [key for key in Reading._fields if key != "name"]
    return Reading(row["metric"].removeprefix(f"{probe.name}."), **{key: row[key] for key in keys})
