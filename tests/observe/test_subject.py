"""What is observed is what plain transformers computes, and what our own training captured, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.readers.conftest import make
from torch import Tensor

from picolm.address import Address
from picolm.errors import PicoError, StoreError
from picolm.observe.config import Observe
from picolm.observe.observed import observers
from picolm.observe.rows import Rows, rows_of
from picolm.observe.subject import Subject
from picolm.readers.families import FAMILIES
from picolm.store import Run

KINDS = ("activations", "gradients")


def rows(tokens_RS: Tensor, positions: list[int], has_targets: bool = True) -> Rows:
    return Rows(list(tokens_RS), [positions] * len(tokens_RS), "observed", has_targets, "of a test")


def plainly(place: Path, tokens_RS: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """What transformers gives for 4 rows at a time, with hooks on every module: the answer of the last 4, and activations."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager", dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(
                output[0] if isinstance(output, tuple) else output
            )
        )
    answers = []
    for batch_BS in tokens_RS.split(4):
        answers.append(model(batch_BS[:, :-1], output_attentions=True, use_cache=False))
        nats = torch.nn.functional.cross_entropy(
            answers[-1].logits.flatten(0, 1), batch_BS[:, 1:].flatten(), reduction="sum"
        )
        (nats / tokens_RS[:, 1:].numel()).backward()
    answer = {
        "logits": torch.cat([each.logits for each in answers]),
        "patterns": [torch.cat(of_layer) for of_layer in zip(*(each.attentions for each in answers))],
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
    }
    return answer, {name: torch.cat(outputs) for name, outputs in seen.items() if isinstance(outputs[0], Tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_transformers_answers_as_plain_transformers(family: str, save: Callable[..., Path]) -> None:
    place = save(make(family), "step7")
    tokens_RS = torch.randint(1, 61, (7, 12), generator=torch.Generator().manual_seed(1))
    answer, seen = plainly(place / "step7", tokens_RS)
    subject = Subject(Run.open(place))
    asked = rows(tokens_RS, list(range(11)))
    names = [name for name in subject.architecture.modules if name in seen and seen[name].shape[:2] == (7, 11)]
    assert len(names) > 15
    wanted = [Address("activations", "observed", name) for name in names]
    parameters = [name.removesuffix(".weight") for name in answer["gradients"]]
    wanted += [Address("gradients", "observed", name) for name in parameters]
    found = subject.tensors(asked, wanted, 4)
    for name in names:
        assert torch.equal(found[Address("activations", "observed", name)], seen[name]), name
    checkpoint: Any = subject.checkpoint
    for name, gradient in answer["gradients"].items():
        module = name.removesuffix(".weight")
        expected = gradient.T if checkpoint.is_transposed(module) and gradient.ndim == 2 else gradient
        torch.testing.assert_close(found[Address("gradients", "observed", module)], expected, rtol=1e-5, atol=1e-7)
    patterns = subject.patterns(asked, batch_size=4)
    assert [address.layer for address in patterns] == [0, 1]
    assert all(torch.equal(pattern, expected) for pattern, expected in zip(patterns.values(), answer["patterns"]))
    assert torch.equal(subject.logits(asked, 4), answer["logits"])
    nats = -answer["logits"].log_softmax(-1).gather(-1, tokens_RS[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(torch.stack(subject.scores(asked, 4)), nats, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi3", "llama"])
def test_a_part_of_a_matrix_of_three_is_what_its_weight_computes(family: str, save: Callable[..., Path]) -> None:
    """X W^T + b of the part, with W as the checkpoint gives it and x the input of the matrix; the gradient: that of the part."""
    subject = Subject(Run.open(save(make(family), "step7")))
    checkpoint: Any = subject.checkpoint
    asked = rows(torch.randint(1, 61, (3, 9), generator=torch.Generator().manual_seed(1)), [2, 7])
    for role in ("attention.query", "attention.key", "attention.value"):
        module = f"{subject.anatomy.block.format(1)}.{subject.anatomy.parts[role].module}"
        holder, part = subject.architecture.holder(module)
        wanted = [Address(kind, "observed", name) for kind in KINDS for name in {module, holder}]
        inputs: list[Tensor] = []
        body = subject.architecture.body(subject.model)
        hook = body.get_submodule(holder).register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0])
        )
        found = subject.tensors(asked, wanted)
        hook.remove()
        weight = checkpoint[Address("weights", "", module)]
        without = inputs[0][:, [2, 7]].detach() @ weight.T
        activation = found[Address("activations", "observed", module)]
        assert activation.shape == without.shape == (3, 2, len(weight))
        offset = activation - without  # the part of the bias, the same everywhere
        torch.testing.assert_close(offset, offset[:1, :1].expand_as(offset), rtol=0, atol=1e-5)
        gradient = found[Address("gradients", "observed", module)]
        assert gradient.shape == weight.shape
        whole = found[Address("gradients", "observed", holder)]
        pieces = checkpoint.part(whole, part) if part else whole
        assert torch.equal(gradient, pieces)


@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_held_out_captures_are_observed_to_the_last_bit(name: str, runs: dict[str, Path]) -> None:
    run = Run.open(runs[name])
    layers = ("v_proj", "o_proj", "q_proj", "k_proj", "w_2", "embedding_proj")
    asked = Observe(positions=(3, 9, 15), modules=layers)
    observer = observers(asked, {name: run})[name]
    compared = 0
    for step in run.steps:
        found = observer.subject.at(run[step]).tensors(observer.rows, observer.addresses)
        stored = run[step].select(split="val")
        assert set(stored) == set(found)
        for address in stored:
            assert torch.equal(found[address], run[step][address]), (step, address)
            compared += 1
    assert compared == len(run.steps) * 2 * (5 * 2 + 1)


def test_positions_give_the_shapes(runs: dict[str, Path]) -> None:
    subject = Subject(Run.open(runs["narrow"]))
    tokens_RS = torch.randint(0, 64, (5, 11))
    wanted = [Address("activations", "observed", "layers.0.attention.v_proj")]
    shapes = {
        (10,): (5, 12),
        (0, 3): (5, 2, 12),
        tuple(range(10)): (5, 10, 12),
    }
    for positions, shape in shapes.items():
        if max(positions) < 10:
            assert subject.tensors(rows(tokens_RS, list(positions)), wanted)[wanted[0]].shape == shape
    ragged = Rows([tokens_RS[0], tokens_RS[1, :6]], [[0, 1, 9], [4]], "observed", True, "of a test")
    found = subject.tensors(ragged, wanted)[wanted[0]]
    assert found.shape == (4, 12)
    alone = subject.tensors(Rows([tokens_RS[1, :6]], [[4]], "observed", True, ""), wanted)[wanted[0]]
    torch.testing.assert_close(found[3:], alone)


def test_a_prompt_is_read_to_its_last_token(runs: dict[str, Path]) -> None:
    subject = Subject(Run.open(runs["narrow"]))
    prompt = rows(torch.tensor([[5, 6, 7]]), [2], has_targets=False)
    expected = subject.model(torch.tensor([[5, 6, 7]]))[:, 2].detach()
    assert torch.equal(subject.logits(prompt), expected)
    with pytest.raises(PicoError, match="prompts have no tokens to predict"):
        subject.scores(prompt)
    with pytest.raises(PicoError, match="prompts have no tokens to predict"):
        subject.tensors(prompt, [Address("gradients", "observed", "layers.0.attention.v_proj")])


def test_a_pattern_is_a_distribution_over_the_past(runs: dict[str, Path]) -> None:
    subject = Subject(Run.open(runs["wide"]))
    patterns = subject.patterns(rows(torch.randint(0, 64, (3, 13)), list(range(12))), [1])
    (address,) = patterns
    assert str(address) == "patterns/observed/layers.1.attention"
    pattern_RNTT = patterns[address]
    assert pattern_RNTT.shape == (3, 4, 12, 12)
    torch.testing.assert_close(pattern_RNTT.sum(-1), torch.ones(3, 4, 12))
    assert pattern_RNTT.triu(1).count_nonzero() == 0


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 4))
def test_batches_hold_every_row_once_in_order_and_one_length(lengths: list[int], size: int) -> None:
    asked = Rows([torch.zeros(length) for length in lengths], [[0]] * len(lengths), "observed", True, "")
    batches = asked.batches(size)
    assert [row for batch in batches for row in batch] == list(range(len(lengths)))
    assert all(len(batch) <= size and len({lengths[row] for row in batch}) == 1 for batch in batches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "it lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "it holds model.layers.1."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and there are 21 tensors"),
        ({"hidden_size": 48}, "describes model.embed_tokens.weight as \\[61, 48\\]; the file holds \\[61, 24\\]"),
        ({"model_type": "of_our_own"}, "transformers does not know this model"),
        ({"num_attention_heads": 5}, "transformers does not know this model .*not a multiple of the number"),
        ({"hidden_act": "of_our_own"}, "transformers cannot build this model"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_that_of_the_weights_is_a_message(
    save: Callable[..., Path],
    change: dict[str, Any],
    message: str,
) -> None:
    import json

    place = save(make("llama"), "step7")
    file = place / "step7" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((PicoError, StoreError), match=message):
        Subject(Run.open(place))


def test_rows_that_cannot_be_read_are_messages(runs: dict[str, Path], tmp_path: Path) -> None:
    import numpy as np

    run = Run.open(runs["narrow"])
    subject = Subject(run)
    for shape, content, message in (
        ((3, 20), "rows", "a row has 19 inputs, and the model of narrow reads at most 16"),
        ((3, 1), "rows", "gives no rows of at least 2 token"),
        ((4,), "rows", r"holds int64 \[4\]; expected whole numbers \[rows, tokens\]"),
    ):
        np.save(tmp_path / content, np.zeros(shape, np.int64))
        with pytest.raises(PicoError, match=message):
            rows_of(Observe(rows=str(tmp_path / "rows.npy")), {"narrow": run}, {"narrow": 16})
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(PicoError, match=r"bad\.npy: cannot be read as rows of token ids"):
        rows_of(Observe(rows=str(tmp_path / "bad.npy")), {"narrow": run}, {"narrow": 16})
    with pytest.raises(PicoError, match="there is no position 16 in a row of 16 inputs"):
        rows_of(Observe(positions=(16,)), {"narrow": run}, {"narrow": 16})
    with pytest.raises(PicoError, match="token id 64; the vocabulary of narrow has 64"):
        subject.logits(rows(torch.tensor([[1, 64, 2]]), [0]))
    with pytest.raises(PicoError, match=r"modules: 'v_prof' matches no module; did you mean 'v_proj'"):
        observers(Observe(modules=("v_prof",)), {"narrow": run})
    with pytest.raises(PicoError, match=r"de_embedding_proj ran 0 times in one pass.*ask for logits"):
        subject.tensors(rows(torch.tensor([[1, 3, 2]]), [0]), [Address("activations", "observed", "de_embedding_proj")])
