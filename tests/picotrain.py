"""A run as pico-train writes it, made from tensors by address, for the tests that read such runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import yaml
from safetensors.torch import save_file
from tests.hub_server import History
from torch import Tensor

from picolm.address import Address

WRAPPER = "_forward_module."


def configuration(devices: int = 1, sub_batch: int = 8, **checkpointing: Any) -> dict[str, Any]:
    return {
        "model": {"model_type": "pico_decoder", "d_model": 8},
        "training": {"fabric": {"num_nodes": 1, "num_devices": devices}},
        "checkpointing": {"learning_dynamics": {"batch_size": sub_batch, "sequence_idx": -1}, **checkpointing},
    }


def content(step: int = 0, rows: int = 21, width: int = 6) -> dict[Address, Tensor]:
    """Weights of a small model, and activations and gradients of both splits, that differ from step to step."""
    generator = torch.Generator().manual_seed(step)
    suffixes = ("attention.v_proj", "attention.o_proj", "swiglu.w_2")
    modules = [f"layers.{layer}.{suffix}" for layer in (0, 1, 10) for suffix in suffixes]
    tensors = {
        Address("weights", "", module): torch.randn(width, 8, generator=generator)
        for module in ["embedding_proj", *modules, "output_norm", "de_embedding_proj"]
    }
    for split, count in (("train", rows), ("val", rows - 4)):
        for module in modules:
            activations = torch.randn(count, width, generator=generator)
            tensors[Address("activations", split, module)] = activations.bfloat16() if split == "train" else activations
            tensors[Address("gradients", split, module)] = torch.randn(width, 8, generator=generator)
    return tensors


def scrambled(rows_NH: Tensor, sub_batch: int) -> Tensor:
    """What pico-train stores on one device: the transpose of each sub-batch, read off row by row in the shape of the batch."""
    blocks = [block.transpose(0, 1).reshape(-1, block.shape[1]) for block in rows_NH.split(sub_batch)]
    return torch.cat(blocks)


def write_step(
    folder: Path,
    tensors: Mapping[Address, Tensor],
    tables: Mapping[str, Tensor] | None = None,
    sub_batch: int | None = 8,
    prefix: str = WRAPPER,
) -> Path:
    """The files of a step in `folder`. sub_batch None: a run on several devices. tables: token ids [R, T] by split."""
    dynamics = folder / "learning_dynamics"
    dynamics.mkdir(parents=True, exist_ok=True)
    files: dict[tuple[str, str], dict[str, Tensor]] = {}
    for (kind, split, module), tensor in tensors.items():
        stored = scrambled(tensor, sub_batch) if kind == "activations" and sub_batch else tensor
        files.setdefault((kind, split), {})[module] = stored
    weights = files.pop(("weights", ""), {})
    if weights:
        save_file(
            {f"pico_decoder.{name}.weight": tensor for name, tensor in weights.items()}, folder / "model.safetensors"
        )
        (folder / "config.json").write_text('{"model_type": "pico_decoder"}')
    for (kind, split), members in files.items():
        captured = {prefix + name: tensor for name, tensor in members.items()}
        torch.save(captured, dynamics / f"{split}_{kind}.pt")
        torch.save({name: weights[name.removeprefix(prefix)] for name in captured}, dynamics / f"{split}_weights.pt")
    for split, ids in (tables or {}).items():
        write_rows(dynamics / f"{split}_data", ids)
    (folder / "fabric_state").mkdir(exist_ok=True)
    (folder / "fabric_state" / "checkpoint.pt").write_bytes(b"not read")
    return folder


def write_rows(folder: Path, ids_RT: Tensor, shards: int = 2) -> None:
    """Token ids as `datasets` saves them to disk: Arrow streams, listed in a state.json."""
    folder.mkdir(parents=True)
    parts = ids_RT.tensor_split(shards)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for name, part in zip(names, parts):
        rows = pa.array(part.tolist(), pa.list_(pa.int32()))
        table = pa.table({"input_ids": rows, "text": [f"row {i}" for i in range(len(part))]})
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            for batch in table.to_batches(max_chunksize=3):
                stream.write_batch(batch)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "cache-0a1b.arrow").write_bytes(b"left behind by a map; not part of the data set")


def write_run(
    folder: Path,
    steps: Sequence[int] = (0, 1000, 2000),
    config: Mapping[str, Any] | None = None,
    sub_batch: int | None = 8,
    **options: Any,
) -> Path:
    """A run with `content(step)` in each step."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = configuration(1 if sub_batch else 4, sub_batch or 8) if config is None else config
    (folder / "training_config.yaml").write_text(yaml.safe_dump(dict(settings)))
    for step in steps:
        write_step(folder / "checkpoints" / f"step_{step}", content(step), sub_batch=sub_batch, **options)
    (folder / "checkpoints" / "latest").symlink_to(f"step_{steps[-1]}")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def push_step(history: History, branch: str, step: int, folder: Path) -> None:
    """As pico-train does: one commit for each artefact of a step."""
    files = files_of(folder)
    model = {name: data for name, data in files.items() if "/" not in name}
    history.commit(branch, f"Saving HF Model -- Step {step}", model)
    history.commit(branch, f"Saving Fabric Checkpoint -- Step {step}", {"checkpoint/checkpoint.pt": b"state %d" % step})
    for split in ("train", "val"):
        part = {name: data for name, data in files.items() if name.startswith(f"learning_dynamics/{split}_")}
        history.commit(branch, f"Saving Learning Dynamics Data ({split}) -- Step {step}", part)
    results = json.dumps({"paloma": 50.0 + step}).encode()
    history.commit(branch, f"Saving Evaluation Results -- Step {step}", {f"eval_results/step_{step}.json": results})
