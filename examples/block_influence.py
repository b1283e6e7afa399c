"""A probe of one's own: how far each block turns the residual stream.

In a YAML file beside this one (see examples/block_influence.yaml):

    probes:
      - probe_name: examples.block_influence:block_influence
        skip: 1

and then, from the folder that holds `examples/`:

    pico analyze examples/block_influence.yaml --run runs/demo
"""

from typing import Annotated

import torch
from pydantic import Field

from picolm.probes import Ask, Quantity, probe
from picolm.probes.means import mean_of


def angles(forward):
    """What is read of a forward pass: for each block, 1 - cosine of its input and its output at each position, [B, T]."""
    streams = zip(forward.hidden, forward.hidden[1:])
    return {str(layer): 1 - torch.cosine_similarity(*pair, dim=-1) for layer, pair in enumerate(streams)}


@probe(
    "block_influence",
    needs=["hidden"],
    gives={"turn": Quantity("1 - cosine", "mean over positions of 1 - cosine of a block's input and its output")},
)
def block_influence(subject, rows, *, skip: Annotated[int, Field(ge=0)] = 1):
    """How far each block turns the residual stream: a block that turns it little can be left out (Men et al. 2024).

    skip: positions at the start of each row that are not counted; the first one often is an outlier.
    """
    answer = yield Ask(rows, angles, frozenset({"hidden"}))
    for layer, of_rows in answer.items():
        yield mean_of("turn", [row[skip:] for row in of_rows], layer=int(layer))
