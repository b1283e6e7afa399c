"""Capture finds what it is asked for, keeps what passes in the order of the data, and touches nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from picolm.address import Address
from picolm.capture import Taps, capture
from picolm.capture.taps import find_modules, gradients
from picolm.errors import PicoError

WIDTH, LENGTH = 3, 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(), nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.attention_norm(x))


class Model(nn.Module):
    """Two blocks between two projections, of which the last is not watched by name alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding_proj = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.unused_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding_proj(x)
        for layer in self.layers:
            x = layer(x)
        return x


def rows(count: int) -> Tensor:
    return torch.randn(count, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def taps(model: nn.Module, *suffixes: str, **options: Any) -> Taps:
    return Taps(find_modules(model, suffixes or ("attention.o_proj",), "all"), **options)


OUTPUT = Address("activations", "train", "layers.1.attention.o_proj")


def fresh(model: Model, x: Tensor, module: str = OUTPUT.module) -> Tensor:
    """What a module returns for all rows in one batch."""
    seen: list[Tensor] = []
    hook = model.get_submodule(module).register_forward_hook(lambda m, i, output: seen.append(output))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


def captured_from(model: Model, x: Tensor, watched: Taps, order: list[list[int]] | None = None, step: int = 0) -> Any:
    order = order or [list(range(len(x)))]
    with capture(watched, split="train", step=step, order=order) as captured:
        for places in order:
            model(x[places]).sum().backward()
    return captured


@pytest.mark.parametrize(
    ("suffixes", "layers", "names"),
    [
        (["o_proj"], "all", ["layers.0.attention.o_proj", "layers.1.attention.o_proj"]),
        (["attention.o_proj"], [1], ["layers.1.attention.o_proj"]),
        (["attention"], "all", ["layers.0.attention", "layers.1.attention"]),
        (["layers.1.attention"], "all", ["layers.1.attention"]),
        (["embedding_proj"], [0], ["embedding_proj"]),
        (["o_proj", "embedding_proj"], [0], ["embedding_proj", "layers.0.attention.o_proj"]),
        (["o_proj"], [], []),
        ([], "all", []),
    ],
)  # fmt: skip
def test_suffixes_match_in_whole_words_within_the_layers(suffixes: list[str], layers: Any, names: list[str]) -> None:
    found = find_modules(Model(), suffixes, layers)
    assert list(found) == [name for name, _ in Model().named_modules() if name in names]
    assert len(found) == len(names)


@pytest.mark.parametrize(
    ("suffix", "hint"),
    [
        ("proj", "; did you mean 'o_proj'?"),
        ("xyz", " (there are:"),
        ("o_prj", "; did you mean 'o_proj'?"),
        ("attention.o_prj", "; did you mean 'attention.o_proj'?"),
        ("ttention", "; did you mean 'attention'?"),
    ],
)  # fmt: skip
def test_a_suffix_that_matches_nothing_lists_what_there_is(suffix: str, hint: str) -> None:
    with pytest.raises(PicoError) as caught:
        find_modules(Model(), ["attention", suffix], "all")
    message = str(caught.value)
    assert message.startswith(f"checkpointing.learning_dynamics.layer_suffixes: {suffix!r} matches no module{hint}")
    assert "attention, attention.o_proj, attention_norm" in message


@pytest.mark.parametrize(
    ("positions", "kept"),
    [("last", [5]), ("all", None), ([0], [0]), ([0, 3, -1], [0, 3, 5]), ([-6], [0]), ([5, 5], [5, 5])],
)
def test_positions_count_from_either_end(positions: Any, kept: list[int] | None) -> None:
    model, x = Model(), rows(4)
    assert taps(model, positions=positions).positions_at(0, LENGTH) == kept
    whole = fresh(model, x)
    expected = whole if kept is None else whole[:, kept[0]] if len(kept) == 1 else whole[:, kept]
    found = captured_from(model, x, taps(model, positions=positions))[OUTPUT]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("position", [6, -7])
def test_a_position_that_there_is_not_is_named(position: int) -> None:
    model = Model()
    message = rf"positions: there is no position {position} in rows of 6 inputs .* -1 is the last"
    with pytest.raises(PicoError, match=message):
        captured_from(model, rows(2), taps(model, positions=[0, position]))


@given(count=st.integers(1, 40), seed=st.integers(0, 5), step=st.integers(0, 1000), length=st.integers(1, 30))
def test_random_positions_are_a_function_of_seed_and_step(count: int, seed: int, step: int, length: int) -> None:
    draw = Taps({}, positions=f"random:{count}", seed=seed).positions_at(step, length)
    torch.manual_seed(step)  # the global generator has no say, and is not moved
    before = torch.get_rng_state()
    assert Taps({}, positions=f"random:{count}", seed=seed).positions_at(step, length) == draw
    assert torch.equal(torch.get_rng_state(), before)
    assert draw == sorted(set(draw))
    assert len(draw) == min(count, length)
    assert set(draw) <= set(range(length))


def test_random_positions_change_with_step_and_seed_and_are_spread_evenly() -> None:
    draws = [
        tuple(Taps({}, positions="random:3", seed=seed).positions_at(step, 20))
        for seed in (0, 1)
        for step in range(200)
    ]
    assert len(set(draws)) > 300
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=20)  # 60 expected of each, 7.1 standard deviation
    assert counts.min() > 30
    assert counts.max() < 90


@pytest.mark.parametrize("order", [[[0, 1, 2, 3, 4]], [[0], [1, 2], [3, 4]], [[4, 0], [2], [3, 1]]])
@pytest.mark.parametrize("max_rows", [None, 3, 5, 100])
def test_rows_come_in_the_order_of_the_data(order: list[list[int]], max_rows: int | None) -> None:
    model, x = Model(), rows(5)
    found = captured_from(model, x, taps(model, max_rows=max_rows), order)
    torch.testing.assert_close(found[OUTPUT], fresh(model, x)[:max_rows, -1])


def test_gradients_are_those_accumulated_over_the_micro_batches() -> None:
    model, x = Model(), rows(5)
    found = captured_from(model, x, taps(model, "o_proj", "attention_norm"), [[0, 1], [2, 3], [4]])
    model.zero_grad()
    model(x).sum().backward()
    names = {"layers.0.attention.o_proj", "layers.0.attention.o_proj.bias", "layers.0.attention_norm"}
    assert {address.module for address in found if address.kind == "gradients" and address.layer == 0} == names
    for name in names:
        parameter = model.get_parameter(name if name.endswith("bias") else f"{name}.weight")
        torch.testing.assert_close(found[Address("gradients", "train", name)], parameter.grad)


def test_what_is_kept_is_a_copy() -> None:
    model, x = Model(), rows(5)
    found = captured_from(model, x, taps(model, positions="all"))
    before = {address: tensor.clone() for address, tensor in found.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
            if parameter.grad is not None:
                parameter.grad.fill_(7.0)
    assert all(torch.equal(found[address], before[address]) for address in before)
    assert not any(tensor.requires_grad for tensor in found.values())


def test_a_parameter_without_a_gradient_has_none_to_keep() -> None:
    model = Model()
    model(rows(2)).sum().backward()
    assert gradients(taps(model, "unused_proj"), "train") == {}


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({}, {"activations", "gradients"}),
        ({"gradients": False}, {"activations"}),
        ({"activations": False}, {"gradients"}),
    ],
)
def test_only_what_is_asked_for_is_kept(options: dict[str, bool], kinds: set[str]) -> None:
    model = Model()
    assert {address.kind for address in captured_from(model, rows(2), taps(model, **options))} == kinds


def test_activations_are_kept_in_the_type_that_is_asked_for() -> None:
    model, x = Model(), rows(3)
    found = captured_from(model, x, taps(model, dtype=torch.bfloat16))
    assert torch.equal(found[OUTPUT], fresh(model, x)[:, -1].bfloat16())
    assert found[Address("gradients", "train", OUTPUT.module)].dtype == torch.float32


def test_outputs_without_positions_are_kept_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    x = rows(4)[:, 0]
    watched = Taps({"0": model[0]})
    with capture(watched, split="val", step=0, order=[[1, 3], [0, 2]]) as captured:
        for places in ([1, 3], [0, 2]):
            model(x[places])
    torch.testing.assert_close(captured[Address("activations", "val", "0")], model(x))


def test_capture_changes_neither_outputs_nor_gradients_and_leaves_no_hook() -> None:
    x, results = rows(4), []
    for watched in (True, False):
        model = Model()
        if watched:
            captured_from(model, x, taps(model, "o_proj", "attention", "attention_norm", "layers.0", positions="all"))
        else:
            model(x).sum().backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_error_inside_takes_the_hooks_away() -> None:
    model = Model()
    with pytest.raises(KeyError), capture(taps(model), split="train", step=0, order=[[0]]):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("passes", [0, 1, 3])
def test_a_module_that_runs_another_number_of_times_is_refused(passes: int) -> None:
    model = Model()

    def watch() -> None:
        with capture(taps(model), split="train", step=0, order=[[0], [1]]):
            for _ in range(passes):
                model(rows(1))

    with pytest.raises(PicoError, match=rf"layers.0.attention.o_proj ran {passes} times in 2 micro-batch\(es\)"):
        watch()


def test_a_module_that_returns_no_tensor_is_named() -> None:
    model = nn.Module()
    model.lstm = nn.LSTM(WIDTH, WIDTH)
    with (
        pytest.raises(PicoError, match=r"lstm returns tuple, not one tensor \[rows, …, width\]: it cannot be captured"),
        capture(Taps({"lstm": model.lstm}), split="train", step=0, order=[[0]]),
    ):
        model.lstm(rows(1))


def test_layers_restrict_whole_blocks() -> None:
    suffixes = ("layers.0", "layers.1", "attention.o_proj", "embedding_proj")
    assert list(find_modules(Model(), suffixes, [1])) == ["embedding_proj", "layers.1", "layers.1.attention.o_proj"]
