"""What is told of a text at a step is what the model computes, found here on other ways."""

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.fox import STEP

from picolm.models.masked import fill
from picolm.observe.rows import Rows
from picolm.observe.subject import Subject
from picolm.probes.induction import _masks
from picolm.store import Run
from picolm.view import answers
from picolm.view.refusal import Refused
from picolm.view.viewed import Viewed

TEXT = "The quick brown fox. The quick dog — naïve!"


@pytest.fixture
def viewed(fox: Run) -> Viewed:
    return Viewed(0, fox, str(fox.path))


@pytest.fixture
def ids(viewed: Viewed) -> list[int]:
    return viewed.text(TEXT).ids


def test_a_text_has_the_losses_ranks_and_likeliest_tokens_of_its_logits(viewed: Viewed, ids: list[int]) -> None:
    found = answers.text(viewed.at(STEP), ids, viewed.words)
    with torch.no_grad():
        logits_TV = viewed.subject.model(torch.tensor([ids]))[0].double()
    p_TV = logits_TV.softmax(-1)
    assert len(ids) == len(found["nats"]) == len(found["top"]) == len(found["rank"])
    assert (found["nats"][0], found["rank"][0], found["top"][0], found["entropy"][0]) == (None, None, [], None)
    for place in range(1, len(ids)):
        p_V, true = p_TV[place - 1], ids[place]
        assert found["nats"][place] == pytest.approx(-math.log(p_V[true]), rel=1e-5)
        assert found["probability"][place] == pytest.approx(float(p_V[true]), rel=1e-5)
        assert found["rank"][place] == int((p_V > p_V[true]).sum())
        assert found["entropy"][place] == pytest.approx(float(-(p_V * p_V.log()).sum()), rel=1e-5)
        likeliest = sorted(range(len(p_V)), key=lambda number: -p_V[number])[: answers.LIKELIEST]
        assert [string for string, _ in found["top"][place]] == viewed.words(likeliest)
        assert [p for _, p in found["top"][place]] == pytest.approx(
            [float(p_V[number]) for number in likeliest], rel=1e-5
        )
    assert found["next"][0][0] == viewed.words([int(p_TV[-1].argmax())])[0]
    assert found["mean_nats"] == pytest.approx(sum(found["nats"][1:]) / (len(ids) - 1))
    assert found["order"] is None


def test_the_losses_are_the_scores_of_the_subject_to_the_last_bit(viewed: Viewed, ids: list[int]) -> None:
    subject = viewed.at(STEP)
    rows = Rows([torch.tensor(ids)], [[0]], "text", True, "")
    assert answers.text(subject, ids, viewed.words)["nats"][1:] == subject.scores(rows, draws=0)[0].tolist()
    assert answers.rows(subject, [ids])[0]["nats"][1:] == subject.scores(rows, draws=0)[0].tolist()


def test_a_row_of_one_token_more_than_the_context_is_read_to_its_end(viewed: Viewed) -> None:
    subject = viewed.at(STEP)
    ids = torch.randint(300, (subject.architecture.context + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    found = answers.text(subject, viewed.cut(ids, 1).ids, viewed.words)
    assert len(found["nats"]) == len(ids)
    assert None not in found["nats"][1:]
    assert found["next"] is None
    assert viewed.cut(ids, 0).truncated
    assert len(viewed.cut(ids, 0).ids) == len(ids) - 1
    _, matrix_LNTT = answers.heads(subject, ids)
    assert matrix_LNTT.shape[-1] == len(ids) - 1


def test_weights_that_are_no_numbers_give_no_numbers(viewed: Viewed, ids: list[int]) -> None:
    subject = viewed.at(STEP)
    with torch.no_grad():
        next(subject.model.parameters()).fill_(math.nan)
    found = answers.text(subject, ids, viewed.words)
    assert set(found["nats"]) == set(found["rank"]) == set(found["probability"]) == {None}
    assert found["top"] == [[]] * len(ids)
    assert found["mean_nats"] is None


def test_patterns_are_those_of_the_model(viewed: Viewed, ids: list[int]) -> None:
    kind, matrix_LNTT = answers.heads(viewed.at(STEP), ids)
    with torch.no_grad():
        expected = viewed.subject.model.with_patterns(torch.tensor([ids]))[1]
    assert kind == "attention"
    assert torch.equal(matrix_LNTT, torch.cat(expected))


def test_scores_of_heads_are_those_of_their_patterns(viewed: Viewed, ids: list[int]) -> None:
    _, matrix_LNTT = answers.heads(viewed.at(STEP), ids)
    found = answers.head_scores(matrix_LNTT, ids)
    size = len(ids)
    after_TT = _masks(torch.tensor([ids]))[0, 2]  # where TransformerLens expects an induction head to look
    queries = [place for place in range(size) if ids[place] in ids[:place]]
    assert queries
    for layer, head in ((0, 0), (2, 3)):
        pattern_TT = matrix_LNTT[layer, head].double()
        before = sum(float(pattern_TT[place, place - 1]) for place in range(1, size)) / (size - 1)
        first = sum(float(pattern_TT[place, 0]) for place in range(1, size)) / (size - 1)
        again = sum(float((pattern_TT * after_TT)[place].sum()) for place in queries) / len(queries)
        assert found["previous"][layer][head] == pytest.approx(before)
        assert found["first"][layer][head] == pytest.approx(first)
        assert found["induction"][layer][head] == pytest.approx(again)
    assert answers.head_scores(matrix_LNTT[..., :2, :2], ids[:2])["induction"] is None  # no token stands twice
    assert answers.head_scores(matrix_LNTT[..., :1, :1], ids[:1])["previous"] == [[None] * 4] * 3


def test_large_patterns_are_cut(viewed: Viewed, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_BYTES", 4 * 12 * 5 * 5)
    assert answers.heads(viewed.at(STEP), ids)[1].shape == (3, 4, 5, 5)


def test_layers_are_read_by_the_final_norm_and_the_unembedding(viewed: Viewed, ids: list[int]) -> None:
    found = answers.layers(viewed.at(STEP), ids, viewed.words)
    rows = Rows([torch.tensor(ids)], [[0]], "text", False, "")
    passed = viewed.subject.forward(rows, [0], ["hidden"])
    assert [len(found[name]) for name in ("likeliest", "probability", "nats", "norm")] == [4] * 4
    for k, hidden_BTH in enumerate(passed.hidden):
        with torch.no_grad():
            p_TV = viewed.subject.readout(hidden_BTH)[0].double().softmax(-1)
        assert found["likeliest"][k] == viewed.words(p_TV.argmax(-1).tolist())
        assert found["probability"][k] == pytest.approx(p_TV.max(-1).values.tolist(), rel=1e-5)
        expected = [-math.log(p_TV[place, true]) for place, true in enumerate(ids[1:])]
        assert found["nats"][k] == [pytest.approx(value, rel=1e-5) for value in expected] + [None]
        assert found["norm"][k] == pytest.approx(hidden_BTH[0].norm(dim=-1).tolist())
    assert found["nats"][-1][:-1] == answers.text(viewed.subject, ids, viewed.words)["nats"][1:]


def test_a_state_space_model_shows_its_mixing(state_space_run: Run) -> None:
    viewed = Viewed(0, state_space_run, "")
    ids = viewed.text("5 7 <9> 5 7").ids  # without a tokenizer, ids
    assert ids == [5, 7, 9, 5, 7]
    assert viewed.words(ids)[:2] == ["<5>", "<7>"]
    subject = viewed.at(STEP)
    kind, matrix_LNTT = answers.heads(subject, ids)
    with torch.no_grad():
        expected = [each.matrix_BHTT[0] for each in subject.model.with_mixing(torch.tensor([ids]))[1]]
    assert kind == "mixing"
    assert torch.equal(matrix_LNTT, torch.stack(expected))
    can = answers.why_not(subject)
    assert (can["text"], can["mixing"], can["lens"]) == (True, True, True)
    assert "does not give the weights of an attention" in can["patterns"]
    for text, why in (("5 x", "no tokenizer"), ("99999", "0 to 60"), ("", "no tokens")):
        with pytest.raises(Refused, match=why):
            viewed.text(text)


def test_a_diffusion_model_is_read_from_left_to_right(make_run: Any) -> None:
    run: Run = make_run(model_type="pico_diffusion", vocab_size=321)
    viewed = Viewed(0, run, "")
    ids = viewed.text(TEXT).ids
    subject = viewed.at(STEP)
    found = answers.text(subject, ids, viewed.words)
    rows = Rows([torch.tensor(ids)], [[0]], "text", True, "")
    assert found["nats"][0] is None  # the first token is given
    assert found["nats"][1:] == pytest.approx(subject.scores(rows, draws=0)[0].tolist(), rel=1e-5)
    assert found["nats"][1:] == pytest.approx(answers.rows(subject, [ids])[0]["nats"][1:], rel=1e-5)
    assert found["next"] is None
    assert answers.text(subject, ids[:1], viewed.words)["nats"] == [None]
    with torch.no_grad():  # the prediction of one token, by hand
        read_1T = torch.tensor([ids])
        read_1T[0, 3:] = subject.model.mask
        p_V = subject.model.logits_at(read_1T, torch.arange(len(ids))[None] == 3)[0].double().softmax(-1)
    assert found["probability"][3] == pytest.approx(float(p_V[ids[3]]), rel=1e-4)
    assert found["order"][0] is None
    assert sorted(found["order"][1:]) == list(range(len(ids) - 1))
    half = len(ids) // 2  # after so many steps as many positions are written: those that come first in the order
    tokens_1T = torch.full((1, len(ids)), subject.model.mask)
    tokens_1T[0, 0] = ids[0]
    written = _after(subject, tokens_1T, half)
    assert {place for place, at in enumerate(found["order"]) if at is None or at < half} == written
    can = answers.why_not(subject)
    assert can["text"] is True
    assert can["patterns"] is True
    assert "hidden tokens from both sides" in can["lens"]
    assert answers.heads(subject, ids)[1].shape == (3, 4, len(ids), len(ids))


def _after(subject: Subject, tokens_1T: torch.Tensor, steps: int) -> set[int]:
    """Where a text is written after so many steps, most confident first; by single steps of `fill`."""
    for _ in range(steps):
        where_1T = tokens_1T == subject.model.mask
        with torch.no_grad():
            sure_P = subject.model.logits_at(tokens_1T, where_1T).double().softmax(-1).amax(-1)
        place = where_1T[0].nonzero()[:, 0][int(sure_P.argmax())]
        whole_1T = fill(subject.model, tokens_1T, order="confident", steps=1)
        tokens_1T = tokens_1T.clone()
        tokens_1T[0, place] = whole_1T[0, place]
    return set((tokens_1T[0] != subject.model.mask).nonzero()[:, 0].tolist())


def test_the_server_starts_without_what_only_training_needs() -> None:
    program = "import sys, picolm.view.server; print([name for name in %r if name in sys.modules])"
    heavy = ["lightning_fabric", "transformers", "matplotlib", "plotly", "scipy"]
    done = subprocess.run([sys.executable, "-c", program % heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
