"""Schedules are functions of the step; optimizers do what their papers say."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from picolm.address import Address
from picolm.errors import PicoError
from picolm.models import Decoder
from picolm.train.config import Optimization
from picolm.train.optim import Muon, build_optimizers, learning_rate, orthogonalize, schedule_remarks
from picolm.train.preview import preview
from picolm.train.state import State

ROLES = {"block.weight": "matrix", "embedding.weight": "embedding", "norm.weight": "norm"}


class Small(nn.Module):
    """One parameter of each role, in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Linear(6, 4, bias=False, dtype=torch.float64)
        self.embedding = nn.Embedding(5, 6, dtype=torch.float64)
        self.norm = nn.RMSNorm(6, dtype=torch.float64)


def steps(optimization: Optimization, gradients: list[float]) -> dict[str, tuple[Tensor, Tensor]]:
    """Before and after one update for each number, which multiplies a fixed random gradient."""
    model = Small()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = build_optimizers(model, ROLES, optimization)
    for factor in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = factor * gradient_of(name, parameter)
        for optimizer in optimizers:
            optimizer.step()
    return {name: (before[name], parameter.detach()) for name, parameter in model.named_parameters()}


def gradient_of(name: str, like: Tensor) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=torch.Generator().manual_seed(len(name)))


def rates(scheduler: str, total: int = 100, **options: Any) -> list[float]:
    optimization = Optimization(lr_scheduler=scheduler, **{"lr": 2.0, "lr_warmup_steps": 20} | options)
    return [learning_rate(step, optimization, total) for step in range(total + 1)]


@pytest.mark.parametrize("scheduler", ["linear_with_warmup", "cosine", "wsd", "constant"])
def test_warm_up_rises_by_equal_steps_and_the_first_update_moves(scheduler: str) -> None:
    assert rates(scheduler)[:20] == pytest.approx([2.0 * (step + 1) / 20 for step in range(20)])
    assert rates(scheduler, lr_warmup_steps=0)[0] == 2.0


@pytest.mark.parametrize(
    ("scheduler", "fractions"),
    [
        ("linear_with_warmup", {20: 1, 40: 0.75, 60: 0.5, 99: 1 / 80, 100: 0}),
        ("cosine", {20: 1, 40: (1 + math.sqrt(0.5)) / 2, 60: 0.5, 80: (1 - math.sqrt(0.5)) / 2, 100: 0}),
        ("wsd", {20: 1, 60: 1, 90: 1, 95: 0.5, 99: 0.1, 100: 0}),
        ("constant", {20: 1, 60: 1, 100: 1}),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_a_schedule_at_its_landmarks(scheduler: str, fractions: dict[int, float], floor: float) -> None:
    found = rates(scheduler, lr_min_ratio=floor)
    assert {step: found[step] for step in fractions} == pytest.approx(
        {step: 2.0 * (floor + (1 - floor) * fraction) for step, fraction in fractions.items()}, abs=1e-12
    )


def test_the_decay_of_wsd_has_the_length_that_is_asked_for() -> None:
    found = rates("wsd", lr_decay_steps=40)
    assert found[60] == 2.0
    assert found[80] == pytest.approx(1.0)


@given(
    scheduler=st.sampled_from(["linear_with_warmup", "cosine", "wsd", "constant"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    floor=st.floats(0, 0.9),
)
def test_up_to_the_peak_then_never_up_again_within_floor_and_peak(
    scheduler: str, total: int, warmup: int, floor: float
) -> None:
    found = rates(scheduler, total, lr_warmup_steps=warmup, lr_min_ratio=floor)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0 < rate <= 2.0 for rate in rising)
    assert all(2.0 * floor - 1e-12 <= rate <= 2.0 for rate in falling)


def test_a_schedule_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_schedule.py").write_text(
        "def stairs(step, warmup, total, decay):\n    return 0.5 ** (step // 10)\n"
    )
    monkeypatch.chdir(tmp_path)
    found = rates("my_lab_schedule:stairs", lr_warmup_steps=0)
    assert [found[9], found[10], found[25]] == [2.0, 1.0, 0.5]


def test_adamw_is_its_closed_form() -> None:
    optimization = Optimization(lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.3, decay_norms_and_embeddings=True)
    for name, (before, after) in steps(optimization, [1.0]).items():
        g = gradient_of(name, before)
        torch.testing.assert_close(after, before * (1 - 0.1 * 0.3) - 0.1 * g / (g.abs() + 1e-3), rtol=1e-12, atol=1e-12)
    for name, (before, after) in steps(optimization, [1.0, -2.0]).items():
        g = gradient_of(name, before)
        first = before * 0.97 - 0.1 * g / (g.abs() + 1e-3)
        m = (0.8 * 0.2 * g + 0.2 * -2 * g) / (1 - 0.8**2)
        v = (0.9 * 0.1 * g**2 + 0.1 * 4 * g**2) / (1 - 0.9**2)
        torch.testing.assert_close(after, first * 0.97 - 0.1 * m / (v.sqrt() + 1e-3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize(("everything", "decayed"), [(False, {"block.weight"}), (True, set(ROLES))])
def test_weight_decay_acts_on_matrices_unless_asked_for_more(
    optimizer: str, everything: bool, decayed: set[str]
) -> None:
    optimization = Optimization(optimizer=optimizer, lr=0.1, weight_decay=0.5, decay_norms_and_embeddings=everything)
    for name, (before, after) in steps(optimization, [0.0]).items():
        torch.testing.assert_close(after, before * (0.95 if name in decayed else 1.0), rtol=1e-14, atol=0)


def test_sgd_with_momentum_is_its_closed_form() -> None:
    optimization = Optimization(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0)
    for name, (before, after) in steps(optimization, [1.0, 3.0]).items():
        torch.testing.assert_close(
            after, before - 0.1 * (1 + 0.9 + 3) * gradient_of(name, before), rtol=1e-12, atol=1e-12
        )


def test_plain_sgd_remembers_nothing() -> None:
    model = Small()
    (optimizer,) = build_optimizers(model, ROLES, Optimization(optimizer="sgd", lr=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not [value for state in optimizer.state.values() for value in state.values() if value is not None]


@pytest.mark.parametrize("shape", [(24, 24), (12, 48), (48, 12), (96, 96), (1, 8)])
def test_orthogonalize_keeps_singular_vectors_and_makes_singular_values_about_one(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64, generator=generator))
    singular_values = torch.logspace(0, -1.3, min(shape), dtype=torch.float64)
    result = orthogonalize(left * singular_values @ right.T)
    seen = left.T @ result @ right  # diagonal in the same vectors
    assert (seen - seen.diagonal().diag()).abs().max() < 1e-10
    assert seen.diagonal().min() > 0.6
    assert seen.diagonal().max() < 1.3
    torch.testing.assert_close(result, left * seen.diagonal() @ right.T)


def test_a_muon_step_has_the_size_of_an_adamw_step_whatever_the_size_of_the_gradient() -> None:
    for shape in ((32, 32), (16, 64), (64, 16)):
        changes = []
        for scale in (1e-3, 1.0, 1e3):
            parameter = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
            parameter.grad = scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            Muon([parameter], lr=0.5, momentum=0.95, weight_decay=0.1).step()
            changes.append(parameter.detach())
        assert changes[0].square().mean().sqrt() / 0.5 == pytest.approx(0.2, rel=0.15)
        torch.testing.assert_close(changes[1], changes[0], rtol=1e-3, atol=1e-4)  # entries are about 0.1
        torch.testing.assert_close(changes[1], changes[2], rtol=1e-3, atol=1e-4)  # entries are about 0.1


def test_muon_takes_the_matrices_and_adamw_the_rest() -> None:
    model = Small()
    muon, adamw = build_optimizers(model, ROLES, Optimization(optimizer="muon", lr=0.1))
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [p for group in muon.param_groups for p in group["params"]] == [model.block.weight]
    assert {id(p) for group in adamw.param_groups for p in group["params"]} == {
        id(model.embedding.weight),
        id(model.norm.weight),
    }
    assert muon.param_groups[0]["momentum"] == 0.95


def test_muon_with_momentum_follows_the_average_of_the_gradients() -> None:
    optimization = Optimization(optimizer="muon", lr=0.1, momentum=0.5, weight_decay=0)
    one, two = steps(optimization, [1.0])["block.weight"], steps(optimization, [1.0, 1.0])["block.weight"]
    torch.testing.assert_close(two[1] - one[1], one[1] - one[0], rtol=1e-4, atol=1e-6)
    turned = steps(optimization, [1.0, -0.1])["block.weight"]  # 0.75 of the buffer still points the old way
    torch.testing.assert_close(turned[1] - one[1], one[1] - one[0], rtol=1e-4, atol=1e-6)


def test_an_optimizer_of_the_users_own_trains(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab_optimizer.py").write_text(
        "import torch\n"
        "class Sign(torch.optim.Optimizer):\n"
        "    @torch.no_grad()\n"
        "    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n"
        "            for p in group['params']:\n"
        "                p.sub_(p.grad.sign(), alpha=group['lr'])\n"
        "def signs(parameters, optimization):\n"
        "    return [Sign([named.parameter for named in parameters], {'lr': optimization.lr})]\n"
    )
    monkeypatch.chdir(tmp_path)
    run = train(
        "training.optimization.optimizer=my_lab_optimizer:signs", "training.max_steps=1", "training.optimization.lr=0.5"
    )
    address = Address("weights", "", "layers.1.swiglu.w_2")
    change = (run[1][address] - run[0][address]).abs()
    torch.testing.assert_close(change, torch.full_like(change, run[0].meta["learning_rate"]), rtol=1e-5, atol=1e-6)


PARTIAL = """
import torch
def partial(parameters, optimization):
    chosen = [named.parameter for named in parameters if "layers.0" in named.name]
    return [torch.optim.SGD(chosen, lr=optimization.lr)]
def grouped(parameters, optimization):
    def of(word):
        return [named.parameter for named in parameters if word in named.name]
    groups = [
        {"params": of("layers.0"), "lr": 0.0},
        {"params": of("layers.1"), "lr": 0.4},
        {"params": of("embedding_proj") + of("output_norm"), "lr": torch.tensor(0.1)},
    ]
    return [torch.optim.SGD(groups, lr=optimization.lr)]
def lone(parameters, optimization):
    return torch.optim.SGD([named.parameter for named in parameters], lr=optimization.lr)
def twice(parameters, optimization):
    everything = [named.parameter for named in parameters]
    return [torch.optim.SGD(everything, lr=0.1), torch.optim.SGD(everything[:1], lr=0.1)]
"""
PLAIN = (
    "training.optimization.weight_decay=0", "training.optimization.grad_clip_norm=null", "training.optimization.lr=0.2",
    "checkpointing.save_every_n_steps=1", "monitoring.logging.log_every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def partial_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_partial.py").write_text(PARTIAL)
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("partial_lab")
def test_gradients_of_parameters_without_an_optimizer_do_not_accumulate(
    train: Callable[..., Any], make_config: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    every = "checkpointing.learning_dynamics.layer_suffixes=[q_proj, w_2, embedding_proj, output_norm]"
    run = train("training.optimization.optimizer=my_lab_partial:partial", every, *PLAIN, "training.max_steps=3")
    said = capsys.readouterr().err
    assert said.count("No optimizer has these parameters, which keep their values") == 1
    assert "embedding_proj.weight, layers.1.attention.q_proj.weight" in said
    for step in run:
        tokens_RS = torch.tensor(run[step].rows("train")["input_ids"].to_pylist())
        model = Decoder(make_config().model)
        State(model, []).restore_weights(run[step])
        nats, count = model.loss(tokens_RS)
        (nats / count).backward()
        true = {name.removesuffix(".weight"): parameter.grad for name, parameter in model.named_parameters()}
        for address in run[step].select(kind="gradients", split="train"):
            torch.testing.assert_close(run[step][address], true[address.module], rtol=1e-4, atol=1e-6)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in true.values()))
        assert run[step].meta["gradient_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("partial_lab")
def test_the_schedule_is_a_factor_on_the_rate_of_each_group(train: Callable[..., Any]) -> None:
    run = train("training.optimization.optimizer=my_lab_partial:grouped", *PLAIN)
    lines = {entry["step"]: entry for entry in run.metrics()}
    for step in range(6):
        factor = run[step].meta["learning_rate"] / 0.2
        rates = {"0": 0.0, "1": 0.4 * factor, "2": 0.1 * factor}
        assert run[step].meta["learning_rates"] == pytest.approx(rates, rel=1e-6)
        assert {name: lines[step][f"lr/{name}"] for name in rates} == pytest.approx(rates, rel=1e-6)
        for module, rate in (("layers.0.swiglu.w_2", 0.0), ("layers.1.swiglu.w_2", 0.4 * factor)):
            weights, gradients = Address("weights", "", module), Address("gradients", "train", module)
            expected = run[step][weights] - rate * run[step][gradients]
            torch.testing.assert_close(run[step + 1][weights], expected, rtol=1e-5, atol=1e-7)
    assert lines[0]["lr"] == pytest.approx(0.1)  # that of training.optimization.lr


@pytest.mark.slow
@pytest.mark.usefixtures("partial_lab")
def test_a_run_that_gave_every_group_the_scheduled_rate_continues_so(
    train: Callable[..., Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("training.optimization.optimizer=my_lab_partial:grouped", *PLAIN)
    with monkeypatch.context() as before:  # what version 0.1.0 did, and what its checkpoints do not say
        meta = State.meta
        before.setattr(State, "meta", lambda self: {k: v for k, v in meta(self).items() if k != "own_rates"})
        before.setattr(State, "own_rates", property(lambda self: False, lambda self, value: None), raising=False)
        train(*words, "training.max_steps=2")
    capsys.readouterr()
    run = train(*words, "training.max_steps=4")
    assert "begun by a version that gave every parameter group the rate of training.optimization.lr" in (
        capsys.readouterr().err
    )
    weights, gradients = (
        Address("weights", "", "layers.1.swiglu.w_2"),
        Address("gradients", "train", "layers.1.swiglu.w_2"),
    )
    expected = run[3][weights] - run[3].meta["learning_rate"] * run[3][gradients]
    torch.testing.assert_close(run[4][weights], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("partial_lab")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lone", "my_lab_partial:lone returned SGD; return a list of torch optimizers"),
        ("twice", "my_lab_partial:twice gives embedding_proj.weight to two optimizers"),
    ],
)
def test_what_is_no_list_of_optimizers_is_refused(train: Callable[..., Any], name: str, message: str) -> None:
    with pytest.raises(PicoError, match=message):
        train(f"training.optimization.optimizer=my_lab_partial:{name}")


@pytest.mark.parametrize(
    ("total", "options", "words"),
    [
        (
            1000,
            {},
            ["lr_warmup_steps is 2500 and training.max_steps 1000", "the last update has a learning rate of 0.00012"],
        ),
        (20, {"lr_warmup_steps": 20}, ["lr_warmup_steps is 20", "Set training.optimization.lr_warmup_steps to 2"]),
        (20, {"lr_warmup_steps": 19}, []),
        (
            100,
            {"lr_scheduler": "wsd", "lr_warmup_steps": 40, "lr_decay_steps": 80},
            ["overlap in a run of 100 steps", "falls from 0.0003 to 0.000225 at once"],
        ),
        (100, {"lr_scheduler": "wsd", "lr_warmup_steps": 95}, ["(lr_decay_steps, 10) overlap"]),
        (100, {"lr_scheduler": "wsd", "lr_warmup_steps": 20, "lr_decay_steps": 80}, []),
        (100, {"lr_scheduler": "cosine", "lr_warmup_steps": 20, "lr_decay_steps": 80}, ["only the schedule wsd reads"]),
        (0, {}, []),
    ],
)
def test_a_schedule_that_cannot_work_is_told(total: int, options: dict[str, Any], words: list[str]) -> None:
    remarks = schedule_remarks(Optimization(**options), total)
    assert len(remarks) == bool(words)
    assert all(word in remarks[0] for word in words)
    rates_found = [learning_rate(step, Optimization(**options), total) for step in range(total)]
    if len(words) == 2 and "0.00012" in words[1]:
        assert rates_found[-1] == pytest.approx(0.00012)


@pytest.mark.slow
def test_training_and_dry_run_say_that_the_schedule_cannot_work(
    train: Callable[..., Any], make_config: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("training.optimization.lr_warmup_steps=7", "training.max_steps=5")
    told = "lr_warmup_steps is 7 and training.max_steps 5: the warm-up does not end before the run"
    assert told in preview(make_config(*words))
    train(*words)
    assert capsys.readouterr().err.count(told) == 1
