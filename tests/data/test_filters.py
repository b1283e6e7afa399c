"""Which documents are kept, and that the rows say by what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.data.documents import Document
from picolm.data.filters import load_filter
from picolm.data.prepare import prepare
from picolm.errors import DataError, PicoError

OPTIONS: dict[str, Any] = {"vocab_size": 300, "seq_len": 32, "seed": 1}


def kept(text: str, *documents: str | Document) -> list[bool]:
    keep = load_filter(text)
    return [keep(document if isinstance(document, Document) else Document(document, None)) for document in documents]


def test_filters_by_name_with_options() -> None:
    assert kept("length,min_characters=3", "ab", "abc") == [False, True]
    assert kept("length,min_characters=1,max_characters=2", "", "ab", "abc") == [False, True, False]
    assert kept("letters,min_share=75e-2", "abc1", "ab 12", "Größe", "") == [True, False, True, True]
    documents = [Document("x", "web"), Document("x", "books"), Document("x", None)]
    assert kept("sources,only=[books, web]", *documents) == [True, True, False]
    assert kept("sources,but=[web]", *documents) == [False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lenght", r"unknown filter 'lenght'; did you mean 'length'"),
        ("length,min=3", r"filter 'length,min=3': has no option 'min' \(it has: min_characters, max_characters\)"),
        ("length,3", r"filter 'length,3': '3' is not of the form OPTION=VALUE"),
        ("length,min_characters=many", r"min_characters=many: should be a valid integer"),
        ("letters,min_share=yes", r"min_share=yes: should be a valid number"),
        ("letters,min_share={", r"option min_share:1: is not valid YAML"),
        ("length,min_characters=" + "[" * 5000, r"option min_characters: is not valid YAML"),
        ("my_lab.nowhere:filter", r"filter 'my_lab.nowhere:filter' cannot be imported"),
    ],
)
def test_what_names_no_filter(text: str, message: str) -> None:
    with pytest.raises(PicoError, match=message):
        load_filter(text)


def test_numbers_can_name_sources() -> None:
    documents = [Document("x", "2020"), Document("x", "0.5"), Document("x", "true"), Document("x", "a")]
    assert kept("sources,only=[2020, 0.5, true]", *documents) == [True, True, True, False]


def test_a_list_has_to_be_one() -> None:
    with pytest.raises(DataError, match=r"only=web: takes a list: only=\[web\]"):
        kept("sources,only=web", "x")


def test_what_is_left_out_is_counted_and_part_of_the_recipe(
    write_texts: Any, tmp_path: Path, story: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quality.py").write_text("def odd(document, *, word='n'):\n    return word in document.text\n")
    monkeypatch.syspath_prepend(tmp_path)
    texts = write_texts({"a.jsonl": [{"text": story(i)} for i in range(20)] + [{"text": "tiny"}] * 3})
    filters = ["length,min_characters=9", "quality:odd,word=learns"]
    manifest = prepare([texts], tmp_path / "out", **OPTIONS, filters=filters)
    assert manifest is not None
    left_out = sum("learns" not in story(i) for i in range(20))
    assert manifest.left_out == {"length,min_characters=9": 3, "quality:odd,word=learns": left_out}
    assert manifest.documents == 20 - left_out
    assert manifest.recipe["filters"][0] == "length,min_characters=9"
    assert manifest.recipe["filters"][1].startswith("quality:odd,word=learns (sha256 ")
    with pytest.raises(
        DataError, match=r"made in another way \(filters \['length,min_characters=9', 'quality.* there, None"
    ):
        prepare([texts], tmp_path / "out", **OPTIONS)
    with pytest.raises(
        DataError, match=r"no text in the 1 files .*; 23 documents were left out by letters,min_share=2"
    ):
        prepare([texts], tmp_path / "none", **OPTIONS, filters=["letters,min_share=2"])


@pytest.mark.slow
def test_of_equal_texts_the_first_stays_wherever_they_are(
    write_texts: Any, tmp_path: Path, story: Callable[[int], str]
) -> None:
    texts = write_texts({
        "a/1.jsonl": [{"text": story(i)} for i in range(30)],
        "b/2.jsonl": [{"text": story(i)} for i in range(15, 45)] + [{"text": story(44)}],
    })  # fmt: skip
    once = write_texts({})
    alone = tmp_path / "alone"
    (alone / "a").mkdir(parents=True)
    (alone / "a/1.jsonl").write_bytes((once / "a/1.jsonl").read_bytes())
    for unit_bytes in (300, 1 << 20):
        found = prepare([texts], tmp_path / f"{unit_bytes}", **OPTIONS, deduplicate=True, unit_bytes=unit_bytes)
        assert found is not None
        assert (found.documents, found.left_out) == (45, {"duplicates": 16})
        assert {name: counts["documents"] for name, counts in found.sources.items()} == {"a": 30, "b": 15}
    without = prepare([alone], tmp_path / "x", **OPTIONS)
    asked = prepare([alone], tmp_path / "y", **OPTIONS, deduplicate=True)
    assert without is not None
    assert asked is not None
    assert asked.splits == without.splits  # where there are none, nothing changes
