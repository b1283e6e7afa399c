"""How far two models predict the same."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from picolm.errors import PicoError
from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows, tokenizer_digest
from picolm.observe.subject import Subject
from picolm.probes.means import mean_of
from picolm.probes.probe import Found, Quantity, probe


def _compared(ours: Pass, theirs: Pass) -> dict[str, Tensor]:
    """Read the divergences of two predictions at each position, [B, P]."""
    log_a, log_b = ours.log_probs_BPV, theirs.log_probs_BPV
    if log_a.shape != log_b.shape:
        raise PicoError(
            f"the models predict over {log_a.shape[-1]} and {log_b.shape[-1]} tokens; their distributions cannot be compared"
        )
    same_BP = ours.likeliest_BP == theirs.likeliest_BP
    return {
        "kl": _kl_terms(log_a, log_b).sum(-1),
        "reverse_kl": _kl_terms(log_b, log_a).sum(-1),
        "js": _js_terms(log_a, log_b).sum(-1),
        "top1_agreement": torch.where((ours.nats_BP + theirs.nats_BP).isnan(), math.nan, same_BP.double()),
    }


def _kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p ln(p / q): its sum is KL(p || q). 0 where p is 0; infinite where only q is 0."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms)


def _js_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (p ln(p / m) + q ln(q / m)) / 2 with m = (p + q) / 2: its sum is the Jensen-Shannon divergence, at most ln 2.

    With r = ln(q / p), ln(p / m) is ln 2 - ln(1 + e^r), so no sum of small numbers is rounded.
    """
    ratio = (log_q - log_p).nan_to_num(0.0, 1e30, -1e30)  # where one of them is 0, its term is 0
    of_p, of_q = log_p.exp() * (math.log(2) - softplus(ratio)), log_q.exp() * (math.log(2) - softplus(-ratio))
    return (of_p + of_q) / 2


@probe(
    "agreement",
    needs=["logits"],
    gives={
        "kl": Quantity(
            "nats", "mean over positions of KL(this model || the other one) of the next-token distributions"
        ),
        "reverse_kl": Quantity("nats", "mean over positions of KL(the other model || this one)"),
        "js": Quantity("nats", "mean over positions of the Jensen-Shannon divergence of the two, at most ln 2"),
        "top1_agreement": Quantity("share of positions", "both models have the same likeliest next token"),
    },
)
def agreement(subject: Subject, other: Subject, rows: Rows) -> Found:
    """Compare the predictions of the model with those of another step, seed or size on the same rows.

    Raises PicoError for models of different vocabularies or tokenizers: the same id would be two tokens.
    """
    digests = {tokenizer_digest(each.run) for each in (subject, other)} - {None}
    if len(digests) > 1:
        raise PicoError(
            f"{subject.run.name} and {other.run.name} have different tokenizers, so the ids of their tokens cannot be compared"
        )
    answer = yield Ask(rows, _compared, beside=(other,))
    for name in ("kl", "reverse_kl", "js", "top1_agreement"):
        yield mean_of(name, answer[name])
