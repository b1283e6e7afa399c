"""Evaluation: every source has its say, sums do not depend on batches, and the units are what they are called."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from picolm.data.parquet import ShardedRows
from picolm.errors import DataError, PicoError
from picolm.models import Decoder, DecoderConfig, NextToken, Noise, Piece, Score
from picolm.train.evaluate import Evaluation, NoLikelihood, Rows, evaluate, pieces_of, score, token_nats
from picolm.train.evaluation_config import Evaluation as Settings
from picolm.train.sample import load_model
from picolm.train.text import Text

LENGTH = 16


class Table:
    """A data source in memory; row i consists of the number i."""

    def __init__(self, labels: list[str] | None, rows: int | None = None):
        self.all_labels, self.count = labels, rows if rows is not None else len(labels or ())

    def __len__(self) -> int:
        return self.count

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        return np.repeat(np.asarray(numbers, dtype=np.int32)[:, None], LENGTH + 1, axis=1)

    def labels(self, numbers: np.ndarray) -> list[str] | None:
        return None if self.all_labels is None else [self.all_labels[number] for number in numbers]


class Tokens(NextToken, torch.nn.Module):
    """A model whose loss at each token is a function of the token and the one before it."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def nats(self, tokens_BS: Tensor) -> Tensor:
        return (tokens_BS[:, 1:] * 0.01 + tokens_BS[:, :-1] * 0.003 + 0.1).float() * self.factor.detach()

    def predictions(self, tokens_BS: Tensor) -> tuple[Tensor, Tensor]:
        return self.nats(tokens_BS), tokens_BS[:, 1:] < 0


def evaluation(
    rows: Rows | None, batch_size: int = 4, model: Any = None, token_bytes: Tensor | None = None
) -> Evaluation:
    return Evaluation(model or Tokens(), rows, batch_size, token_bytes, rank=0, world=1, device=torch.device("cpu"))


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), limit=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_sample_takes_as_equal_a_share_of_each_source_as_there_is(sizes: list[int], limit: int, seed: int) -> None:
    labels = [str(source) for source, size in enumerate(sizes) for _ in range(size)]
    np.random.default_rng(seed).shuffle(labels)
    rows = Rows.sample(Table(labels), limit, LENGTH + 1)
    assert len(rows.tokens_RS) == len(rows.numbers) == min(limit, len(labels))
    assert list(rows.numbers) == sorted(set(rows.numbers))
    assert rows.tokens_RS[:, 0].tolist() == list(rows.numbers)
    taken = Counter(labels[number] for number in rows.numbers)
    most = max(taken.values())
    assert all(taken[str(source)] >= min(size, most - 1) for source, size in enumerate(sizes))


def test_without_sources_a_sample_is_the_first_rows() -> None:
    assert Rows.sample(Table(None, 50), 7, 5).numbers.tolist() == list(range(7))
    assert Rows.sample(Table(None, 50), None, 5).tokens_RS.shape == (50, 5)


@pytest.mark.parametrize("lying", [0, 1, 2])
def test_a_number_of_rows_is_not_believed_before_memory_is_taken(tmp_path: Path, lying: int) -> None:
    file = tmp_path / "val.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2, 3]] * 4}), file)
    rows = [10**12 if shard == lying else 4 for shard in range(3)]
    source = ShardedRows(["a", "b", "c"], rows, lambda shard: file, fingerprint="", row_length=3)
    with pytest.raises(DataError, match=rf"^{'abc'[lying]}: holds 4 rows where {10**12} were expected"):
        Rows.sample(source, 2, 3)


def test_every_row_belongs_to_one_process_and_one_micro_batch() -> None:
    rows = Rows.sample(Table(None, 23), None, 5)
    places = [place for rank in range(3) for some, _ in rows.micro_batches(4, rank, 3) for place in some]
    assert sorted(places) == list(range(23))
    assert all(torch.equal(tokens, rows.tokens_RS[some]) for some, tokens in rows.micro_batches(4, 1, 3))


def test_results_do_not_depend_on_the_batch_size() -> None:
    rows = Rows.sample(Table(["a", "b", "a", "c", "a", "a", "b"]), None, LENGTH + 1)
    results = [evaluate(("paloma",), evaluation(rows, size)) for size in (1, 2, 3, 100)]
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-12)
    nats_R = Tokens().nats(rows.tokens_RS).double()
    assert results[0]["paloma/nats_per_token"] == pytest.approx(nats_R.mean().item())
    assert results[0]["paloma/b"] == pytest.approx(math.exp(nats_R[[1, 6]].mean().item()))
    assert set(results[0]) == {"paloma", "paloma/nats_per_token"} | {
        f"paloma/{source}{unit}" for source in "abc" for unit in ("", "/nats_per_token")
    }


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary() -> None:
    model = Decoder(DecoderConfig(d_model=8, n_layers=1, attention_n_heads=2, attention_n_kv_heads=1, vocab_size=50,
                                  activation_hidden_dim=8, max_seq_len=LENGTH))  # fmt: skip
    torch.nn.init.zeros_(model.de_embedding_proj.weight)
    results = evaluate(("paloma",), evaluation(Rows.sample(Table(None, 50), None, LENGTH + 1), model=model))
    assert results["paloma"] == pytest.approx(50, rel=1e-6)


def test_bits_per_byte_are_those_of_the_text(tmp_path: Path) -> None:
    from picolm.data.tokenizer import train_tokenizer, write_tokenizer

    text = "Le cœur a ses raisons, que la raison ne connaît point. " * 8
    vocabulary = train_tokenizer([text], 300)
    write_tokenizer(vocabulary, tmp_path, LENGTH)
    tokens_S = vocabulary.tokenizer.encode(text).ids
    rows = Rows(torch.tensor([tokens_S]), None, np.arange(1))
    table_V = Text(tmp_path / "tokenizer.json", 320).token_bytes_V
    results = evaluate(("paloma",), evaluation(rows, token_bytes=table_V))
    nats = Tokens().nats(rows.tokens_RS).double().sum().item()
    predicted = text.encode().removeprefix(
        vocabulary.tokenizer.decode(tokens_S[:1]).encode()
    )  # all but the first token
    assert results["paloma/bits_per_byte"] == pytest.approx(nats / math.log(2) / len(predicted))
    assert len(predicted) > len(tokens_S)


def test_without_a_tokenizer_there_are_no_bits_per_byte_and_without_rows_nothing() -> None:
    results = evaluate(("paloma",), evaluation(Rows.sample(Table(None, 3), None, 5)))
    assert not [name for name in results if "byte" in name]
    assert evaluate(("paloma",), evaluation(None)) == {}


@pytest.mark.parametrize(("nats", "perplexity"), [(800.0, math.inf), (math.inf, math.inf), (math.nan, math.nan)])
def test_a_perplexity_that_overflows_is_infinite_or_nan(nats: float, perplexity: float) -> None:
    model = Tokens()
    model.nats = lambda tokens_BS: torch.full(tokens_BS[:, 1:].shape, nats)  # type: ignore[method-assign]
    found = evaluate(("paloma",), evaluation(Rows.sample(Table(None, 3), None, 5), model=model))["paloma"]
    assert found == pytest.approx(perplexity, nan_ok=True)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_leaves_the_model_as_it_was(
    training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab_evaluation.py").write_text(
        "import torch\n"
        "def states(evaluation):\n"
        "    return {'training': evaluation.model.training, 'grad': torch.is_grad_enabled()}\n"
        "def broken(evaluation):\n"
        "    raise ValueError\n"
    )
    monkeypatch.chdir(tmp_path)
    model = Tokens().train(training)
    assert evaluate(("my_lab_evaluation:states",), evaluation(None, model=model)) == {"training": False, "grad": False}
    assert model.training is training
    with pytest.raises(ValueError):
        evaluate(("my_lab_evaluation:broken",), evaluation(None, model=model))
    assert model.training is training


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_every_process_computes_as_often_and_no_row_counts_twice(count: int, size: int) -> None:
    rows = Rows(torch.arange(count)[:, None] * torch.ones(5, dtype=torch.long), None, np.arange(count))
    for world in range(1, 6):
        batches = [list(rows.micro_batches(size, rank, world)) for rank in range(world)]
        assert len({len(own) for own in batches}) == 1
        places = [place for own in batches for some, _ in own for place in some]
        assert sorted(places) == list(range(count))
        for some, tokens in (batch for own in batches for batch in own):
            assert len(tokens) == max(1, len(some))  # a process whose rows are used up runs along
            assert tokens[: len(some), 0].tolist() == some


@pytest.fixture
def short_val(toy_data: Path, tmp_path: Path) -> Path:
    """The toy corpus with held-out rows that are one token shorter, as those of the published validation set are."""
    folder = tmp_path / "short_val"
    folder.mkdir()
    for file in toy_data.glob("*.parquet"):
        table = pq.read_table(file)
        if file.name.startswith("val"):
            tokens = pa.array([row[:-1] for row in table["input_ids"].to_pylist()], pa.list_(pa.int32()))
            table = table.set_column(0, "input_ids", tokens)
        pq.write_table(table, folder / file.name)
    return folder


@pytest.mark.slow
def test_held_out_rows_may_be_one_token_shorter_than_training_rows(train: Callable[..., Any], short_val: Path) -> None:
    run = train(
        f"data.dataset.name={short_val}", "training.max_steps=2", "checkpointing.learning_dynamics.positions=[-1, 0]"
    )
    tokens_RS = torch.tensor(run[2].rows("val")["input_ids"].to_pylist())
    assert tokens_RS.shape == (12, LENGTH)
    model, seen = load_model(run, 2), {}
    for address in run[2].select(kind="activations", split="val"):
        model.get_submodule(address.module).register_forward_hook(lambda m, i, out, at=address: seen.update({at: out}))
    nats_RT = token_nats(model, tokens_RS)
    assert run.evaluation(2)["paloma/nats_per_token"] == pytest.approx(nats_RT.mean().item(), rel=1e-5)
    assert run[2].meta["capture"] == {"positions": [15, 0], "val_positions": [14, 0]}
    for address, output_RTH in seen.items():
        torch.testing.assert_close(run[2][address], output_RTH[:, [14, 0]], atol=1e-5, rtol=1e-5)


def test_evaluation_may_use_a_part_of_each_row(train: Callable[..., Any]) -> None:
    run = train("training.max_steps=0", "evaluation.paloma.max_length=5", "evaluation.paloma.max_rows=4")
    tokens_RS = torch.tensor(run[0].rows("val")["input_ids"].to_pylist())[:4, :6]
    by_hand = token_nats(load_model(run, 0), tokens_RS).mean().item()
    assert run.evaluation(0)["paloma/nats_per_token"] == pytest.approx(by_hand, rel=1e-5)


def test_a_position_that_held_out_rows_do_not_have_is_named(train: Callable[..., Any], short_val: Path) -> None:
    with pytest.raises(PicoError, match=r"there is no position 15 in rows of 15 inputs \(held-out rows may be shorter"):
        train(f"data.dataset.name={short_val}", "checkpointing.learning_dynamics.positions=[15]")


def test_held_out_tokens_beyond_the_vocabulary_are_told_before_the_start(
    train: Callable[..., Any], toy_data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    pq.write_table(pa.table({"input_ids": [[1] * 16 + [64]]}), folder / "val-00000-of-00001.parquet")
    told = "row 0: a held-out row holds token id 64 at position 16, outside of the vocabulary of 64"
    with pytest.raises(DataError, match=told):
        train(f"evaluation.paloma.dataset_name={folder}")


def test_a_model_that_computes_nan_has_no_perplexity_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", "picolm"):
        found = evaluate(("paloma",), evaluation(Rows.sample(Table(None, 3), None, 5), model=Tokens(math.nan)))
    assert set(found) == {"paloma", "paloma/nats_per_token"}
    assert all(math.isnan(value) for value in found.values())
    assert "paloma has no value: the model computes NaN" in caplog.text


class Bound(Tokens):
    """A model that only bounds the likelihood: each draw adds a random number between 0 and 1 to the nats of a token."""

    likelihood = "bound"

    def score(self, pieces: Sequence[Piece], *, draws: int = 1, noise: Noise | None = None) -> Score:
        assert noise is not None
        exact = super().score(pieces)
        added_DN = torch.stack([noise.uniform(1)[:, 0] for _ in range(draws)])
        nats = [nats_T + added for nats_T, added in zip(exact.nats, added_DN.mean(0))]
        scored_N = torch.tensor([piece.scored for piece in pieces])
        return Score(nats, added_DN.std(0) * scored_N / math.sqrt(draws), draws, exact=False)


def test_a_bound_is_called_a_bound_and_has_a_standard_error() -> None:
    rows = Rows.sample(Table(["a", "b", "a", "c"]), None, LENGTH + 1)
    settings = Settings(draws=400)
    exact = evaluate(("paloma",), evaluation(rows))
    found = [evaluate(("paloma",), evaluation(rows, size, Bound())._replace(settings=settings)) for size in (1, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)  # each row has noise of its own
    assert not [name for name in found[0] if not name.startswith("paloma_bound")]
    assert not [name for name in found[0] if name.endswith("/nats_per_token")]
    assert found[0]["paloma_bound/draws"] == 400
    error = found[0]["paloma_bound/standard_error"]
    assert error == pytest.approx(12**-0.5 / 20 / 2, rel=0.1)  # a uniform number, 400 draws, 4 rows
    difference = found[0]["paloma_bound/bound_nats_per_token"] - exact["paloma/nats_per_token"]
    assert difference == pytest.approx(0.5, abs=4 * error)


def test_the_last_step_of_a_run_has_draws_of_its_own() -> None:
    rows = Rows.sample(Table(None, 3), None, 5)
    given = evaluation(rows, model=Bound())._replace(settings=Settings(draws=2, final_draws=9), last=7)
    found = {step: evaluate(("paloma",), given._replace(step=step)) for step in (6, 7)}
    assert [found[step]["paloma_bound/draws"] for step in (6, 7)] == [2, 9]


def test_draws_belong_to_the_number_of_a_row_whatever_the_selection() -> None:
    rows = Rows.sample(Table(None, 6), None, LENGTH + 1)
    settings = Settings(draws=2)
    whole = score(pieces_of(Bound(), rows.tokens_RS), evaluation(rows, model=Bound())._replace(settings=settings), 2)
    some = Rows(rows.tokens_RS[[4, 1]], None, rows.numbers[[4, 1]])
    found = evaluate(("paloma",), evaluation(some, model=Bound())._replace(settings=settings))
    assert found["paloma_bound/bound_nats_per_token"] * 2 * LENGTH == pytest.approx(whole.nats[[4, 1]].sum().item())


def test_a_bound_where_an_exact_value_is_needed_is_refused_with_the_reason() -> None:
    class NoExact(Bound):
        def score(self, pieces: Sequence[Piece], *, draws: int = 1, noise: Noise | None = None) -> Score:
            if draws == 0:
                raise NotImplementedError
            return super().score(pieces, draws=draws, noise=noise)

    class Other(Bound):
        def score(self, pieces: Sequence[Piece], *, draws: int = 1, noise: Noise | None = None) -> Score:
            return super().score(pieces, draws=max(2, draws), noise=noise)

    for model in (NoExact(), Other()):
        with pytest.raises(NoLikelihood, match=r"can only be bounded .* not comparable with an exact value"):
            token_nats(model, torch.zeros(2, 5, dtype=torch.long))


def test_a_model_without_a_likelihood_has_no_perplexity_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    model = Tokens()
    model.likelihood = "none"  # type: ignore[misc]
    with caplog.at_level("WARNING", "picolm"):
        found = evaluate(("paloma",), evaluation(Rows.sample(Table(None, 3), None, 5), model=model))
    assert list(found) == ["paloma"]
    assert math.isnan(found["paloma"])
    assert "paloma has no value: the likelihood of a text cannot be computed from this model" in caplog.text
