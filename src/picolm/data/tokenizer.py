"""Tokenizers: training one, finding a given one, what ends a document, and how many bytes of text a token stands for."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import threading
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from picolm import trusted
from picolm.data.manifest import file_of
from picolm.errors import DataError, PicoError
from picolm.network import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from picolm.data import Source

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
_LONG_RUN, _PIECE_OF_RUN = 4096, 256
_RUN = re.compile(rf"[^\W\d_]{{{_LONG_RUN},}}|\d{{{_LONG_RUN},}}|(?:[^\s\w]|_){{{_LONG_RUN},}}")
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
    file = find_tokenizer(place)
    trusted.refuse_lfs_pointer(file.resolve())
    return parse_tokenizer(trusted.read_bytes(file.resolve()), str(file))


def parse_tokenizer(content: bytes, where: str) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, as `load_tokenizer` does. Raises DataError, naming `where`."""
    from tokenizers import Tokenizer

    trusted.parse_json(content, where, dict[str, Any])  # the library has no limit of depth
    with _library_errors(f"{where}: cannot be read as a tokenizer.json"):
        tokenizer = Tokenizer.from_buffer(content.removeprefix(codecs.BOM_UTF8))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_text(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """Return the tokens of a text as in training: nothing is added by post-processors, and nothing cut off or padded.

    what: the text, for messages. Raises DataError for text that is not valid Unicode or that the tokenizer cannot encode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not valid UTF-8 (at character {error.start}); give it in the encoding UTF-8"
        ) from None
    with _library_errors(f"{what} cannot be encoded by the tokenizer of the run"):
        return list(tokenizer.encode(text, add_special_tokens=False).ids)


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
    if path.is_dir() and os.path.lexists(path / "tokenizer.json"):
        file_of(path, "tokenizer.json")
        return path / "tokenizer.json"
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
    with _library_errors("the tokenizer cannot be trained"):
        _interruptible(lambda: tokenizer.train_from_iterator(_cut_runs(texts), trainer))
    return Vocabulary(tokenizer, END_OF_TEXT, 0, None)


def write_tokenizer(vocabulary: Vocabulary, folder: Path, max_length: int) -> dict[str, str]:
    """Write tokenizer.json and a tokenizer_config.json, so that transformers loads the folder.

    Returns their digests as a manifest states them: sha256 and config_sha256.
    """
    target = folder / "tokenizer.json"
    if vocabulary.file is None:
        target.write_text(vocabulary.tokenizer.to_str(pretty=True), encoding="utf-8")
    else:
        target.write_bytes(trusted.read_bytes(vocabulary.file.resolve()))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "eos_token": vocabulary.eos_token,
        "pad_token": vocabulary.eos_token,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    files = {"sha256": target, "config_sha256": folder / "tokenizer_config.json"}
    return {key: hashlib.sha256(file.read_bytes()).hexdigest() for key, file in files.items()}


def check_same(rows: Source, name: str, file: Path | None, sha256: str | None, what: str) -> None:
    """Raise DataError where rows were made with another tokenizer than the one in `file`, as far as both are known.

    name: of the rows; what: what the tokenizer belongs to; sha256: its digest where there is no file.
    """
    made_with = getattr(rows, "tokenizer_sha256", None)
    if file is not None:
        sha256 = hashlib.sha256(trusted.read_bytes(file.resolve())).hexdigest()
    if made_with is None or sha256 is None or made_with == sha256:
        return
    if file is not None and rows.tokenizer_file is not None and is_same(file, rows.tokenizer_file):
        return
    raise DataError(
        f"{name}: its rows were made with another tokenizer (sha-256 {made_with}) than {what} (sha-256 {sha256}), so their ids "
        "mean other text; set data.tokenizer.name to auto, or prepare the text again with `pico data prepare --tokenizer`"
    )


def is_same(one: Path, other: Path) -> bool:
    """Tell whether two files hold the same tokenizer: equal bytes, or equal once the library has read them."""
    if trusted.read_bytes(one.resolve()) == trusted.read_bytes(other.resolve()):
        return True
    return bool(load_tokenizer(one).to_str() == load_tokenizer(other).to_str())


def encode(vocabulary: Vocabulary, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens. Raises DataError where the tokenizer cannot encode one."""
    with _library_errors(f"{vocabulary.file or 'tokenizer'}: cannot encode the text; is its unknown token missing?"):
        encodings = vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class Losses:
    """Counts the characters that a tokenizer has no token for, or only the one for what is unknown.

    Each text is compared with what its tokens decode to. White space is not counted; with a normalizer, neither are case,
    accents and compatible forms of a character. Byte-level tokenizers lose nothing and are not measured.
    """

    def __init__(self, tokenizer: Tokenizer):
        described = json.loads(tokenizer.to_str())
        model = described["model"]
        unknown = model.get("unk_id") if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])
        self._tokenizer, self._unknown = tokenizer, unknown
        self._fold = _Folded() if described["normalizer"] else _Visible()
        self._measured = not _keeps_all(described, set(tokenizer.get_vocab()))
        self.characters, self.lost = 0, Counter[str]()

    def add(self, texts: list[str], ids: list[list[int]]) -> None:
        """Count what is lost between texts and their token ids."""
        if not self._measured:
            return
        known = [[number for number in numbers if number != self._unknown] for numbers in ids]
        for text, decoded in zip(texts, self._tokenizer.decode_batch(known, skip_special_tokens=False)):
            wanted = Counter(text.translate(self._fold))
            self.characters += wanted.total()
            self.lost += wanted - Counter(decoded.translate(self._fold))


class _Visible(dict[int, str]):
    """A translation table that removes white space."""

    def __missing__(self, code: int) -> str:
        self[code] = found = self.kept(chr(code))
        return found

    def kept(self, character: str) -> str:
        """Return what stands for a character in the comparison."""
        return "" if character.isspace() else character


class _Folded(_Visible):
    """The same, without what normalizers may change of a character: its case, its accents, its form."""

    def kept(self, character: str) -> str:
        """Return what stands for a character in the comparison."""
        parts = unicodedata.normalize("NFKD", character.casefold())
        bare = "".join(part for part in parts if not unicodedata.combining(part) and not part.isspace())
        return bare or ("" if character.isspace() or unicodedata.combining(character) else character)


def _keeps_all(described: dict[str, Any], vocabulary: set[str]) -> bool:
    """Tell whether a tokenizer is byte-level BPE with a token for each byte, before which nothing is removed."""
    from tokenizers.pre_tokenizers import ByteLevel

    normalizer, before = described["normalizer"] or {"normalizers": []}, described["pre_tokenizer"] or {}
    forms = normalizer.get("normalizers", [normalizer])
    return (
        all(form["type"] in ("NFC", "NFD", "NFKC", "NFKD") for form in forms)
        and before.get("pretokenizers", [before])[-1].get("type") == "ByteLevel"
        and '"Removed"' not in json.dumps(before)
        and described["model"]["type"] == "BPE"
        and vocabulary >= set(ByteLevel.alphabet())
    )


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn what the tokenizers library raises, bare Exceptions and panics, into a DataError that begins with `what`."""
    try:
        yield
    except PicoError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({str(error) or type(error).__name__})") from error


def _interruptible(work: Callable[[], None]) -> None:
    """Do work in another thread, so that Ctrl-C is answered while the library is at it."""
    result: Future[None] = Future()

    def run() -> None:
        try:
            work()
            result.set_result(None)
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True, name="tokenizer training").start()
    while not result.done():
        wait([result], timeout=0.5)
    result.result()


def _cut_runs(texts: Iterable[str]) -> Iterator[str]:
    """Yield texts with very long runs of letters, digits or signs cut into pieces.

    The trainer takes each run for one word, and its time grows with the square of the longest ones: 0.2 MB of DNA took 68 s.
    """
    for text in texts:
        start = 0
        if any(len(word) >= _LONG_RUN for word in text.split()):
            for run in _RUN.finditer(text):
                for end in range(run.start() + _PIECE_OF_RUN, run.end(), _PIECE_OF_RUN):
                    yield text[start:end]
                    start = end
        yield text[start:]


UNKNOWN_BYTES = -(1 << 40)  # of a token that stands for any text it does not know: a sum with one of these is negative
_KEEPS_TEXT = {
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Punctuation",
    "UnicodeScripts",
    "Split",
}  # unless they remove what splits
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer_file: str | Path) -> np.ndarray | None:
    """Return int64 [V]: the bytes of text, as the normalizer leaves it, that each token stands for; 0 for special tokens.

    A byte-level token has as many bytes as letters. Where splitting a text removes nothing, as with tokenizers of characters,
    a token has the bytes of its own text. Where words are single tokens and white space (or a delimiter) between them is
    removed, it counts one separator for each word. The unknown token has `UNKNOWN_BYTES`. Returns None where the bytes follow
    from the text alone: a word before a comma and one before a space are the same token.
    """
    tokenizer = load_tokenizer(tokenizer_file)
    form = json.loads(tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps(form["decoder"])
    separator = 0 if byte_level else _separator_bytes(form)
    if separator is None:
        return None
    added = tokenizer.get_added_tokens_decoder()
    entries = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    sizes_V = np.zeros(max(entries, default=-1) + 1, dtype=np.int64)
    for number, token in entries.items():
        if token == form["model"].get("unk_token") or number == form["model"].get("unk_id"):
            sizes_V[number] = UNKNOWN_BYTES
        elif number in added:
            sizes_V[number] = 0 if added[number].special else len(added[number].content.encode()) + separator
        else:
            size = _letters(token) if byte_level else _own_bytes(token, form)
            if size is None:
                return None
            sizes_V[number] = size + separator
    return sizes_V


def _letters(token: str) -> int | None:
    from tokenizers.pre_tokenizers import ByteLevel

    return len(token) if set(token) <= set(ByteLevel.alphabet()) else None


def _own_bytes(token: str, form: Mapping[str, Any]) -> int | None:
    """Return the bytes of the text of a token: `▁` is a space for Metaspace, `<0x0A>` a byte where bytes are the fallback."""
    model = form["model"]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if model.get("byte_fallback") and _BYTE.fullmatch(token):
        return 1
    spaces = '"Metaspace"' in json.dumps([form["pre_tokenizer"], form["decoder"]]) or "▁" in json.dumps(
        form["normalizer"], ensure_ascii=False
    )
    return len((token.replace("▁", " ") if spaces else token).encode())


def _separator_bytes(form: Mapping[str, Any]) -> int | None:
    """Return the bytes of text that splitting removes for each token; None where that differs from token to token."""
    outer = form["pre_tokenizer"]
    parts = outer["pretokenizers"] if outer and outer["type"] == "Sequence" else [outer] if outer else []
    removed = [
        part for part in parts if part["type"] not in _KEEPS_TEXT or str(part.get("behavior", "")).lower() == "removed"
    ]
    if not removed:
        return 0
    if len(parts) > 1 or form["model"]["type"] != "WordLevel":
        return None
    if removed[0]["type"] == "WhitespaceSplit":
        return 1
    return len(removed[0]["delimiter"].encode()) if removed[0]["type"] == "CharDelimiterSplit" else None


def allow_parallelism() -> None:
    """Let the library use its threads, unless the user decided otherwise; saying so also silences its warning at forks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _configured_end(place: str | Path, file: Path) -> str | None:
    """The `eos_token` of the tokenizer_config.json beside a tokenizer.json."""
    beside = file.with_name("tokenizer_config.json")
    if os.path.lexists(beside):
        beside = file_of(file.parent, beside.name)
    elif Path(place).expanduser().exists():
        return None
    else:
        try:
            beside = fetch(str(place), "tokenizer_config.json", None, DataError)
        except DataError:
            return None  # not every repository has one
    config = trusted.read_json(beside.resolve(), dict[str, Any])
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise DataError(f"{beside}: eos_token: should be text, or an object whose content is text")
    return content
