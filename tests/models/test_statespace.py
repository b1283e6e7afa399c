"""The state space model is Mamba-2: its reference values, its initial values, its cache, and what optimizers are told."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from picolm.models import MODELS, Model, NextToken, StateSpace, StateSpaceConfig
from picolm.models.attention import twice_differentiable
from picolm.models.mamba2 import from_mamba2, statespace_config, to_mamba2

REFERENCE = Path(__file__).parent / "reference"
SIZES = {  # width, layers, state, head size: parameters outside of the embeddings
    "tiny": (96, 24, 48, 16, 1_618_368),
    "small": (384, 26, 128, 64, 25_843_240),
    "medium": (768, 28, 128, 64, 105_429_728),
    "large": (1536, 28, 128, 64, 410_036_672),
    "300k": (36, 12, 12, 12, 113_580),
    "1m": (84, 12, 44, 28, 621_468),
    "3m": (168, 12, 96, 56, 2_469_408),
    "10m": (312, 12, 192, 104, 8_541_168),
}


@pytest.fixture
def config() -> StateSpaceConfig:
    """Small enough to be instant; every width different, so that a mixed-up one shows."""
    return StateSpaceConfig(
        d_model=48, n_layers=3, vocab_size=101, max_seq_len=160, state_size=10, head_dim=8, n_groups=3, expand=2
    )


@pytest.fixture
def model(config: StateSpaceConfig) -> StateSpace:
    """With weights large enough that its predictions are far from uniform."""
    found = StateSpace(config)
    found.init_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.ndim == 2 and "conv" not in name:
                parameter.mul_(8.0)
    return found


@pytest.fixture
def tokens(config: StateSpaceConfig) -> Tensor:
    """[B, S] with S = 131: two chunks and a few positions."""
    return torch.randint(0, config.vocab_size, (3, 131), generator=torch.Generator().manual_seed(2))


class Reference:
    """A model of known weights, and what it computes."""

    def __init__(self, name: str):
        with safe_open(REFERENCE / f"{name}.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            about = file.metadata()
        stated = json.loads(about["config"])
        stated |= {"model_type": "mamba2", "layer_norm_epsilon": stated["norm_eps"], "max_seq_len": stated["length"]}
        self.config = statespace_config(stated)
        self.loss = float(about["loss"])
        self.weights, self.gradients = (
            {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for prefix in ("weights/", "gradients/")
        )
        self.tokens, self.logits, self.states = (tensors[key] for key in ("tokens", "logits", "last_states"))
        self.generated = tensors["generated_greedy_from_8"]
        self.model = StateSpace(self.config)
        self.model.load_state_dict(from_mamba2(self.weights, self.config))


@pytest.fixture(params=["mamba2", "mamba2_two_groups"])
def reference(request: pytest.FixtureRequest) -> Reference:
    return Reference(request.param)


def test_logits_states_and_nats_are_those_of_the_reference(reference: Reference) -> None:
    inputs = reference.tokens[:, :-1]
    assert (reference.model(inputs) - reference.logits).abs().max() < 1e-5
    model, cache = reference.model.double(), reference.model.new_cache()
    assert (model(inputs, cache) - reference.logits).abs().max() < 1e-13
    for layer, expected in enumerate(reference.states):
        assert (cache.layers[layer][-1] - expected).abs().max() < 1e-13
    nats, _ = model.predictions(reference.tokens)
    assert nats.mean().item() == pytest.approx(reference.loss, rel=1e-13)
    assert (
        nats.exp().mul(reference.logits.softmax(-1).gather(2, reference.tokens[:, 1:, None])[..., 0]).sub(1).abs().max()
        < 1e-12
    )


def test_gradients_are_those_of_the_reference(reference: Reference) -> None:
    model = reference.model.double()
    loss = model.loss(reference.tokens)
    (loss.nats / loss.tokens).backward()
    found = to_mamba2({name: parameter.grad for name, parameter in model.named_parameters()}, reference.config)
    assert len(reference.gradients) >= 9
    for name, expected in reference.gradients.items():
        assert (found[name] - expected).norm() < 2e-7 * expected.norm(), name


def test_it_writes_what_the_reference_writes(reference: Reference) -> None:
    for cached in (True, False):
        found = reference.model.generate(reference.tokens[:, :8], 12, use_cache=cached)
        assert torch.equal(found, reference.generated)


def test_weights_of_mamba2_are_moved_and_not_changed(reference: Reference) -> None:
    again = to_mamba2(reference.model.state_dict(), reference.config)
    assert set(again) == set(reference.weights)
    assert all(torch.equal(again[name], value) for name, value in reference.weights.items())


@pytest.mark.parametrize("size", SIZES)
def test_the_sizes_have_the_parameter_counts_that_are_stated(size: str) -> None:
    width, layers, state, head, expected = SIZES[size]
    with torch.device("meta"):
        model = StateSpace(StateSpaceConfig(d_model=width, n_layers=layers, state_size=state, head_dim=head))
    roles = model.parameter_roles()
    assert sum(p.numel() for name, p in model.named_parameters() if roles[name] != "embedding") == expected


def test_roles_are_what_optimizers_ask_for(model: StateSpace) -> None:
    roles = model.parameter_roles()
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert roles["embedding_proj.weight"] == roles["de_embedding_proj.weight"] == "embedding"
    norms = ("output_norm.weight", "layers.0.ssm_norm.weight", "layers.0.ssm.norm.weight")
    assert {roles[name] for name in norms} == {"norm"}
    dynamics = ["A_log", "dt_bias", "D", *(f"{part}_conv.{key}" for part in "xbc" for key in ("weight", "bias"))]
    assert {
        name.removeprefix("layers.1.ssm.") for name, role in roles.items() if role == "dynamics" and ".1." in name
    } == {*dynamics}
    matrices = [f"layers.1.ssm.{part}_proj.weight" for part in ("z", "x", "b", "c", "dt", "o")]
    assert {roles[name] for name in matrices} == {"matrix"}


def test_a_later_token_changes_nothing_before_it(model: StateSpace, tokens: Tensor) -> None:
    """But for rounding in its own chunk, whose values are scaled by half of what the chunk decays."""
    other, model = tokens.clone(), model.double()
    other[:, 100] = (other[:, 100] + 1) % 101
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :88], after[:, :88])  # two chunks of 44
    assert (before[:, 88:100] - after[:, 88:100]).abs().max() < 1e-12 < (before[:, 100] - after[:, 100]).abs().max()


@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 300])
def test_rows_of_any_length_are_those_of_one_position_after_the_other(model: StateSpace, length: int) -> None:
    """300 is beyond max_seq_len, which no position of the model knows of."""
    tokens = torch.randint(0, 101, (2, length), generator=torch.Generator().manual_seed(length))
    model = model.double()
    cache = model.new_cache()
    steps = torch.cat([model(token, cache) for token in tokens.split(1, 1)], 1)
    torch.testing.assert_close(model(tokens), steps, rtol=1e-10, atol=1e-10)


def test_a_cache_filled_piece_by_piece_gives_the_logits_of_one_pass_and_stays_small(
    model: StateSpace, tokens: Tensor
) -> None:
    cache, sizes = model.new_cache(), set()
    pieces = []
    for piece in tokens.split([70, 1, 2, 58], dim=1):
        pieces.append(model(piece, cache))
        sizes.add(sum(t.numel() for kept in cache.layers.values() for t in kept))
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 131
    assert sizes == {3 * 3 * (3 * (96 + 2 * 30) + 96 * 10)}  # layers, rows, windows and states


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}], ids=["greedy", "top-k"])
def test_with_and_without_the_cache_the_same_tokens_come_out(model: StateSpace, tokens: Tensor, options: dict) -> None:
    with_cache, without = (
        model.generate(tokens[:, :7], 40, use_cache=cached, generator=torch.Generator().manual_seed(3), **options)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert len(with_cache[:, 7:].unique()) > 10


def test_loss_and_predictions_are_the_cross_entropy_of_the_logits(model: StateSpace, tokens: Tensor) -> None:
    loss, found = model.loss(tokens), model.predictions(tokens)
    assert loss.tokens == 3 * 130
    plain = NextToken.loss(model, tokens), NextToken.predictions(model, tokens)
    torch.testing.assert_close(plain, (loss, found), rtol=1e-4, atol=1e-4)


def test_its_mixing_matrices_are_what_values_are_multiplied_by(model: StateSpace, tokens: Tensor) -> None:
    model, seen = model.double(), {}
    layer = model.layers[1].ssm
    layer.x_conv.register_forward_hook(lambda module, arguments, output: seen.update(values=output))
    layer.norm.register_forward_hook(lambda module, arguments, output: seen.update(mixed=arguments[0]))
    logits, mixed = model.with_mixing(tokens)
    assert torch.equal(logits, model(tokens))
    assert [each.matrix_BHTT.shape for each in mixed] == [(3, 12, 131, 131)] * 3
    values_BTHP = seen["values"].unflatten(-1, (12, 8))
    made_BTHP = torch.einsum("bhts,bshp->bthp", mixed[1].matrix_BHTT, values_BTHP)
    torch.testing.assert_close(made_BTHP.flatten(2), seen["mixed"], rtol=1e-10, atol=1e-10)
    assert (mixed[1].matrix_BHTT < 0).any()
    cache = model.new_cache()
    model(tokens, cache)
    torch.testing.assert_close(mixed[2].state_BHPN, cache.layers[2][-1], rtol=1e-10, atol=1e-10)
    assert (mixed[0].decay_BTH > 0).all()
    assert not hasattr(model, "with_patterns")  # of attention: what asks for them is told that there are none


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-mixed"])
def test_a_training_step_is_the_same_bit_for_bit(model: StateSpace, tokens: Tensor, autocast: bool) -> None:
    def step() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nats = model.loss(tokens).nats
        return [nats, *torch.autograd.grad(nats, list(model.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


def test_under_autocast_the_gradients_are_near_those_of_float32(model: StateSpace, tokens: Tensor) -> None:
    exact = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        nats = model.loss(tokens).nats
    found = torch.autograd.grad(nats, list(model.parameters()))
    for (name, parameter), a, b in zip(model.named_parameters(), found, exact):
        assert a.dtype == parameter.dtype
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name


def test_the_form_with_second_derivatives_gives_the_same_gradients(model: StateSpace, tokens: Tensor) -> None:
    model = model.double()
    exact = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    with twice_differentiable():
        found = torch.autograd.grad(NextToken.loss(model, tokens).nats, list(model.parameters()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in found), list(model.parameters()))
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert all(each.isfinite().all() for each in second)


def test_hooks_see_the_output_of_every_module_inside_of_the_blocks(model: StateSpace, tokens: Tensor) -> None:
    seen = {}
    for name, module in model.named_modules():
        if name.startswith("layers.") and hasattr(module, "weight"):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape}))
    model.loss(tokens).nats.backward()
    assert seen["layers.1.ssm.o_proj"] == (3, 130, 48)
    assert seen["layers.1.ssm.x_proj"] == (3, 130, 96)
    own = {f"layers.{layer}.ssm.{key}" for layer in range(3) for key in ("A_log", "dt_bias", "D")}
    biases = {f"layers.{layer}.ssm.{part}_conv.bias" for layer in range(3) for part in "xbc"}
    assert {name + ".weight" for name in seen} | own | biases == {
        n for n, _ in model.named_parameters() if n.startswith("layers.")
    }
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_initial_values_are_those_of_mamba2(config: StateSpaceConfig) -> None:
    model = StateSpace(dataclasses.replace(config, d_model=512, head_dim=1, n_groups=1))
    model.init_parameters(torch.Generator().manual_seed(0))
    layer = model.layers[0].ssm
    A, steps = layer.A_log.exp(), torch.nn.functional.softplus(layer.dt_bias)
    assert 1 <= A.min() < 1.1 < 15.9 < A.max() <= 16
    assert A.mean().item() == pytest.approx(8.5, rel=0.05)
    assert 1e-3 <= steps.min() * 1.0001 < 1.1e-3 < 0.09 < steps.max() <= 0.10001
    assert steps.log().mean().item() == pytest.approx(math.log(1e-2), rel=0.05)
    assert (layer.D == 1).all()
    for convolution in (layer.x_conv, layer.b_conv):
        assert convolution.weight.abs().max() <= 0.5
        assert convolution.weight.std().item() == pytest.approx(12**-0.5, rel=0.1)
    assert layer.x_conv.bias.std().item() == pytest.approx(12**-0.5, rel=0.1)
    assert layer.x_proj.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.o_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(3), rel=0.03)
    assert (layer.norm.weight == 1).all()
    assert (model.output_norm.weight == 1).all()


def test_init_is_a_function_of_its_generator_alone(config: StateSpaceConfig) -> None:
    for init in ("normal", "torch_default"):
        models = [StateSpace(dataclasses.replace(config, init=init)) for _ in range(2)]
        for noise, model in enumerate(models):
            torch.manual_seed(noise)
            model.init_parameters(torch.Generator().manual_seed(5))
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_flops_count_each_product_of_a_matrix_and_of_the_recurrence(config: StateSpaceConfig) -> None:
    with torch.device("meta"):
        model = StateSpace(config)
    matrices = 3 * (48 * (96 + 96 + 30 + 30 + 12) + 96 * 48 + 4 * (96 + 60)) + 48 * 101
    assert model.flops_per_token(16) == model.flops_per_token(160) == 6 * (matrices + 3 * 3 * 96 * 10)


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (
            {"head_dim": 100},
            ("d_model", "expand", "head_dim"),
            "1536 channels .* not heads of 100 channels; use one of 1, 2",
        ),
        ({"n_groups": 5}, ("n_groups",), "24 heads are not 5 groups of one size; use one of 1, 2, 3, 4, 6, 8, 12, 24"),
        ({"state_size": 0}, ("state_size",), "0 must be positive and finite"),
        ({"norm_eps": math.inf}, ("norm_eps",), "inf must be positive and finite"),
    ],
)
def test_broken_rules_between_fields_say_what_to_do(change: dict, names: tuple, message: str) -> None:
    config = dataclasses.replace(StateSpaceConfig(), **change)
    ((found, _),) = config.problems()
    assert found == names
    with pytest.raises(ValueError, match=message):
        StateSpace(config)


def test_it_is_registered_and_keeps_the_protocol(model: StateSpace) -> None:
    assert MODELS.get("pico_statespace") is StateSpace
    assert isinstance(model, Model)
    assert not list(StateSpaceConfig().problems())
    assert model.anatomy().captured() == ["ssm.value", "ssm.output"]
    modules = dict(model.layers[0].named_modules()) | dict(model.named_modules())
    assert all(part.module in modules for part in model.anatomy().parts.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler, about itself
def test_compiled_it_takes_the_same_step(model: StateSpace, tokens: Tensor) -> None:
    plain = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    compiled = torch.autograd.grad(torch.compile(model.loss)(tokens).nats, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), compiled, plain):
        assert (a - b).norm() < 1e-4 * b.norm(), name
