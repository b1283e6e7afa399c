"""On a GPU: training runs, and a step that is continued, replayed or captured there is the same step, as on a CPU.

The rows are long enough that kernels split a sum over keys between thread blocks: with one block there is one order of terms.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.commands import command
from tests.fox import TEXT

from picolm.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from picolm.errors import PicoError
from picolm.models import Decoder, Loss
from picolm.models.attention import attention
from picolm.observe.config import Observe
from picolm.observe.observed import observers
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.store import Run
from picolm.train.afterwards import evaluate_steps
from picolm.train.devices import only_deterministic
from picolm.train.job import Due
from picolm.train.replay import replay

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch, where it loads its compiler
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf"
    ),  # the compiler looks at all
]

Train = Callable[..., Run]
LENGTH = 1024
EVERYTHING = Due(weights=True, optimizer=True, dynamics=True)
OPTIMIZERS = ["adamw", "muon"]
PRECISIONS = ["bf16-mixed", "32-true"]
# Of the largest number of a tensor: bfloat16 rounds to 2^-9, and a gradient is a sum of many such numbers.
TOLERANCE = {"bf16-mixed": 3e-2, "32-true": 1e-4}


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with a tokenizer, and pairs of sentences."""
    folder = tmp_path_factory.mktemp("text")
    write_tokenizer(train_tokenizer([TEXT], 300), folder, LENGTH)
    ids = load_tokenizer(folder).encode(TEXT).ids
    tokens = np.resize(np.array(ids, dtype=np.int32), (48, LENGTH + 1))
    for split, rows in (("train", tokens[:40]), ("val", tokens[40:])):
        pq.write_table(pa.table({"input_ids": list(rows)}), folder / f"{split}-00000-of-00001.parquet")
    pairs = [{"sentence_good": f"The {a}", "sentence_bad": f"{a} The", "UID": "order"} for a in ("dog", "fox", "cold")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


@pytest.fixture
def options(text_data: Path) -> list[str]:
    """Overrides of the toy configuration: on a GPU, with heads of 64 and rows of LENGTH."""
    return [
        f"data.dataset.name={text_data}", "data.tokenizer.vocab_size=300", "model.vocab_size=320", "model.d_model=256",
        "model.activation_hidden_dim=512", f"model.max_seq_len={LENGTH}", "training.fabric.accelerator=cuda",
        "checkpointing.learning_dynamics.positions=all", "training.optimization.lr_scheduler=constant",
        "training.optimization.lr=0.003",
    ]  # fmt: skip


@pytest.fixture
def train_on_gpu(train: Train, options: list[str]) -> Train:
    """A function from overrides to the finished run."""
    return lambda *overrides: train(*options, *overrides)


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    """After several models of one class, torch would give up compiling."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def chosen(optimizer: str = "adamw", precision: str = "bf16-mixed", compile: bool = False) -> list[str]:
    return [
        f"training.optimization.optimizer={optimizer}", f"training.fabric.precision={precision}", f"training.compile={compile}",
    ]  # fmt: skip


def losses(run: Run) -> list[float]:
    return [entry["train/loss"] for entry in run.metrics() if "train/loss" in entry]


def content(run: Run, step: int) -> dict[str, str]:
    """sha-256 by file of a step."""
    return {name: record.sha256 for name, record in run._sealed(step).files.items()}


def far_off(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, of the largest number."""
    one, other = one.double(), other.double()
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_learns(train_on_gpu: Train, optimizer: str, precision: str, compile: bool) -> None:
    run = train_on_gpu(*chosen(optimizer, precision, compile), "training.max_steps=30")
    found = losses(run)
    assert found[0] == pytest.approx(np.log(320), rel=0.05)
    assert found[-1] < 0.5 * found[0]
    weights = run[30].select(kind="weights")
    assert {run[30][address].dtype for address in weights} == {torch.float32}
    assert run.environment["hardware"]["gpus"] == [torch.cuda.get_device_name(0)]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_with_the_same_bytes(train_on_gpu: Train, optimizer: str, precision: str, compile: bool) -> None:
    asked = chosen(optimizer, precision, compile)
    whole = train_on_gpu(*asked, "checkpointing.run_name=whole", "training.max_steps=10")
    train_on_gpu(*asked, "checkpointing.run_name=parts", "training.max_steps=4")
    torch.compiler.reset()
    parts = train_on_gpu(*asked, "checkpointing.run_name=parts", "training.max_steps=10")
    for step in (6, 8, 10):
        assert content(parts, step) == content(whole, step)


def test_a_compiled_run_goes_on_with_the_same_bytes_where_nothing_compiled_is_kept(
    make_config: Any, options: list[str], tmp_path: Path
) -> None:
    """As on another node of a cluster, where what was tuned by timing would be tuned again."""
    make_config()  # writes the file

    def train(name: str, steps: int, cache: str) -> Run:
        words = [*options, *chosen(compile=True), f"checkpointing.run_name={name}", f"training.max_steps={steps}"]
        done = subprocess.run(
            [sys.executable, "-m", "picolm", "train", f"{tmp_path}/toy.yaml", *words],
            capture_output=True, text=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return Run.open(tmp_path / "runs" / name)

    whole = train("whole", 6, "first")
    train("parts", 2, "first")
    parts = train("parts", 6, "second")
    assert content(parts, 6) == content(whole, 6)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_replayed_step_is_the_step_that_was_stored(train_on_gpu: Train, precision: str, compile: bool) -> None:
    asked = chosen("muon", precision, compile)
    dense = train_on_gpu(*asked, "checkpointing.save_every_n_steps=1", "checkpointing.run_name=dense")
    torch.compiler.reset()
    sparse = train_on_gpu(*asked, "checkpointing.save_every_n_steps=100", "checkpointing.run_name=sparse")
    torch.compiler.reset()
    verdict = replay(sparse, [3, 5], kinds=EVERYTHING, destination=sparse, verify=True)
    assert verdict.identical
    assert [found.step for found in verdict.compared] == [0, 2, 4, 6]
    for step in (3, 5):
        assert content(sparse, step) == content(dense, step)


def test_an_operation_without_a_deterministic_kernel_ends_the_run_unless_it_may_warn(
    train_on_gpu: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Decoder.loss

    def loss(model: Decoder, tokens_BS: torch.Tensor, noise: object = None) -> Loss:
        torch.zeros(3, device=tokens_BS.device).put_(tokens_BS[0, :1] * 0, torch.ones(1, device=tokens_BS.device))
        return original(model, tokens_BS, noise)

    monkeypatch.setattr(Decoder, "loss", loss)
    with pytest.raises(PicoError, match="put_ has no deterministic kernel on this device"):
        train_on_gpu(*chosen(), "training.max_steps=1")
    with pytest.warns(UserWarning, match="deterministic"):
        train_on_gpu(*chosen(), "training.max_steps=1", "training.deterministic=warn")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_has_the_same_gradient_each_time(dtype: torch.dtype) -> None:
    """At this length other kernels add in another order from time to time."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(4, 4, 2048, *group, 64, device="cuda", dtype=dtype, generator=generator).requires_grad_()
        for group in ([3], [], [])
    )
    found = []
    for _ in range(9):
        with only_deterministic(True):
            out = attention(q, k, v)
            found.append(torch.autograd.grad(out, (q, k, v), out.detach()))
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1024, 100])
def test_attention_on_a_gpu_is_that_of_a_cpu_and_holds_no_scores(dtype: torch.dtype, queries: int) -> None:
    generator, keys = torch.Generator().manual_seed(0), 1024
    q, k, v = (
        torch.randn(8, 2, length, *group, 32, generator=generator).requires_grad_()
        for length, group in ((queries, [3]), (keys, []), (keys, []))
    )
    on_gpu = [x.detach().to("cuda", dtype).requires_grad_() for x in (q, k, v)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with only_deterministic(True):
        out = attention(*on_gpu)
        out.float().square().sum().backward()
    scores = 8 * 6 * queries * keys * dtype.itemsize
    if queries == keys:  # fewer of them have so few scores that the gradients are more
        assert torch.cuda.max_memory_allocated() - before < scores
    expected = attention(q, k, v)
    expected.square().sum().backward()
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in ((out, expected), *((x.grad, y.grad) for x, y in zip(on_gpu, (q, k, v)))):
        assert far_off(one.detach().cpu(), other.detach()) < tolerance


@pytest.mark.parametrize("precision", PRECISIONS)
def test_capture_changes_nothing(train_on_gpu: Train, precision: str) -> None:
    blind = ("checkpointing.learning_dynamics.what=[]", "checkpointing.learning_dynamics.eval_data=null")
    for compile in (False, True):
        asked = (*chosen("adamw", precision, compile), "checkpointing.save_every_n_steps=1")
        watched = train_on_gpu(*asked, f"checkpointing.run_name=watched-{compile}")
        torch.compiler.reset()
        unwatched = train_on_gpu(*asked, *blind, f"checkpointing.run_name=blind-{compile}")
        torch.compiler.reset()
        for name in ("model.safetensors", "optimizer.safetensors"):
            assert content(watched, 6)[name] == content(unwatched, 6)[name]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_a_compiled_run_captures_is_what_the_plain_pass_computes(train_on_gpu: Train, precision: str) -> None:
    plain, compiled = (
        train_on_gpu(
            *chosen("adamw", precision, compile), "training.max_steps=1", f"checkpointing.run_name=of-{compile}"
        )
        for compile in (False, True)
    )
    first, other = plain[0], compiled[0]
    addresses = [address for address in first if address.split]
    assert {(address.kind, address.split) for address in addresses} == {
        (kind, split) for kind in ("activations", "gradients") for split in ("train", "val")
    }
    assert addresses == [address for address in other if address.split]
    for address in addresses:
        if address.kind == "activations" or address.split == "val":  # not from the compiled pass
            assert torch.equal(first[address], other[address]), address
        else:
            assert far_off(other[address], first[address]) < TOLERANCE[precision], address


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cpu_observes_what_a_gpu_captured(train_on_gpu: Train, precision: str, compile: bool) -> None:
    run = train_on_gpu(*chosen("adamw", precision, compile), "checkpointing.save_every_n_steps=3")
    observer = observers(Observe(positions="all"), {run.name: run})[run.name]
    subject: Subject = observer.subject.at(run[3])
    rows: Rows = observer.rows
    stored = [address for address in run[3] if address.split == "val"]
    assert len(stored) > 4
    observed = subject.tensors(rows, stored)
    for address in stored:
        assert far_off(run[3][address], observed[address]) < TOLERANCE[precision], address


@pytest.mark.parametrize("precision", PRECISIONS)
def test_afterwards_gives_what_training_gave(train_on_gpu: Train, text_data: Path, precision: str) -> None:
    asked = ["evaluation.metrics=[paloma,minimal_pairs]", f"evaluation.minimal_pairs.path={text_data}/pairs.jsonl"]
    run = train_on_gpu(*chosen("adamw", precision), *asked)
    recorded = {step: run.evaluation(step) for step in run.steps}
    assert set(recorded[6] or {}) >= {"paloma", "paloma/bits_per_byte", "minimal_pairs"}
    for step, results in evaluate_steps(run, None, []):
        assert results == recorded[step]


def test_commands_work_on_what_a_gpu_trained(
    train_on_gpu: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, pico = train_on_gpu(*chosen(), "training.max_steps=40"), command(monkeypatch, capsys)
    place = str(run.path)
    assert "paloma" in pico("evaluate", place, "--steps", "40")
    assert pico("generate", place, "--prompt", "The quick brown", "--max-new-tokens", "8").startswith("The quick brown")
    assert "identical" in pico("replay", place, "--step", "38", "--verify").lower()
    assert "40" in pico("list", place)


def test_the_optimizer_state_is_on_the_gpu_again(train_on_gpu: Train) -> None:
    """Fused kernels need it there, with the number of steps."""
    asked = (*chosen("adamw"), "training.optimization.lr_warmup_steps=0")
    train_on_gpu(*asked, "training.max_steps=2")
    run = train_on_gpu(*asked, "training.max_steps=4")
    assert run[4].meta["optimizer_scalars"]["step.output_norm.weight"] == 4


def test_a_gpu_draws_the_model_of_a_cpu(train_on_gpu: Train, train: Train, options: list[str]) -> None:
    """The same weights and the same batch, and so the same loss up to rounding."""
    first = train_on_gpu(*chosen("adamw", "32-true"), "training.max_steps=1", "checkpointing.run_name=gpu")
    on_cpu = [word for word in options if "accelerator" not in word]
    other = train(*on_cpu, *chosen("adamw", "32-true"), "training.max_steps=1", "checkpointing.run_name=cpu")
    for address in first[0].select(kind="weights"):
        assert torch.equal(first[0][address], other[0][address])
    assert losses(first) == pytest.approx(losses(other), rel=1e-5)
    for address in first[0].select(kind="gradients", split="train"):
        assert far_off(first[0][address], other[0][address]) < TOLERANCE["32-true"], address
