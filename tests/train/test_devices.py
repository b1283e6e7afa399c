"""What the machine has is used, what it has not is told, and the precision asked for is the one that computes."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from picolm.errors import PicoError
from picolm.models import Decoder, Loss
from picolm.store import Run
from picolm.train import devices
from picolm.train.build import equip
from picolm.train.config import Fabric, Training
from picolm.train.failure import StopSignal
from picolm.train.loop import train as train_job
from picolm.train.preview import preview

Train = Callable[..., Run]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that makes torch believe in other devices."""

    def have(gpus: int = 0, mps: bool = False, native_bfloat16: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(devices, "_native_bfloat16", lambda accelerator: native_bfloat16)

    return have


@pytest.mark.parametrize(
    ("has", "accelerator", "precision"),
    [
        ({"gpus": 1, "mps": True, "native_bfloat16": True}, "cuda", "bf16-mixed"),
        ({"gpus": 1}, "cuda", "32-true"),
        ({"mps": True}, "mps", "32-true"),
        ({"native_bfloat16": True}, "cpu", "bf16-mixed"),
        ({}, "cpu", "32-true"),
    ],
)
def test_auto_takes_the_best_there_is(machine: Any, has: dict[str, Any], accelerator: str, precision: str) -> None:
    machine(**has)
    resolved = devices.resolve(Fabric())
    assert (resolved.accelerator, resolved.precision) == (accelerator, precision)
    assert devices.resolve(Fabric(accelerator="cpu", precision="64-true")).precision == "64-true"


@pytest.mark.parametrize(
    ("has", "asked", "message"),
    [
        ({}, {"accelerator": "cuda"}, "training.fabric.accelerator is cuda, but this machine has no CUDA device; set training.f"),
        ({}, {"accelerator": "gpu"}, "training.fabric.accelerator is gpu, but this machine has no CUDA device"),
        ({}, {"accelerator": "mps"}, "training.fabric.accelerator is mps, but this machine has no MPS device"),
        ({"gpus": 2}, {"accelerator": "cuda", "num_devices": 3}, "training.fabric.num_devices is 3, but this machine has 2 cuda"),
        ({"mps": True}, {"accelerator": "mps", "num_devices": 2}, "training.fabric.num_devices is 2, but this machine has 1 mps"),
    ],
)  # fmt: skip
def test_a_device_that_is_not_there_is_named(
    machine: Any, has: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    machine(**has)
    with pytest.raises(PicoError) as caught:
        devices.check_available(devices.resolve(Fabric(**asked)))
    assert str(caught.value).startswith(message)


def test_what_there_is_is_accepted(machine: Any) -> None:
    machine(gpus=2)
    for asked in (
        Fabric(accelerator="cuda", num_devices=2),
        Fabric(accelerator="gpu"),
        Fabric(accelerator="cpu", num_devices=9),
    ):
        devices.check_available(asked)


def test_a_run_for_a_gpu_is_refused_and_previewed_where_there_is_none(
    train: Train, make_config: Any, machine: Any
) -> None:
    machine()
    with pytest.raises(PicoError, match="accelerator is cuda, but this machine has no CUDA device"):
        train("training.fabric.accelerator=cuda")
    text = preview(make_config("training.fabric.accelerator=cuda"))
    assert "Not on this machine: training.fabric.accelerator is cuda, but this machine has no CUDA device" in text
    assert "saved steps" in text


def test_what_fabric_refuses_is_a_message(train: Train) -> None:
    with pytest.raises(PicoError, match=r"unknown training.fabric.strategy 'ddpp'; did you mean 'ddp'\?"):
        train("training.fabric.strategy=ddpp")


@pytest.mark.slow
def test_the_precision_asked_for_is_the_one_that_computes(train: Train) -> None:
    losses = {}
    for precision, weights, activations in (
        ("64-true", torch.float64, torch.float64),
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ):
        run = train(
            f"training.fabric.precision={precision}", "training.max_steps=1", f"checkpointing.run_name=of-{precision}"
        )
        dtypes = {address.kind: run[1][address].dtype for address in run[1]}
        assert dtypes == dict.fromkeys(dtypes, weights) | {"activations": activations}
        assert (devices.weight_dtype(precision), devices.compute_dtype(precision)) == (weights, activations)
        losses[precision] = run.metrics()[-1]["train/loss"]
        assert losses[precision] == pytest.approx(losses["64-true"], rel=3e-3)
    assert len(set(losses.values())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_run_goes_on_exactly_in_every_precision(train: Train, precision: str) -> None:
    options = (
        f"training.fabric.precision={precision}", "training.optimization.lr_scheduler=constant", "evaluation.metrics=null",
        "checkpointing.learning_dynamics.eval_data=null",
    )  # fmt: skip
    whole = train(*options, "training.max_steps=2", "checkpointing.run_name=whole")
    train(*options, "training.max_steps=1")
    continued = train(*options, "training.max_steps=2")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert continued[2].files[name] == whole[2].files[name]


@pytest.fixture
def determinism() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


@pytest.mark.usefixtures("determinism")
@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_is_what_is_asked_for(wanted: bool) -> None:
    devices.set_determinism(wanted)
    assert torch.are_deterministic_algorithms_enabled() is wanted
    assert torch.backends.cudnn.benchmark is not wanted
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


def place(value: float) -> torch.Tensor:
    """By an operation that has no deterministic kernel on any device."""
    return torch.zeros(3).put_(torch.tensor([0]), torch.tensor([value]))


@pytest.mark.usefixtures("determinism")
def test_an_operation_without_a_deterministic_kernel_is_named_and_so_is_the_way_out() -> None:
    devices.set_determinism(True)
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        place(1.0)
    with (
        pytest.raises(
            PicoError,
            match=r"^training.deterministic is true, but put_ has no deterministic kernel on this device; set "
            r"training.deterministic=warn to compute with it",
        ),
        devices.only_deterministic(True),
    ):
        place(1.0)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="of another kind"), devices.only_deterministic(True):
        raise RuntimeError("of another kind")
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    devices.set_determinism(False)
    with devices.only_deterministic(False):
        assert place(1.0)[0] == 1


@pytest.mark.usefixtures("determinism")
def test_forward_and_backward_take_only_deterministic_kernels(
    make_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention on CUDA chooses its kernel in the forward pass, and the order of its sums in the backward pass."""
    found: list[tuple[str, bool]] = []

    def note(place: str) -> None:
        found.append((place, not torch.is_deterministic_algorithms_warn_only_enabled()))

    original = Decoder.loss

    def loss(model: Decoder, *words: Any) -> Any:
        note("forward")
        nats, tokens = original(model, *words)
        nats.register_hook(lambda gradient: note("backward"))
        return Loss(nats, tokens)

    monkeypatch.setattr(Decoder, "loss", loss)
    for exact in (True, False):
        with ExitStack() as stack:
            job = equip(make_config("training.max_steps=0"), stack.enter_context(StopSignal()), stack)
            assert not job.exact  # it is of use on CUDA only
            job.exact = exact
            train_job(job)
        assert set(found) == {("forward", exact), ("backward", exact)}
        found.clear()


@pytest.mark.usefixtures("determinism")
@pytest.mark.parametrize("chosen", [True, "warn", False])
def test_the_compiler_chooses_nothing_by_timing_where_bits_count(chosen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        pytest.skip("this version of torch has no such switch")
    monkeypatch.setattr(config, "deterministic", not chosen)
    devices.set_compiler(Training(deterministic=chosen))
    assert config.deterministic is bool(chosen)


@pytest.mark.usefixtures("determinism")
def test_a_cublas_workspace_of_the_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    devices.set_determinism(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.fixture
def mallopt(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The calls that a glibc in its place would get."""
    calls: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: None):
            self.mallopt = lambda option, value: calls.append((option, value)) or 1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    return calls


def test_the_allocator_keeps_what_it_has(mallopt: list[tuple[int, int]]) -> None:
    assert devices.tune_allocator()
    assert mallopt == [(-1, 2**31 - 1), (-2, 2**26), (-4, 0)]  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX of malloc.h


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_"])
def test_an_allocator_that_the_user_set_up_is_left_alone(
    mallopt: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    assert not devices.tune_allocator()
    assert mallopt == []


def test_other_systems_are_left_alone(mallopt: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not devices.tune_allocator()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # musl has no mallopt
    assert not devices.tune_allocator()
    assert mallopt == []


@pytest.mark.parametrize(
    ("compile", "on_cpu", "on_cuda"), [("auto", False, True), (True, True, True), (False, False, False)]
)
def test_compiling_is_automatic_on_gpus_only(compile: Any, on_cpu: bool, on_cuda: bool) -> None:
    training = Training(compile=compile)
    assert devices.want_compile(training, torch.device("cpu")) is on_cpu
    assert devices.want_compile(training, torch.device("cuda")) is on_cuda


def test_the_peak_and_the_hardware_are_told() -> None:
    assert 1e9 < devices.matmul_peak(torch.device("cpu"), torch.float32) < 1e14
    assert {"platform", "cpu", "threads", "gpus"} == set(devices.hardware())
