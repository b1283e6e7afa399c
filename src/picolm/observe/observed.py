"""A checkpoint with the tensors that its model computes on given rows, beside those that it stores.

What was computed is kept in `$PICO_CACHE/observed`, by the digest of what it depends on: weights, configuration, rows, and the
versions that compute it. The folder is bounded: what was not used for longest is deleted.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from picolm.address import Address
from picolm.errors import FileError, PicoError, StoreError
from picolm.network import cache_folder
from picolm.observe.config import Observe
from picolm.observe.rows import Rows, rows_of
from picolm.observe.subject import Subject, threads_of
from picolm.store import Checkpoint, Run
from picolm.store.checkpoint import stored_weights_digest
from picolm.store.files import disk_errors, replacement, write_atomically
from picolm.store.tensors import read_header, read_tensor, tensor_bytes, write_tensors
from picolm.trusted import parse_json, read_bytes

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("picolm")

VERSION = 1  # of what is computed; another one makes everything that is kept invalid
MOST_BYTES = 4 * 2**30  # of the folder


class Observer:
    """What is observed at all steps of one run: the rows, the modules, and the model."""

    def __init__(self, subject: Subject, rows: Rows, asked: Observe):
        self.subject, self.rows, self.asked = subject, rows, asked
        self.asking = threading.Lock()  # one model, so one question at a time
        if asked.hidden and not hasattr(subject.architecture.outline, "hide"):
            raise PicoError(f"hidden: the model of {subject.run.name} has no mask; only a diffusion model hides tokens")
        kinds = [kind for kind in asked.what if kind in ("activations", "gradients")]
        self.addresses = subject.architecture.addresses(asked.split, kinds, asked.modules, asked.layers)

    def at(self, checkpoint: Checkpoint) -> "ObservedCheckpoint":
        """Return a checkpoint of the run with what is observed there. Nothing is computed."""
        return ObservedCheckpoint(checkpoint, self)


def observers(asked: Observe, runs: Mapping[str, Run]) -> dict[str, Observer]:
    """Return an observer of each run, all on the same rows. Raises PicoError for a model that cannot be run."""
    subjects = {name: Subject(run) for name, run in runs.items()}
    models = {name: subject.architecture for name, subject in subjects.items()}
    contexts = {name: model.context for name, model in models.items()}
    rows = rows_of(asked, runs, contexts, {name: model.outline.row_length(0) for name, model in models.items()})
    return {name: Observer(subject, rows[name], asked) for name, subject in subjects.items()}


class ObservedCheckpoint(Checkpoint):
    """A checkpoint, and the activations and gradients of its model on the rows of an observer.

    They replace what the step may store of the same kinds and split.
    """

    def __init__(self, stored: Checkpoint, observer: Observer):
        self.stored, self._observer = stored, observer
        self.path, self.step = stored.path, stored.step

    @property
    def meta(self) -> Mapping[str, Any]:
        """What the step records; the positions of what is observed are part of the identity of its rows."""
        captured = self.stored.meta.get("capture") or {}
        return {**self.stored.meta, "capture": {**captured, f"{self._observer.rows.split}_positions": None}}

    @property
    def about(self) -> Mapping[str, Any]:
        return self.stored.about

    @property
    def files(self) -> Collection[str]:
        return self.stored.files

    @property
    def minimum_bytes(self) -> int:
        return self.stored.minimum_bytes

    def read(self, name: str) -> bytes:
        return self.stored.read(name)

    def bytes_by_kind(self) -> dict[str, int]:
        return self.stored.bytes_by_kind()

    def verify(self) -> list[str]:
        return self.stored.verify()

    def rows(self, split: str) -> "pa.Table":
        return self.stored.rows(split)

    def rows_digest(self, split: str) -> str | None:
        """Return the identity of the rows and of the positions that are read of them."""
        return self._observer.rows.identity if split == self._observer.rows.split else self.stored.rows_digest(split)

    @cached_property
    def _weights(self) -> str | None:
        return stored_weights_digest(self.stored)

    @cached_property
    def observed(self) -> frozenset[Address]:
        """The addresses of what is observed; none of a step without weights."""
        return frozenset(self._observer.addresses) if self._weights is not None else frozenset()

    @cached_property
    def _hidden(self) -> frozenset[tuple[str, ...]]:
        """Kinds and splits of stored tensors that what is observed replaces."""
        return frozenset(address[:2] for address in self.observed)

    def __iter__(self) -> Iterator[Address]:
        yield from (address for address in self.stored if address[:2] not in self._hidden)
        yield from (address for address in self._observer.addresses if address in self.observed)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, address: object) -> bool:
        return address in self.observed or (
            isinstance(address, tuple) and address[:2] not in self._hidden and address in self.stored
        )

    def __getitem__(self, address: Address) -> Tensor:
        if address not in self.observed:
            return self.stored[address]
        self.fetch([address])
        digests = self._digests()
        tensor = read_tensor(self._file, read_header(self._file)[str(address)])
        if digests is None or hashlib.sha256(tensor_bytes(tensor)).hexdigest() != digests.get(str(address)):
            log.warning("%s is damaged; it is computed again.", self._file)
            self._file.with_suffix(".json").unlink(missing_ok=True)
            return self[address]
        return tensor

    def shape(self, address: Address) -> tuple[int, ...]:
        if address not in self.observed:
            return self.stored.shape(address)
        if address.kind == "gradients":
            return self.stored.shape(address._replace(kind="weights", split=""))
        rows, width = self._observer.rows, self._observer.subject.architecture.width(self.stored, address.module)
        counts = {len(positions) for positions in rows.positions}
        if len(counts) > 1:
            return sum(map(len, rows.positions)), width
        return (len(rows.tokens), width) if counts == {1} else (len(rows.tokens), *counts, width)

    def digest(self, address: Address) -> str:
        """Return a digest of what the tensor depends on, without computing it."""
        if address not in self.observed:
            return self.stored.digest(address)
        return hashlib.sha256(f"{self._key}\n{address}".encode()).hexdigest()

    def location(self, address: Address) -> str:
        if address not in self.observed:
            return self.stored.location(address)
        return f"{self.path}: observed with its weights"

    def fetch(self, addresses: Collection[Address], rows: Collection[str] = ()) -> None:
        """Compute what is observed, unless it is kept, and download what the step stores."""
        asked = [address for address in addresses if address not in self.observed]
        if asked:
            self.stored.fetch(asked, rows)
        if len(asked) == len(addresses) or self._digests() is not None:
            return
        folder = self._file.parent
        with disk_errors("what is observed", folder):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f"{self._file.name[:1]}.lock"):
                if self._digests() is None:  # another process may have computed it meanwhile
                    self._compute()
                    bound(folder, MOST_BYTES, but=self._file)

    def _compute(self) -> None:
        observer = self._observer
        with observer.asking:
            subject = observer.subject.at(self.stored)
            found = subject.tensors(observer.rows, observer.addresses, observer.asked.batch_size)
        with replacement(self._file) as temporary:
            _, digests = write_tensors(temporary, {str(address): tensor for address, tensor in found.items()})
        write_atomically(self._file.with_suffix(".json"), json.dumps(digests).encode())

    @cached_property
    def _key(self) -> str:
        observer = self._observer
        versions = (VERSION, torch.__version__, threads_of(observer.subject.run), observer.asked.batch_size)
        parts = (self._weights, observer.subject.architecture.identity(self.step), observer.rows.identity, *versions)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @cached_property
    def _file(self) -> Path:
        whole = "\n".join((self._key, *map(str, self._observer.addresses)))
        return cache_folder() / "observed" / f"{hashlib.sha256(whole.encode()).hexdigest()}.safetensors"

    def _digests(self) -> dict[str, str] | None:
        """Return the digests of the tensors that are kept, None where they are not, or damaged."""
        record = self._file.with_suffix(".json")
        try:
            digests = parse_json(read_bytes(record), str(record), dict[str, str])
            if set(read_header(self._file)) != {str(address) for address in self._observer.addresses}:
                return None
            os.utime(self._file)  # used now
            return digests
        except (FileError, StoreError, OSError):
            return None


def bound(folder: Path, most_bytes: int, but: Path, ending: str = ".safetensors") -> None:
    """Delete what was not used for longest in a folder, of files with this ending, until they have at most `most_bytes`."""

    def used(file: Path) -> float:
        return file.stat().st_mtime

    files = sorted((file for file in folder.glob(f"*{ending}") if file != but), key=used)
    total = sum(file.stat().st_size for file in (*files, but))
    for file in files:
        if total <= most_bytes:
            return
        total -= file.stat().st_size
        file.with_suffix(".json").unlink(missing_ok=True)
        file.unlink(missing_ok=True)
