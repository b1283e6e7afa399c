"""Generation: the cache changes the time it takes and nothing else."""

import pytest
import torch

from picolm.models.generate import KeyValueCache, choose


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8, "top_k": 50}],
    ids=["greedy", "sampled", "top-k", "top-p"],
)
def test_with_and_without_the_cache_the_same_tokens_come_out(model, tokens, options):
    prompt = tokens[:, :7]
    with_cache, without = (
        model.generate(prompt, 80, use_cache=cached, generator=torch.Generator().manual_seed(3), **options)
        for cached in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert with_cache.shape == (3, 87)
    assert torch.equal(with_cache[:, :7], prompt)
    assert len(with_cache[:, 7:].unique()) > 10  # a model that only repeats itself would prove little


def test_a_cache_filled_piece_by_piece_gives_the_logits_of_one_pass(model, tokens):
    cache = KeyValueCache()
    pieces = [model(piece, cache) for piece in tokens.split([70, 1, 2, 58], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 131


def test_greedy_takes_the_likeliest_token_each_time(model, tokens):
    out = model.generate(tokens[:, :5], 6)
    torch.testing.assert_close(out[:, 5:], model(out[:, :-1])[:, 4:].argmax(-1))


def test_a_row_that_has_ended_is_filled_and_all_ended_stops(model, tokens):
    free = model.generate(tokens[:, :5], 20)
    eos = int(free[0, 8])
    out = model.generate(tokens[:, :5], 20, eos=eos)
    ended = (out[0, 5:] == eos).nonzero()[0].item()
    assert (out[0, 5 + ended :] == eos).all()
    alone = model.generate(tokens[:1, :5], 20, eos=eos)
    assert alone.shape[1] == 5 + ended + 1


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    many = logits.expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    for arguments, expected in {
        (1.0, None, None): [0.5, 0.3, 0.15, 0.05],
        (1.0, 2, None): [0.625, 0.375, 0, 0],
        (1.0, None, 0.8): [0.625, 0.375, 0, 0],
        (1.0, None, 0.81): [10 / 19, 6 / 19, 3 / 19, 0],
        (0.5, None, None): [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365],
    }.items():
        drawn = choose(many, *arguments, generator)
        shares = drawn.flatten().bincount(minlength=4) / 20_000
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("length", "new", "options", "message"),
    [
        (0, 1, {}, "the prompt has 0 tokens; this model takes between 1 and 160"),
        (161, 0, {}, "the prompt has 161 tokens; this model takes between 1 and 160"),
        (100, 61, {}, "61 new tokens after a prompt of 100 do not fit into a context of 160: ask for at most 60"),
        (5, 5, {"temperature": -1.0}, "temperature must be a number of at least 0"),
        (5, 5, {"temperature": 1.0, "top_k": 0}, "top_k at least 1"),
        (5, 5, {"temperature": 1.0, "top_p": 0.0}, r"top_p in \(0, 1\]"),
    ],
)
def test_what_cannot_be_done_is_said(model, length, new, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(torch.zeros(1, length, dtype=torch.long), new, **options)
