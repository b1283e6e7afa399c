"""Checkpoints of nanoGPT, LitGPT and torchtitan: the same weights as in a checkpoint of transformers are read from each."""

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from picolm.address import Address
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import analyze
from picolm.errors import PicoError, StoreError
from picolm.schema import load
from picolm.store import Checkpoint, Run

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # DCP in one process

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, VOCABULARY = 2, 16, 4, 2, 6, 23
ROLES = ("attention.query", "attention.key", "attention.value", "attention.output", "mlp.output")
Parts = dict[tuple[int, str], Tensor]


def weights(kv_heads: int = KV_HEADS, step: int = 0) -> Parts:
    """The parts of a model by layer and role, outputs x inputs; of layer -1 the embedding and the unembedding."""
    draw = torch.Generator().manual_seed(step)
    rows = {"attention.query": HEADS, "attention.key": kv_heads, "attention.value": kv_heads}
    found = {
        (layer, role): torch.randn(n * SIZE, WIDTH, generator=draw)
        for layer in range(LAYERS)
        for role, n in rows.items()
    }
    for layer in range(LAYERS):
        found[layer, "attention.output"] = torch.randn(WIDTH, HEADS * SIZE, generator=draw)
        found[layer, "mlp.output"] = torch.randn(WIDTH, 40, generator=draw)
    return found | {(-1, role): torch.randn(VOCABULARY, WIDTH, generator=draw) for role in ("embedding", "unembedding")}


def nanogpt(folder: Path, step: int, compiled: bool = False, bias: bool = False, name: str = "") -> Parts:
    parts = weights(HEADS, step)
    parts[-1, "unembedding"] = parts[-1, "embedding"]
    state = {"transformer.wte.weight": parts[-1, "embedding"], "lm_head.weight": parts[-1, "embedding"]}
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        state[f"{block}.attn.c_attn.weight"] = torch.cat([parts[layer, role] for role in ROLES[:3]])
        state[f"{block}.attn.c_proj.weight"] = parts[layer, "attention.output"]
        state[f"{block}.mlp.c_proj.weight"] = parts[layer, "mlp.output"]
        state[f"{block}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()  # the mask, where there is no flash attention
        if bias:
            state[f"{block}.attn.c_attn.bias"] = torch.randn(3 * HEADS * SIZE)
    prefix = "_orig_mod." if compiled else ""
    arguments = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "block_size": 8,
        "bias": bias,
        "vocab_size": VOCABULARY,
    }
    content = {
        "model": {prefix + key: value for key, value in state.items()},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95)}]},
        "model_args": arguments, "iter_num": step, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / (name or f"ckpt_{step}.pt"))
    return parts


def litgpt(folder: Path, step: int, alone: bool = False) -> Parts:
    parts = weights(step=step)
    state = {"transformer.wte.weight": parts[-1, "embedding"], "lm_head.weight": parts[-1, "unembedding"]}
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        state[f"{block}.attn.qkv.weight"] = torch.cat([parts[layer, role] for role in ROLES[:3]])
        state[f"{block}.attn.proj.weight"] = parts[layer, "attention.output"]
        state[f"{block}.mlp.proj.weight"] = parts[layer, "mlp.output"]
    place = folder / f"step-{step:08}"
    place.mkdir(parents=True)
    torch.save(
        state if alone else {"model": state, "optimizer": {"state": {}}, "step_count": step}, place / "lit_model.pth"
    )
    config = {
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_embd": WIDTH,
        "n_query_groups": KV_HEADS,
        "head_size": SIZE,
        "bias": False,
    }
    (place / "model_config.yaml").write_text(yaml.safe_dump(config))
    return parts


def torchtitan(folder: Path, step: int, newer: bool = True, nested: bool = False) -> Parts:
    parts = weights(step=step)
    attention, last = ("attention.qkv_linear", "lm_head") if newer else ("attention", "output")
    state = {"tok_embeddings.weight": parts[-1, "embedding"], f"{last}.weight": parts[-1, "unembedding"]}
    for layer in range(LAYERS):
        for role, name in zip(ROLES[:3], ("wq", "wk", "wv")):
            state[f"layers.{layer}.{attention}.{name}.weight"] = parts[layer, role]
        state[f"layers.{layer}.attention.wo.weight"] = parts[layer, "attention.output"]
        state[f"layers.{layer}.feed_forward.w2.weight"] = parts[layer, "mlp.output"]
    model = {"model": state} if nested else state
    others = {"optimizer": {"state": {"layers.0.attention.wo.weight": torch.zeros(3)}}, "train_state": {"step": step}}
    dcp.save({**model, **others}, checkpoint_id=folder / f"step-{step}", no_dist=True)
    numbers = "{heads: 4, kv_heads: 2, layers: 2, width: 16}"
    (folder / "series.yaml").write_text(f"anatomy: {{numbers: {numbers}}}\ntokens_per_step: 512\n")
    return parts


WRITERS: dict[str, Callable[[Path, int], Parts]] = {
    "nanogpt": nanogpt,
    "nanogpt compiled": lambda folder, step: nanogpt(folder, step, compiled=True, bias=True),
    "litgpt": litgpt,
    "litgpt weights alone": lambda folder, step: litgpt(folder, step, alone=True),
    "torchtitan": torchtitan,
    "torchtitan older": lambda folder, step: torchtitan(folder, step, newer=False, nested=True),
}


def read(checkpoint: Checkpoint, layer: int, role: str) -> Tensor:
    anatomy: Any = checkpoint.anatomy  # type: ignore[attr-defined]
    module = anatomy.parts[role].module
    return checkpoint[Address("weights", "", module if layer < 0 else f"{anatomy.block.format(layer)}.{module}")]


@pytest.mark.parametrize("name", WRITERS)
def test_every_part_is_what_was_written(name: str, tmp_path: Path) -> None:
    written = {step: WRITERS[name](tmp_path / "out", step) for step in (100, 2000)}
    run = Run.open(tmp_path / "out")
    assert run.steps == [100, 2000]
    for step, parts in written.items():
        checkpoint = run[step]
        for (layer, role), expected in parts.items():
            assert torch.equal(read(checkpoint, layer, role), expected), (step, layer, role)
            module = checkpoint.anatomy.parts[role].module  # type: ignore[attr-defined]
            address = Address(
                "weights", "", module if layer < 0 else f"{checkpoint.anatomy.block.format(layer)}.{module}"
            )  # type: ignore[attr-defined]
            assert checkpoint.shape(address) == tuple(expected.shape)
        assert not any("optimizer" in a.module or a.module.endswith(".attn.bias") for a in checkpoint)
    assert not [problem for step in run for problem in run.problems(step)]


@pytest.mark.parametrize("name", WRITERS)
def test_circuits_and_heads_are_cut_from_them(name: str, tmp_path: Path) -> None:
    parts = WRITERS[name](tmp_path / "out", 7)
    (tmp_path / "a.yaml").write_text(
        "analysis_name: a\nmetrics: [{metric_name: norm, norm_type: frobenius, components: [{component_name: ov_circuit}]}]\n"
        f"monitoring: {{output_dir: {tmp_path}/results}}\n"
    )
    outcome = analyze(load(tmp_path / "a.yaml", AnalysisConfig), [str(tmp_path / "out")])
    found = {(row["layer"], row["head"]): row["value"] for row in outcome.rows}
    kv_heads = len(parts[0, "attention.value"]) // SIZE
    for layer in range(LAYERS):
        for head in range(HEADS):
            group = head // (HEADS // kv_heads)
            values = parts[layer, "attention.value"].double()[group * SIZE : (group + 1) * SIZE]
            output = parts[layer, "attention.output"].double()[:, head * SIZE : (head + 1) * SIZE]
            assert found[layer, head] == pytest.approx(float((output @ values).norm()), rel=1e-6)


def test_a_file_of_nanogpt_knows_its_step(tmp_path: Path) -> None:
    nanogpt(tmp_path / "out", 300, name="ckpt.pt")
    for place in (tmp_path / "out", tmp_path / "out" / "ckpt.pt"):
        assert Run.open(place).steps == [300]
    nanogpt(tmp_path / "out", 200)
    assert Run.open(tmp_path / "out").steps == [200, 300]
    nanogpt(tmp_path / "out", 300)
    with pytest.raises(StoreError, match=r"ckpt.pt and ckpt_300.pt are both step 300"):
        Run.open(tmp_path / "out")
    (tmp_path / "out" / "ckpt.pt").unlink()
    (tmp_path / "out" / "ckpt_300.pt").rename(tmp_path / "out" / "ckpt_400.pt")
    with pytest.raises(
        StoreError, match=r"ckpt_400.pt: is step 300 by its iter_num; say in .*series.yaml which step it is"
    ):
        Run.open(tmp_path / "out")
    (tmp_path / "out" / "series.yaml").write_text("steps: {ckpt_400.pt: 400, ckpt_200.pt: 200}\n")
    assert Run.open(tmp_path / "out").steps == [200, 400]


def test_a_folder_for_each_step_of_nanogpt(tmp_path: Path) -> None:
    for step in (10, 20):
        nanogpt(
            tmp_path / "runs" / f"step_{step}" if (tmp_path / "runs").mkdir(exist_ok=True) is None else tmp_path,
            step,
            name="ckpt.pt",
        )
    assert Run.open(tmp_path / "runs").steps == [10, 20]


@pytest.mark.slow
def test_shards_of_two_processes_are_put_together(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = Path(__file__).with_name("shards.py")
    done = subprocess.run([*launcher, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoint, whole = Run.open(tmp_path)[5], torch.load(tmp_path / "full.bin")
    assert len(checkpoint) == len(whole) == 12
    for name, weight in whole.items():
        assert torch.equal(checkpoint[Address("weights", "", name.removesuffix(".weight"))], weight), name
    (tmp_path / "step-5" / "__1_0.distcp").unlink()
    with pytest.raises(StoreError, match=r"__1_0.distcp is not there; it is half a checkpoint"):
        _ = Run.open(tmp_path)[5][Address("weights", "", "layers.0.feed_forward.w2")]


def test_tokens_are_those_that_series_yaml_says(tmp_path: Path) -> None:
    for step in (0, 10):
        torchtitan(tmp_path / "out", step)
    run = Run.open(tmp_path / "out")
    assert list(run.read_metrics(("tokens",))) == [{"step": 0, "tokens": 0}, {"step": 10, "tokens": 5120}]
    assert list(run.read_metrics(("train/loss",))) == []


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("name", ["nanogpt", "litgpt", "torchtitan"])
def test_code_in_a_pickle_is_refused_in_words(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    WRITERS[name](tmp_path / "out", 5)
    file = {
        "nanogpt": tmp_path / "out/ckpt_5.pt",
        "litgpt": tmp_path / "out/step-00000005/lit_model.pth",
        "torchtitan": tmp_path / "out/step-5/.metadata",
    }[name]
    if name == "torchtitan":
        file.write_bytes(pickle.dumps(Code()))
    else:
        torch.save({"model": {"a": torch.zeros(2)}, "model_args": Code()}, file)
    with pytest.raises(PicoError, match=r"code"):
        list(Run.open(tmp_path / "out")[5])
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["nanogpt", "litgpt", "torchtitan"])
def test_damage_is_a_message(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "out", 5)
    for file in [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.suffix != ".yaml"]:
        data = file.read_bytes()
        for damaged in (b"", data[: len(data) // 2], data[:40] + bytes([data[40] ^ 255]) + data[41:], b"[]"):
            file.write_bytes(damaged)
            with contextlib.suppress(PicoError):
                checkpoint = Run.open(tmp_path / "out")[5]
                for address in checkpoint:
                    _ = checkpoint[address]
        file.write_bytes(data)
    assert Run.open(tmp_path / "out").problems(5) == []
