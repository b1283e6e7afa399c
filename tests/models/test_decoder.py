"""The decoder is the published one: its names, its counts, its arithmetic."""

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from picolm.models import MODELS, Decoder, DecoderConfig, Model, NextToken

PUBLISHED = {  # width, hidden width: parameters, parameters without embeddings
    "tiny": (96, 384, 11_282_784, 1_624_416),
    "small": (384, 1536, 64_595_328, 25_961_856),
    "medium": (768, 3072, 181_095_168, 103_828_224),
    "large": (1536, 6144, 569_808_384, 415_274_496),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_sizes_have_the_published_parameter_counts(size):
    width, hidden, everything, without_embeddings = PUBLISHED[size]
    with torch.device("meta"):
        model = Decoder(DecoderConfig(d_model=width, activation_hidden_dim=hidden))
    roles = model.parameter_roles()
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(counts.values()) == everything
    assert sum(n for name, n in counts.items() if roles[name] != "embedding") == without_embeddings


def test_parameters_have_the_published_names(model):
    block = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "attention_norm"]
    block += ["swiglu.w_0", "swiglu.w_1", "swiglu.w_2", "swiglu_norm"]
    expected = {f"layers.{i}.{name}.weight" for i in range(3) for name in block}
    expected |= {"embedding_proj.weight", "output_norm.weight", "de_embedding_proj.weight"}
    assert set(model.state_dict()) == expected == set(model.parameter_roles())


def test_roles_are_what_optimizers_ask_for(model):
    roles = model.parameter_roles()
    assert roles["embedding_proj.weight"] == roles["de_embedding_proj.weight"] == "embedding"
    assert roles["output_norm.weight"] == roles["layers.0.swiglu_norm.weight"] == "norm"
    assert roles["layers.2.attention.o_proj.weight"] == roles["layers.0.swiglu.w_0.weight"] == "matrix"


@pytest.mark.slow
def test_logits_are_those_of_llama_after_the_permutation_of_q_and_k_rows(model, config, tokens):
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.activation_hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.attention_n_heads,
            num_key_value_heads=config.attention_n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.position_emb_theta},
            tie_word_embeddings=False,
        )
    )
    llama.load_state_dict({llama_name(name): for_llama(name, value, 8) for name, value in model.state_dict().items()})
    with torch.no_grad():
        ours, theirs = model(tokens), llama(tokens).logits
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def llama_name(name: str) -> str:
    if not name.startswith("layers."):
        outer = {"embedding_proj": "model.embed_tokens", "output_norm": "model.norm", "de_embedding_proj": "lm_head"}
        return outer[name.removesuffix(".weight")] + ".weight"
    for ours, theirs in {
        "attention_norm": "input_layernorm",
        "swiglu_norm": "post_attention_layernorm",
        "attention.": "self_attn.",
        "swiglu.w_0": "mlp.gate_proj",
        "swiglu.w_1": "mlp.up_proj",
        "swiglu.w_2": "mlp.down_proj",
    }.items():
        name = name.replace(ours, theirs)
    return "model." + name


def for_llama(name: str, value: torch.Tensor, head_size: int) -> torch.Tensor:
    """Llama in transformers turns (x_f, x_{f + D/2}) where Pico turns (x_2f, x_2f+1)."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return value
    return value.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).flatten(0, 2)


def test_a_later_token_changes_nothing_before_it(model, tokens):
    other = tokens.clone()
    other[:, 100] = (other[:, 100] + 1) % 101
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :100], after[:, :100])
    assert not torch.equal(before[:, 100:], after[:, 100:])


@pytest.mark.slow
def test_loss_and_predictions_are_the_cross_entropy_of_the_logits(model, tokens):
    loss = model.loss(tokens)
    expected = torch.nn.functional.cross_entropy(
        model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    assert loss.tokens == 3 * 130
    torch.testing.assert_close(loss.nats, expected.sum())
    nats, likeliest = model.predictions(tokens)
    torch.testing.assert_close(nats, expected.view(3, 130).detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(likeliest, model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:])
    plain = NextToken.loss(model, tokens), NextToken.predictions(model, tokens)
    torch.testing.assert_close(plain, (loss, (nats, likeliest)), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_plain_loss(model, tokens):
    names = [name for name, _ in model.named_parameters()]
    ours = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    logits = model(tokens[:, :-1]).flatten(0, 1)
    plain = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum")
    for name, a, b in zip(names, ours, torch.autograd.grad(plain, list(model.parameters()))):
        assert (a - b).norm() < 1e-4 * b.norm(), name


def test_a_model_that_knows_nothing_pays_ln_v(model, tokens):
    with torch.no_grad():
        model.de_embedding_proj.weight.zero_()
    loss = model.loss(tokens)
    assert loss.nats.item() / loss.tokens == pytest.approx(math.log(101), rel=1e-6)


def test_two_models_do_not_share_their_positions(config, tokens):
    a = Decoder(config)
    before = a(tokens)
    b = Decoder(dataclasses.replace(config, position_emb_theta=100.0, max_seq_len=131))
    b.load_state_dict(a.state_dict())
    assert not torch.allclose(b(tokens), before)
    assert torch.equal(a(tokens), before)


def test_built_on_the_meta_device_it_is_whole_once_it_has_weights(model, config, tokens):
    with torch.device("meta"):
        other = Decoder(config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(other(tokens), model(tokens))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16-mixed"])
def test_a_training_step_is_the_same_bit_for_bit(model, tokens, autocast):
    def step() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            nats = model.loss(tokens).nats
        return [nats, *torch.autograd.grad(nats, list(model.parameters()))]

    assert all(torch.equal(a, b) for a, b in zip(step(), step()))


def test_under_autocast_the_gradients_are_near_those_of_float32(model, tokens):
    exact = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        nats = model.loss(tokens).nats
    for (name, parameter), a, b in zip(
        model.named_parameters(), torch.autograd.grad(nats, list(model.parameters())), exact
    ):
        assert a.dtype == parameter.dtype
        assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.98, name


def test_hooks_see_the_output_of_every_module_inside_of_the_blocks(model, tokens):
    seen = {}
    for name, module in model.named_modules():
        if name.startswith("layers.") and hasattr(module, "weight"):
            module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out.shape}))
    model.loss(tokens).nats.backward()
    assert seen["layers.1.attention.o_proj"] == (3, 130, 48)
    assert seen["layers.1.attention.v_proj"] == (3, 130, 16)
    assert {name + ".weight" for name in seen} == {n for n, _ in model.named_parameters() if n.startswith("layers.")}
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_normal_init_has_its_standard_deviations(config):
    model = Decoder(dataclasses.replace(config, d_model=192, activation_hidden_dim=512))
    model.init_parameters(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all()
            continue
        expected = 0.02 / math.sqrt(6) if name.endswith(("o_proj.weight", "w_2.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel())


def test_torch_default_init_has_the_distributions_of_torch(config):
    config = dataclasses.replace(config, d_model=192, activation_hidden_dim=512, init="torch_default")
    ours, theirs = Decoder(config), Decoder(config)  # the constructor leaves torch's own initialisation
    ours.init_parameters(torch.Generator().manual_seed(0))
    quantiles = torch.linspace(0, 1, 11)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.03, abs=1e-9), name
        spread = (a.flatten().quantile(quantiles) - b.flatten().quantile(quantiles)).abs()[1:-1].max()
        assert spread <= 0.05 * b.abs().max(), name


def test_init_is_a_function_of_its_generator_alone(config):
    models = [Decoder(config), Decoder(config)]
    for noise, model in enumerate(models):
        torch.manual_seed(noise)
        model.init_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize(("width", "hidden", "expected"), [(96, 384, 15.6e6), (384, 1536, 179.3e6)])
def test_flops_per_token_are_those_of_the_known_shapes(width, hidden, expected):
    with torch.device("meta"):
        model = Decoder(DecoderConfig(d_model=width, activation_hidden_dim=hidden, vocab_size=4096))
    assert model.flops_per_token(512) == pytest.approx(expected, rel=0.003)


def test_more_positions_than_the_context_is_an_error(model):
    with pytest.raises(ValueError, match=r"161 positions, but the context of this model is max_seq_len = 160"):
        model(torch.zeros(1, 161, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        ({"d_model": 100}, ("d_model", "attention_n_heads"), "100 is not divisible by 12 heads.* try 96 or 120"),
        ({"d_model": 84}, ("d_model", "attention_n_heads"), "84 is heads of odd size 7.* try 72 or 96"),
        ({"d_model": 4}, ("d_model", "attention_n_heads"), "4 is not divisible by 12 heads.* try 24"),
        (
            {"attention_n_kv_heads": 5},
            ("attention_n_heads", "attention_n_kv_heads"),
            "12 query heads cannot share 5 key-value heads evenly; use one of 1, 2, 3, 4, 6, 12",
        ),
        ({"n_layers": 0}, ("n_layers",), "0 must be positive and finite"),
        ({"norm_eps": math.inf}, ("norm_eps",), "inf must be positive and finite"),
    ],
)
def test_broken_rules_between_fields_say_what_to_do(change, names, message):
    config = dataclasses.replace(DecoderConfig(), **change)
    ((found, _),) = config.problems()
    assert found == names
    with pytest.raises(ValueError, match=message):
        Decoder(config)


def test_the_published_sizes_break_no_rule():
    assert not list(DecoderConfig().problems())


def test_pydantic_holds_the_configuration_to_its_fields():
    adapter = TypeAdapter(DecoderConfig)
    assert adapter.validate_python({"d_model": 96}) == DecoderConfig(d_model=96)
    with pytest.raises(ValidationError, match="n_layer\n"):
        adapter.validate_python({"n_layer": 3})
    described = adapter.json_schema()["properties"]
    assert all(described[field.name].get("description") for field in dataclasses.fields(DecoderConfig))


def test_it_is_registered_and_keeps_the_protocol(model):
    assert MODELS.get("pico_decoder") is Decoder
    assert isinstance(model, Model)


@pytest.mark.slow
def test_importing_the_models_does_not_import_transformers():
    check = "import sys, picolm.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the compiler, about itself
def test_compiled_it_takes_the_same_step(model, tokens):
    plain = torch.autograd.grad(model.loss(tokens).nats, list(model.parameters()))
    compiled = torch.autograd.grad(torch.compile(model.loss)(tokens).nats, list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), compiled, plain):
        assert (a - b).norm() < 1e-4 * b.norm(), name
