"""Divergences of two distributions, term by term, so that sums over a part of the vocabulary can be taken. In nats."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p ln(p / q): its sum is KL(p || q). 0 where p is 0; infinite where only q is 0."""
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(log_p == -math.inf, 0.0, terms)


def js_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return (p ln(p / m) + q ln(q / m)) / 2 with m = (p + q) / 2: its sum is the Jensen-Shannon divergence, at most ln 2.

    With r = ln(q / p), ln(p / m) is ln 2 - ln(1 + e^r), so no sum of small numbers is rounded.
    """
    ratio = (log_q - log_p).nan_to_num(0.0, 1e30, -1e30)  # where one of them is 0, its term is 0
    of_p, of_q = log_p.exp() * (math.log(2) - softplus(ratio)), log_q.exp() * (math.log(2) - softplus(-ratio))
    return (of_p + of_q) / 2
