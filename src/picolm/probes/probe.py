"""The class `Probe`: a function of the model of one checkpoint, asked on rows, that yields named numbers.

`@probe("name", gives={...})` registers a function. Its positional parameters say what it is given: `subject` (the model of the
step), `other` (that of the step to compare with), `rows` (those of the analysis), `stated` (those of its own entry of the
configuration, None without). Keyword-only parameters are its options, in Python and in YAML. The function is a generator: it
yields each `Reading`, and for what is read of a forward pass it yields an `Ask`, whose value is the `Answer`. Probes that ask
about the same rows share their passes.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from picolm.errors import PicoError
from picolm.observe import passes
from picolm.observe.passes import Answer, Ask
from picolm.observe.subject import Subject
from picolm.options import Option, Options, type_hints
from picolm.registry import Registry

Family = Literal["behaviour", "landscape"]
GIVEN = ("subject", "other", "earlier", "rows", "stated")


class Quantity(NamedTuple):
    """What a reading is: its units (nats, share of attention, …; empty for a pure number) and its definition in a sentence."""

    units: str
    definition: str


class Reading(NamedTuple):
    """A number that a probe found, or the reason why there is none.

    layer, head: what it belongs to, None for the whole model. bin: the group that it belongs to (a token, a frequency, a part).
    chance: what a model without the property would give. reason: why there is no value. note: what a reader of the value has to
    know. rows: digest of the rows, where the probe made them itself.
    """

    name: str
    value: float | None
    layer: int | None = None
    head: int | None = None
    bin: str = ""
    standard_error: float | None = None
    chance: float | None = None
    reason: str = ""
    note: str = ""
    rows: str = ""


Found = Generator[Ask | Reading, Answer, None]
"""What a probe returns: it yields asks, whose values are their answers, and readings."""
Steps = Sequence[tuple[int, Sequence[Reading]]]
"""The readings of a run by step, in order."""


class Probe:
    """A probe; see the head of this file.

    gives: what its readings are, by name. needs: what the model has to give, see `Subject.require`. afterwards: a function of the
    readings of all steps of a run that yields (step, reading) for what only the steps together say.
    """

    def __init__(
        self,
        function: Callable[..., Iterable[Any]],
        name: str,
        gives: Mapping[str, Quantity],
        needs: Collection[str] = (),
        family: Family = "behaviour",
        afterwards: Callable[[Steps], Iterator[tuple[int, Reading]]] | None = None,
    ):
        self.function, self.name, self.gives, self.needs, self.family = (
            function,
            name,
            dict(gives),
            tuple(needs),
            family,
        )
        self.afterwards = afterwards
        hints, self.options, given = type_hints(function), Options(), list[str]()
        for key, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                self.options[key] = Option(key, hints.get(key, parameter.annotation), parameter.default)
            elif key in GIVEN and parameter.default is parameter.empty:
                given.append(key)
            else:
                raise PicoError(
                    f"probe {name}: its parameter {key} is none of {', '.join(GIVEN)}; an option stands behind a `*`"
                )
        if "subject" not in given:
            raise PicoError(f"probe {name}: takes no subject, the model that it asks")
        self.given = tuple(given)
        self.summary = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())

    @property
    def compares(self) -> bool:
        """Whether it compares the model of a step with another one."""
        return "other" in self.given

    def __call__(self, *given: Any, **options: Any) -> list[Reading]:
        """Return the readings, from Python: `calibration(subject, rows, bins=10)`. Raises PicoError where there are none, and
        TypeError for wrong arguments.
        """
        if len(given) != len(self.given):
            raise TypeError(f"{self.name} takes {', '.join(self.given)}; given {len(given)}")
        if problems := self.options.problems(options):
            raise TypeError("; ".join(f"{self.name}: {key}: {complaint}" for key, complaint in problems.items()))
        running = Running(self, dict(zip(self.given, given)), options)
        run([running], running.given["subject"])
        if running.failure is not None:
            raise running.failure
        return running.readings

    def start(self, given: Mapping[str, Any], options: Mapping[str, Any]) -> Found:
        """Begin to run. given: what its positional parameters are. Raises PicoError for a model that gives not what is needed."""
        for each in filter(None, (given["subject"], given.get("other") if self.compares else None)):
            each.require(*self.needs)
        found: Any = self.function(*(given[key] for key in self.given), **options)
        return found if isinstance(found, Generator) else _each(found)

    def checked(self, reading: Reading) -> Reading:
        """Return a reading with numbers as they are stored. Raises PicoError for one that the probe does not declare."""
        if not isinstance(reading, Reading):
            raise PicoError(f"probe {self.name}: yields {type(reading).__name__}; expected a Reading or an Ask")
        if self.gives and reading.name not in self.gives:
            raise PicoError(f"probe {self.name}: {reading.name!r} is none of what it gives ({', '.join(self.gives)})")
        value = None if reading.value is None else float(reading.value)
        if value is not None and math.isnan(value):
            value, reading = None, reading._replace(reason=reading.reason or "it is not a number here")
        error, chance = (
            None if number is None or math.isnan(number) else float(number)
            for number in (reading.standard_error, reading.chance)
        )
        return reading._replace(value=value, standard_error=error, chance=chance)

    def quantity(self, name: str) -> Quantity:
        """Return what a reading is; of a function without declarations, what its docstring says."""
        return self.gives.get(name) or Quantity("", self.summary)

    @property
    def code(self) -> str:
        """Digest of the source of the probe and of what it is computed with, so that an edited formula is computed again."""
        return _code_of(self.function)

    def __repr__(self) -> str:
        return f"<probe {self.name}>"


PROBES: Registry[Probe] = Registry("probe")


def probe(
    name: str,
    *,
    gives: Mapping[str, Quantity],
    needs: Collection[str] = (),
    family: Family = "behaviour",
    afterwards: Callable[[Steps], Iterator[tuple[int, Reading]]] | None = None,
) -> Callable[[Callable[..., Iterable[Any]]], Probe]:
    """Return a decorator that registers a function as the probe `name`; the other arguments are those of `Probe`."""

    def register(function: Callable[..., Iterable[Any]]) -> Probe:
        return PROBES.add(name)(Probe(function, name, gives, needs, family, afterwards))

    return register


def find_probe(name: str) -> Probe:
    """Return the probe `name` of a configuration; a plain function is one under its whole name. Raises PicoError."""
    part: Any = PROBES.get(name)
    return part if isinstance(part, Probe) else Probe(part, name, {})


class Running:
    """A probe under way. readings: what it has found; ask: what it waits for, None at its end; failure: why it ended early."""

    def __init__(self, of: Probe, given: Mapping[str, Any], options: Mapping[str, Any]):
        self.probe, self.given, self._options = of, given, options
        self.readings: list[Reading] = []
        self.ask: Ask | None = None
        self.failure: PicoError | None = None
        self._found: Found | None = None

    def go_on(self, answered: Answer | PicoError | None = None) -> None:
        """Run until the probe asks, or ends. answered: what it asked for; an error is raised where it asked."""
        self.ask = None
        try:
            if self._found is None:
                self._found = self.probe.start(self.given, self._options)
            if isinstance(answered, PicoError):
                item = self._found.throw(answered)
            else:
                item = next(self._found) if answered is None else self._found.send(answered)
            while not isinstance(item, Ask):
                self.readings.append(self.probe.checked(item))
                item = next(self._found)
            self.ask = item
        except StopIteration:
            pass
        except PicoError as error:
            self.failure = error
        except Exception as error:
            raise PicoError(f"probe {self.probe.name} fails: {type(error).__name__}: {error}") from error


def run(probes: Sequence[Running], subject: Subject, batch_size: int = 8) -> None:
    """Run probes to their ends on one subject. In each round, all that wait for an answer share their passes."""
    for each in probes:
        each.go_on()
    while waiting := [each for each in probes if each.ask is not None]:
        asks = [each.ask for each in waiting if each.ask is not None]
        for each, answered in zip(waiting, _answers(subject, asks, batch_size)):
            each.go_on(answered)


def _answers(subject: Subject, asks: Sequence[Ask], batch_size: int) -> Sequence[Answer | PicoError]:
    """Return the answers; where one of several cannot be given, each is asked alone."""
    try:
        return subject.answer(asks, batch_size)
    except PicoError as error:
        return [error] if len(asks) == 1 else [each for ask in asks for each in _answers(subject, [ask], batch_size)]


def _each(readings: Iterable[Reading]) -> Found:
    yield from readings


@cache
def _code_of(function: Any) -> str:
    """Return a digest of the file of a function, and of all of this package and of `observe`, which it may be computed with."""
    own = inspect.getsourcefile(function)
    files = [
        *Path(__file__).parent.glob("*.py"),
        *Path(passes.__file__).parent.glob("*.py"),
        *([Path(own)] if own else []),
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()
