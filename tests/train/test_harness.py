"""lm-evaluation-harness asks, we answer: exact to the token, whatever the padding, and in the terms of our own evaluation."""

import importlib
import json
import math
import warnings
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.fox import STEP, TEXT

from picolm.data.tokenizer import load_tokenizer
from picolm.errors import PicoError
from picolm.store import Run
from picolm.train.evaluate import Evaluation, Rows, evaluate, token_nats
from picolm.train.evaluation_config import Evaluation as Settings
from picolm.train.sample import load_model
from picolm.train.text import Text

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs: pip install 'picolm[lm_eval]'"),
]

DOCUMENTS = [TEXT[:90], "naïve dog", TEXT[20:420]]  # the last is longer than the context
QUESTIONS = [
    {"question": "The quick brown", "choices": ["fox", "dog jumps", "1790 again, naïve"], "answer": 0},
    {"question": "It's cold", "choices": ["and", "over the lazy dog; the dog sleeps."], "answer": 1},
    {"question": TEXT[:400], "choices": ["fox", "dog"], "answer": 1},
]


@pytest.fixture(autouse=True, scope="module")
def harness() -> None:
    """Imported here, seconds that only these tests take, with the warnings of the packages that it imports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("lm_eval")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks of one's own and their documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    (folder / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in QUESTIONS))

    def source(name: str) -> str:
        return f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
"""

    (folder / "texts.yaml").write_text(f"""
task: fox_texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
{source("documents")}""")
    (folder / "choices.yaml").write_text(f"""
task: fox_choices
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{source("questions")}""")
    (folder / "writing.yaml").write_text(f"""
task: fox_writing
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
{source("questions")}""")
    return folder


def evaluation(run: Run, **settings: Any) -> Evaluation:
    text = Text(run.step_path(STEP) / "tokenizer.json", 320)
    chosen = Settings.model_validate({"lm_eval": settings})
    return Evaluation(load_model(run), None, 4, text.token_bytes_V, 0, 1, torch.device("cpu"), text, chosen)


def measure(run: Run, tasks: Path, *names: str, **settings: Any) -> dict[str, float]:
    return evaluate(("lm_eval",), evaluation(run, tasks=names, include_path=str(tasks), **settings))


def windows(run: Run, text: str) -> list[tuple[list[int], int]]:
    """A text after the end of another one, as rows of 65 tokens that overlap by one; how many of each row are scored.

    What is left for the last row is scored with all of the context before it.
    """
    tokens = [0, *load_tokenizer(run.step_path(STEP)).encode(text).ids]
    ends = [*range(64, len(tokens) - 1, 64), len(tokens) - 1]
    return [(tokens[max(0, end - 64) : end + 1], end - start) for start, end in zip([0, *ends], ends)]


def test_perplexity_is_that_of_our_own_evaluation(fox: Run, tasks: Path) -> None:
    """Same nats: ln (perplexity per byte) x bytes = ln (per word) x words = ln (per token) x tokens."""
    found, plain, cut = measure(fox, tasks, "fox_texts"), evaluation(fox), 0
    nats = tokens = size = 0.0
    for row, scored in (window for text in DOCUMENTS for window in windows(fox, text)):
        tokens += scored
        if scored == len(row) - 1:
            own = evaluate(("paloma",), plain._replace(rows=Rows(torch.tensor([row]), None, np.arange(1))))
            nats += own["paloma/nats_per_token"] * scored
            size += own["paloma/nats_per_token"] * scored / math.log(2) / own["paloma/bits_per_byte"]
        else:
            nats += float(token_nats(plain.model, torch.tensor([row]))[0, -scored:].sum())
            size += int(plain.token_bytes_V[row[-scored:]].sum())  # type: ignore[index]
            cut += 1
    text_bytes, words = sum(len(text.encode()) for text in DOCUMENTS), sum(len(text.split()) for text in DOCUMENTS)
    assert (cut, size) == (1, pytest.approx(text_bytes, rel=1e-9))
    assert found["lm_eval/fox_texts/bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert found["lm_eval/fox_texts/byte_perplexity"] == pytest.approx(math.exp(nats / text_bytes), rel=1e-5)
    assert math.log(found["lm_eval/fox_texts/word_perplexity"]) * words / tokens == pytest.approx(
        nats / tokens, rel=1e-5
    )


def test_a_text_that_fits_has_the_bits_per_byte_of_paloma(fox: Run, tasks: Path) -> None:
    found = measure(fox, tasks, "fox_texts", limit=1)
    ((row, _),) = windows(fox, DOCUMENTS[0])
    own = evaluate(("paloma",), evaluation(fox)._replace(rows=Rows(torch.tensor([row]), None, np.arange(1))))
    assert found["lm_eval/fox_texts/bits_per_byte"] == pytest.approx(own["paloma/bits_per_byte"], rel=1e-6)
    words_per_token = len(DOCUMENTS[0].split()) / (len(row) - 1)
    assert found["lm_eval/fox_texts/word_perplexity"] ** words_per_token == pytest.approx(own["paloma"], rel=1e-6)


def test_padding_and_batches_change_nothing(fox: Run, tasks: Path) -> None:
    names = ("fox_texts", "fox_choices")
    one = measure(fox, tasks, *names, batch_size=1)
    assert set(one) == {f"lm_eval/fox_texts/{unit}" for unit in ("word_perplexity", "byte_perplexity", "bits_per_byte")} | {
        "lm_eval/fox_choices/acc", "lm_eval/fox_choices/acc_norm",
    }  # fmt: skip
    for size in (2, 16):
        assert measure(fox, tasks, *names, batch_size=size) == pytest.approx(one, rel=1e-6)


def by_hand(run: Run, context: str, continuation: str) -> tuple[float, bool]:
    """The definition: tokens of both together, the last of them scored, the context cut from the left; no batch."""
    tokenizer, model = load_tokenizer(run.step_path(STEP)), load_model(run)
    before = tokenizer.encode(context).ids if context else [0]
    whole = tokenizer.encode(context + continuation).ids if context else [0, *tokenizer.encode(continuation).ids]
    scored, kept = len(whole) - len(before), whole[-65:]
    row_TV = model(torch.tensor([kept[:-1]]))[0].detach().double().log_softmax(-1)[-scored:]
    targets = kept[-scored:]
    return sum(float(row_V[t]) for row_V, t in zip(row_TV, targets)), row_TV.argmax(-1).tolist() == targets


def test_answers_have_the_probability_of_their_tokens_and_are_greedy_where_they_are(fox: Run) -> None:
    from picolm.train.harness import Adapter

    pairs = [(entry["question"], " " + choice) for entry in QUESTIONS for choice in entry["choices"]]
    pairs += [("", "The dog"), ("We don't ", "know")]
    with torch.no_grad():
        found = Adapter(evaluation(fox)).loglikelihood(
            [SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True
        )
    for pair, (ln_p, is_greedy) in zip(pairs, found, strict=True):
        moved = pair if not pair[0].endswith(" ") else (pair[0].rstrip(), " " + pair[1])
        expected = by_hand(fox, *moved)
        assert ln_p == pytest.approx(expected[0], rel=1e-5), pair
        assert is_greedy == expected[1], pair


def test_what_would_be_written_is_greedy_and_nothing_else(fox: Run) -> None:
    from picolm.train.harness import Adapter

    tokenizer, adapter = load_tokenizer(fox.step_path(STEP)), Adapter(evaluation(fox))
    before = tokenizer.encode("The dog").ids
    after = load_model(fox).generate(torch.tensor([before]), 5)[0, len(before) :].tolist()
    other = [*after[:-1], (after[-1] + 1) % 320]
    with torch.no_grad():
        found = adapter._loglikelihood_tokens([(None, before, tokens) for tokens in (after, other, [])])
    assert [greedy for _, greedy in found] == [True, False, True]
    assert found[2] == (0.0, True)


def test_it_writes_what_we_write_up_to_the_end_that_was_asked_for(fox: Run) -> None:
    from picolm.train.harness import Adapter

    tokenizer, model = load_tokenizer(fox.step_path(STEP)), load_model(fox)
    answers = []
    for prompt in ("The lazy fox doesn't", "", TEXT[:400]):
        tokens = (tokenizer.encode(prompt).ids or [0])[-(64 - 12) :]
        whole = tokenizer.decode(model.generate(torch.tensor([tokens]), 12, eos=0)[0, len(tokens) :].tolist())
        for until in ([], [whole[4]], whole[2:4]):
            stop = [until] if isinstance(until, str) else until
            expected = whole.split(stop[0])[0] if stop else whole
            request = SimpleNamespace(args=(prompt, {"until": until, "max_gen_toks": 12, "do_sample": False}))
            answers.append((Adapter(evaluation(fox)).generate_until([request])[0], expected))
    assert all(written == expected for written, expected in answers)
    assert len(set(answers)) > 4
    request = SimpleNamespace(args=("The", {"do_sample": True, "temperature": 0.7}))
    with pytest.raises(PicoError, match=r"random answers \(do_sample\); only greedy ones"):
        Adapter(evaluation(fox)).generate_until([request])


def test_limits_and_examples_are_those_of_the_configuration(fox: Run, tasks: Path) -> None:
    (best, _), (other, _) = (by_hand(fox, QUESTIONS[1]["question"], " " + choice) for choice in QUESTIONS[1]["choices"])
    first = measure(fox, tasks, "fox_choices", limit=1)["lm_eval/fox_choices/acc"]
    both = measure(fox, tasks, "fox_choices", limit=2)["lm_eval/fox_choices/acc"]
    assert first in (0.0, 1.0)
    assert both == (first + float(other > best)) / 2
    assert measure(fox, tasks, "fox_writing") == {"lm_eval/fox_writing/exact_match": 0.0}


def test_the_generators_of_the_process_are_left_alone(fox: Run, tasks: Path) -> None:
    def drawn() -> tuple[float, float]:
        return torch.rand(1).item(), np.random.rand()

    def seed() -> None:
        torch.manual_seed(5)
        np.random.seed(5)

    ready = evaluation(fox, tasks=["fox_choices"], include_path=str(tasks))
    seed()
    evaluate(("lm_eval",), ready)
    after = drawn()
    seed()
    assert after == drawn()


@pytest.mark.parametrize("name", ["fox_choices", "fox_texts", "fox_writing"])
def test_a_model_that_computes_nan_has_no_score_and_the_log_says_why(
    fox: Run, tasks: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = evaluation(fox, tasks=[name], include_path=str(tasks))
    with torch.no_grad():
        asked.model.output_norm.weight[0] = math.nan
    with caplog.at_level("WARNING", "picolm"):
        found = evaluate(("lm_eval",), asked)
    assert list(found) == ["lm_eval"]
    assert math.isnan(found["lm_eval"])
    assert "lm_eval has no value: the model computes NaN or infinities" in caplog.text


def test_a_task_that_there_is_not_is_named(fox: Run, tasks: Path) -> None:
    with pytest.raises(
        PicoError, match=r"no task 'fox_txts', and no file in .*tasks describes it; did you mean 'fox_texts'"
    ):
        measure(fox, tasks, "fox_txts")


def test_nothing_is_shown_but_what_is_wrong(fox: Run, tasks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    measure(fox, tasks, "fox_choices")
    assert capfd.readouterr() == ("", "")
