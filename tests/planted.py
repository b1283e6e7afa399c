"""Secrets that stand in the environment of every test. None of them may end in a file, or in what is said."""

import os
from collections.abc import Iterator
from pathlib import Path

TOKEN = "hf_planted0123456789abcdef"
SECRETS = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "planted0" * 5}


def told(text: str) -> list[str]:
    """The names of the secrets that a text holds."""
    return [name for name, secret in SECRETS.items() if secret in text]


def holders(folder: Path) -> list[str]:
    """The files below a folder that hold one, their own names included."""
    secrets = [secret.encode() for secret in SECRETS.values()]
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(secret in part for part in _content(path) for secret in secrets)
    ]


def _content(path: Path) -> Iterator[bytes]:
    """The name of a file and its data, without the holes of sparse ones, which may be larger than the memory."""
    yield str(path).encode()
    with path.open("rb") as file:
        end, size = 0, os.fstat(file.fileno()).st_size
        while end < size:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # nothing but a hole follows
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield os.pread(file.fileno(), end - start, start)
