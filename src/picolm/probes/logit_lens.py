"""What the model would predict if it ended after each of its blocks.

Legend: K = L + 1 places of the residual stream: 0 before the first block, k after k blocks.
"""

import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.passes import Ask, Pass
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.means import mean_of
from picolm.probes.probe import Found, Quantity, Reading, probe
from picolm.probes.stream import of_the_stream, place

_CLOSE = 1e-4  # of the readout of the last block to the logits: relative, and absolute in logits
_CHECKED = 16  # positions

_OF_A_LAYER = {
    "kl": Quantity(
        "nats", "mean KL divergence from the model's own prediction to what is read from the residual stream"
    ),
    "agreement": Quantity("share of positions", "the likeliest token read from the residual stream is the model's own"),
    "loss": Quantity("nats", "mean loss of the next token under what is read from the residual stream"),
    "entropy": Quantity("nats", "mean entropy of what is read from the residual stream"),
}


@probe(
    "logit_lens",
    needs=["logits", "hidden", "readout"],
    gives={
        **of_the_stream(_OF_A_LAYER),
        "prediction_depth": Quantity(
            "blocks",
            "mean over positions of the least number of blocks from which on the likeliest token is the model's own",
        ),
        "depth_positions": Quantity("positions", "number of positions whose prediction depth is this number of blocks"),
    },
)
def logit_lens(subject: Subject, rows: Rows) -> Found:
    """Read the next token from the residual stream before the first block and after each block.

    softmax(unembedding(final_norm(h_k))) (nostalgebraist 2020); prediction depth as in Baldock et al. 2021, of this readout. The
    reading of the last block is the model's own, with a KL divergence of 0. Costs an unembedding and a softmax per block. Raises
    PicoError for a model whose logits are not the unembedding of its final norm.
    """
    answer = yield Ask(rows, lambda found: _read(subject, found), frozenset({"hidden"}))
    places = answer["kl"][0].shape[0]
    for k in range(places):
        for name in _OF_A_LAYER:
            named, layer = place(name, k)
            yield mean_of(named, [row_KP[k] for row_KP in answer[name]], layer=layer)
    depth_N = torch.cat(answer["depth"])
    yield mean_of("prediction_depth", answer["depth"])
    for k in range(places):
        here_N = torch.where(depth_N.isnan(), depth_N, (depth_N == k).float())
        yield Reading("depth_positions", float(here_N.double().sum()), bin=str(k))


def _read(subject: Subject, found: Pass) -> dict[str, Tensor]:
    """Read each place of the residual stream, [B, K, P], and the depth of each prediction, [B, P]; one row at a time, so that
    few numbers per token of the vocabulary are in memory.
    """
    check_readout(subject, found)
    of_rows = [_of_row(subject, found, row) for row in range(len(found.tokens_BS))]
    return {name: torch.stack([of_row[name] for of_row in of_rows]) for name in of_rows[0]}


def _of_row(subject: Subject, found: Pass, row: int) -> dict[str, Tensor]:
    targets_P, last_PV = found.targets_BP[row], found.log_probs_BPV[row]
    final_PV, likeliest_P = last_PV.exp(), last_PV.max(-1).indices
    read: dict[str, list[Tensor]] = {name: [] for name in _OF_A_LAYER}
    for k, hidden_BTH in enumerate(found.hidden):
        lens_PV = last_PV
        if k < len(found.hidden) - 1:
            lens_PV = subject.readout(hidden_BTH[row : row + 1, : len(targets_P)])[0].to(last_PV.dtype).log_softmax(-1)
        # argmax gives a token even of what is not a number
        known_P = torch.where((lens_PV[:, 0] + last_PV[:, 0]).isnan(), torch.nan, 1.0)
        read["kl"].append((last_PV - lens_PV).mul_(final_PV).sum(-1))
        read["agreement"].append((lens_PV.max(-1).indices == likeliest_P) * known_P)  # half of the time of argmax
        read["loss"].append(-lens_PV.gather(-1, targets_P[:, None])[:, 0])
        read["entropy"].append(-lens_PV.exp().mul_(lens_PV).sum(-1))
    of_row = {name: torch.stack(of_places) for name, of_places in read.items()}
    stays_KP = of_row["agreement"].flip(0).cumprod(0)
    return of_row | {"depth": len(stays_KP) - stays_KP.sum(0)}


def check_readout(subject: Subject, found: Pass) -> None:
    """Raise PicoError unless the readout of the last block is what the model itself gives, at the first positions of a row."""
    logits_TV, read_TV = found.logits_BTV[0, :_CHECKED], subject.readout(found.hidden[-1][:1, :_CHECKED])[0]
    if not torch.allclose(read_TV, logits_TV, rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
        difference = float((read_TV - logits_TV).abs().max())
        raise PicoError(
            f"the logits of {subject.run.name} are not its unembedding of its final norm (they differ by {difference:.2g}; "
            "some models cap or scale them), so its logit lens is not defined; leave this probe out"
        )
