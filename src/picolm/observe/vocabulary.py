"""The tokens of a model that are no text: the one that its texts begin with, and all others."""

from typing import Any

from picolm.errors import PicoError
from picolm.observe.rows import tokenizer_of
from picolm.observe.training import SeenRows
from picolm.store import Run
from picolm.trusted import parse_json

_FILES = ("config.json", "generation_config.json")


def first_token(run: Run) -> int | None:
    """Return the id of the token that texts of a model begin with: its bos, else its eos.

    In training a text begins after the end of another one. Looked up in the files beside the newest step, then in the data of a
    run of Pico. None where neither states it.
    """
    stated = _stated(run)
    for key in ("bos_token_id", "eos_token_id"):
        if stated.get(key):
            return stated[key][0]
    try:
        return SeenRows(run).eos
    except PicoError:
        return None


def special_tokens(run: Run) -> set[int]:
    """Return the ids of the tokens that the files of a model call special: those that begin, end and pad texts, and those of its
    tokenizer. Empty where there are no such files.
    """
    found = {number for numbers in _stated(run).values() for number in numbers}
    try:
        added = tokenizer_of(run)[1].get_added_tokens_decoder()
    except PicoError:
        added = {}
    return found | {number for number, token in added.items() if token.special}


def _stated(run: Run) -> dict[str, list[int]]:
    """Return the ids in the files beside the newest step, by their keys: bos_token_id, eos_token_id, …"""
    found = dict[str, list[int]]()
    if not run.steps:  # a run that has saved nothing yet
        return found
    checkpoint = run[run.steps[-1]]
    for name in _FILES:
        if name not in checkpoint.files:
            continue
        content = parse_json(checkpoint.read(name), f"{checkpoint.path / name}", dict[str, Any])
        for key, value in content.items():
            numbers = [each for each in (value if isinstance(value, list) else [value]) if type(each) is int]
            if key.endswith("_token_id") and numbers:
                found.setdefault(key, numbers)
    return found
