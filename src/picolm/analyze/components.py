"""Components: which matrices of a checkpoint are measured: a tensor, one head of it, or a circuit of several tensors.

A component is a function of a checkpoint that yields operands: a name, a head, a digest of what determines the matrix,
and a function that loads it, so that nothing is read before it is needed. What a checkpoint does not hold is yielded as
an `Absent`. A user's own component may simply yield pairs (Address, Tensor).

Notation: d = width of the residual stream, D = head size, h = a query head,
g = h // (heads / key-value heads), the key-value head that it uses.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from picolm.address import Address, has_suffix
from picolm.analyze.heads import Cut, count_of, extent, layers_of, part_of, size_of
from picolm.analyze.matrix import Matrix
from picolm.errors import PicoError
from picolm.models.anatomy import Anatomy
from picolm.registry import Registry

Layers = Literal["all"] | Sequence[int]
KINDS = ("weights", "gradients", "activations")
CIRCUITS = (
    "ov_circuit",
    "qk_circuit",
    "value_circuit",
    "write_read_circuit",
)  # which need weights, whatever is measured
_BY_COLUMNS = ("ov_circuit", "value_circuit")  # heads of the outer layer are columns of its weight


class Operand(NamedTuple):
    """A matrix to measure. head: None if it is not of one head; digest: of what determines its content, so that equal
    digests mean equal matrices; load: reads and returns it.
    """

    address: Address
    head: int | None
    digest: str
    load: Callable[[], Matrix]


class Absent(NamedTuple):
    """Something that was requested and that the checkpoint does not hold. what: its name, for messages."""

    what: str


# function(checkpoint, *, data_type, split, layer_suffixes, layers, heads, anatomy, model) -> operands. It gets only the
# keywords that it takes; `model` is the `model` section of the run's YAML.
COMPONENTS: Registry[Any] = Registry("component")
Function = TypeVar("Function", bound=Callable[..., Any])


def component(name: str, kinds: Sequence[str] | None = None) -> Callable[[Function], Function]:
    """Return a decorator that registers a component. kinds: the data types that it supports (None: all)."""

    def register(function: Function) -> Function:
        function.kinds = kinds  # type: ignore[attr-defined]
        COMPONENTS.add(name)(function)
        return function

    return register


def operands(checkpoint: Any, name: str, **asked: Any) -> Iterator[Operand | Absent]:
    """Yield what component `name` finds in `checkpoint`. Pairs (Address, Tensor) of a user's component become operands.

    asked: keywords as listed at COMPONENTS; the component gets those that it takes.
    """
    function = COMPONENTS.get(name)
    taken = inspect.signature(function).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        asked = {parameter.name: asked[parameter.name] for parameter in taken if parameter.name in asked}
    for found in function(checkpoint, **asked):
        if isinstance(found, Operand | Absent):
            yield found
        else:
            address, tensor = found
            digest = hashlib.sha256(tensor.detach().double().contiguous().numpy().tobytes()).hexdigest()
            digest = digest_of(digest, str(tensor.dtype))  # the type decides the noise floor
            yield Operand(Address(*address), None, digest, partial(Matrix, tensor))


@component("simple")
def simple(
    checkpoint: Any, *, data_type: str, split: str, layer_suffixes: Any, layers: Layers, anatomy: Anatomy, **_: Any
) -> Iterator[Operand | Absent]:
    """Tensors as they are: weights, gradients, activations or optimizer moments of modules, chosen by role or by the
    end of their names.
    """
    named = (layer_suffixes,) if isinstance(layer_suffixes, str) else tuple(layer_suffixes or ())
    modules: list[str | None] = [anatomy.module(name) for name in anatomy.suffixes(named)]
    for suffix in modules or [None]:
        found = _matching(checkpoint, data_type, split, suffix, layers)
        for address in found:
            yield Operand(address, None, checkpoint.digest(address), _loader(checkpoint, address))
        yield from _absent(found, data_type, split, suffix or "anything", layers)


@component("mlp", kinds=KINDS)
def mlp(checkpoint: Any, *, layer_suffixes: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """Output projection of the MLPs: its weights, its gradients, and what it adds to the residual stream."""
    yield from simple(checkpoint, layer_suffixes=layer_suffixes or "mlp.output", **asked)


@component("attention", kinds=KINDS)
def attention(checkpoint: Any, *, layer_suffixes: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """Output projection of the attention: its weights, its gradients, and what attention adds to the residual stream,
    with the values of all positions mixed (see ov_circuit for each position on its own).
    """
    yield from simple(checkpoint, layer_suffixes=layer_suffixes or "attention.output", **asked)


@component("embedding", kinds=KINDS)
def embedding(checkpoint: Any, *, layer_suffixes: Any, layers: Layers, **asked: Any) -> Iterator[Operand | Absent]:
    """Token embedding (layer_suffixes: unembedding for the output layer)."""
    yield from simple(checkpoint, layer_suffixes=layer_suffixes or "embedding", layers="all", **asked)


@component("residual", kinds=("activations",))
def residual(
    checkpoint: Any, *, data_type: str, split: str, layers: Layers, anatomy: Anatomy, **_: Any
) -> Iterator[Operand | Absent]:
    """Residual stream after each block. The run has to capture whole blocks: layer_suffixes: [layers.0, …]."""
    captured = checkpoint.select(kind=data_type, split=split)
    blocks = {address.layer: address for address in captured if address.layer is not None and not address.suffix}
    there, beyond = layers_of([*captured, *checkpoint.select(kind="weights")], anatomy)
    for layer in there if layers == "all" else layers:
        if layer in blocks:
            yield Operand(blocks[layer], None, checkpoint.digest(blocks[layer]), _loader(checkpoint, blocks[layer]))
        else:
            block = anatomy.block.format(layer)
            address = Address(data_type, split, block)
            yield Absent(f"{address} (the run has to capture whole blocks: layer_suffixes: [{block}])")
    if layers == "all" and beyond:
        yield Absent(f"{data_type}/{split} of {beyond}")


@component("per_head", kinds=KINDS)
def per_head(
    checkpoint: Any,
    *,
    data_type: str,
    split: str,
    layer_suffixes: Any,
    layers: Layers,
    anatomy: Anatomy,
    **_: Any,
) -> Iterator[Operand | Absent]:
    """The part of each head in the projections of the attention: rows of q, k and v, columns of o (default: v); of a state space
    model: rows of values and gates, columns of the output (default: values).
    """
    default = (
        "ssm.value" if "ssm.value" in anatomy.parts and "attention.value" not in anatomy.parts else "attention.value"
    )
    suffixes = (layer_suffixes,) if isinstance(layer_suffixes, str) else layer_suffixes or (default,)
    for suffix in map(anatomy.module, suffixes):
        found = _matching(checkpoint, data_type, split, suffix, layers)
        for address in found:
            yield from _heads_of(checkpoint, address, anatomy)
        yield from _absent(found, data_type, split, suffix, layers)


def _heads_of(checkpoint: Any, address: Address, anatomy: Anatomy) -> Iterator[Operand]:
    before, _, projection = address.module.rpartition(".")
    own = part_of(anatomy, projection)
    cut = {part.module.rpartition(".")[2]: part for part in anatomy.parts.values() if part.cut}
    if own is None:
        *first, last = cut or ["nothing"]
        names = f"{', '.join(first)} and {last}" if first else last
        raise PicoError(f"per_head: {address.module} has no heads; it splits {names}")
    if own.by == "columns" and address.kind == "activations":
        raise PicoError(f"per_head: the output of {projection} is a sum over heads and cannot be split; use ov_circuit")
    beside = {address._replace(module=f"{before}.{name}".lstrip(".")): part for name, part in cut.items()}
    extents = {
        other: (str(part.cut), extent(checkpoint, other, part))
        for other, part in beside.items()
        if other in checkpoint and not (other.kind == "activations" and part.by == "columns")
    }
    where = name_of(checkpoint)
    by_column, size = own.by == "columns" or address.kind == "activations", size_of(anatomy, extents, where)
    for head in range(count_of(anatomy, extents, address, where)):
        part = slice(head * size, (head + 1) * size)

        def load(part: slice = part) -> Matrix:
            tensor = rows_of(checkpoint[address])
            return Matrix(tensor[:, part] if by_column else tensor[part])

        yield Operand(address, head, digest_of(checkpoint.digest(address), "head", head, size), load)


@component("ov_circuit", kinds=KINDS)
def ov_circuit(checkpoint: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """What a head writes to the residual stream. Weights: W_O[:, h] W_V[g] (d x d, rank D; Elhage et al. 2021).
    Activations: those of W_V[g] multiplied by W_O[:, h], which is what each position offers before attention mixes
    positions. Gradients: the first-order change gO V + O gV. With `heads: false`: the sum over the heads of a layer.
    """
    yield from _circuit(
        checkpoint, "ov_circuit", ("output_layer", "attention.output"), ("value_layer", "attention.value"), **asked
    )


@component("qk_circuit", kinds=("weights", "gradients"))
def qk_circuit(checkpoint: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """What a head attends to. Weights: W_Q[h]^T W_K[g] (d x d, rank D), before rotary position embedding. Gradients:
    the first-order change gQ^T K + Q^T gK. With `heads: false`: the sum over the heads of a layer.
    """
    yield from _circuit(
        checkpoint, "qk_circuit", ("query_layer", "attention.query"), ("key_layer", "attention.key"), **asked
    )


@component("value_circuit", kinds=("weights", "gradients"))
def value_circuit(checkpoint: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """What a head of a state space model writes to the residual stream of what it reads there. Weights: W_O[:, h] W_X[h] (d x d,
    rank: head size), without the convolution, SiLU, gate and norm that stand between the two. Gradients: the first-order change
    gO X + O gX. With `heads: false`: the sum over the heads of a layer.
    """
    yield from _circuit(
        checkpoint, "value_circuit", ("output_layer", "ssm.output"), ("value_layer", "ssm.value"), **asked
    )


@component("write_read_circuit", kinds=("weights", "gradients"))
def write_read_circuit(checkpoint: Any, **asked: Any) -> Iterator[Operand | Absent]:
    """What a state space layer reads of what it wrote before: W_C^T W_B (d x d, rank: state size times groups), summed over
    groups, of which heads take theirs; without the convolutions and SiLU between. Gradients: the first-order change
    gC^T B + C^T gB.
    """
    yield from _circuit(
        checkpoint,
        "write_read_circuit",
        ("query_layer", "ssm.read"),
        ("key_layer", "ssm.write"),
        **asked | {"heads": False},
    )


def _circuit(
    checkpoint: Any,
    name: str,
    outer: tuple[str, str],
    inner: tuple[str, str],
    *,
    data_type: str,
    split: str,
    layer_suffixes: Any,
    layers: Layers,
    heads: bool,
    anatomy: Anatomy,
    **_: Any,
) -> Iterator[Operand | Absent]:
    """Yield a circuit per layer and head. outer, inner: key in `layer_suffixes` and default role of the two factors."""
    suffixes = tuple(anatomy.module(_suffix(layer_suffixes, key) or role) for key, role in (outer, inner))
    there, beyond = layers_of(
        [*checkpoint.select(kind="weights"), *(checkpoint.select(kind=data_type, split=split))], anatomy
    )
    for layer in there if layers == "all" else layers:
        block = anatomy.block.format(layer)
        needed = _needed(data_type, split, *(f"{block}.{suffix}" for suffix in suffixes))
        missing = [address for address in needed if address not in checkpoint]
        if missing:
            yield Absent(" and ".join(map(str, missing)))
            continue
        cut = _cut_of(checkpoint, name, needed, anatomy)
        address = Address(data_type, "" if data_type == "weights" else split, f"{block}.{name}")
        digests = [checkpoint.digest(part) for part in needed]
        for head in range(cut.heads) if heads else (None,):

            def load(head: int | None = head, needed: list[Address] = needed, cut: Cut = cut) -> Matrix:
                tensors = [rows_of(checkpoint[part]) for part in needed]
                return _product(name, data_type, tensors, head, cut)

            yield Operand(address, head, digest_of(name, data_type, head, *cut, *digests), load)
    if layers == "all" and beyond:
        yield Absent(f"{data_type} of {beyond}")


def _cut_of(checkpoint: Any, name: str, needed: list[Address], anatomy: Anatomy) -> Cut:
    """Return how the two layers of a circuit are split into heads. Raises PicoError if it is unknown or impossible."""
    outer, inner = needed[:2]
    if name == "write_read_circuit":  # not of a head
        return Cut(1, 1, int(checkpoint.shape(outer)[0]))
    across = -1 if name in _BY_COLUMNS else 0
    extents = {
        outer: ("heads", int(checkpoint.shape(outer)[across])),
        inner: ("kv_heads", int(checkpoint.shape(inner)[-1 if inner.kind == "activations" else 0])),
    }
    where = name_of(checkpoint)
    heads, kv_heads = (count_of(anatomy, extents, address, where) for address in (outer, inner))
    if heads % kv_heads:
        raise PicoError(f"{where}: {heads} query heads ({outer}) cannot share {kv_heads} key-value heads ({inner})")
    return Cut(heads, kv_heads, size_of(anatomy, extents, where))


def name_of(checkpoint: Any) -> str:
    """Return the name of a checkpoint for messages: `step 200 of demo`, else its path or its text."""
    return getattr(checkpoint, "name", None) or str(getattr(checkpoint, "path", checkpoint))


def _suffix(layer_suffixes: Any, key: str) -> str | None:
    if isinstance(layer_suffixes, Mapping):
        return layer_suffixes.get(key)
    return getattr(layer_suffixes, key, None)


def _needed(data_type: str, split: str, outer: str, inner: str) -> list[Address]:
    """Return the addresses that a circuit is computed from: outer before inner, weights before gradients."""
    weights = [Address("weights", "", outer), Address("weights", "", inner)]
    if data_type == "weights":
        return weights
    if data_type == "activations":
        return [weights[0], Address("activations", split, inner)]
    return [*weights, Address("gradients", split, outer), Address("gradients", split, inner)]


def _product(name: str, data_type: str, tensors: list[Tensor], head: int | None, cut: Cut) -> Matrix:
    """Return the circuit as a product of two factors: left d x r, right r x d (activations: N x r and r x d).

    tensors: in the order of `_needed`.
    """
    count, groups, size = cut
    width = size if head is not None else groups * size

    def outer(
        tensor: Tensor,
    ) -> Tensor:  # columns of the output projection, rows of the query one; without heads: the sum over each group
        columns = tensor if name in _BY_COLUMNS else tensor.T
        if head is not None:
            return columns[:, head * size : (head + 1) * size].double()
        return columns.double().unflatten(1, (groups, count // groups, size)).sum(2).flatten(1)

    def inner(tensor: Tensor, dimension: int) -> Tensor:
        group = (head or 0) // (count // groups)
        return (tensor if head is None else tensor.narrow(dimension, group * size, size)).double()

    types = [tensor.dtype for tensor in tensors]
    if data_type == "activations":
        return Matrix.product(inner(tensors[1], 1), outer(tensors[0]).T, rank=width, stored=(types[1], types[0]))
    if data_type == "weights":
        return Matrix.product(outer(tensors[0]), inner(tensors[1], 0), rank=width, stored=(types[0], types[1]))
    left, right, left_gradient, right_gradient = tensors
    changes = [(outer(left_gradient), inner(right, 0)), (outer(left), inner(right_gradient, 0))]
    return Matrix.sum_of_products(changes, stored=[(types[2], types[1]), (types[0], types[3])])


def rows_of(tensor: Tensor) -> Tensor:
    """Return activations at several positions [R, P, H] as R P rows; other tensors unchanged."""
    return tensor.flatten(0, 1) if tensor.ndim == 3 else tensor


def digest_of(*parts: Any) -> str:
    """Return the SHA-256 of what determines a derived matrix or a value."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _loader(checkpoint: Any, address: Address) -> Callable[[], Matrix]:
    return lambda: Matrix(rows_of(checkpoint[address]))


def _matching(checkpoint: Any, kind: str, split: str, suffix: str | None, layers: Layers) -> list[Address]:
    batchless = kind not in ("gradients", "activations")
    candidates = checkpoint.select(kind=kind, split="" if batchless else split)
    return [
        address
        for address in candidates
        if (suffix is None or has_suffix(address.module, suffix))
        and (layers == "all" or address.layer is None or address.layer in layers)
    ]


def _absent(found: list[Address], kind: str, split: str, suffix: str, layers: Layers) -> Iterator[Absent]:
    """Yield the layers that were requested by number and not found; if nothing was found, the suffix itself."""
    place = f"{kind}/{split} of" if kind in ("gradients", "activations") else f"{kind} of"
    if not found:
        yield Absent(f"{place} {suffix}")
    elif layers != "all" and any(address.layer is not None for address in found):
        there, stack = {address.layer for address in found}, next(address.stack for address in found if address.stack)
        yield from (Absent(f"{place} {stack}.{layer}.{suffix}") for layer in layers if layer not in there)


def available(checkpoint: Any) -> str:
    """Return what a checkpoint holds, for messages: `gradients/train: attention.output, …; …`."""
    held: dict[str, dict[str, None]] = {}
    for address in checkpoint:
        held.setdefault("/".join(filter(None, address[:2])), {})[address.suffix or address.module] = None
    return "; ".join(f"{kind}: {', '.join(suffixes)}" for kind, suffixes in held.items())
