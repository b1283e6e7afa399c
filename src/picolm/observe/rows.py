"""The rows that models are asked about, as token ids of each model: held-out rows, texts, token ids, or prompts.

Texts are read by each model with its own tokenizer. Where the tokenizers of several models differ, the rows are the same texts,
and the positions are those whose tokens end at the same characters in all of them.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from picolm.errors import PicoError
from picolm.observe.config import HELD_OUT, Observe
from picolm.store import Run
from picolm.store.checkpoint import Missing

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

log = logging.getLogger("picolm")

TOKENIZER = "tokenizer.json"
ROWS_OF_A_FILE, LONGEST = 64, 512
Positions = list[list[int]]


@dataclass(frozen=True)
class Rows:
    """R rows of token ids, int64 [S] each.

    positions: those to read of each row. has_targets: whether the last token of each row is only predicted; else (prompts) it is
    read, and nothing is predicted. identity: digest of what is read where: equal for the same ids and positions, and for texts
    that several tokenizers read. unread: tokens at the end of a row with targets that the model does not read: `row_length(0)`,
    1 for the next token, 0 where what is predicted stands in the row itself. whole_of: of rows that are read whole, the identity
    of the rows with targets that they are otherwise, which share their passes.
    hidden: percent of the tokens that are hidden.
    """

    tokens: list[Tensor]
    positions: Positions
    split: str
    has_targets: bool
    identity: str
    unread: int = 1
    hidden: int = 0
    whole_of: str = ""

    def read_whole(self) -> "Rows":
        """Return the rows with their last tokens read too, not only predicted."""
        identity = digest_of(self.identity, "read whole")
        return replace(self, has_targets=False, identity=identity, whole_of=self.identity)

    def inputs(self, row: int) -> int:
        """Return the number of positions of a row that the model computes."""
        return len(self.tokens[row]) - (self.unread if self.has_targets else 0)

    def batches(self, size: int) -> list[list[int]]:
        """Return the rows of each forward pass, in order: at most `size`, and of one length."""
        found: list[list[int]] = []
        for row, tokens in enumerate(self.tokens):
            if found and len(found[-1]) < size and len(self.tokens[found[-1][0]]) == len(tokens):
                found[-1].append(row)
            else:
                found.append([row])
        return found


def rows_of(
    asked: Observe, runs: Mapping[str, Run], contexts: Mapping[str, int], unread: Mapping[str, int] | None = None
) -> dict[str, Rows]:
    """Return the rows for the model of each run. contexts: the most positions of each model. unread: see `Rows`, by run.

    Raises PicoError for rows that are not there, that are longer than a context, or that tokenizers cannot be compared on.
    """
    ahead = unread or dict.fromkeys(runs, 1)

    def checked(tokens: list[Tensor], name: str, has_targets: bool = True) -> Rows:
        return _checked(tokens, asked, contexts[name], name, has_targets, ahead[name])

    if asked.rows == HELD_OUT:
        return {name: checked(held_out(run), name) for name, run in runs.items()}
    if isinstance(asked.rows, str) and (ids := given_rows(asked.rows)) is not None:
        if asked.max_rows is None and len(ids) > ROWS_OF_A_FILE:
            log.warning(
                "%s: the first %d of its %d rows are read; more with max_rows.", asked.rows, ROWS_OF_A_FILE, len(ids)
            )
        chosen = ids[: asked.max_rows or ROWS_OF_A_FILE]
        return {name: checked(chosen, name) for name in runs}
    tokenizers = {name: tokenizer_of(run) for name, run in runs.items()}
    if len({digest for digest, _ in tokenizers.values()}) == 1:
        _, first = next(iter(tokenizers.values()))
        tokens = [_encoded(first, prompt) for prompt in _prompts(asked)] or _cut(
            first, asked, _length(asked, contexts) + max(ahead.values())
        )
        return {name: checked(tokens, name, isinstance(asked.rows, str)) for name in runs}
    return _aligned(asked, {name: tokenizer for name, (_, tokenizer) in tokenizers.items()}, contexts, ahead)


def held_out(run: Run) -> list[Tensor]:
    """Return the rows that a run holds out: those stored with its captures, else those of its data. Raises PicoError."""
    from picolm.readers.series import Series

    for step in run.steps:
        try:
            table = run[step].rows(HELD_OUT)
        except Missing:
            continue
        return [torch.as_tensor(row, dtype=torch.long) for row in table.column("input_ids").to_pylist()]
    if isinstance(run, Series):
        raise PicoError(
            f"{run.path}: a series of checkpoints has no held-out rows of its own; say which with rows: a file of texts, of "
            "token ids, or a list of prompts"
        )
    from picolm.train.build import captured_rows, open_batches
    from picolm.train.sample import config_of

    config = config_of(run)
    found = captured_rows(config, open_batches(config).source)
    if found is None:
        raise PicoError(f"{run.path}: has no held-out rows (checkpointing.learning_dynamics.eval_data)")
    return list(found.tokens_RS)


def _prompts(asked: Observe) -> list[str]:
    return [] if isinstance(asked.rows, str) else list(asked.rows)[: asked.max_rows]


def is_ids(place: str) -> bool:
    """Return whether a name is that of a file that may hold rows of token ids."""
    return place.endswith(".npy") or ".parquet" in place


def given_rows(place: str) -> list[Tensor] | None:
    """Return the rows of token ids in a file, None if it holds texts. Raises PicoError."""
    from picolm.data.token_rows import read_token_rows

    found = read_token_rows(place)
    return None if found is None else [torch.from_numpy(row) for row in found]


def _texts(place: str) -> Iterator[str]:
    """Yield the texts in a file. Raises PicoError."""
    name, _, column = place.rpartition(":") if ".parquet:" in place else (place, "", "")
    if column and column != "text":
        from picolm.data.decode import opened

        with opened(Path(name), name) as table:
            yield from filter(None, table.read(columns=[column])[column].to_pylist())
        return
    from picolm.data.documents import Reader, find_files

    reader = Reader()
    for file in find_files([Path(name)]):
        yield from (document.text for document in reader.documents(file))


def _tokenizer_file(run: Run) -> tuple[bytes, str] | None:
    """Return the content of the tokenizer of a run, and where it is; None without one."""
    for step in [*run.steps[-1:], *run.steps[:-1]]:
        if TOKENIZER in run[step].files:
            return run[step].read(TOKENIZER), f"{run[step].path}/{TOKENIZER}"
    if run.steps:
        return None
    from picolm.train.build import open_batches, tokenizer_file
    from picolm.train.sample import config_of

    config = config_of(run)  # in training, before anything is saved: what is going to be saved
    file = tokenizer_file(config, open_batches(config).source)
    return None if file is None else (file.read_bytes(), str(file))


def tokenizer_digest(run: Run) -> str | None:
    """Return the digest of the tokenizer of a run, None without one."""
    file = _tokenizer_file(run)
    return None if file is None else hashlib.sha256(file[0]).hexdigest()


def tokenizer_of(run: Run) -> "tuple[str, Tokenizer]":
    """Return the digest of the tokenizer of a run, and the tokenizer. Raises PicoError without one."""
    from picolm.data.tokenizer import parse_tokenizer

    if (file := _tokenizer_file(run)) is not None:
        return hashlib.sha256(file[0]).hexdigest(), parse_tokenizer(*file)
    raise PicoError(
        f"{run.path}: none of its steps has a {TOKENIZER}, so its model cannot read text; put that of the model into one of "
        "them, or give token ids (rows: FILE.npy or FILE.parquet:COLUMN)"
    )


def _encoding(tokenizer: "Tokenizer", text: str) -> "Encoding":
    from picolm.data.tokenizer import encoding_of

    return encoding_of(tokenizer, text, f"the text {text[:40]!r}")


def _encoded(tokenizer: "Tokenizer", text: str) -> Tensor:
    return torch.tensor(_encoding(tokenizer, text).ids, dtype=torch.long)


def _length(asked: Observe, contexts: Mapping[str, int]) -> int:
    return asked.length or min(LONGEST, *contexts.values())


def _cut(tokenizer: "Tokenizer", asked: Observe, size: int) -> list[Tensor]:
    """Return rows of `size` tokens of the texts of a file, one text after the other; what remains of each is left out,
    unless it is the whole text.
    """
    rows = list[Tensor]()
    for text in _texts(str(asked.rows)):
        tokens = _encoded(tokenizer, text)
        whole = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
        rows += whole or ([tokens] if len(tokens) > 1 else [])
        if len(rows) >= (asked.max_rows or ROWS_OF_A_FILE):
            break
    return rows[: asked.max_rows or ROWS_OF_A_FILE]


def _checked(tokens: list[Tensor], asked: Observe, context: int, name: str, has_targets: bool, unread: int) -> Rows:
    """Return rows with their positions. Raises PicoError for rows that are empty or longer than the context."""
    tokens = tokens[: asked.max_rows]
    lengths = [len(row) - (unread if has_targets else 0) for row in tokens]
    if not lengths or min(lengths) < 1:
        raise PicoError(f"{asked.rows}: gives no rows of at least {1 + has_targets} token(s)")
    if max(lengths) > context:
        raise PicoError(
            f"{asked.rows}: a row has {max(lengths)} inputs, and the model of {name} reads at most {context}"
        )
    positions = [_positions(asked.positions, length) for length in lengths]
    hidden = [asked.hidden] if asked.hidden else []
    identity = digest_of(*(row.tolist() for row in tokens), positions, *hidden)
    return Rows(tokens, positions, asked.split, has_targets, identity, unread, asked.hidden)


def _positions(asked: Any, length: int) -> list[int]:
    if asked in ("all", "last"):
        return list(range(length)) if asked == "all" else [length - 1]
    if beyond := [position for position in asked if not -length <= position < length]:
        raise PicoError(f"positions: there is no position {beyond[0]} in a row of {length} inputs")
    return [position % length for position in asked]


def _aligned(
    asked: Observe, tokenizers: "Mapping[str, Tokenizer]", contexts: Mapping[str, int], ahead: Mapping[str, int]
) -> dict[str, Rows]:
    """Return the same texts as each tokenizer reads them, at the positions whose tokens end at the same characters."""
    if asked.positions not in ("all", "last"):
        raise PicoError(
            "the tokenizers of the runs differ, so a number of a position means another place in each: positions: all or last"
        )
    has_targets, texts = isinstance(asked.rows, str), _prompts(asked)
    if has_targets:
        first = next(iter(tokenizers.values()))
        pieces = _pieces(first, _texts(str(asked.rows)), _length(asked, contexts) // 2 + 1)
        texts = list(islice(pieces, asked.max_rows or ROWS_OF_A_FILE))
    found: dict[str, tuple[list[Tensor], Positions]] = {name: ([], []) for name in tokenizers}
    common: list[list[int]] = []
    for text in texts:
        read = {
            name: _read(tokenizer, text, contexts[name], ahead[name] if has_targets else 0)
            for name, tokenizer in tokenizers.items()
        }
        ends = sorted(set.intersection(*(set(places) for _, places in read.values())))
        if not ends:
            raise PicoError(
                f"the tokenizers of {', '.join(tokenizers)} have no place in common where their tokens end, in {text[:60]!r}; "
                "give other texts, or compare runs of one tokenizer"
            )
        common.append(ends if asked.positions == "all" else ends[-1:])
        for name, (tokens, places) in read.items():
            found[name][0].append(tokens)
            found[name][1].append([places[end] for end in common[-1]])
    identity = digest_of(texts, common, *([asked.hidden] if asked.hidden else []))
    return {
        name: Rows(*rows, asked.split, has_targets, identity, ahead[name], asked.hidden) for name, rows in found.items()
    }


def _read(tokenizer: "Tokenizer", text: str, context: int, unread: int) -> tuple[Tensor, dict[int, int]]:
    """Return the tokens of a text, cut to the context, and for each character where a token ends the position of that token."""
    encoding = _encoding(tokenizer, text)
    tokens = torch.tensor(encoding.ids[: context + unread], dtype=torch.long)
    last = {
        end: place for place, (_, end) in enumerate(encoding.offsets)
    }  # of a character of several tokens, the last one
    return tokens, {end: place for end, place in last.items() if place < len(tokens) - unread}


def _pieces(tokenizer: "Tokenizer", texts: Iterable[str], size: int) -> Iterator[str]:
    """Yield the texts in pieces of `size` tokens of one tokenizer, so that the others have room for theirs."""
    for text in texts:
        offsets = _encoding(tokenizer, text).offsets
        for start in range(0, len(offsets), size):
            part = offsets[start : start + size]
            if len(part) > 1:
                yield text[part[0][0] : part[-1][1]]


def digest_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
