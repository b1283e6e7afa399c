"""Tokens as text: one string for each token, whose concatenation is the text.

Bytes of a token that are no UTF-8 by themselves, such as a part of a letter, are shown as ⟨e2⟩.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from picolm.data.tokenizer import encode_text, parse_tokenizer
from picolm.view.refusal import Refused

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _shown(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"⟨{byte:02x}⟩" for byte in error.object[error.start : error.end]), error.end


codecs.register_error("picolm.shown", _shown)


@cache
def _bytes_of_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Words:
    """The tokenizer of a run. Without one, a text is written as token ids, and a token is shown as `<id>`."""

    def __init__(self, content: bytes | None, size: int, where: str = ""):
        """Read the content of a tokenizer.json (None: there is none). size: of the vocabulary. Raises DataError."""
        tokenizer = parse_tokenizer(content, where) if content is not None else None
        self.tokenizer, self.size, self.digest = tokenizer, size, hashlib.sha256(content or b"").hexdigest()
        form: dict[str, Any] = json.loads(tokenizer.to_str()) if tokenizer is not None else {}
        self._byte_level = "ByteLevel" in json.dumps(form.get("decoder"))
        self._added = set(tokenizer.get_added_tokens_decoder()) if tokenizer is not None else set[int]()
        self._known: dict[int, str] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Raises PicoError for a text that cannot be read."""
        if self.tokenizer is not None:
            return encode_text(self.tokenizer, text, "the text")
        try:
            ids = [int(word) for word in text.replace("<", " ").replace(">", " ").split()]
        except ValueError:
            raise Refused("this run has no tokenizer: write the ids of tokens, as `5 17 3`") from None
        if any(not 0 <= number < self.size for number in ids):
            raise Refused(f"the ids of tokens of this run are 0 to {self.size - 1}")
        return ids

    def __call__(self, ids: Iterable[int]) -> list[str]:
        """Return the string of each token."""
        return [self._known.get(number) or self._known.setdefault(number, self._string(number)) for number in ids]

    def _string(self, number: int) -> str:
        token = self.tokenizer.id_to_token(number) if self.tokenizer is not None else None
        if token is None:
            return f"<{number}>"
        if number in self._added:
            return token
        letters = _bytes_of_letters()
        if self._byte_level and all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token).decode("utf-8", "picolm.shown")
        if found := _BYTE.fullmatch(token):
            return bytes([int(found[1], 16)]).decode("utf-8", "picolm.shown")
        return token.replace("▁", " ").removeprefix("##")
