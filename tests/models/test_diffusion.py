"""Masked diffusion against a table that can be enumerated, and a small network against the definitions, counted out."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from picolm.models import Decoder, Diffusion, DiffusionConfig, Noise, Piece, anatomy_of
from picolm.models.generate import NotFinite
from picolm.models.masked import bound, fill, hide_by_time, hide_exactly, left_to_right, nats_along

KNOWN = np.load(Path(__file__).with_name("reference") / "diffusion.npz")
SEQUENCES = torch.as_tensor(KNOWN["sequences"])
ALL = torch.ones_like(SEQUENCES, dtype=torch.bool)
PERMUTATIONS = list(itertools.permutations(range(4)))


class Table:
    """A denoiser that looks up its probabilities."""

    mask = 3

    def __init__(self, name: str):
        self.p = torch.as_tensor(KNOWN[f"table_{name}"])

    def logits_at(self, tokens_BT: Tensor, where_BT: Tensor) -> Tensor:
        return self.p[(tokens_BT * torch.tensor([64, 16, 4, 1])).sum(-1)].log()[where_BT]

    def nats_at(self, tokens_BT: Tensor, where_BT: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
        logits_PV = self.logits_at(tokens_BT, where_BT)
        return -logits_PV.gather(-1, targets_P[:, None])[:, 0], logits_PV.argmax(-1) == targets_P


class Stated(Noise):
    """Noise whose numbers are stated, for one row each."""

    def __init__(self, levels: Any, orders: Sequence[Any] = (), uniform: Any = None):
        super().__init__([0])
        self.levels, self.orders, self.numbers = torch.as_tensor(levels, dtype=torch.float64), orders, uniform

    def stratified(self) -> Tensor:
        return self.levels

    def permutations(self, lengths: Sequence[int]) -> list[Tensor]:
        return [torch.tensor(order) for order in self.orders]

    def uniform(self, *shape: int) -> Tensor:
        return torch.as_tensor(self.numbers)


def every_draw() -> Stated:
    """Each number of hidden tokens with each permutation: 96 draws that are equally likely."""
    levels = [(k - 0.5) / 4 for k in range(1, 5) for _ in PERMUTATIONS]
    return Stated(levels, PERMUTATIONS * 4)


@pytest.mark.parametrize("name", ["exact", "noisy"])
def test_mean_and_variance_of_the_bound_over_all_draws_are_the_known_ones(name: str) -> None:
    for number, tokens_T in enumerate(SEQUENCES):
        tokens_BT = tokens_T.expand(96, 4)
        _, sums_1B = bound(Table(name), tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), every_draw(), 1)
        assert sums_1B.mean().item() == pytest.approx(KNOWN[f"{name}/fixed_k_mean"][number], abs=1e-12)
        assert sums_1B.var(correction=0).item() == pytest.approx(KNOWN[f"{name}/fixed_k_variance"][number], abs=1e-11)


@pytest.mark.parametrize("least", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("name", ["exact", "noisy"])
def test_masks_by_time_have_the_known_mean_with_its_bias_and_variance(name: str, least: float) -> None:
    """Patterns are counted out, and the time is integrated over ln p, where 1 / p is smooth."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    p_G = np.exp((1 - nodes) / 2 * math.log(least))
    of_time_G = weights / 2 * p_G * -math.log(least) / (1 - least)
    patterns = torch.tensor(list(itertools.product([False, True], repeat=4)))
    levels = (np.repeat(p_G, 16) - least) / (1 - least)
    where_BT, weights_B = hide_by_time(
        torch.ones(len(levels), 4, dtype=torch.bool), Stated(levels, uniform=(~patterns).double().repeat(60, 1)), least
    )
    assert torch.equal(where_BT, patterns.repeat(60, 1))
    p_B = torch.as_tensor(np.repeat(p_G, 16))
    hidden_B = where_BT.sum(-1)
    chance_B = torch.as_tensor(np.repeat(of_time_G, 16)) * p_B**hidden_B * (1 - p_B) ** (4 - hidden_B)
    for number in (0, 17, 80):
        tokens_BT = SEQUENCES[number].expand(len(levels), 4)
        nats_P, _ = Table(name).nats_at(tokens_BT.masked_fill(where_BT, 3), where_BT, tokens_BT[where_BT])
        sums_B = torch.zeros(where_BT.shape, dtype=torch.float64).masked_scatter(where_BT, nats_P).sum(-1) * weights_B
        mean = (chance_B * sums_B).sum().item()
        assert mean == pytest.approx(KNOWN[f"{name}/by_t_{least}_mean"][number], rel=1e-8)
        variance = (chance_B * (sums_B - mean) ** 2).sum().item()
        assert variance == pytest.approx(KNOWN[f"{name}/by_t_{least}_variance"][number], rel=1e-7)


@pytest.mark.parametrize("name", ["exact", "noisy"])
def test_exact_nats_along_every_order_are_the_known_ones_and_sum_to_1(name: str) -> None:
    found = []
    for order in PERMUTATIONS:
        ranks_T = torch.tensor(order).argsort()  # an order lists positions, a rank is the place of a position in it
        nats_NT, _ = nats_along(Table(name), SEQUENCES, ALL, ranks_T.expand(81, 4))
        found.append(nats_NT.sum(-1))
    found_NO = torch.stack(found, -1)
    np.testing.assert_allclose(found_NO, KNOWN[f"{name}/orders_nats"], atol=1e-12)
    torch.testing.assert_close((-found_NO).exp().sum(0), torch.ones(24, dtype=torch.float64))
    np.testing.assert_allclose(found_NO.mean(-1), KNOWN[f"{name}/fixed_k_mean"], atol=1e-12)
    nats_NT, _ = nats_along(Table(name), SEQUENCES, ALL, left_to_right(ALL))
    np.testing.assert_allclose(nats_NT.sum(-1), KNOWN[f"{name}/left_to_right_nats"], atol=1e-12)


def check_law(law: np.ndarray, tokens_NT: Tensor) -> None:
    """By chi-square, over the sequences that are expected at least 5 times."""
    counts = np.bincount((tokens_NT * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81)
    expected = law * len(tokens_NT)
    often = expected >= 5
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
    statistic = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    freedom = often.sum()
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8


@pytest.mark.parametrize("name", ["exact", "noisy"])
@pytest.mark.parametrize(
    ("order", "steps", "law"),
    [
        *(("random", steps, f"law_{steps}") for steps in (1, 2, 4, 16)),
        ("random", None, "random_order_nats"),
        ("left_to_right", None, "left_to_right_nats"),
        ("confident", None, "confident_first_nats"),
        ("confident", 4, "confident_first_nats"),
        ("confident", 1, "law_1"),
    ],
)
def test_samples_have_the_law_that_is_known(name: str, order: Any, steps: int | None, law: str) -> None:
    known = KNOWN[f"{name}/{law}"]
    masks_NT = torch.full((20_000, 4), 3)
    generator = torch.Generator().manual_seed(1)
    tokens_NT = fill(Table(name), masks_NT, steps=steps, order=order, temperature=1.0, generator=generator)
    check_law(known if law.startswith("law") else np.exp(-known), tokens_NT)


def test_one_token_at_a_time_from_exact_conditionals_is_the_joint_also_in_blocks() -> None:
    masks_NT = torch.full((20_000, 4), 3)
    for options in ({"order": "random"}, {"order": "confident", "block_length": 2}, {"order": "left_to_right"}):
        generator = torch.Generator().manual_seed(2)
        tokens_NT = fill(Table("exact"), masks_NT, temperature=1.0, generator=generator, **options)
        check_law(KNOWN["joint"], tokens_NT)


def test_a_gap_is_filled_given_both_sides() -> None:
    """Of the exact table, by the conditional distribution of the joint."""
    joint = KNOWN["joint"].reshape(3, 3, 3, 3)
    gaps_NT = torch.tensor([2, 3, 3, 0]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(3)
    filled_NT = fill(Table("exact"), gaps_NT, order="random", temperature=1.0, generator=generator)
    law = np.zeros((3, 3, 3, 3))
    law[2, :, :, 0] = joint[2, :, :, 0] / joint[2, :, :, 0].sum()
    check_law(law.flatten(), filled_NT)


# A network that can be counted out: 3 tokens, of which 4 are predicted.


def network(**changes: Any) -> Diffusion:
    shape = {"d_model": 8, "n_layers": 2, "vocab_size": 3, "max_seq_len": 4, "attention_n_heads": 2,
             "attention_n_kv_heads": 1, "activation_hidden_dim": 16}  # fmt: skip
    model = Diffusion(DiffusionConfig(**{**shape, **changes})).double()
    model.init_parameters(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(30.0)
    return model.eval()


def after(first: int) -> Tensor:
    """All rows of the network that begin so, [81, 5]."""
    return torch.cat((torch.full((81, 1), first), SEQUENCES), 1)


def counted_nats(model: Diffusion, tokens_NS: Tensor, order: Sequence[int]) -> Tensor:
    """-ln p along an order of positions 1 … 4, from `forward` alone, [N]."""
    total_N = torch.zeros(len(tokens_NS), dtype=torch.float64)
    state_NS = tokens_NS.clone()
    state_NS[:, 1:] = 3
    for position in order:
        log_p_NV = model(state_NS)[:, position].log_softmax(-1)
        total_N -= log_p_NV.gather(-1, tokens_NS[:, position, None])[:, 0]
        state_NS[:, position] = tokens_NS[:, position]
    return total_N


@torch.no_grad()
def test_exact_scores_of_a_network_sum_to_1_and_are_those_of_the_definition() -> None:
    model = network()
    for first in range(3):
        rows = after(first)
        score = model.score([Piece(row, 4) for row in rows], draws=0)
        assert score.exact
        assert score.draws == 0
        assert not score.standard_error.any()
        nats_N = torch.stack(score.nats).sum(-1)
        assert (-nats_N).exp().sum().item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(nats_N, counted_nats(model, rows, [1, 2, 3, 4]), rtol=0, atol=1e-12)
        assert nats_N.std() > 0.3  # it is no uniform model
        greedy = model.generate(rows[:1, :1], 4, order="left_to_right")
        assert score.likeliest is not None
        assert torch.equal(rows[score.likeliest], greedy)


@torch.no_grad()
def test_the_bound_of_a_network_over_all_draws_is_the_mean_of_all_orders_and_is_one() -> None:
    model, rows = network(), after(1)
    orders_NO = torch.stack([counted_nats(model, rows, [p + 1 for p in order]) for order in PERMUTATIONS], -1)
    asked_BS = torch.tensor([False, True, True, True, True]).expand(96, 5)
    for number in (0, 5, 44, 80):
        _, sums_1B = bound(model, rows[number].expand(96, 5), asked_BS, every_draw(), 1)
        assert sums_1B.mean().item() == pytest.approx(orders_NO[number].mean().item(), abs=1e-12)
        assert sums_1B.mean() > -torch.logsumexp(-orders_NO[number], 0) + math.log(24)  # Jensen


@torch.no_grad()
def test_a_score_of_many_draws_is_the_bound_within_its_standard_error() -> None:
    model, rows = network(), after(2)
    orders_NO = torch.stack([counted_nats(model, rows, [p + 1 for p in order]) for order in PERMUTATIONS], -1)
    score = model.score([Piece(row, 4) for row in rows], draws=400, noise=Noise(range(81)))
    assert not score.exact
    assert score.draws == 400
    assert score.likeliest is None
    off_N = (torch.stack(score.nats).sum(-1) - orders_NO.mean(-1)) / score.standard_error
    assert 0.8 < off_N.std() < 1.2
    assert off_N.abs().max() < 4.5
    assert model.score([Piece(rows[0], 4)], draws=1, noise=Noise([0])).standard_error.isnan().all()


@pytest.mark.parametrize("masking", ["exact", "by_time"])
def test_the_loss_and_its_gradient_are_those_of_plain_autograd(masking: str) -> None:
    model = network(masking=masking, masking_least=0.2)
    rows = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(0))
    loss = model.loss(rows, Noise(range(6)))
    assert loss.tokens == 24
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss.nats, parameters)
    asked = torch.ones_like(rows, dtype=torch.bool)
    asked[:, 0] = False
    hidden = hide_exactly(asked, Noise(range(6))) if masking == "exact" else hide_by_time(asked, Noise(range(6)), 0.2)
    assert not hidden.where_BT[:, 0].any()
    logits = model(rows.masked_fill(hidden.where_BT, 3))
    terms = cross_entropy(logits.flatten(0, 1), rows.flatten(), reduction="none").view(6, 5) * hidden.where_BT
    expected = (terms.sum(-1) * hidden.weights_B).sum()
    torch.testing.assert_close(loss.nats.double(), expected.detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_batch_in_which_chance_hides_nothing_costs_nothing() -> None:
    model = network(masking="by_time", masking_least=1e-9)
    model._hide = lambda *given: hide_by_time(torch.zeros(2, 5, dtype=torch.bool), Noise([1, 2]), 0.5)  # type: ignore[method-assign, assignment]
    loss = model.loss(torch.zeros(2, 5, dtype=torch.long), Noise([1, 2]))
    loss.nats.backward()
    assert loss.nats == 0
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("draws", [0, 3])
def test_neither_padding_nor_company_changes_a_score(draws: int) -> None:
    model = network(max_seq_len=40).float()
    generator = torch.Generator().manual_seed(4)
    pieces = [Piece(torch.randint(0, 3, (length,), generator=generator), scored)
              for length, scored in ((41, 40), (9, 3), (2, 1), (30, 0), (9, 8))]  # fmt: skip
    together = model.score(pieces, draws=draws, noise=Noise(range(5)))
    for number, piece in enumerate(pieces):
        alone = model.score([piece], draws=draws, noise=Noise([number]))
        assert together.nats[number].shape == (piece.scored,)
        torch.testing.assert_close(together.nats[number], alone.nats[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.standard_error[number], alone.standard_error[0], rtol=1e-4, atol=1e-5)
        assert draws or together.likeliest[number] == alone.likeliest[0]  # type: ignore[index]


@torch.no_grad()
def test_what_is_given_before_a_piece_is_read_and_what_is_scored_is_hidden() -> None:
    """Of the last two tokens, given the others, along both orders of them."""
    model, rows = network(), after(0)
    score = model.score([Piece(row, 2) for row in rows], draws=0)
    state = rows.clone()
    state[:, 3:] = 3
    first = -model(state)[:, 3].log_softmax(-1).gather(-1, rows[:, 3:4])[:, 0]
    state[:, 3] = rows[:, 3]
    second = -model(state)[:, 4].log_softmax(-1).gather(-1, rows[:, 4:])[:, 0]
    torch.testing.assert_close(torch.stack(score.nats), torch.stack((first, second), -1))


def test_levels_of_a_batch_are_one_in_each_stratum_for_any_micro_batches_and_processes() -> None:
    def levels(places: list[int]) -> Tensor:
        return Noise([100 + place for place in places], step_seed=7, places=places, rows=12).stratified()

    whole = levels(list(range(12)))
    assert sorted((whole * 12).long().tolist()) == list(range(12))
    assert torch.equal(torch.cat([levels([3, 0, 7]), levels([11])]), whole[[3, 0, 7, 11]])
    assert not torch.equal((whole * 12).long(), torch.arange(12))
    of_row = torch.stack([Noise([step], step_seed=step, places=[5], rows=12).stratified() for step in range(2000)])
    assert of_row.mean().item() == pytest.approx(0.5, abs=0.03)  # each row has any level, not that of its place
    assert of_row.max() < 1


def test_exactly_k_tokens_are_hidden_and_every_k_is_as_frequent() -> None:
    asked_BT = torch.zeros(4000, 7, dtype=torch.bool)
    asked_BT[:, 2:7] = True
    noise = Noise(range(4000), step_seed=1, places=range(4000), rows=4000)
    where_BT, weights_B = hide_exactly(asked_BT, noise)
    counts_B = where_BT.sum(-1)
    assert not (where_BT & ~asked_BT).any()
    torch.testing.assert_close(weights_B, 5 / counts_B.double())
    assert torch.bincount(counts_B).tolist() == [0, 800, 800, 800, 800, 800]  # strata: no chance is left
    shares_T = where_BT[:, 2:].double().mean(0)
    assert (shares_T - 0.6).abs().max() < 0.04


def test_a_position_sees_those_after_it_and_the_mask_is_no_prediction() -> None:
    model = network()
    one, other = torch.tensor([[0, 1, 2, 0, 1]]), torch.tensor([[0, 1, 2, 0, 2]])
    logits = model(one)
    assert logits.shape == (1, 5, 3)
    assert (logits[:, 0] - model(other)[:, 0]).abs().max() > 1e-3
    assert model.embedding_proj.weight.shape == (4, 8)
    assert model.de_embedding_proj.weight.shape == (3, 8)


def test_it_has_the_parameters_of_the_decoder_and_one_embedding_more() -> None:
    config = network().config
    shape = {name: value for name, value in vars(config).items() if not name.startswith(("masking", "model_type"))}
    decoder, model = Decoder(Decoder.Config(**shape)), Diffusion(config)
    sizes = [{name: p.numel() for name, p in each.named_parameters()} for each in (decoder, model)]
    sizes[0]["embedding_proj.weight"] += 8
    assert sizes[0] == sizes[1]
    assert model.parameter_roles() == decoder.parameter_roles()
    assert anatomy_of(model).parts == anatomy_of(decoder).parts
    assert "both sides" in anatomy_of(model).notes[0]


def test_flops_count_each_product_of_a_row() -> None:
    """Of 4 tokens: 5 positions with 5 keys, and on average the logits of 2.5 of them."""
    model = network()
    body = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers") and p.ndim == 2)
    per_row = 6 * (5 * body + 2 * 2 * 8 * 5 * 5 + 2.5 * 24)
    assert model.flops_per_token(4) == int(per_row / 4)


@torch.no_grad()
def test_text_ends_where_it_says_and_is_as_long_as_asked() -> None:
    model, prompt = network(max_seq_len=20), torch.tensor([[0, 1, 2], [2, 1, 0]])
    for options in ({}, {"steps": 3}, {"block_length": 4}, {"order": "left_to_right", "use_cache": True}):
        written = model.generate(prompt, 12, **options)
        assert written.shape == (2, 15)
        assert torch.equal(written[:, :3], prompt)
        assert (written < 3).all()
    full = model.generate(prompt, 12, temperature=1.0, generator=torch.Generator().manual_seed(1))
    ended = model.generate(prompt, 12, temperature=1.0, eos=2, generator=torch.Generator().manual_seed(1))
    ends = [row.tolist().index(2) if 2 in row else 11 for row in full[:, 3:]]
    assert ended.shape[1] == 4 + max(ends)
    for row, whole, end in zip(ended[:, 3:], full[:, 3:], ends):
        assert torch.equal(row[: end + 1], whole[: end + 1])
        assert (row[end + 1 :] == 2).all()
    blocks = model.generate(prompt, 16, eos=[0, 1, 2], block_length=2)
    assert blocks.shape == (2, 4)  # the first block ends all texts


@torch.no_grad()
def test_greedy_text_with_steps_for_each_token_is_that_without_and_draws_are_repeatable() -> None:
    model, prompt = network(max_seq_len=20), torch.tensor([[0, 1]])
    for order in ("confident", "left_to_right"):
        assert torch.equal(model.generate(prompt, 9, order=order), model.generate(prompt, 9, order=order, steps=9))
    drawn = [model.generate(prompt, 9, temperature=0.8, top_k=2, top_p=0.9, order="random",
                            generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@torch.no_grad()
def test_only_masks_are_filled_in() -> None:
    model = network()
    filled = model.infill(torch.tensor([[0, 3, 1, 3, 2], [1, 1, 1, 1, 1]]))
    assert filled[0, [0, 2, 4]].tolist() == [0, 1, 2]
    assert filled[1].tolist() == [1, 1, 1, 1, 1]
    assert (filled < 3).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.loss(torch.zeros(1, 5, dtype=torch.long)), "needs the noise"),
        (lambda m: m.score([Piece(torch.tensor([1, 2]), 1)], draws=2), "draws=0 gives exact nats"),
        (lambda m: m.score([Piece(torch.tensor([1, 2]), 2)], draws=0), "2 scored tokens of 2: the first one is given"),
        (lambda m: m(torch.zeros(1, 6, dtype=torch.long)), "6 positions, but this model reads max_seq_len"),
        (lambda m: m(torch.zeros(1, 2, dtype=torch.long), object()), "nothing of the earlier ones can be kept"),
        (lambda m: m.generate(torch.tensor([[1]]), 5), "do not fit into a context of 5"),
        (lambda m: m.generate(torch.tensor([[1]]), 2, temperature=-1), "temperature -1"),
        (lambda m: m.generate(torch.tensor([[1]]), 2, order="best"), "order 'best'; use random, confident or"),
        (lambda m: m.generate(torch.tensor([[1]]), 2, steps=0), "both must be at least 1"),
        (lambda m: m.generate(torch.tensor([[1]]), 4, steps=1, block_length=2), "1 steps for 2 blocks of 2"),
        (lambda m: m.infill(torch.tensor([[3, 1]])), "the first token is given, never filled in"),
        (lambda m: network(masking_least=1.0), "masking_least: 1.0 must be below 1"),
    ],
)
def test_what_cannot_be_is_said(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        call(network())


def test_a_network_that_computes_nan_writes_nothing() -> None:
    model = network()
    with torch.no_grad():
        model.output_norm.weight.fill_(math.nan)
    with pytest.raises(NotFinite):
        model.generate(torch.tensor([[1]]), 2)


def test_its_files_travel_and_import_nothing_of_this_package() -> None:
    model = network()
    files = model.modelling_files()
    assert not [name for name, text in files.items() if "picolm" in text]
    using = [name for name, text in files.items() if "from transformers" in text]
    assert using == ["pico_diffusion.py"]
    assert json.loads(json.dumps(model.hf_config()))["mask_token_id"] == 3


def test_keys_that_it_shares_with_the_decoder_keep_their_help(tmp_path: Path) -> None:
    from picolm.document import ConfigError
    from picolm.schema import load
    from picolm.train.config import schema_for

    file = tmp_path / "wrong.yaml"
    file.write_text("model: {model_type: pico_diffusion, d_model: wide, masking: some}")
    with pytest.raises(ConfigError) as error:
        load(file, schema_for)
    said = str(error.value)
    assert "Width of the residual stream" in said
    assert "How training hides tokens" in said
