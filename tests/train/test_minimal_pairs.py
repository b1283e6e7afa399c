"""Minimal pairs: a sentence has the log-probability of all its tokens, and pairs are counted by phenomenon."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fox import STEP

from picolm.data.tokenizer import load_tokenizer
from picolm.errors import DataError, PicoError
from picolm.models import Piece
from picolm.store import Run
from picolm.train.evaluate import Evaluation, evaluate, score
from picolm.train.evaluation_config import Evaluation as Settings
from picolm.train.sample import load_model
from picolm.train.text import Text

SENTENCES = [
    "The dog sleeps.",
    "The dog sleep.",
    "It's cold!",
    "The quick brown fox jumps over the lazy dog",
    "We don't",
]
PAIRS = [
    {"sentence_good": good, "sentence_bad": bad, "UID": uid, "linguistics_term": "all"}
    for good, bad, uid in zip(SENTENCES, SENTENCES[1:] + SENTENCES[:1], ["one", "one", "two", "two", "two"])
]


def write(path: Path, entries: list[Any]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def accuracy(run: Run, path: Path, **options: Any) -> dict[str, float]:
    settings = Settings.model_validate({"minimal_pairs": {"path": str(path)} | options})
    text = Text(run.step_path(STEP) / "tokenizer.json", 320)
    evaluation = Evaluation(load_model(run), None, 4, None, 0, 1, torch.device("cpu"), text, settings)
    return evaluate(("minimal_pairs",), evaluation)


def ln_p(run: Run, sentence: str) -> float:
    """By hand: no batch, no padding, the logits of every position."""
    tokens = [0, *load_tokenizer(run.step_path(STEP)).encode(sentence).ids]
    row_TV = load_model(run)(torch.tensor([tokens]))[0].detach().double().log_softmax(-1)
    return sum(float(row_TV[place, token]) for place, token in enumerate(tokens[1:]))


@pytest.mark.slow
def test_the_likelier_sentence_wins_and_phenomena_are_counted_apart(fox: Run, tmp_path: Path) -> None:
    right = [ln_p(fox, pair["sentence_good"]) > ln_p(fox, pair["sentence_bad"]) for pair in PAIRS]
    assert len(set(right)) == 2  # both happen
    expected = {
        "minimal_pairs": sum(right) / 5,
        "minimal_pairs/one": sum(right[:2]) / 2,
        "minimal_pairs/two": sum(right[2:]) / 3,
    }
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    for batch_size in (1, 3, 64):
        assert accuracy(fox, file, batch_size=batch_size) == expected
    assert accuracy(fox, file, group_by="linguistics_term") == {
        "minimal_pairs": sum(right) / 5,
        "minimal_pairs/all": sum(right) / 5,
    }
    assert accuracy(fox, file, group_by="nothing") == {"minimal_pairs": sum(right) / 5}


def test_the_score_is_the_sum_over_all_tokens_in_batches_too(fox: Run) -> None:
    tokenizer = load_tokenizer(fox.step_path(STEP))
    pieces = [
        Piece(torch.tensor([0, *ids]), len(ids)) for ids in (tokenizer.encode(sentence).ids for sentence in SENTENCES)
    ]
    pieces.insert(2, Piece(torch.tensor([0]), 0))
    expected = [-ln_p(fox, sentence) for sentence in SENTENCES]
    expected.insert(2, 0.0)
    for size in (1, 2, 10):
        evaluation = Evaluation(load_model(fox), None, size, None, 0, 1, torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(score(pieces, evaluation).nats.tolist(), expected, rtol=1e-6, atol=1e-5)


def test_processes_share_the_work_and_lose_nothing(fox: Run) -> None:
    tokenizer = load_tokenizer(fox.step_path(STEP))
    pieces = [
        Piece(torch.tensor([0, *ids]), len(ids)) for ids in (tokenizer.encode(sentence).ids for sentence in SENTENCES)
    ]
    alone = Evaluation(load_model(fox), None, 2, None, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        shares = [
            score(pieces, alone._replace(rank=rank, world=3)).nats for rank in range(3)
        ]  # what all_reduce adds up
        assert [int((share > 0).sum()) for share in shares] == [2, 2, 1]
        torch.testing.assert_close(sum(shares), score(pieces, alone).nats, rtol=1e-6, atol=0)


def test_equal_sentences_are_no_success(fox: Run, tmp_path: Path) -> None:
    file = write(tmp_path / "same.jsonl", [{"sentence_good": "The dog", "sentence_bad": "The dog"}])
    assert accuracy(fox, file) == {"minimal_pairs": 0.0}


def test_a_folder_is_all_of_its_files(fox: Run, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", PAIRS[:2])
    write(tmp_path / "b.jsonl", PAIRS[2:])
    (tmp_path / "README.md").write_text("no pairs")
    whole = write(tmp_path / "whole.json", PAIRS)
    assert accuracy(fox, tmp_path) == accuracy(fox, whole)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"evaluation.minimal_pairs.path: .*pairs.jsonl holds no pairs"),
        ('{"sentence_good": "a"\n', r"pairs.jsonl:1: is no JSON"),
        ('{"sentence_good": "a", "sentence_bad": "b"}\n{"good": "a"}\n',
         r"pairs.jsonl:2: should be an object with the texts sentence_good and sentence_bad; found '\{\"good\": \"a\"\}'"),
        ('{"sentence_good": "a", "sentence_bad": ""}', r"pairs.jsonl:1: should be an object with the texts"),
        (json.dumps({"sentence_good": "xy" * 99, "sentence_bad": "b"}), r":1: a sentence of \d+ tokens; the context .* is 64"),
    ],
)  # fmt: skip
def test_a_file_that_holds_something_else_is_told_with_its_line(
    fox: Run, tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "pairs.jsonl").write_text(text)
    with pytest.raises(DataError, match=words):
        accuracy(fox, tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read"):
        accuracy(fox, tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_nan_has_no_accuracy_and_the_log_says_why(
    fox: Run, tmp_path: Path, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = load_model(fox)
    with torch.no_grad():
        model.layers[1].swiglu.w_2.weight[0, 0] = value
    settings = Settings.model_validate({"minimal_pairs": {"path": str(write(tmp_path / "pairs.jsonl", PAIRS))}})
    text = Text(fox.step_path(STEP) / "tokenizer.json", 320)
    with caplog.at_level("WARNING", "picolm"):
        found = evaluate(
            ("minimal_pairs",), Evaluation(model, None, 4, None, 0, 1, torch.device("cpu"), text, settings)
        )
    assert list(found) == ["minimal_pairs"]
    assert math.isnan(found["minimal_pairs"])
    assert "minimal_pairs has no value: the model computes NaN or infinities for 10 of 10 texts" in caplog.text


def test_pairs_that_differ_in_float64_alone_are_told_apart(fox: Run, tmp_path: Path) -> None:
    """Log-probabilities of a model in float64 are not rounded to float32."""
    pieces = [Piece(torch.tensor([0, 5, 9, 12]), 3)]
    model = load_model(fox).double()
    evaluation = Evaluation(model, None, 4, None, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        ln_p_TV = model(torch.tensor([[0, 5, 9]]))[0].log_softmax(-1)
    expected = -sum(float(ln_p_TV[place, token]) for place, token in enumerate([5, 9, 12]))
    assert score(pieces, evaluation).nats.item() == pytest.approx(expected, abs=1e-12)


def test_without_a_tokenizer_there_are_no_sentences(train: Callable[..., Run], tmp_path: Path) -> None:
    file = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(PicoError, match="minimal_pairs: the run has no tokenizer, so it cannot read text"):
        train("evaluation.metrics=[minimal_pairs]", f"evaluation.minimal_pairs.path={file}")


def test_what_is_asked_for_must_be_given(make_config: Callable[..., Any]) -> None:
    with pytest.raises(PicoError, match=r"evaluation.minimal_pairs.path.*: is empty, and minimal_pairs is asked for"):
        make_config("evaluation.metrics=[minimal_pairs]")
    with pytest.raises(PicoError, match=r"evaluation.lm_eval.tasks.*: is empty, and lm_eval is asked for"):
        make_config("evaluation.metrics=[lm_eval]")
