"""Induction against reference values, TransformerLens's numbers, heads with known patterns, and the limits of rows."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.fox import fox, make_run  # noqa: F401
from tests.probes.conftest import REFERENCE, Measure, by_head, expected, value
from tests.readers.conftest import make
from torch import Tensor, nn

from picolm.errors import PicoError
from picolm.models import Anatomy, Diffusion, DiffusionConfig, NextToken
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.observe.training import rows_of_tokens
from picolm.observe.vocabulary import first_token, special_tokens
from picolm.probes.induction import OF_HEADS, OF_MODEL
from picolm.probes.probe import Reading, Running, find_probe, run
from picolm.store import Run

CHECKPOINTS = [("llama_s0", 0), ("llama_s0", 300), ("llama_s0", 500), ("neox_s0", 0), ("neox_s0", 500)]
PLAIN = ("prefix_matching", "duplicate_token", "previous_token", "previous_token_without_first")
K, SIZE = 8, 40
Found = dict[tuple[str, int | None, int | None], Reading]


@pytest.mark.parametrize(("series", "step"), CHECKPOINTS)
@pytest.mark.parametrize("which", ["repeated", "repeated_all"])
def test_induction_is_that_of_independent_code(
    measure: Measure, rows: dict[str, str], which: str, series: str, step: int
) -> None:
    found = measure({"probe_name": "induction", "rows": rows[which]}, runs=(series,), steps=[step])
    known = {key.removeprefix(f"{which}."): each for key, each in expected(series, step).items() if which in key}
    keys = {name: name for name in PLAIN} | {"first_token_mass": "bos_mass"}
    for mine in ("tl_mul", "tl_mul_no_bos_no_current", "tl_abs"):
        theirs = mine.replace("abs", "abs_unrounded")
        keys |= {f"{mine}_{name}": f"{theirs}.{name}_head" for name in ("previous_token", "duplicate_token")}
        keys[f"{mine}_induction"] = f"{theirs}.induction_head"
    assert set(keys) == set(OF_HEADS)
    for name, key in keys.items():
        np.testing.assert_allclose(by_head(found, f"induction.{name}", step), known[key], rtol=0, atol=2e-6)
    losses = [value(found, f"induction.{name}", step) for name in ("induction_loss", "first_copy_loss")]
    assert losses == pytest.approx([known["induction_loss"], known["loss_first_copy"]], abs=1e-5)
    assert value(found, "induction.copy_advantage", step) == pytest.approx(losses[0] - losses[1])
    assert value(found, "induction.induction_accuracy", step) == pytest.approx(known["induction_accuracy"], abs=1 / 480)
    assert set(found["reason"]) == {""}
    assert found["chance"].notna().all()


@pytest.mark.parametrize("place", [("llama_s0", 500), ("neox_s0", 500)])
def test_the_loss_without_bos_and_over_the_first_token_is_transformerlens(
    measure: Measure, rows: dict[str, str], tmp_path: Path, place: tuple[str, int]
) -> None:
    known = json.loads((REFERENCE / "public/induction_loss_bos_variants.json").read_text())["{}/step_{}".format(*place)]
    np.save(tmp_path / "without.npy", np.load(rows["repeated"])[:, 1:])
    for file, key in ((rows["repeated_bos_overwritten"], "BOS over first token"), ("without.npy", "no BOS")):
        found = measure({"probe_name": "induction", "rows": str(file)}, runs=place[:1], steps=[place[1]])
        assert value(found, "induction.tl_evals_induction_loss") == pytest.approx(known[key], abs=1e-5)


class Made(NextToken, nn.Module):
    """A model whose heads have given patterns, [T, T] each, and whose prediction is the token after the first occurrence of the
    present one, with probability `sure`; where there is none, all are as likely.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]] | None, sure: float = 0.9):
        super().__init__()
        self.layers, self.sure, self.config = layers, sure, SimpleNamespace(vocab_size=SIZE, max_seq_len=64)
        if layers is not None:
            self.with_patterns = lambda tokens_BT: (self(tokens_BT), self.patterns(len(tokens_BT)))

    def patterns(self, rows: int) -> list[Tensor]:
        assert self.layers is not None
        return [torch.stack(list(heads)).expand(rows, -1, -1, -1) for heads in self.layers]

    def forward(self, tokens_BT: Tensor) -> Tensor:
        probabilities_BTV = torch.full((*tokens_BT.shape, SIZE), 1 / SIZE)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for place, token in enumerate(tokens):
                if (first := tokens.index(token)) < place:
                    probabilities_BTV[row, place] = (1 - self.sure) / (SIZE - 1)
                    probabilities_BTV[row, place, tokens[first + 1]] = self.sure
        return probabilities_BTV.log()


class Given(Subject):
    """A subject that is a model, not a checkpoint."""

    def __init__(self, model: Any):
        self.run: Any = SimpleNamespace(name="given", config={}, environment={"hardware": {"threads": 1}})
        self.checkpoint: Any = SimpleNamespace(step=0)
        outline = SimpleNamespace(outline=model, anatomy=Anatomy(), context=model.config.max_seq_len)
        self.architecture: Any = SimpleNamespace(**vars(outline), body=lambda each: each)
        self._model, self._filled = model, 0


def ask(subject: Subject, stated: Rows | Tensor | None = None, **options: Any) -> Found:
    """Return what the probe finds by name, layer and head. Raises the PicoError that it ended with."""
    stated = rows_of_tokens(stated, has_targets=False) if isinstance(stated, Tensor) else stated
    running = Running(find_probe("induction"), {"subject": subject, "stated": stated}, options)
    run([running], subject)
    if running.failure is not None:
        raise running.failure
    return {(each.name, each.layer, each.head): each for each in running.readings}


def looking_back(size: int, distance: int) -> Tensor:
    """Return a pattern whose queries attend to the token so far back, and to themselves where there is none."""
    queries_T = torch.arange(size)
    return nn.functional.one_hot(torch.where(queries_T < distance, queries_T, queries_T - distance), size).float()


def uniform(size: int) -> Tensor:
    return torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]


@pytest.mark.parametrize("bos", [0, "none"])
def test_heads_of_known_patterns_have_their_scores(bos: int | str) -> None:
    """Each head that attends to one place has 1 there and 0 elsewhere; uniform attention has exactly the chance level."""
    size = 2 * K + (bos == 0)
    heads = [looking_back(size, K - 1), looking_back(size, K), looking_back(size, 1), uniform(size)]
    found = ask(Given(Made([heads, heads[::-1]])), tokens="all", length=K, count=5, bos=bos)
    names = ("prefix_matching", "duplicate_token", "previous_token")
    for layer, order in ((0, (0, 1, 2, 3)), (1, (3, 2, 1, 0))):
        for place, name in enumerate(names):
            assert [found[name, layer, order[other]].value for other in range(3)] == [
                float(place == other) for other in range(3)
            ]
        for name in OF_HEADS:
            reading = found[name, layer, order[3]]
            assert reading.value == pytest.approx(reading.chance, abs=1e-6)
            assert reading.standard_error == pytest.approx(0, abs=1e-7)
        assert found["tl_mul_previous_token", layer, order[2]].value == pytest.approx((size - 1) / size)
        # Of the queries that attend to neither the first token nor themselves, only that of r's last token is not expected.
        assert found["tl_mul_no_bos_no_current_induction", layer, order[0]].value == pytest.approx(K / (size - K))
        assert found["tl_mul_no_bos_no_current_duplicate_token", layer, order[1]].value == 1
    queries = range(K + (bos == 0), size)
    chance = sum(1 / (i + 1) for i in queries) / len(queries)
    assert found["prefix_matching", 0, 0].chance == found["duplicate_token", 0, 0].chance == pytest.approx(chance)
    assert found["previous_token", 0, 0].chance == pytest.approx(sum(1 / (i + 1) for i in range(1, size)) / (size - 1))


@pytest.mark.parametrize("bos", [0, "none"])
def test_a_model_that_copies_has_the_loss_of_its_confidence(bos: int | str) -> None:
    """-ln 0.9 on the second copy, ln V on the first: in every place that is counted, and nowhere else."""
    found = ask(Given(Made([[uniform(2 * K + (bos == 0))]])), tokens="all", length=K, count=3, bos=bos)
    model = {name: found[name, None, None].value for name in OF_MODEL if (name, None, None) in found}
    assert model["induction_loss"] == pytest.approx(-math.log(0.9), rel=1e-6)
    assert model["first_copy_loss"] == pytest.approx(math.log(SIZE), rel=1e-6)
    assert model["copy_advantage"] == pytest.approx(-math.log(0.9 * SIZE), rel=1e-6)
    assert model["induction_accuracy"] == 1
    assert ("tl_evals_induction_loss" in model) is (bos == "none")
    assert found["induction_loss", None, None].chance == pytest.approx(math.log(SIZE))


def test_scores_are_those_of_plain_loops() -> None:
    """Random patterns and rows, some of whose tokens come more often, read entry by entry."""
    generator = torch.Generator().manual_seed(0)
    size = 2 * K + 1
    pattern_TT = torch.rand(size, size, generator=generator).tril()
    pattern_TT /= pattern_TT.sum(-1, keepdim=True)
    r_RK = torch.randint(1, 6, (4, K), generator=generator)
    tokens_RT = torch.cat([torch.zeros(4, 1, dtype=torch.long), r_RK, r_RK], 1)
    found = ask(Given(Made([[pattern_TT]])), tokens_RT)
    a, queries = pattern_TT.tolist(), range(1, size)
    wanted = {
        "prefix_matching": np.mean([a[i][i - K + 1] for i in range(K + 1, size)]),
        "duplicate_token": np.mean([a[i][i - K] for i in range(K + 1, size)]),
        "previous_token": np.mean([a[i][i - 1] for i in queries]),
        "previous_token_without_first": np.mean([a[i][i - 1] for i in queries[1:]]),
        "first_token_mass": np.mean([a[i][0] for i in queries]),
    }
    entries = [(i, j) for i in range(size) for j in range(i + 1)]
    for name in ("previous_token", "duplicate_token", "induction"):
        mul, without, off = [], [], []
        for row in tokens_RT.tolist():
            there = {
                "previous_token": lambda i, j: j == i - 1,
                "duplicate_token": lambda i, j, row=row: j < i and row[i] == row[j],
                "induction": lambda i, j, row=row: j > 0 and row[i] == row[j - 1],
            }[name]
            mul.append(sum(a[i][j] for i, j in entries if there(i, j)) / size)
            kept = [(i, j) for i, j in entries if 0 < j < i]
            without.append(sum(a[i][j] for i, j in kept if there(i, j)) / sum(a[i][j] for i, j in kept))
            off.append(1 - sum(abs(a[i][j] - there(i, j)) for i, j in entries) / size)
        wanted |= {f"tl_mul_{name}": np.mean(mul), f"tl_mul_no_bos_no_current_{name}": np.mean(without)}
        wanted[f"tl_abs_{name}"] = np.mean(off)
    assert set(wanted) == set(OF_HEADS)
    for name, number in wanted.items():
        assert found[name, 0, 0].value == pytest.approx(number, abs=1e-6), name


def test_a_model_without_attention_gives_its_losses(measure: Measure) -> None:
    found = ask(Given(Made(None)), tokens="all", length=K, bos=0)
    assert set(found) == {(name, None, None) for name in [*OF_HEADS, *OF_MODEL][:-1]}
    assert found["induction_loss", None, None].value == pytest.approx(-math.log(0.9), rel=1e-6)
    for name in OF_HEADS:
        assert found[name, None, None].value is None
        assert found[name, None, None].reason == "the model of given does not give the weights of an attention"


@pytest.mark.parametrize("bos", [0, "none"])
def test_a_model_that_predicts_hidden_tokens_has_its_exact_losses_from_left_to_right(bos: int | str) -> None:
    """Each token of each copy alone: hidden with all later ones, and predicted from what is left."""
    torch.manual_seed(0)
    heads = {"attention_n_heads": 2, "attention_n_kv_heads": 2}
    sizes = {"d_model": 16, "n_layers": 1, "vocab_size": SIZE, "max_seq_len": 2 * K, "activation_hidden_dim": 16}
    model = Diffusion(DiffusionConfig(**sizes, **heads)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    r_RK = torch.stack([torch.randperm(SIZE - 1)[: K - 1] + 1 for _ in range(3)])
    tokens_RT = torch.cat([*([torch.zeros(3, 1, dtype=torch.long)] if bos == 0 else []), r_RK, r_RK], 1)
    found = ask(Given(model), tokens_RT)
    size = tokens_RT.shape[1]
    nats_RT = torch.zeros(3, size, dtype=torch.float64)
    for place in range(1, size):
        hidden_RT = tokens_RT.clone()
        hidden_RT[:, place:] = model.config.vocab_size
        log_probs_RV = model(hidden_RT)[:, place].log_softmax(-1)
        nats_RT[:, place] = -log_probs_RV.gather(-1, tokens_RT[:, place : place + 1])[:, 0]
    begin, length = int(bos == 0), r_RK.shape[1]
    first_RX, second_RX = nats_RT[:, begin + 1 : begin + length], nats_RT[:, begin + length + 1 :]
    assert first_RX.shape == second_RX.shape
    assert found["first_copy_loss", None, None].value == pytest.approx(first_RX.mean().item(), rel=1e-5)
    assert found["induction_loss", None, None].value == pytest.approx(second_RX.mean().item(), rel=1e-5)
    assert found["copy_advantage", None, None].value == pytest.approx((second_RX - first_RX).mean().item(), abs=1e-5)
    assert ("induction_accuracy", None, None) not in found
    assert "it predicts hidden tokens from both sides" in found["prefix_matching", None, None].reason


def test_a_model_of_transformers_without_attention_gives_its_losses_and_the_rest_goes_on(
    measure: Measure, tmp_path: Path
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 65, "hidden_size": 8, "num_hidden_layers": 2, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(tmp_path / "mamba" / "step_1")
    np.save(tmp_path / "rows.npy", np.arange(1, 21).reshape(2, 10))
    entries = [{"probe_name": "induction", "tokens": "all", "length": 5}, {"probe_name": "calibration"}]
    attention = {"probe_name": "attention"}
    found = measure(*entries, attention, runs=(str(tmp_path / "mamba"),), observe={"rows": str(tmp_path / "rows.npy")})
    for name in ("induction.induction_loss", "calibration.ece"):
        assert value(found, name) > 0
    lacking = found[found["value"].isna() & ~found["metric"].str.startswith("calibration")]
    assert set(lacking["metric"]) == {"attention", *(f"induction.{name}" for name in OF_HEADS)}
    assert set(lacking["reason"]) == {"MambaForCausalLM does not give the weights of an attention in each layer"}


@pytest.fixture
def subject() -> Subject:
    return Subject(Run.open(REFERENCE / "checkpoints/llama_s0"))


def drawn(found: Found) -> str:
    (digest,) = {each.rows for each in found.values()}
    return digest


def test_rows_are_drawn_from_the_frequent_tokens_of_the_training_rows(
    subject: Subject, rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their digest is that of rows whose tokens are the most frequent ones, without BOS; each row depends on its number alone."""
    seen: list[Tensor] = []
    forward = Subject.forward

    def watched(self: Subject, asked: Rows, batch: Sequence[int], needs: Any = ()) -> Any:
        seen.extend(asked.tokens[row] for row in batch)
        return forward(self, asked, batch, needs)

    monkeypatch.setattr(Subject, "forward", watched)
    options = {"training_rows": rows["corpus_train"], "alphabet": 40, "length": 10}
    first = drawn(ask(subject, **options, count=7))
    tokens_RT = torch.stack(seen)
    assert tokens_RT.shape == (7, 21)
    assert (tokens_RT[:, 0] == 0).all()
    assert torch.equal(tokens_RT[:, 1:11], tokens_RT[:, 11:])
    assert all(len(set(row.tolist())) == 11 for row in tokens_RT)
    counts = np.bincount(np.load(rows["corpus_train"]).ravel(), minlength=512)
    counts[0] = 0
    frequent = np.argsort(-counts, kind="stable")[:40]
    assert set(tokens_RT[:, 1:].flatten().tolist()) <= set(frequent.tolist())
    seen.clear()
    assert drawn(ask(subject, **options, count=9)) != first
    assert torch.equal(torch.stack(seen)[:7], tokens_RT)
    assert drawn(ask(subject, tokens=frequent.tolist(), length=10, count=7)) != drawn(ask(subject, **options, seed=1))
    seen.clear()
    ask(subject, tokens="all", length=60, count=100)
    assert set(torch.stack(seen)[:, 1:].flatten().tolist()) == set(range(1, 512))


def test_a_list_of_tokens_shows_the_induction_that_the_whole_vocabulary_hides(
    measure: Measure, rows: dict[str, str]
) -> None:
    """The warning of the reference: a model that was trained on 64 symbols does it on these alone."""
    symbols = sorted(set(np.load(rows["repeated"])[:, 1:].ravel().tolist()))
    entries = [{"probe_name": "induction", "tokens": tokens} for tokens in (symbols, "all")]
    found = measure(*entries, steps=[500])
    best = found[found["metric"] == "induction.prefix_matching"].groupby("options")["value"].max()
    assert sorted(best) == [pytest.approx(0.05, abs=0.1), pytest.approx(0.75, abs=0.1)]
    assert found.groupby("options")["rows"].nunique().tolist() == [1, 1]
    assert set(found[["layer", "head"]].dropna().itertuples(index=False, name=None)) == {
        (layer, head) for layer in range(2) for head in range(4)
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 64}, r"rows of 129 tokens, .*reads at most 128; the largest length is 63"),
        ({"length": 65, "bos": "none"}, "the largest length is 64"),
        ({"tokens": [5]}, r"there are 1 token\(s\) to draw from, and r has 32 different ones"),
        ({"tokens": [5] * 40}, r"there are 1 token\(s\)"),
        ({"tokens": [0, 1, 2], "length": 2}, "tokens holds 0, the token before r"),
        ({"tokens": [1, 2, 600], "length": 3}, "a row holds token id 600; the vocabulary of llama_s0 has 512"),
        ({"tokens": "frequent"}, r"state a file of its training rows \(training_rows: FILE.npy\)"),
        ({"tokens": "all", "bos": 512}, "token id 512"),
    ],
)
def test_rows_that_cannot_be_made_say_why(subject: Subject, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PicoError, match=message):
        ask(subject, **options)


@pytest.mark.parametrize(
    ("tokens_RT", "message"),
    [
        (torch.arange(9)[None], "row 0 does not repeat itself"),
        (torch.tensor([[0, 1, 2, 1, 2], [0, 1, 2, 1, 3]]), "row 1 does not repeat itself"),
        (torch.zeros(1, 129, dtype=torch.long), "the rows have 129 tokens, all of which are read; .* at most 128"),
        (torch.zeros(1, 3, dtype=torch.long), "3 to 3 tokens; expected rows"),
    ],
)
def test_stated_rows_that_do_not_repeat_themselves_are_refused(
    subject: Subject, tokens_RT: Tensor, message: str
) -> None:
    with pytest.raises(PicoError, match=message):
        ask(subject, tokens_RT)


def test_rows_of_several_lengths_are_refused(subject: Subject) -> None:
    with pytest.raises(PicoError, match="the rows have 5 to 7 tokens"):
        ask(subject, Rows([torch.zeros(7).long(), torch.zeros(5).long()], [[0], [0]], "made", False, ""))


def test_the_rest_of_an_analysis_goes_on(measure: Measure, rows: dict[str, str]) -> None:
    bad, good = {"probe_name": "induction", "length": 200, "tokens": "all"}, {"probe_name": "calibration"}
    found = measure(bad, good, steps=[0], observe={"rows": rows["val"]})
    assert found[found["metric"] == "induction"]["reason"].str.contains("the largest length is 63").all()
    assert value(found, "calibration.ece", 0) >= 0


def test_one_row_has_no_standard_error_and_nan_has_no_value(subject: Subject) -> None:
    found = ask(subject, tokens="all", count=1, length=2)
    assert all(each.standard_error is None and each.value is not None for each in found.values())
    with torch.no_grad():
        next(subject.model.parameters()).fill_(math.nan)
    found = ask(subject, tokens="all", count=2)
    assert {(each.value, each.reason) for each in found.values()} == {(None, "it is not a number here")}


def test_a_model_that_says_nothing_of_its_texts(tmp_path: Path) -> None:
    """No BOS in its files: it has to be stated, then a vocabulary of 65 gives rows of up to 64 different tokens."""
    nothing = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    make("llama", vocab_size=65, max_position_embeddings=160, **nothing).save_pretrained(tmp_path / "step7")
    small = Subject(Run.open(tmp_path))
    with pytest.raises(
        PicoError, match=r"not known which token its texts begin with; state its id \(bos: 0\), or bos: none"
    ):
        ask(small, tokens="all")
    assert ask(small, tokens="all", length=64, bos=0, count=2)["induction_loss", None, None].value is not None
    assert ask(small, tokens="all", length=65, bos="none", count=2)["induction_loss", None, None].value is not None
    with pytest.raises(PicoError, match=r"64 token\(s\) to draw from"):
        ask(small, tokens="all", length=65, bos=0)


@pytest.mark.slow
def test_a_run_of_pico_knows_its_training_rows(measure: Measure, train: Callable[..., Run]) -> None:
    run = train()
    entries = [{"probe_name": "induction", "length": 7, "count": 3, "alphabet": 20, "bos": bos} for bos in (5, "none")]
    found = measure(*entries, {"probe_name": "induction", "length": 7}, runs=(str(run.path),), steps=[0, 6])
    known = found[found["options"].str.contains("bos")]
    assert known.groupby("options")["rows"].nunique().tolist() == [1, 1]
    assert set(known["reason"]) == {""}
    assert found[~found["options"].str.contains("bos")]["reason"].str.contains("state its id").all()


def test_a_run_with_a_tokenizer_knows_its_bos_and_what_is_no_text(fox: Run, tmp_path: Path) -> None:  # noqa: F811
    """Its rows begin with the end of a text; of all special tokens none is drawn."""
    end = first_token(fox)
    assert end is not None
    assert end in special_tokens(fox)
    found = ask(Subject(fox), tokens="all", length=5)
    assert drawn(found) == drawn(ask(Subject(fox), tokens="all", length=5, bos=end))
    assert drawn(found) != drawn(ask(Subject(fox), tokens="all", length=5, bos=end + 1))
    np.save(tmp_path / "rows.npy", np.array([[end, end, 270, end, 271, 272, 270]]))
    with pytest.raises(PicoError, match=r"there are 3 token\(s\) to draw from"):
        ask(Subject(fox), training_rows=str(tmp_path / "rows.npy"), length=4, bos=5)
