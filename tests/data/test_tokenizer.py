"""Tokenizers: the same from the same text, lossless, and byte for byte accounted for."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from picolm.data.tokenizer import (
    END_OF_TEXT,
    find_tokenizer,
    load_tokenizer,
    load_vocabulary,
    parse_tokenizer,
    token_bytes,
    train_tokenizer,
    write_tokenizer,
)
from picolm.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of 400 entries trained on a few sentences."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(train_tokenizer(["the cat sat on the mat. Übergrößen, 漢字! " * 20] * 5, 320), folder, 16)
    return folder


def test_training_repeats_itself(story: Callable[[int], str]) -> None:
    texts = [story(number) for number in range(200)]
    first, second = (train_tokenizer(iter(texts), 400).tokenizer.to_str() for _ in range(2))
    assert first == second
    assert len(json.loads(first)["model"]["vocab"]) == 400


def test_the_end_of_text_is_the_first_entry_and_text_cannot_spell_it(folder: Path) -> None:
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.eos_token, vocabulary.eos_id) == (END_OF_TEXT, 0)
    ids = vocabulary.tokenizer.encode(f"the end{END_OF_TEXT}of it").ids
    assert 0 not in ids
    assert vocabulary.tokenizer.decode(ids) == f"the end{END_OF_TEXT}of it"


def test_any_text_survives_and_its_bytes_are_counted(folder: Path) -> None:
    tokenizer, sizes_V = load_tokenizer(folder), token_bytes(folder / "tokenizer.json")
    assert sizes_V is not None
    assert len(sizes_V) == tokenizer.get_vocab_size()

    @given(st.text(st.characters(codec="utf-8")))
    def check(text: str) -> None:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        assert sizes_V[ids].sum() == len(text.encode())

    check()
    assert sizes_V[0] == 0


def test_bytes_of_added_tokens_and_of_holes_in_the_numbering(folder: Path, tmp_path: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])
    tokenizer.add_special_tokens(["<|mask|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    sizes_V = token_bytes(tmp_path / "tokenizer.json")
    assert sizes_V is not None
    assert sizes_V[-2:].tolist() == [3, 0]


WORDS = {"the": 0, "fox": 1, "é": 2, ",": 3, "[UNK]": 4, " ": 5, "\n": 6, "a": 7}


def saved(folder: Path, model: Any, pre_tokenizer: Any = None, decoder: Any = None, normalizer: Any = None) -> Path:
    """A tokenizer.json of these parts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer(model)
    for name, part in (("pre_tokenizer", pre_tokenizer), ("decoder", decoder), ("normalizer", normalizer)):
        if part is not None:
            setattr(tokenizer, name, part)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("words", [["the", "fox", ",", "a"], ["fox"], ["the", "the", "a"]])
def test_words_have_their_bytes_and_one_separator_each(tmp_path: Path, words: list[str]) -> None:
    from tokenizers import models, pre_tokenizers

    for splitter, separator in ((pre_tokenizers.WhitespaceSplit(), " "), (pre_tokenizers.CharDelimiterSplit("é"), "é")):
        file = saved(tmp_path, models.WordLevel(WORDS, unk_token="[UNK]"), splitter)
        sizes_V = token_bytes(file)
        assert sizes_V is not None
        ids = load_tokenizer(file).encode(separator.join(words)).ids
        assert sizes_V[ids].sum() == len((separator.join(words) + separator).encode())


@pytest.mark.parametrize("behavior", ["isolated", "merged_with_next"])
def test_characters_have_their_own_bytes(tmp_path: Path, behavior: Any) -> None:
    from tokenizers import Regex, models, pre_tokenizers

    text = "a, é\na"
    file = saved(tmp_path, models.WordLevel(WORDS, unk_token="[UNK]"), pre_tokenizers.Split(Regex(r"[\s\S]"), behavior))
    sizes_V = token_bytes(file)
    assert sizes_V is not None
    ids = load_tokenizer(file).encode(text).ids
    assert len(ids) == len(text)
    assert sizes_V[ids].sum() == len(text.encode())
    unknown = load_tokenizer(file).encode("x" + text).ids
    assert sizes_V[unknown].sum() < 0  # nobody can say how many bytes the unknown token stands for
    assert sizes_V[load_tokenizer(file).token_to_id("<|endoftext|>")] == 0


def test_pieces_with_marks_for_spaces_and_bytes_as_the_last_resort(tmp_path: Path) -> None:
    from tokenizers import decoders, models, pre_tokenizers

    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "f", "o", "x"]
    model = models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>", byte_fallback=True)
    mark = pre_tokenizers.Metaspace(prepend_scheme="never")
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    file = saved(tmp_path, model, mark, decoder)
    sizes_V = token_bytes(file)
    assert sizes_V is not None
    for text in ("fox fox", "f é\n你好 x"):
        assert sizes_V[load_tokenizer(file).encode(text).ids].sum() == len(text.encode())


def test_bytes_are_unknown_where_they_follow_from_the_text_alone(tmp_path: Path) -> None:
    from tokenizers import models, pre_tokenizers

    words = models.WordLevel(WORDS, unk_token="[UNK]")
    for splitter in (
        pre_tokenizers.Whitespace(),  # "fox," and "fox ,"
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Split(" ", "removed"),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Digits(True)]),
    ):
        assert token_bytes(saved(tmp_path, words, splitter)) is None
    assert token_bytes(saved(tmp_path, models.BPE({"f": 0}, []), pre_tokenizers.WhitespaceSplit())) is None
    assert token_bytes(saved(tmp_path, models.WordPiece({"f": 0, "[UNK]": 1}, unk_token="[UNK]"))) is None


def test_truncation_and_padding_of_a_file_are_switched_off(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (
        load_tokenizer(tmp_path).encode("the cat sat on the mat").ids
        == load_tokenizer(folder).encode("the cat sat on the mat").ids
    )


@pytest.mark.parametrize("end", ["</s>", {"content": "</s>", "special": True}])
def test_the_end_of_text_is_what_the_configuration_says(tmp_path: Path, end: Any) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "</s>": 2})).save(str(tmp_path / "tokenizer.json"))
    assert load_vocabulary(tmp_path).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    assert load_vocabulary(tmp_path / "tokenizer.json").eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    assert load_vocabulary(tmp_path).eos_id == 2


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import models

    with pytest.raises(
        DataError, match=r"nothing: is no tokenizer.json, no folder with one, and not the form owner/name"
    ):
        find_tokenizer("nothing")
    with pytest.raises(DataError, match=r"is no tokenizer.json, no folder with one"):
        find_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer.json: cannot be read as a tokenizer.json"):
        load_tokenizer(tmp_path)
    Tokenizer(models.WordLevel({"a": 0})).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"has no end-of-text token .* name it as eos_token in a tokenizer_config.json beside it"
    ):
        load_vocabulary(tmp_path)
    with pytest.raises(DataError, match="a vocabulary of 256 is too small"):
        train_tokenizer(["a"], 256)
    with pytest.raises(DataError, match=r"allenai/none: tokenizer.json: is not in the Hub's cache, and offline mode"):
        find_tokenizer("allenai/none")


@pytest.mark.parametrize("library_speaks", [False, True])
def test_a_panic_of_the_library_is_one_message_and_what_it_says_otherwise_is_heard(
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    library_speaks: bool,
) -> None:
    """A panic writes its stack to the descriptor of the standard error, past Python."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["continuing_subword_prefix"] = "planted:Part"  # longer than the tokens that it is cut off
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    if library_speaks:
        loaded = Tokenizer.from_buffer
        monkeypatch.setattr(
            Tokenizer, "from_buffer", staticmethod(lambda data: os.write(2, b"a warning\n") and loaded(data))
        )
    for _ in range(2):
        with pytest.raises(DataError, match=r"tokenizer.json: cannot be read as a tokenizer.json \(range end index"):
            load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""
    load_tokenizer(folder)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "a warning\n" * library_speaks + "after\n"


@pytest.mark.slow
def test_transformers_loads_the_folder(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    text = "the cat sat on  the mat.\n"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.decode(ours.encode(text).ids) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.model_max_length) == (END_OF_TEXT, 0, 16)


def test_golden_encoding(folder: Path) -> None:
    assert load_tokenizer(folder).encode("the cat sat").ids == [259, 275, 278]


@pytest.mark.parametrize("number", [10_000_001, 10**9, 2**32 - 1, 2**64])
@pytest.mark.parametrize("where", ["vocabulary", "added"])
@pytest.mark.parametrize("model", ["BPE", "WordLevel"])
def test_a_token_id_beyond_all_vocabularies_is_a_message(model: str, where: str, number: int) -> None:
    """The library counts up to the largest id and ends the process where the memory does not suffice."""
    form: dict[str, Any] = {"model": {"type": model, "vocab": {"a": 0, "b": 1}, "merges": [], "unk_token": "a"}}
    if where == "vocabulary":
        form["model"]["vocab"]["c"] = number
    else:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        form["added_tokens"] = [{"id": number, "content": "c", **flags}]
    with pytest.raises(
        DataError, match=rf"^x: has a token id of {number} among 3 tokens; the largest that is read is 10000000"
    ):
        parse_tokenizer(json.dumps(form).encode(), "x")
