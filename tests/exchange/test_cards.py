"""What a card says of names that hold markup; what a card of somebody else may hold."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from picolm.exchange.card import kept_by_hand, model_card, with_front_matter
from picolm.store import Run

HOSTILE = "x\n---\n# <script>alert(1)</script> ``` [a](javascript:b) --> |"


def test_names_with_markup_change_nothing_else_in_the_card(tmp_path: Path) -> None:
    run = Run.create(
        tmp_path / "a",
        {"model": {"model_type": HOSTILE, "d_model": HOSTILE}, "data": {"dataloader": {"batch_size": HOSTILE}}},
        {
            "data": {"name": HOSTILE, "fingerprint": HOSTILE, "rows": 5},
            "packages": {HOSTILE: HOSTILE},
            "seeds": {HOSTILE: 1},
            "model": {HOSTILE: HOSTILE, "layers": 12},
        },
    )
    run.append_metrics({"step": 0, "train/loss": 2.0})
    card = model_card(run, "lab/run", HOSTILE, {0: "a" * 40}, {HOSTILE: HOSTILE, "list": [HOSTILE]})
    rendered = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(card.split("---\n", 2)[2])
    headings = re.findall(r"<h[1-6]>(.*?)</h[1-6]>", rendered)
    assert headings[1:] == ["Data and order", "Configuration", "Loss", "Loading a step", "Analyzing it"]
    assert headings[0].startswith("x --- # &lt;script&gt;")
    assert "layers 12)" in rendered
    assert not re.search(r"<script|<a |<img", rendered.split("-->")[1])
    assert rendered.count("<pre>") == 4
    assert rendered.count("<!--") == rendered.count("-->") == 1
    program = re.search(r"(`{3,})python\n(.*?)\n\1\n", card, re.DOTALL)
    assert program is not None
    compile(program[2], "card", "exec")


@pytest.mark.slow
@pytest.mark.parametrize(
    "front",
    ["a: &a [*a]", "[" * 5000, "a: !!python/object/apply:os.system [id]", "just text", "- a", "1: 2", "a: [\n"],
)
def test_the_first_lines_of_another_card_are_kept_or_left_out(front: str) -> None:
    card = with_front_matter("---\ntags: [pico]\n---\nbody", f"---\n{front}\n---\nold")
    assert card.startswith("---\n")
    assert "tags:" in card
    assert card.endswith("---\nbody")


def test_what_was_added_by_hand_stays() -> None:
    card = with_front_matter("---\ntags: [pico]\n---\nbody", "---\nlicense: mit\nlanguage: [en]\n---\nold")
    assert "license: mit" in card
    assert not kept_by_hand(card, "hub:lab/run@x") or "body" in card
