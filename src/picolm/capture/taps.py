"""Choose the modules and positions to capture, read them with hooks, and gather them from all processes.

With FSDP2, parameters, gradients and moments are DTensors: each process holds a shard. All processes must call the
functions that gather in the same order. Gathered tensors are returned on the first process only.

Shapes: B rows of a micro-batch, T positions, H width of a module's output, R rows kept, P positions kept.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from picolm.address import Address, has_suffix
from picolm.errors import PicoError
from picolm.registry import did_you_mean
from picolm.seeds import derive

Order = Sequence[Sequence[int] | np.ndarray]  # for each micro-batch, the places of its rows in the global batch
Positions = Literal["last", "all"] | str | Sequence[int]


@dataclass(frozen=True)
class Taps:
    """The settings of a capture, resolved for one model.

    positions: `last`, `all`, `random:k`, or indices into the sequence. One position gives activations [R, H], several
    [R, P, H]. max_rows: how many rows of the global batch to keep activations of, in data order; None keeps all.
    dtype: element type of kept activations; None keeps the type in which they were computed.
    """

    modules: dict[str, nn.Module]
    activations: bool = True
    gradients: bool = True
    positions: Positions = "last"
    dtype: torch.dtype | None = None
    max_rows: int | None = None
    seed: int = 0

    def positions_at(self, step: int, length: int) -> list[int] | None:
        """Return the positions to keep at `step` in sequences of `length` tokens; None to keep all.

        Raises PicoError if the sequences are too short for a configured position.
        """
        if self.positions == "all":
            return None
        if self.positions == "last":
            return [length - 1]
        if isinstance(self.positions, str):
            count = min(int(self.positions.removeprefix("random:")), length)
            generator = torch.Generator().manual_seed(derive(self.seed, "positions", step))
            return sorted(torch.randperm(length, generator=generator)[:count].tolist())
        beyond = [position for position in self.positions if not -length <= position < length]
        if beyond:
            raise PicoError(
                f"checkpointing.learning_dynamics.positions: there is no position {beyond[0]} in rows of {length} inputs "
                "(held-out rows may be shorter than training rows); -1 is the last one of any row"
            )
        return [position % length for position in self.positions]


def find_modules(
    model: nn.Module, suffixes: Sequence[str], layers: Literal["all"] | Sequence[int]
) -> dict[str, nn.Module]:
    """Return the modules whose names end in one of `suffixes` (whole words), in the order of the model; see `matching`."""
    named = {name: module for name, module in model.named_modules() if name}
    lists = {name for name, module in named.items() if isinstance(module, nn.ModuleList)}
    found = matching(named, suffixes, layers, "checkpointing.learning_dynamics.layer_suffixes", but=lists)
    return {name: named[name] for name in found}


def matching(
    names: Collection[str],
    suffixes: Sequence[str],
    layers: Literal["all"] | Sequence[int],
    key: str,
    but: Collection[str] = (),
) -> list[str]:
    """Return the names of modules that end in one of `suffixes` (whole words), in the order of `names`.

    Of modules inside blocks, only those of `layers` are returned. key: the key of the configuration, for messages; but: names
    that are not listed there. Raises PicoError, listing the known suffixes, if a suffix matches no module.
    """
    found: set[str] = set()
    for suffix in suffixes:
        matches = [name for name in names if has_suffix(name, suffix)]
        if not matches:
            known = dict.fromkeys(Address("", "", name).suffix or name for name in names if name not in but)
            raise PicoError(
                f"{key}: {suffix!r} matches no module"
                f"{did_you_mean(suffix, [*known, *(name.rsplit('.', 1)[-1] for name in known)])} (there are: {', '.join(known)})"
            )
        layer_of = {name: Address("", "", name).layer for name in matches}
        found |= {n for n in matches if layers == "all" or layer_of[n] is None or layer_of[n] in layers}
    return [name for name in names if name in found]


class Captured(dict[Address, Tensor]):
    """The captured tensors of one step by address; complete after the `capture` block has ended.

    lengths: the numbers of positions in the outputs that were captured.
    """

    def __init__(self) -> None:
        self.lengths: set[int] = set()


@contextmanager
def capture(taps: Taps, *, split: str, step: int, order: Order | None) -> Iterator[Captured]:
    """Capture the forward and backward passes that run inside the block.

    order: for each micro-batch of this process, the places of its rows in the global batch. Activations are sorted in
    that global order, one row per sequence, for any number of micro-batches and processes. Rows of a micro-batch beyond
    its places are not kept. None where the micro-batches are not known before: the rows of each process are counted as
    they come, see `place_in_batch`. With several processes, all must call this, and the first one gets all captured tensors.
    Raises PicoError if a module did not run exactly once per micro-batch or does not return one tensor.
    """
    captured = Captured()
    count = None if order is None else sum(len(_rows_kept(taps, places)) for places in order)
    records = {name: _Kept(count) for name in taps.modules} if taps.activations else {}
    hooks = [
        taps.modules[name].register_forward_hook(_record(taps, step, name, kept, order, captured.lengths))
        for name, kept in records.items()
    ]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()
    places = _places_kept(taps, records, order)
    for name, kept in records.items():
        rows = gather_rows(kept.rows(), places)
        if rows is not None:
            captured[Address("activations", split, name)] = rows
    if taps.gradients:
        captured |= gradients(taps, split)


class _Kept:
    """The rows that are kept of the outputs of one module. runs: how often it ran; count: the rows so far.

    Where their number is known, they are written into one tensor. Small tensors that stay would lie between the large ones of
    each pass, so that the memory of those could not be used again: 1024 rows of a 12-layer model took 0.8 GB more.
    """

    def __init__(self, total: int | None):
        self._total, self._pieces = total, list[Tensor]()
        self.runs = self.count = 0

    def add(self, chosen: Tensor, dtype: torch.dtype) -> None:
        """Copy rows."""
        self.runs, at, self.count = self.runs + 1, self.count, self.count + len(chosen)
        if self._total is None:
            self._pieces.append(chosen.to(device="cpu", dtype=dtype, copy=True))
            return
        if not self._pieces:
            self._pieces.append(torch.empty((self._total, *chosen.shape[1:]), dtype=dtype))
        if chosen.shape[1:] != self._pieces[0].shape[1:]:
            raise PicoError(f"a batch cannot be captured whose rows differ in length: {tuple(chosen.shape)}")
        self._pieces[0][at : self.count] = chosen

    def rows(self) -> Tensor:
        """Return all of them."""
        return self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces)


def gradients(taps: Taps, split: str) -> dict[Address, Tensor]:
    """Return copies of the current gradients of the chosen modules' own parameters; only the first process gets any."""
    found = {}
    for module_name, module in taps.modules.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = module_name if parameter_name == "weight" else f"{module_name}.{parameter_name}"
            gradient = full_tensor(parameter.grad) if parameter.grad is not None else None
            if gradient is not None:
                found[Address("gradients", split, name)] = gradient
    return found


def place_in_batch(row: int) -> int:
    """Return the place in the global batch of the n-th row of this process, where nothing else says it: in turns."""
    return row * world_size() + (dist.get_rank() if world_size() > 1 else 0)


def _rows_kept(taps: Taps, places: Any) -> list[int]:
    """Return which rows of a micro-batch are kept, by their places in the global batch."""
    return [row for row, place in enumerate(places) if taps.max_rows is None or place < taps.max_rows]


def _places_kept(taps: Taps, records: Mapping[str, _Kept], order: Order | None) -> list[int]:
    """Return the places of the rows that were kept of each module. Raises PicoError for a module that did not run once."""
    if order is not None:
        for name, kept in records.items():
            if kept.runs != len(order):
                raise PicoError(
                    f"{name} ran {kept.runs} times in {len(order)} micro-batch(es), so its activations cannot be captured "
                    "(the loss reads the weight of the last layer directly); leave it out of layer_suffixes, or capture only "
                    "gradients"
                )
        return [int(places[row]) for places in order for row in _rows_kept(taps, places)]
    runs = {name: kept.runs for name, kept in records.items()}
    usual = max(runs.values(), key=list(runs.values()).count, default=0)
    for name, times in runs.items():
        if times != usual or not times:
            raise PicoError(
                f"{name} ran {times} times where other modules ran {usual} times, so its activations cannot be captured; "
                "choose other modules (layer_suffixes), or capture only gradients (what)"
            )
    return [place_in_batch(row) for row in range(next((kept.count for kept in records.values()), 0))]


def _record(taps: Taps, step: int, name: str, kept: _Kept, order: Order | None, lengths: set[int]) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        if torch._C._current_graph_task_id() != -1:  # activation checkpointing computes it again while it goes backward
            return
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise PicoError(
                f"{name} returns {type(output).__name__}, not one tensor [rows, …, width]: it cannot be captured"
            )
        if order is None:
            places: Any = [place_in_batch(row) for row in range(kept.count, kept.count + len(output))]
        else:
            places = order[kept.runs] if kept.runs < len(order) else ()
        lengths.update(output.shape[1:-1])
        kept.add(_select(output.detach(), _rows_kept(taps, places), taps, step), taps.dtype or output.dtype)

    return hook


def _select(output_BTH: Tensor, rows: list[int], taps: Taps, step: int) -> Tensor:
    chosen = output_BTH if len(rows) == len(output_BTH) else output_BTH[rows]
    if chosen.ndim > 2:
        positions = taps.positions_at(step, chosen.shape[1])
        if positions is not None:
            chosen = chosen[:, positions[0]] if len(positions) == 1 else chosen[:, positions]
    return chosen


def world_size() -> int:
    """Return the number of processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Return whether this is the first process: the one that gets gathered tensors and writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def full_tensor(tensor: Tensor) -> Tensor | None:
    """Return a copy of the full tensor on the CPU, gathered if it is a DTensor; None on all processes but the first."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().to(device="cpu", copy=True) if is_first() else None


def whole_tensors(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return `tensors` with each DTensor gathered to the CPU, one at a time; other processes get no DTensors."""
    gathered = {key: full_tensor(t) if isinstance(t, DTensor) else t for key, t in tensors.items()}
    return {key: tensor for key, tensor in gathered.items() if tensor is not None}


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a CPU tensor over all processes, on every process; the all-reduce runs on `device`."""
    if world_size() == 1:
        return tensor
    on_device = tensor.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def on_every_process(tensor: Tensor) -> Tensor:
    """Return the full tensor on every process, on its own device."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(whole: Tensor, like: Tensor) -> Tensor:
    """Return `whole`, which every process has, with the placement of `like`. No communication."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(mesh, like.placements)


def gather_rows(rows: Tensor, places: Sequence[int]) -> Tensor | None:
    """Return the rows of all processes, sorted by place in the global batch; None on all processes but the first."""
    if world_size() > 1:
        pieces: list[tuple[Tensor, Sequence[int]]] | None = [(rows, places)] * world_size() if is_first() else None
        dist.gather_object((rows, places), pieces)
        if pieces is None:
            return None
        rows = torch.cat([piece for piece, _ in pieces])
        places = [place for _, some in pieces for place in some]
    if list(places) == sorted(places):
        return rows
    return rows[torch.tensor(places).argsort()]
