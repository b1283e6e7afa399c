"""A run of masked diffusion keeps the promises of every run: repeatable, captured as it happened, and the same in any cut."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fox import STEP
from tests.train.test_loop import digests, kill_at

from picolm.address import Address
from picolm.data.tokenizer import load_tokenizer
from picolm.errors import PicoError
from picolm.formats import export
from picolm.models import Noise
from picolm.observe.config import Observe
from picolm.observe.observed import observers
from picolm.observe.subject import Subject
from picolm.store import Run
from picolm.train import noise, run_training
from picolm.train.evaluate import Evaluation, evaluate
from picolm.train.evaluation_config import Evaluation as Settings
from picolm.train.inspection import batch_at
from picolm.train.job import Due
from picolm.train.replay import replay
from picolm.train.sample import load_model, sample
from picolm.train.text import Text

Train = Callable[..., Run]
MODEL = "model.model_type=pico_diffusion"

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("masking", ["exact", "by_time"])
def test_an_interrupted_run_ends_with_the_same_bytes_and_replays_to_them(
    train: Train, make_config: Any, monkeypatch: pytest.MonkeyPatch, masking: str
) -> None:
    options = (MODEL, f"model.masking={masking}", "training.max_steps=12", "checkpointing.save_every_n_steps=6")
    whole = train(*options, "checkpointing.run_name=whole")
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        assert run_training(make_config(*options)) != 0
    continued = train(*options)
    assert digests(continued, 12) == digests(whole, 12)
    assert continued.evaluation(12) == whole.evaluation(12)
    verdict = replay(whole, [8], kinds=Due(), verify=True)
    assert verdict.identical
    assert verdict.compared


def test_capture_changes_no_byte_and_accumulation_changes_rounding_only(train: Train) -> None:
    watched = train(MODEL, "checkpointing.run_name=watched", "checkpointing.learning_dynamics.positions=all")
    blind = train(MODEL, "checkpointing.run_name=blind", "checkpointing.learning_dynamics.what=[]")
    assert digests(watched, 6) == digests(blind, 6)
    cut = train(MODEL, "checkpointing.run_name=cut", "training.optimization.gradient_accumulation_steps=4",
                "checkpointing.learning_dynamics.positions=all")  # fmt: skip
    for address in watched[6].select(kind="weights") + watched[0].select(kind="gradients"):
        step = 6 if address.kind == "weights" else 0
        torch.testing.assert_close(cut[step][address], watched[step][address], rtol=1e-3, atol=1e-5)


def test_the_stored_gradient_trained_the_model_and_is_that_of_the_stated_noise(train: Train) -> None:
    run = train(
        MODEL, "checkpointing.learning_dynamics.what=[gradients]", "training.optimization.optimizer=sgd",
        "training.optimization.grad_clip_norm=null", "training.optimization.weight_decay=0",
        "training.optimization.lr=1.0", "checkpointing.save_every_n_steps=1",
        "checkpointing.learning_dynamics.layer_suffixes=[q_proj, k_proj, v_proj, o_proj, w_0, w_1, w_2, attention_norm,"
        " swiglu_norm, output_norm, embedding_proj, de_embedding_proj]",
    )  # fmt: skip
    assert len(run[0].select(kind="gradients", split="train")) == len(run[0].select(kind="weights"))
    for step in (0, 4):
        before, after = run[step], run[step + 1]
        model = load_model(run, step)
        tokens_RS = torch.tensor(before.rows("train")["input_ids"].to_pylist())
        loss = model.loss(tokens_RS, noise.of_training(42, step, list(range(len(tokens_RS))), len(tokens_RS)))
        (loss.nats / loss.tokens).backward()
        for address in before.select(kind="gradients", split="train"):
            weights = Address("weights", "", address.module)
            implied = (before[weights].double() - after[weights].double()) / before.meta["learning_rate"]
            rounding = 2**-23 * before[weights].abs().max().double() / before.meta["learning_rate"]
            assert (implied - before[address].double()).abs().max() <= rounding, address
            again = dict(model.named_parameters())[f"{address.module}.weight"].grad
            torch.testing.assert_close(again, before[address], rtol=1e-4, atol=1e-6)
    mask = run[0][Address("gradients", "train", "embedding_proj")][-1]
    assert mask.any()


def test_captures_are_of_rows_in_which_nothing_is_hidden_and_observation_repeats_them(train: Train) -> None:
    run = train(MODEL, "checkpointing.learning_dynamics.positions=all")
    for step in run:
        checkpoint, model = run[step], load_model(run, step)
        for split in ("train", "val"):
            tokens_RS = torch.tensor(checkpoint.rows(split)["input_ids"].to_pylist())
            for address in checkpoint.select(kind="activations", split=split):
                seen: list[torch.Tensor] = []
                hook = model.get_submodule(address.module).register_forward_hook(
                    lambda m, i, out, seen=seen: seen.append(out)
                )
                with torch.no_grad():
                    model(tokens_RS[:, :-1])
                hook.remove()
                torch.testing.assert_close(checkpoint[address], seen[0], rtol=1e-5, atol=1e-5)
    asked = Observe(what=("activations", "gradients"), positions="all")
    (observer,) = observers(asked, {"toy": run}).values()
    seen_there = observer.subject.at(run[6]).tensors(observer.rows, observer.addresses)
    stored = run[6].select(split="val")
    assert set(stored) == set(seen_there)
    assert all(torch.equal(run[6][address], seen_there[address]) for address in stored)


def test_a_stated_noise_level_is_part_of_the_address_and_hides_that_share(train: Train) -> None:
    run = train(MODEL, "training.optimization.lr=1e-30")
    masks = {}
    for percent in (25, 50):
        asked = Observe(what=("activations",), positions="all", modules=("embedding",), hidden=percent)
        (observer,) = observers(asked, {"toy": run}).values()
        (address,) = observer.addresses
        assert address == Address("activations", f"val_hidden_{percent}", "embedding_proj")
        found = [observer.at(run[step])[address] for step in (0, 6)]
        assert torch.equal(*found)  # the same tokens at every step
        mask_H = run[0][Address("weights", "", "embedding_proj")][-1]
        masks[percent] = (found[0] == mask_H).all(-1)
        assert not masks[percent][:, 0].any()
        assert (masks[percent].sum(-1) == round(percent / 100 * 15)).all()
    assert (masks[25] <= masks[50]).all()
    assert not torch.equal(masks[50][0], masks[50][1])
    subject = observer.subject.at(run[6])
    assert subject.logits(observer.rows).shape[-1] == 64
    with pytest.raises(PicoError, match="predicts hidden tokens at their own positions, and none is hidden"):
        subject.logits(replace(observer.rows, hidden=0))
    with pytest.raises(PicoError, match="has no mask; only a diffusion model hides tokens"):
        observers(asked, {"toy": train("checkpointing.run_name=decoder")})
    assert "not of 50 % hidden" in next(Observe(what=("gradients",), hidden=50).problems())[1]


def test_noise_of_held_out_rows_belongs_to_the_row(train: Train) -> None:
    """With a learning rate of almost 0, their gradients at two steps are those of the same masks."""
    run = train(MODEL, "training.optimization.lr=1e-30", "training.optimization.weight_decay=0")
    for split, same in (("val", True), ("train", False)):
        address = run[0].select(kind="gradients", split=split)[0]
        assert torch.equal(run[0][address], run[6][address]) is same


def test_a_bound_is_logged_as_one_and_exact_losses_of_tokens_are_those_of_the_definition(train: Train) -> None:
    run = train(MODEL, "checkpointing.save_every_n_steps=3")
    entry = next(entry for entry in run.metrics() if "train/loss" in entry)
    assert entry["train/bound_nats_per_token"] == entry["train/loss"]
    assert not {"train/perplexity", "train/bits_per_byte"} & set(entry)
    assert not [name for name in run.evaluation(6) or {} if name.endswith("/nats_per_token")]
    assert (run.evaluation(3) or {})["paloma_bound/draws"] == 8
    assert (run.evaluation(6) or {})["paloma_bound/draws"] == 64
    seen = batch_at(run, 3, rows=2, loss=True)
    model = load_model(run, 3)
    row_S = seen.rows.tokens_RS[1]
    state_TS = row_S.repeat(len(row_S) - 1, 1)
    for place in range(1, len(row_S)):
        state_TS[place - 1, place:] = model.mask
    with torch.no_grad():
        log_p_TV = torch.stack([model(state_TS)[place - 1, place] for place in range(1, len(row_S))]).log_softmax(-1)
    expected_T = -log_p_TV.gather(-1, row_S[1:, None])[:, 0]
    assert seen.before_RT is not None
    torch.testing.assert_close(seen.before_RT[1].float(), expected_T, rtol=1e-4, atol=1e-5)


def test_probes_of_the_next_token_refuse_it_with_the_reason(train: Train) -> None:
    subject = Subject(train(MODEL))
    with pytest.raises(PicoError, match=r"predicts hidden tokens from both sides"):
        subject.require("logits")
    assert subject.likelihood == "bound"


@pytest.mark.filterwarnings("ignore")  # of torch, about its own tracing
def test_a_compiled_loss_is_the_loss_to_rounding() -> None:
    from picolm.models import Diffusion, DiffusionConfig

    model = Diffusion(DiffusionConfig(d_model=24, n_layers=2, attention_n_heads=4, attention_n_kv_heads=2,
                                      activation_hidden_dim=48, vocab_size=64, max_seq_len=16))  # fmt: skip
    model.init_parameters(torch.Generator().manual_seed(0))
    compiled = torch.compile(type(model).loss, dynamic=False, backend="eager")
    rows = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    frames = []
    for step in range(12):  # more numbers of hidden tokens than graphs that may be kept
        seeds = [100 * step + row for row in range(4)]
        torch.testing.assert_close(compiled(model, rows, Noise(seeds)).nats, model.loss(rows, Noise(seeds)).nats)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert frames[-1] == frames[0]  # nothing is compiled for another number of them


@pytest.fixture
def lab(make_run: Any) -> Run:
    """A run with a tokenizer and one step of a model of large weights."""
    run: Run = make_run(model_type="pico_diffusion", max_seq_len=63)
    return run


def exact_nats(run: Run, sentence: str) -> float:
    """From left to right, by hand: no batch, no padding, the logits of `forward`."""
    model = load_model(run)
    tokens = torch.tensor([[0, *load_tokenizer(run.step_path(STEP)).encode(sentence).ids]])
    total, state = 0.0, tokens.clone()
    state[:, 1:] = model.mask
    for place in range(1, tokens.shape[1]):
        with torch.no_grad():
            total -= model(state)[0, place].double().log_softmax(-1)[tokens[0, place]].item()
        state[:, place] = tokens[:, place]
    return total


def measured(run: Run, name: str, settings: dict[str, Any]) -> dict[str, float]:
    text, chosen = Text(run.step_path(STEP) / "tokenizer.json", 320), Settings.model_validate(settings)
    return evaluate(
        (name,), Evaluation(load_model(run), None, 4, text.token_bytes_V, 0, 1, torch.device("cpu"), text, chosen)
    )


def test_minimal_pairs_and_tasks_are_judged_by_exact_nats(lab: Run, tmp_path: Path) -> None:
    sentences = ["the fox runs", "a fox run over the hill", "the dog and a fox", "hills the over", "fox"]
    pairs = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairwise([*sentences, sentences[0]])]
    nats = [exact_nats(lab, sentence) for sentence in sentences]
    right = [good < bad for good, bad in pairwise([*nats, nats[0]])]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for size in (1, 64):
        found = measured(lab, "minimal_pairs", {"minimal_pairs": {"path": str(tmp_path), "batch_size": size}})
        assert found == {"minimal_pairs": sum(right) / 5}
    (tmp_path / "data").mkdir()
    questions = [{"choices": sentences}]
    (tmp_path / "data" / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in questions))
    (tmp_path / "task.yaml").write_text(f"""
task: lab_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data/questions.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: choices
doc_to_target: {int(np.argmin(nats))}
metric_list: [{{metric: acc}}]
""")
    found = measured(lab, "lm_eval", {"lm_eval": {"tasks": ["lab_choices"], "include_path": str(tmp_path)}})
    assert found["lm_eval/lab_choices/acc"] == 1


def test_text_is_written_in_any_order_and_gaps_are_filled(lab: Run, fox: Run) -> None:
    place, tokenizer = str(lab.path), load_tokenizer(lab.step_path(STEP))
    for options in ({}, {"order": "random", "steps": 3}, {"order": "left_to_right", "block_length": 4}):
        written = sample(place, None, "the fox", max_new_tokens=8, seed=1, temperature=0.8, **options)
        assert written.startswith("the fox")
        assert written == sample(place, None, "the fox", max_new_tokens=8, seed=1, temperature=0.8, **options)
    filled = sample(place, None, "the fox", max_new_tokens=5, seed=1, temperature=0.0, suffix=" runs")
    assert filled.startswith("the fox")
    assert filled.endswith(" runs")
    ids = [*tokenizer.encode("the fox").ids, *[320] * 5, *tokenizer.encode(" runs").ids]
    assert filled == tokenizer.decode(load_model(lab).infill(torch.tensor([ids]))[0].tolist())
    with pytest.raises(PicoError, match=r"order, suffix: only a diffusion model can be asked for that"):
        sample(str(fox.path), None, "the fox", max_new_tokens=5, seed=1, order="random", suffix="x")
    with pytest.raises(PicoError, match="do not fit into a context of 64"):
        sample(place, None, "the fox", max_new_tokens=64, seed=1)
    with pytest.raises(PicoError, match="tokens; this model takes between 1 and 64"):
        sample(place, None, "the fox", max_new_tokens=63, seed=1, suffix=" runs")


REFUSED = {
    "llama": "Diffusion has no Llama equivalent: only pico_decoder computes",
    "gguf": "the llada of llama.cpp has a logit for every token that it reads",
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_refuse_it_with_the_reason(lab: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(PicoError, match=REFUSED[name]):
        export(lab, STEP, name, tmp_path / "out")
    export(lab, STEP, "torch", tmp_path / "plain")
