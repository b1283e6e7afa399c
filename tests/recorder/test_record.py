"""What a Recorder leaves of a loop, and that the loop does not notice it."""

import contextlib
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.recorder import loops
from tests.recorder.loops import LENGTH, Way, gpt, train
from torch import Tensor, nn

from picolm import Recorder
from picolm.address import Address
from picolm.cli import main
from picolm.errors import PicoError
from picolm.store import Run

BLOCK = "h.1.attn.c_proj"
pytestmark = [  # warnings of torch.compile
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


def recording(place: Path, **options: Any) -> Callable[[nn.Module, torch.optim.Optimizer], Recorder]:
    return lambda model, optimizer: Recorder(
        place, model, optimizer, **{"save_every_n_steps": 1, "log_every_n_steps": 1} | options
    )


def checkpointed(model: nn.Module) -> nn.Module:
    """Activation checkpointing as transformers does it: each block is computed again while it goes backward."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for number, block in enumerate(model.h):
        model.h[number] = checkpoint_wrapper(block)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def compiled_by_block(model: nn.Module) -> nn.Module:
    for block in model.h:
        block.compile()
    return model


WAYS = {
    "plain": Way(),
    "accumulation": Way(accumulation=3),
    "dropout": Way(dropout=0.2, accumulation=2),
    "momentum": Way(optimizer=partial(torch.optim.SGD, momentum=0.9)),
    "adamw": Way(optimizer=torch.optim.AdamW),
    "autocast": Way(autocast=True),
    "clip": Way(clip=0.01),
    "activation checkpointing": Way(wrap=checkpointed, dropout=0.2),
    "compiled": Way(wrap=torch.compile, accumulation=2),
    "compiled in place": Way(wrap=compiled_in_place),
    "compiled by block": Way(wrap=compiled_by_block),
    "compiled with dropout": Way(wrap=torch.compile, dropout=0.2),
}
COMPILED = [name for name in WAYS if "compiled" in name]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in COMPILED else ()) for n in WAYS])
def test_a_loop_ends_with_the_same_bytes(name: str, tmp_path: Path) -> None:
    plain, recorded = train(WAYS[name]), train(WAYS[name], recording(tmp_path / "run", save_every_n_steps=3))
    for key, weight in plain.state_dict().items():
        assert torch.equal(weight, recorded.state_dict()[key]), key
    run = Run.open(tmp_path / "run")
    assert run.steps == [0, 3, 6, 7]
    assert not [problem for step in run for problem in run.problems(step)]
    assert {str(a) for a in run[3]} >= {f"activations/train/{BLOCK}", f"gradients/train/{BLOCK}", f"weights//{BLOCK}"}


@pytest.mark.parametrize("name", [*(n for n in WAYS if n not in COMPILED and n not in ("momentum", "adamw", "clip"))])
def test_gradients_are_those_of_the_update(name: str, tmp_path: Path) -> None:
    """W_n - W_(n+1) = lr g_n for SGD, to the rounding of the subtraction."""
    train(WAYS[name], recording(tmp_path / "run"))
    run = Run.open(tmp_path / "run")
    rates = {entry["step"]: entry["lr"] for entry in run.read_metrics(("lr",))}
    for step in range(7):
        for address in run[step].select(kind="gradients"):
            weight = Address("weights", "", address.module)
            before, after, gradient = (
                x.double() for x in (run[step][weight], run[step + 1][weight], run[step][address])
            )
            error = (before - after - rates[step] * gradient).abs().max()
            assert error <= 2**-23 * before.abs().max(), (step, address)
            assert gradient.abs().max() > 0


def test_activations_are_those_of_the_rows_in_their_order(tmp_path: Path) -> None:
    way = WAYS["accumulation"]
    train(way, recording(tmp_path / "run", learning_dynamics={"layer_suffixes": ["attn.c_proj"], "positions": "all"}))
    step = Run.open(tmp_path / "run")[4]
    model = gpt()
    model.load_state_dict(
        {name: step[Address("weights", "", name.removesuffix(".weight"))] for name in model.state_dict()}
    )
    rows_RS = torch.tensor(step.rows("train")["input_ids"].to_pylist())
    data = loops.batches(way)
    expected = [torch.cat(next(data)) for _ in range(5)][4]
    assert torch.equal(rows_RS, expected)
    kept: list[Tensor] = []
    model.h[1].attn.c_proj.register_forward_hook(lambda module, given, output: kept.append(output.detach()))
    for micro_batch in rows_RS.split(4):
        model(micro_batch[:, :-1])
    assert torch.equal(step[Address("activations", "train", BLOCK)], torch.cat(kept))
    assert step.meta["capture"] == {"positions": None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compiled", "compiled in place", "compiled by block"])
def test_a_compiled_loop_has_the_activations_of_the_same_weights(name: str, tmp_path: Path) -> None:
    """They come from a second pass that is not compiled, so they are those of the plain loop at step 0, to the last bit."""
    for place, way in (("plain", Way(accumulation=WAYS[name].accumulation)), ("run", WAYS[name])):
        train(way, recording(tmp_path / place, save_every_n_steps=5))
    plain, compiled = Run.open(tmp_path / "plain")[0], Run.open(tmp_path / "run")[0]
    assert set(plain) == set(compiled)
    for address in plain.select(kind="activations"):
        assert torch.equal(plain[address], compiled[address]), address
    for address in plain.select(kind="gradients"):
        torch.testing.assert_close(plain[address], compiled[address], rtol=1e-4, atol=1e-6)


def test_rows_that_are_not_given_are_those_that_the_model_reads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows_BT = torch.randint(61, (3, LENGTH))
    with Recorder(tmp_path / "run", model, optimizer) as recorder, recorder.step(0):
        model(rows_BT, rows_BT)[1].backward()
    step = Run.open(tmp_path / "run")[0]
    assert step.rows("train")["input_ids"].to_pylist() == rows_BT.tolist()
    assert step.meta["capture"] == {"positions": [LENGTH - 1]}


def test_the_scale_of_a_scaler_is_taken_out(tmp_path: Path) -> None:
    runs = []
    for place, scaler in (("plain", None), ("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))):
        torch.manual_seed(0)
        model = gpt()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows_BT = torch.randint(61, (3, LENGTH))
        with Recorder(tmp_path / place, model, optimizer, scaler=scaler) as recorder, recorder.step(0, rows_BT):
            loss = model(rows_BT, rows_BT)[1]
            (loss if scaler is None else scaler.scale(loss)).backward()
        runs.append(Run.open(tmp_path / place))
    plain, scaled = (run[0] for run in runs)
    for address in plain.select(kind="gradients"):
        torch.testing.assert_close(plain[address], scaled[address], rtol=1e-6, atol=0)
    norms = [next(run.read_metrics(("grad_norm",)))["grad_norm"] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_optimizer_state_is_kept_under_the_names_of_parameters(tmp_path: Path) -> None:
    train(WAYS["adamw"], recording(tmp_path / "run"))
    step = Run.open(tmp_path / "run")[7]
    assert {a.kind for a in step} == {"weights", "exp_avg", "exp_avg_sq"}
    assert step[Address("exp_avg_sq", "", "h.0.c_fc")].shape == step[Address("weights", "", "h.0.c_fc")].shape


def test_a_loop_that_starts_again_goes_on_with_its_run(tmp_path: Path) -> None:
    train(Way(steps=7), recording(tmp_path / "run"))
    first = list(Run.open(tmp_path / "run").read_metrics(("train/loss",)))
    train(Way(steps=7), recording(tmp_path / "run"))
    again = Run.open(tmp_path / "run")
    assert list(again.read_metrics(("train/loss",))) == first
    assert len(first) == 7
    assert again.steps == list(range(8))


def test_retention_and_cadences_are_those_of_training(tmp_path: Path) -> None:
    options = {
        "save_schedule": "log",
        "save_every_n_steps": 5,
        "keep": {"optimizer": "last 1"},
        "save_learning_dynamics": 2,
    }
    train(WAYS["adamw"], recording(tmp_path / "run", **options))
    run = Run.open(tmp_path / "run")
    assert run.steps == [0, 1, 2, 4, 5, 7]
    assert [step for step in run if run[step].select(kind="exp_avg")] == [7]
    assert [step for step in run if run[step].select(kind="gradients")] == [0, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_several_processes_leave_the_run_of_one(wrap: str, tmp_path: Path) -> None:
    def start(out: str, *place: str) -> dict[str, Tensor]:
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            loops.__file__,
            out,
            wrap,
            *place,
        ]
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Tensor] = torch.load(tmp_path / out)
        return found

    plain, recorded = start("plain.pt"), start("recorded.pt", "run")
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    run = Run.open(tmp_path / "run")
    assert run.steps == [0, 2, 4, 6, 7]
    gradient, weight = Address("gradients", "train", "h.0.c_fc"), Address("weights", "", "h.0.c_fc")
    after = run[7][weight].double()
    rate = 0.1 * (1 + math.cos(math.pi * 6 / 7)) / 2
    assert (run[6][weight].double() - after - rate * run[6][gradient].double()).abs().max() <= 2**-23
    rows_RS = torch.tensor(run[6].rows("train")["input_ids"].to_pylist())
    assert rows_RS.shape == (16, LENGTH + 1)  # of two micro-batches of two processes
    model = gpt()
    held = {name: run[6][Address("weights", "", name.removesuffix(".weight"))] for name in model.state_dict()}
    model.load_state_dict(held)
    kept: list[Tensor] = []
    model.h[1].attn.c_proj.register_forward_hook(lambda module, given, output: kept.append(output.detach()[:, -1]))
    _, loss = model(rows_RS[:, :-1], rows_RS[:, 1:])
    assert loss is not None
    loss.backward()
    torch.testing.assert_close(run[6][Address("activations", "train", BLOCK)], kept[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(run[6][gradient], model.h[0].c_fc.weight.grad, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_is_a_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows_BT = torch.randint(61, (3, LENGTH))
    with pytest.raises(PicoError, match=r"there is no option 'save_every'; did you mean 'save_every_n_steps'"):
        Recorder(tmp_path / "a", model, optimizer, save_every=1)
    with pytest.raises(PicoError, match=r"save_every_n_steps: Input should be a valid integer"):
        Recorder(tmp_path / "a", model, optimizer, save_every_n_steps="often")
    with pytest.raises(PicoError, match=r"eval_data: `pico observe`"):
        Recorder(tmp_path / "a", model, optimizer, learning_dynamics={"eval_data": "rows"})
    with pytest.raises(PicoError, match=r"'nothing' matches no module"):
        Recorder(tmp_path / "a", model, optimizer, learning_dynamics={"layer_suffixes": ["nothing"]})
    assert not (tmp_path / "a").exists()
    with Recorder(tmp_path / "b", model, optimizer) as recorder:
        with pytest.raises(PicoError, match=r"step 0: the block left no gradients"), recorder.step(0, rows_BT):
            model(rows_BT)
        with pytest.raises(PicoError, match=r"ran 0 times"), recorder.step(0, rows_BT):
            pass
    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(KeyError),
        Recorder(tmp_path / "c", model, optimizer) as recorder,
        recorder.step(0, rows_BT),
    ):
        raise KeyError
    assert not [hook for module in model.modules() for hook in module._forward_hooks]


def test_a_place_with_another_run_is_left_alone(tmp_path: Path) -> None:
    Run.create(tmp_path / "run", {"model": {}}, {})
    model = gpt()
    with pytest.raises(PicoError, match=r"holds a run that was not recorded from a loop"):
        Recorder(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.1))


Pico = Callable[..., tuple[int, str]]


@pytest.fixture
def pico(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pico:
    """A command of pico in the folder of the test; returns its exit status and what it says."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["pico", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), " ".join((printed.out + printed.err).split())

    return run


NEEDS_THE_LOOP = [
    "train run/training_config.yaml", "replay run --step 1", "fork run --step 1 --run-name x", "batch run --step 1",
    "generate run --prompt x", "export run --format llama --out x", "evaluate run",
]  # fmt: skip


@pytest.mark.parametrize("command", NEEDS_THE_LOOP)
def test_what_needs_the_loop_says_why_it_cannot(command: str, pico: Pico, tmp_path: Path) -> None:
    train(Way(steps=2), recording(tmp_path / "run"))
    status, said = pico(*command.split())
    assert status in (1, 2), said
    assert "recorded from a training loop that Pico does not know" in said
    assert "Traceback" not in said


ANALYSIS = """
analysis_name: a
metrics:
- {metric_name: cosine, target_checkpoint: previous, data_split: train, components: [
    {component_name: simple, data_type: gradients, layer_suffixes: attn.c_proj}]}
- {metric_name: per, data_split: train, components: [
    {component_name: simple, data_type: activations, layer_suffixes: attn.c_proj}]}
- {metric_name: norm, data_split: train, components: [
    {component_name: simple, data_type: gradients, layer_suffixes: attn.c_proj}]}
"""


def test_a_recorded_run_is_listed_verified_analyzed_and_reported(pico: Pico, tmp_path: Path) -> None:
    train(Way(steps=7), recording(tmp_path / "run", save_every_n_steps=3))
    (tmp_path / "analysis.yaml").write_text(ANALYSIS)
    for words in ("list run", "verify run", "analyze analysis.yaml --run run --report"):
        status, said = pico(*words.split())
        assert status == 0, said
    page = (tmp_path / "analysis_results" / "a" / "report.html").read_text()
    count = sum(parameter.numel() for parameter in gpt().parameters())
    assert f"{count:,}" in page  # the embedding counts once, though it is stored as the unembedding too


@pytest.mark.parametrize(
    ("positions", "recorded"), [("last", [-1]), ([-1], [-1]), ([0, 2], [0, 2]), ([0, -1], [0, -1]), ("random:2", None)]
)
def test_positions_in_rows_of_several_lengths_are_recorded_as_they_are(
    positions: Any, recorded: list[int] | None, tmp_path: Path
) -> None:
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(tmp_path / "run", model, optimizer, learning_dynamics={"positions": positions})
    refused = pytest.raises(PicoError, match=r"random:2 means other positions in rows of 5 and of 9 inputs")
    with refused if recorded is None else contextlib.nullcontext(), recorder.step(0):
        for length in (5, 9):
            rows_BT = torch.randint(61, (2, length))
            model(rows_BT, rows_BT)[1].backward()
    recorder.close(finished=False)
    if recorded is not None:
        assert Run.open(tmp_path / "run")[0].meta["capture"] == {"positions": recorded}
