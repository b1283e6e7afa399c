"""Train, find and load tokenizers; find the end-of-text token, and the number of text bytes per token."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import tempfile
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
    from tokenizers import Encoding, Tokenizer

    from picolm.data import Source

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
_LONG_RUN, _PIECE_OF_RUN = 4096, 256
_RUN = re.compile(rf"[^\W\d_]{{{_LONG_RUN},}}|\d{{{_LONG_RUN},}}|(?:[^\s\w]|_){{{_LONG_RUN},}}")
_LARGEST_ID = 10_000_000
_STANDARD_ERROR = threading.Lock()
_ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eos|>")


class Vocabulary(NamedTuple):
    """A tokenizer with its end-of-text token. file: its tokenizer.json; None if it was just trained."""

    tokenizer: Tokenizer
    eos_token: str
    eos_id: int
    file: Path | None


def load_tokenizer(place: str | Path) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder, or a Hub repository, without truncation and padding.

    Text that spells a special token is encoded as text, so a document cannot contain an end-of-text token.
    Raises DataError if there is no valid tokenizer.
    """
    file = find_tokenizer(place)
    trusted.refuse_lfs_pointer(file.resolve())
    return parse_tokenizer(trusted.read_bytes(file.resolve()), str(file))


def parse_tokenizer(content: bytes, where: str) -> Tokenizer:
    """Return the tokenizer in the content of a tokenizer.json, as `load_tokenizer` does. Raises DataError."""
    from tokenizers import Tokenizer

    _check_ids(trusted.parse_json(content, where, dict[str, Any]), where)  # nor does the library limit the nesting
    with _library_errors(f"{where}: cannot be read as a tokenizer.json"), _without_its_stack():
        tokenizer = Tokenizer.from_buffer(content.removeprefix(codecs.BOM_UTF8))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _check_ids(form: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a token id so large that the library, which counts up to it, would take all memory."""
    model = form.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = form.get("added_tokens")
    numbers = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    numbers += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    largest = max((number for number in numbers if isinstance(number, int)), default=0)
    if largest > _LARGEST_ID:
        raise DataError(
            f"{where}: has a token id of {largest} among {len(numbers)} tokens; the largest that is read is {_LARGEST_ID}"
        )


def encode_text(tokenizer: Tokenizer, text: str, what: str) -> list[int]:
    """Return the token ids of a text as in training: without special tokens, truncation and padding; see `encoding_of`."""
    return list(encoding_of(tokenizer, text, what).ids)


def encoding_of(tokenizer: Tokenizer, text: str, what: str) -> Encoding:
    """Return the token ids of a text, and the characters that each stands for, without special tokens.

    what: a name for the text, for messages. Raises DataError if the text is not valid Unicode or cannot be encoded.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what} is not valid UTF-8 (at character {error.start}); give it in the encoding UTF-8"
        ) from None
    with _library_errors(f"{what} cannot be encoded by the tokenizer of the run"), _without_its_stack():
        return tokenizer.encode(text, add_special_tokens=False)


def load_vocabulary(place: str | Path) -> Vocabulary:
    """Return the tokenizer at `place` with its end-of-text token. Raises DataError if it has none."""
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
    """Return the local path of a tokenizer.json: a file, in a folder, or downloaded from a Hub repository.

    Raises DataError if `place` is none of these.
    """
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
    """Raise DataError if `vocab_size` is too small for a byte-level vocabulary (256 bytes and the end of text)."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and the end of text make {SMALLEST_VOCABULARY}"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """Train byte-level BPE (each byte is a token, so any text can be encoded); the end-of-text token has id 0.

    The result depends only on the texts and the size. A small corpus may give fewer entries than `vocab_size`. Raises
    DataError if `vocab_size` is too small or training fails.
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
    """Write tokenizer.json and tokenizer_config.json, so that transformers can load the folder.

    Returns their digests as stored in a manifest: sha256 and config_sha256.
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
    """Raise DataError if `rows` were made with another tokenizer; do nothing if one of the two is unknown.

    name: name of the rows, for messages. file: the other tokenizer.json; sha256: its digest, if `file` is None.
    what: the owner of that tokenizer, for messages.
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
    """Return whether two files hold the same tokenizer: equal bytes, or equal after the library has loaded them."""
    if trusted.read_bytes(one.resolve()) == trusted.read_bytes(other.resolve()):
        return True
    return bool(load_tokenizer(one).to_str() == load_tokenizer(other).to_str())


def encode(vocabulary: Vocabulary, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens. Raises DataError if a text cannot be encoded."""
    what = f"{vocabulary.file or 'tokenizer'}: cannot encode the text; is its unknown token missing?"
    with _library_errors(what), _without_its_stack():
        encodings = vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class Losses:
    """A counter of the characters for which a tokenizer has no token, or only its unknown token.

    Each text is compared with its decoded tokens. White space is not counted; if the tokenizer has a normalizer,
    differences in case, accents and compatibility forms are ignored. Byte-level tokenizers lose nothing and are not
    measured.
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
        """Count the characters that are lost between texts and their token ids."""
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
        """Return the text that is compared for a character."""
        return "" if character.isspace() else character


class _Folded(_Visible):
    """A `_Visible` table that also removes what normalizers may change: case, accents, compatibility form."""

    def kept(self, character: str) -> str:
        """Return the text that is compared for a character."""
        parts = unicodedata.normalize("NFKD", character.casefold())
        bare = "".join(part for part in parts if not unicodedata.combining(part) and not part.isspace())
        return bare or ("" if character.isspace() or unicodedata.combining(character) else character)


def _keeps_all(described: dict[str, Any], vocabulary: set[str]) -> bool:
    """Return whether a tokenizer is byte-level BPE with a token for each byte, and removes nothing before encoding."""
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
    """Convert errors of the tokenizers library (exceptions and panics) into a DataError that begins with `what`."""
    try:
        yield
    except PicoError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({str(error) or type(error).__name__})") from error


@contextmanager
def _without_its_stack() -> Iterator[None]:
    """Drop what native code writes to the standard error when the block raises: a panic prints its stack there."""
    with _STANDARD_ERROR, tempfile.TemporaryFile() as kept:  # the descriptor belongs to the whole process
        try:
            original = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        os.dup2(kept.fileno(), 2)
        try:
            yield
            kept.seek(0)
            os.write(original, kept.read())
        finally:
            os.dup2(original, 2)
            os.close(original)


def _interruptible(work: Callable[[], None]) -> None:
    """Run `work` in another thread, so that Ctrl-C works while the library is busy."""
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
    """Yield texts, with very long sequences of letters, digits or signs cut into pieces.

    The trainer treats each sequence as one word, and its time grows with the square of the longest word: 0.2 MB of DNA
    took 68 s.
    """
    for text in texts:
        start = 0
        if any(len(word) >= _LONG_RUN for word in text.split()):
            for run in _RUN.finditer(text):
                for end in range(run.start() + _PIECE_OF_RUN, run.end(), _PIECE_OF_RUN):
                    yield text[start:end]
                    start = end
        yield text[start:]


UNKNOWN_BYTES = -(1 << 40)  # for the unknown token, which has no fixed text: a sum that includes it is negative
_KEEPS_TEXT = {
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Punctuation",
    "UnicodeScripts",
    "Split",
}  # unless their behavior is "removed"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def token_bytes(tokenizer_file: str | Path) -> np.ndarray | None:
    """Return the number of bytes of normalized text for each token, int64 [V]; 0 for special tokens.

    A byte-level token has as many bytes as letters. If pre-tokenization removes nothing, as in character tokenizers, a
    token has the bytes of its own text. If words are single tokens and the white space (or delimiter) between them is
    removed, each word includes one separator. The unknown token has `UNKNOWN_BYTES`. Returns None if the bytes cannot
    be known from the tokens: for example, if a word has the same token before a comma and before a space.
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
    """Return the bytes of a token's text: `▁` is a space with Metaspace, `<0x0A>` one byte with byte fallback.

    Returns None if tokens have subword prefixes or word suffixes.
    """
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
    """Return the bytes of text that pre-tokenization removes per token; None if this differs between tokens."""
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
    """Let the library use threads, unless TOKENIZERS_PARALLELISM is set; this also silences its warning about forks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _configured_end(place: str | Path, file: Path) -> str | None:
    """Return the `eos_token` of the tokenizer_config.json beside a tokenizer.json; None if there is none."""
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
