"""What the weights of attention heads do by themselves, and how the heads of two layers compose (Elhage et al. 2021).

Every circuit has the rank of a head, so what is asked of a matrix of vocabulary by vocabulary, or of width by width, is computed
from products of the size of a head, in float64.

Legend: V vocabulary, H width of the residual stream, N query heads, D head size. Heads are q_NDH, k_NDH, v_NDH (rows of the
projections) and o_NDH (columns of the output projection); each query head has the key and value of its group.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from picolm.address import Address
from picolm.errors import PicoError
from picolm.observe.subject import Subject
from picolm.probes.probe import Found, Quantity, Reading, probe

_HEADS = ("attention.query", "attention.key", "attention.value", "attention.output")
_NEEDED = ("embedding", "unembedding", *_HEADS)
_PIECE = 8192  # tokens of the vocabulary that are in float64 at a time

_COPYING = (
    "sum Re(lambda) / sum |lambda| over the eigenvalues of W_U W_O W_V W_E: 1 where a head raises the tokens it reads"
)
_MATCHING = (
    "sum Re(lambda) / sum |lambda| over the eigenvalues of W_E^T W_Q^T W_K W_E: 1 where tokens attend to their own kind"
)
_FOLDED = "with the gains of the norms multiplied in"


def _composition(product: str) -> Quantity:
    return Quantity(
        "", f"{product} of this head and the earlier head in the bin (layer.head), W_QK = W_Q^T W_K, W_OV = W_O W_V"
    )


class Heads(NamedTuple):
    """The projections of one layer by query head, float64."""

    q_NDH: Tensor
    k_NDH: Tensor
    v_NDH: Tensor
    o_NDH: Tensor


@probe(
    "circuits",
    gives={
        "ov_copying": Quantity("", _COPYING),
        "ov_copying_folded": Quantity("", f"{_COPYING}, {_FOLDED}"),
        "qk_matching": Quantity("", _MATCHING),
        "qk_matching_folded": Quantity("", f"{_MATCHING}, {_FOLDED}"),
        "q_composition": _composition("|W_QK^T W_OV| / (|W_QK| |W_OV|)"),
        "k_composition": _composition("|W_QK W_OV| / (|W_QK| |W_OV|)"),
        "v_composition": _composition("|W_OV later W_OV earlier| / (|W_OV later| |W_OV earlier|)"),
    },
)
def circuits(subject: Subject, *, most_layers_apart: Annotated[int, Field(ge=0)] | None = None) -> Found:
    """Measure from weights alone which heads copy, which attend to their own kind of token, and which compose.

    most_layers_apart: between heads whose composition is measured (default: any; 0: none); the number of pairs grows with the
    square of the number of heads. The chance level of a composition is 1 / sqrt(H), its root mean square over all rotations of
    the residual stream between the two heads. Positions (rotary or learned) are no part of a circuit; biases and norms inside of
    attention are told in the note. Raises PicoError for a model without attention of known parts.
    """
    _check(subject)
    note = "; ".join(subject.anatomy.notes)
    vocabulary = _vocabulary(subject)
    earlier: deque[tuple[int, Tensor]] = deque(maxlen=most_layers_apart)
    for layer in range(subject.anatomy.layers or 0):
        heads = Heads(*(_heads(subject, role, layer) for role in _HEADS))
        for reading in (
            *_eigenvalue_readings(subject, layer, heads, *vocabulary),
            *_compositions(layer, heads, earlier),
        ):
            yield reading._replace(note=note)
        earlier.append((layer, _factor(heads.v_NDH, heads.o_NDH)))


def _check(subject: Subject) -> None:
    """Raise PicoError for a model whose parts are not known."""
    anatomy = subject.anatomy
    missing = [role for role in _NEEDED if role not in anatomy.parts]
    missing += [number for number in ("layers", "heads", "kv_heads") if getattr(anatomy, number) is None]
    if missing:
        raise PicoError(
            f"the circuits of {subject.run.name} are not known: its anatomy has no {', '.join(missing)}; leave this probe out"
        )


def _eigenvalue_readings(
    subject: Subject, layer: int, heads: Heads, to_logits_HH: Tensor, to_tokens_HH: Tensor
) -> Iterator[Reading]:
    """Yield what the eigenvalues of the circuits of each head say. Those of A B are those of B A, which is small here."""
    before_H, final_H = _gains(subject, layer)
    q_NDH, k_NDH, v_NDH, o_NDH = heads
    for name, left_NDH, middle_HH, right_NDH, gains in (
        ("ov_copying", v_NDH, to_logits_HH, o_NDH, (before_H, final_H)),
        ("qk_matching", k_NDH, to_tokens_HH, q_NDH, (before_H, before_H)),
    ):
        yield from _positive_shares(name, layer, left_NDH @ middle_HH @ right_NDH.mT)
        left_H, right_H = gains
        if left_H is None or right_H is None:
            reason = "the norm before the attention, or the last one, is not known"
            yield from (Reading(f"{name}_folded", None, layer, head, reason=reason) for head in range(len(q_NDH)))
        else:
            product_NDD = (left_NDH * left_H) @ middle_HH @ (right_NDH * right_H).mT
            yield from _positive_shares(f"{name}_folded", layer, product_NDD)


def _positive_shares(name: str, layer: int, product_NDD: Tensor) -> Iterator[Reading]:
    """Yield sum Re(lambda) / sum |lambda| of the matrix of each head: 1 where no eigenvalue takes away, -1 where all do."""
    for head, product_DD in enumerate(product_NDD):
        if not product_DD.isfinite().all():
            yield Reading(name, None, layer, head, chance=0.0, reason="the weights hold what is not a number")
            continue
        values_D = torch.linalg.eigvals(product_DD)
        total = float(values_D.abs().sum())
        share = float(values_D.real.sum()) / total if total else None
        yield Reading(name, share, layer, head, chance=0.0, reason="" if total else "the circuit is zero")


def _compositions(layer: int, heads: Heads, earlier: Iterable[tuple[int, Tensor]]) -> Iterator[Reading]:
    """Yield how far each head of a layer reads what each head of earlier layers writes. earlier: numbers, and factors of W_OV."""
    q_NDH, k_NDH, v_NDH, o_NDH = heads
    reads = {
        "q_composition": _factor(k_NDH, q_NDH),
        "k_composition": _factor(q_NDH, k_NDH),
        "v_composition": _factor(o_NDH, v_NDH),
    }
    chance = q_NDH.shape[-1] ** -0.5
    for number, writes_NDH in earlier:
        for name, reads_NDH in reads.items():
            for head, of_earlier in enumerate(_shares(reads_NDH, writes_NDH).tolist()):
                for other, share in enumerate(of_earlier):
                    reason = "one of the two circuits is zero, or not a number" if math.isnan(share) else ""
                    yield Reading(name, share, layer, head, f"{number}.{other}", chance=chance, reason=reason)


def _factor(outer_NDH: Tensor, inner_NDH: Tensor) -> Tensor:
    """Return R inner of the circuit outer^T inner of each head, with outer^T = Q R: it has the norms of the circuit, also of
    its product with another one from the inner side, without a matrix of H by H.
    """
    if not outer_NDH.isfinite().all():
        return torch.full_like(inner_NDH, torch.nan)
    return torch.linalg.qr(outer_NDH.mT, mode="r").R @ inner_NDH


def _shares(reads_NDH: Tensor, writes_NDH: Tensor) -> Tensor:
    """Return |A B| / (|A| |B|) of the circuits A and B of each pair of heads, from their factors, [N, N]."""
    product_NDND = torch.tensordot(reads_NDH, writes_NDH, dims=([2], [2]))
    sizes_N, other_N = (factor_NDH.flatten(1).norm(dim=1) for factor_NDH in (reads_NDH, writes_NDH))
    return product_NDND.square().sum((1, 3)).sqrt() / torch.outer(sizes_N, other_N)


def _vocabulary(subject: Subject) -> tuple[Tensor, Tensor]:
    """Return W_E W_U and W_E W_E^T, sums over the vocabulary in float64, [H, H]."""
    embedding_VH, unembedding_VH = (
        _weight(subject, subject.anatomy.module(role)) for role in ("embedding", "unembedding")
    )
    if embedding_VH.shape != unembedding_VH.shape:
        raise PicoError(
            f"the embedding is {list(embedding_VH.shape)} and the unembedding {list(unembedding_VH.shape)}: no circuit from "
            "tokens to the same tokens; leave this probe out"
        )
    both_HH, own_HH = torch.zeros(2, embedding_VH.shape[1], embedding_VH.shape[1], dtype=torch.float64)
    for embedding_PH, unembedding_PH in zip(embedding_VH.split(_PIECE), unembedding_VH.split(_PIECE)):
        exact_PH = embedding_PH.double()
        both_HH += exact_PH.mT @ unembedding_PH.double()
        own_HH += exact_PH.mT @ exact_PH
    return both_HH, own_HH


def _heads(subject: Subject, role: str, layer: int) -> Tensor:
    """Return a projection of a layer by query head, in float64, [N, D, H]."""
    anatomy, part = subject.anatomy, subject.anatomy.parts[role]
    weight = _weight(subject, f"{anatomy.block.format(layer)}.{part.module}").double()
    heads, count = anatomy.heads or 1, getattr(anatomy, part.cut or "heads") or 1
    rows = weight.T if part.by == "columns" else weight
    if len(rows) % count or heads % count:
        raise PicoError(f"{part.module} of layer {layer} has {len(rows)} features, which {count} heads cannot share")
    return rows.unflatten(0, (count, -1)).repeat_interleave(heads // count, 0)


def _weight(subject: Subject, module: str) -> Tensor:
    return subject.checkpoint[Address("weights", "", module)]


def _gains(subject: Subject, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """Return the gains of the norm before the attention of a layer, and of the last norm; None where there is no such part."""
    parts, block = subject.anatomy.parts, subject.anatomy.block.format(layer)
    before, final = parts.get("attention.norm"), parts.get("final_norm")
    return (
        None if before is None else _gain(subject, f"{block}.{before.module}"),
        None if final is None else _gain(subject, final.module),
    )


def _gain(subject: Subject, module: str) -> Tensor:
    """Return by how much a norm multiplies each feature, up to a factor, in float64, [H].

    Its answers to s and -s differ by twice the gain times s, up to a factor, whatever it adds. The mean of s is 0, so that a norm
    that takes the mean away gives the same; the entries are as large as each other for an even H, and so large that the epsilon
    below the root is nothing.
    """
    norm = subject.architecture.body(subject.model).get_submodule(module)
    width, dtype = subject.anatomy.width or 1, next(subject.model.parameters()).dtype
    s_H = 1024 * (1 - 2 * (torch.arange(width, dtype=dtype) % 2))
    s_H -= s_H.mean()
    with torch.no_grad():
        odd_H = (norm(s_H[None, None]) - norm(-s_H[None, None]))[0, 0]
    return (odd_H / s_H).double()
