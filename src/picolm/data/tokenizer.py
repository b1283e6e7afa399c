"""Tokenizers: training one, finding a given one, what ends a document, and how many bytes of text a token stands for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from picolm.errors import DataError
from picolm.network import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>")


class Vocabulary(NamedTuple):
    """A tokenizer and what ends a document in it. file: where it came from, None for one just trained."""

    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    file: Path | None


def load_tokenizer(place: str | Path) -> Tokenizer:
    """The tokenizer at a tokenizer.json, in a folder, or of a Hub repository; it never cuts off, pads, or adds tokens by itself.

    Text that spells a special token is encoded as text, so that no document can end itself.
    """
    from tokenizers import Tokenizer

    file = find_tokenizer(place)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{file}: cannot be read as a tokenizer.json ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_vocabulary(place: str | Path) -> Vocabulary:
    """The tokenizer at a place with its end-of-text token. Raises DataError when it has none."""
    file, tokenizer = find_tokenizer(place), load_tokenizer(place)
    candidates = [_configured_end(place, file), *_ENDS]
    for token in filter(None, candidates):
        number = tokenizer.token_to_id(token)
        if number is not None:
            return Vocabulary(tokenizer, token, number, file)
    raise DataError(
        f"{file}: has no end-of-text token (looked for: {', '.join(_ENDS)}); "
        "name it as eos_token in a tokenizer_config.json beside it"
    )


def find_tokenizer(place: str | Path) -> Path:
    """The local path of a tokenizer.json: the file itself, the one of a folder, or the one of a Hub repository, downloaded."""
    path = Path(place).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.is_file():
        return path
    if path.exists() or str(place).count("/") != 1 or path.suffix == ".json":
        raise DataError(
            f"{place}: is no tokenizer.json, no folder with one, and not the form owner/name of a Hub repository"
        )
    return fetch(str(place), "tokenizer.json", None, DataError)


def check_size(vocab_size: int) -> None:
    """Raise DataError when a byte-level vocabulary cannot be so small."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and the end of text make {SMALLEST_VOCABULARY}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Byte-level BPE (each byte is a token, so that any text has an encoding); the end-of-text token is id 0.

    The result depends on the texts and the size alone. A small corpus may yield fewer entries than asked for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    allow_parallelism()
    tokenizer.train_from_iterator(texts, trainer)
    return Vocabulary(tokenizer, END_OF_TEXT, 0, None)


def write_tokenizer(vocabulary: Vocabulary, folder: Path, max_length: int) -> str:
    """Write tokenizer.json and a tokenizer_config.json, so that transformers loads the folder; returns the former's sha-256."""
    target = folder / "tokenizer.json"
    if vocabulary.file is None:
        target.write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
    else:
        shutil.copyfile(vocabulary.file, target)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "eos_token": vocabulary.eos_token,
        "pad_token": vocabulary.eos_token,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return hashlib.sha256(target.read_bytes()).hexdigest()


def token_bytes(tokenizer_file: str | Path) -> np.ndarray | None:
    """int64 [V]: bytes of text that each id stands for, 0 for special tokens and unused ids; None if it is not byte-level.

    A byte-level vocabulary writes each byte as one letter of an alphabet of 256, so that a token has as many bytes as letters.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    tokenizer = load_tokenizer(tokenizer_file)
    if "ByteLevel" not in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        return None
    letters = set(ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    entries = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    sizes_V = np.zeros(max(entries) + 1, dtype=np.int64)
    for number, token in entries.items():
        if number in added:
            sizes_V[number] = 0 if added[number].special else len(added[number].content.encode())
        elif set(token) <= letters:
            sizes_V[number] = len(token)
        else:
            return None
    return sizes_V


def allow_parallelism() -> None:
    """Let the library use its threads, unless the user decided otherwise; saying so also silences its warning at forks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _configured_end(place: str | Path, file: Path) -> str | None:
    """The `eos_token` of the tokenizer_config.json beside a tokenizer.json."""
    beside = file.with_name("tokenizer_config.json")
    if not beside.is_file() and not Path(place).expanduser().exists():
        try:
            beside = fetch(str(place), "tokenizer_config.json", None, DataError)
        except DataError:
            return None  # not every repository has one
    if not beside.is_file():
        return None
    token = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    return token.get("content") if isinstance(token, dict) else token
