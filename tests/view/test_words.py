"""Tokens as text: together they are the text."""

import pytest
from tests.fox import STEP, TEXT

from picolm.errors import PicoError
from picolm.store import Run
from picolm.view.viewed import Viewed
from picolm.view.words import Words

STRANGE = "naïve — 😀 日本 <b>&amp;</b>\n\ttab"


@pytest.fixture
def words(fox: Run) -> Words:
    return Viewed(0, fox, "").words


def test_the_strings_of_the_tokens_make_the_text(words: Words) -> None:
    text = TEXT.replace("ï", "i")
    assert "".join(words(words.encode(text))) == text


def test_bytes_that_are_no_letters_by_themselves_are_shown(words: Words) -> None:
    shown = "".join(words(words.encode(STRANGE)))
    for letter in sorted(set(STRANGE) - {letter for letter in STRANGE if letter.isascii()}):
        parts = "".join(f"⟨{byte:02x}⟩" for byte in letter.encode())
        assert letter in shown or parts in shown
    plain = shown
    for letter in set(STRANGE):
        plain = plain.replace("".join(f"⟨{byte:02x}⟩" for byte in letter.encode()), letter)
    assert plain == STRANGE


def test_a_special_token_is_text_like_any_other(words: Words, fox: Run) -> None:
    assert words([0]) == ["<|endoftext|>"]
    assert 0 not in words.encode("<|endoftext|>")  # typed, it is letters
    assert fox[STEP].step == STEP


def test_an_id_without_a_token_is_shown_as_its_number(words: Words) -> None:
    assert words([319]) == ["<319>"]


def test_a_text_that_is_no_unicode_is_refused(words: Words) -> None:
    with pytest.raises(PicoError, match="not valid UTF-8"):
        words.encode("\ud800")


def test_a_vocabulary_of_word_pieces_and_one_of_spaces(tmp_path: object) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁the", -1.0), ("▁", -2.0), ("<0xE2>", -3.0)], 0, True))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert Words(unigram.to_str().encode(), 9)([1, 2, 3]) == [" the", " ", "⟨e2⟩"]
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    assert Words(pieces.to_str().encode(), 9)([1, 2]) == ["play", "ing"]
