"""Read steps during an analysis: each tensor once, with counts of what was requested and what was read."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from picolm.address import Address
from picolm.analyze.components import Absent, Operand, operands
from picolm.analyze.config import Component
from picolm.analyze.heads import read_anatomy
from picolm.errors import PicoError
from picolm.store.checkpoint import stored_weights_digest

if TYPE_CHECKING:
    from torch import Tensor

    from picolm.analyze.matrix import Matrix
    from picolm.models import Anatomy
    from picolm.observe.config import Observe
    from picolm.observe.observed import Observer
    from picolm.observe.rows import Rows
    from picolm.observe.subject import Subject
    from picolm.store import Checkpoint, Run

log = logging.getLogger("picolm")

KEPT = 8  # cached tensors of one step for each thread: two circuits of four tensors


class Reader(Mapping[Address, "Tensor"]):
    """A checkpoint that caches its last few tensors: the heads of a layer are computed from the same ones."""

    def __init__(self, checkpoint: "Checkpoint", run: "Run", readers: "Readers"):
        self.checkpoint, self.run, self.readers = checkpoint, run, readers
        self._tensors: OrderedDict[Address, Tensor] = OrderedDict()
        self._operands: dict[tuple[Component, str], tuple[list[Operand], list[Absent]]] = {}
        self._rows: dict[str, str | None] = {}
        self._reading = Lock()  # layers may be computed in parallel

    @property
    def name(self) -> str:
        """The name in messages: `step 200 of demo`."""
        return f"step {self.checkpoint.step} of {self.run.name}"

    def digest(self, address: Address) -> str:
        self.readers.asked.add((self.run.name, self.checkpoint.step, address))
        return self.checkpoint.digest(address)

    def __getitem__(self, address: Address) -> "Tensor":
        with self._reading:
            if address not in self._tensors:
                self.readers.tensors_read += 1
                self._tensors[address] = self.checkpoint[address]
                if len(self._tensors) > KEPT * self.readers.threads:
                    self._tensors.popitem(last=False)
            return self._tensors[address]

    def __iter__(self) -> Iterator[Address]:
        return iter(self.checkpoint)

    def __len__(self) -> int:
        return len(self.checkpoint)

    def __contains__(self, address: object) -> bool:
        return address in self.checkpoint

    def shape(self, address: Address) -> tuple[int, ...]:
        return self.checkpoint.shape(address)

    def select(self, **patterns: str) -> list[Address]:
        return self.checkpoint.select(**patterns)

    @cached_property
    def anatomy(self) -> "Anatomy":
        """The names of the parts of the model at this step, and how heads are cut from them."""
        return read_anatomy(self.checkpoint, self.readers.models[self.run.name], self.name)

    def operands(self, component: Component, split: str) -> tuple[list[Operand], list[Absent]]:
        """Return (what a component finds in this step, what it does not find)."""
        key = (component, split)
        if key not in self._operands:
            asked: dict[str, Any] = {
                name: getattr(component, name) for name in ("data_type", "layer_suffixes", "layers", "heads")
            }
            asked |= {"anatomy": self.anatomy, "model": self.readers.models[self.run.name]}
            found = list(operands(self, component.component_name, split=split, **asked))
            present = [operand for operand in found if isinstance(operand, Operand)]
            self._operands[key] = present, [absent for absent in found if isinstance(absent, Absent)]
        return self._operands[key]

    def rows_digest(self, split: str) -> str | None:
        """Return a digest of the inputs that the activations of `split` belong to; None if it is not stored."""
        if split not in self._rows:
            self._rows[split] = self.checkpoint.rows_digest(split)
        return self._rows[split]

    def positions(self, split: str) -> list[int] | None:
        """Return the positions in each input that the activations belong to; None for all, or if not stored."""
        captured = self.checkpoint.meta.get("capture") or {}
        return captured.get("positions" if split == "train" else f"{split}_positions")


def model_section(run: "Run") -> dict[str, Any]:
    """Return the `model` section of a run's configuration, empty if it has none. Raises PicoError if it is not a
    mapping.
    """
    section = run.config.get("model")
    if section is not None and not isinstance(section, Mapping):
        raise PicoError(f"{run.path}: `model` in its configuration is {section!r}; expected keys and values")
    return dict(section or {})


class Readers:
    """The readers of the steps in use: those that are pinned, and the last two others."""

    def __init__(self, runs: Mapping[str, "Run"], observe: "Observe | None" = None):
        """observe: what is observed of all runs, beside what they store."""
        self.runs, self._observe = runs, observe
        self.steps = {name: run.steps for name, run in runs.items()}  # as they were when the analysis began
        self.models = {name: model_section(run) for name, run in runs.items()}
        self.pinned: dict[tuple[str, int], Reader] = {}
        self._recent: OrderedDict[tuple[str, int], Reader] = OrderedDict()
        self.tensors_read = 0
        self.threads = 1  # number of threads that read at the same time
        self.fixed: dict[str, Matrix] = {}  # by digest: matrices of the step that all others are compared with
        self.asked: set[tuple[str, int, Address]] = (
            set()
        )  # run, step and address of all tensors whose digests were requested
        self._said: set[str] = set()
        self._subjects: dict[tuple[str, bool], Subject] = {}
        self._weights: dict[tuple[str, int], str | None] = {}
        self._asked_rows: dict[Observe, Mapping[str, Rows]] = {}

    def at(self, run: str, step: int, pin: bool = False) -> Reader | None:
        """Return the reader of a step, None if the run does not have it. pin: keep the reader."""
        key = (run, step)
        reader = self.pinned.get(key) or self._recent.get(key)
        if reader is None:
            if step not in self.steps[run]:
                return None
            stored = self.runs[run][step]
            reader = Reader(self._observers[run].at(stored) if self._observe else stored, self.runs[run], self)
        if pin:
            self.pinned[key] = reader
        elif key not in self.pinned:
            self._recent[key] = reader
            while len(self._recent) > 2:
                self._recent.popitem(last=False)
        return reader

    @cached_property
    def _observers(self) -> "Mapping[str, Observer]":
        from picolm.observe.observed import observers

        assert self._observe is not None
        return observers(self._observe, self.runs)

    def subject(self, run: str, beside: bool = False) -> "Subject":
        """Return the model of a run, to be asked; the same one at each call. beside: a second one, to compare the first with.

        Raises PicoError for a model that cannot be run.
        """
        from picolm.observe.subject import Subject

        if (run, beside) not in self._subjects:
            self._subjects[run, beside] = Subject(self.runs[run])
        return self._subjects[run, beside]

    def weights_digest(self, run: str, step: int) -> str | None:
        """Return the digest of the weights of a step, None if it has none; looked up once."""
        if (run, step) not in self._weights:
            self._weights[run, step] = stored_weights_digest(self.runs[run][step])
        return self._weights[run, step]

    def rows(self, asked: "Observe") -> "Mapping[str, Rows]":
        """Return the rows of each run that probes are asked on, all the same. Raises PicoError where there are none."""
        from picolm.observe.rows import rows_of

        if asked not in self._asked_rows:
            models = {name: self.subject(name).architecture for name in self.runs}
            contexts = {name: model.context for name, model in models.items()}
            ahead = {name: model.outline.row_length(0) for name, model in models.items()}
            self._asked_rows[asked] = rows_of(asked, self.runs, contexts, ahead)
        return self._asked_rows[asked]

    def observes(self, address: Address) -> bool:
        """Return whether a tensor is observed, and not stored."""
        asked = self._observe
        return asked is not None and address.split == asked.split and address.kind in asked.what

    def fetch(self, places: Iterable[tuple[str, int]]) -> None:
        """Compute what is observed at some steps of runs, in this thread."""
        for run, step in places:
            if (reader := self.at(run, step)) is not None:
                reader.checkpoint.fetch(self._observers[run].addresses)

    def location(self, run: str, step: int, address: Address) -> str:
        """Return the file that holds a tensor, for messages."""
        reader = self.at(run, step)
        return reader.checkpoint.location(address) if reader is not None else ""

    def say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning(text)
