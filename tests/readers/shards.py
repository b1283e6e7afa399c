"""What torchtitan saves: a model that is sharded over processes by FSDP2, in shards of torch.distributed.checkpoint.

`torchrun shards.py OUT` leaves OUT/step-5 and, whole, OUT/full.bin.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard


class Holder(nn.Module):
    """Modules by name; FSDP2 takes no ModuleDict."""

    def __init__(self, **held: nn.Module):
        super().__init__()
        for name, module in held.items():
            self.add_module(name, module)


def block() -> Holder:
    sizes = {"wq": (16, 24), "wk": (16, 12), "wv": (16, 12), "wo": (24, 16)}
    attention = {name: nn.Linear(into, out, bias=False) for name, (into, out) in sizes.items()}
    # 41: not the same on both processes
    return Holder(attention=Holder(**attention), feed_forward=Holder(w2=nn.Linear(41, 16, bias=False)))


def main() -> None:
    out = Path(sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    layers = nn.ModuleDict({str(number): block() for number in range(2)})
    model = Holder(tok_embeddings=nn.Embedding(23, 16), layers=layers, output=nn.Linear(16, 23, bias=False))
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    for layer in layers.values():
        fully_shard(layer)
    fully_shard(model)
    dcp.save({**model.state_dict(), "train_state": {"step": 5}}, checkpoint_id=out / "step-5")
    if dist.get_rank() == 0:
        torch.save(whole, out / "full.bin")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
