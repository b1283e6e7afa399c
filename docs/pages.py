"""The code that a page shows, and how it is run: by tests/test_docs.py in small, by docs/figures/tutorials.py as it stands.

A page is run from top to bottom in one folder: a block with `title="FILE"` is written to that file, shell blocks are executed
line by line, Python blocks share their variables. Comments in front of a block, which a reader does not see, say otherwise:

    <!-- test: KEY=VALUE … -->     these words are added to each `pico` command of the block when it is tested
    <!-- not run: REASON -->       it is not executed
    <!-- page: WHAT … -->          on top of a page: what lies there before, `demo` (runs/demo), `hub` or `pythia`
                                   (a Hub on this machine)
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SHELL, PYTHON = {"sh", "bash"}, {"python"}
SHOWN = {"", "text", "yaml", "json"}  # languages that are looked at, unless a title makes a file of them
_FENCE = re.compile(r"^( *)(```+) *(\w*)(.*)$")
_COMMENT = re.compile(r"^ *<!-- *(test|not run|page): *(.*?) *-->$")
_TITLE = re.compile(r'title="([^"]+)"')


class Block(NamedTuple):
    """Code between fences. words: added in tests; reason: why it is not run, None where it is."""

    line: int
    language: str
    title: str | None
    code: str
    words: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def runs(self) -> bool:
        return self.reason is None and (self.title is not None or self.language not in SHOWN)


def given(text: str) -> set[str]:
    """What the first line of a page says must be there before."""
    match = _COMMENT.match(text.partition("\n")[0])
    return set(match[2].split()) if match and match[1] == "page" else set()


def blocks(text: str) -> Iterator[Block]:
    """The blocks of a page, in order. Raises ValueError for a language or a comment that says nothing about a block."""
    lines = iter(enumerate(text.splitlines(), 1))
    pending: dict[str, str] = {}
    for number, line in lines:
        if (comment := _COMMENT.match(line)) and comment[1] != "page":
            pending[comment[1]] = comment[2]
        elif fence := _FENCE.match(line):
            code = "\n".join(_inside(lines, fence)) + "\n"
            yield _block(number, fence, code, pending)
            pending = {}
        elif pending and line.strip():
            raise ValueError(f"line {number}: {pending} stands in front of no block")


def _inside(lines: Iterator[tuple[int, str]], fence: re.Match[str]) -> Iterator[str]:
    indent = len(fence[1])
    for _, line in lines:
        if line.strip() == fence[2]:
            return
        yield line[indent:]
    raise ValueError(f"{fence[0]!r} is never closed")


def _block(number: int, fence: re.Match[str], code: str, pending: dict[str, str]) -> Block:
    title = _TITLE.search(fence[4])
    block = Block(
        number, fence[3], title[1] if title else None, code,
        tuple(pending.get("test", "").split()), pending.get("not run"),
    )  # fmt: skip
    if block.language not in SHELL | PYTHON | SHOWN:
        raise ValueError(f"line {number}: {block.language!r} is no language that is known here")
    if pending and (
        block.reason == "" or (block.language in SHOWN and not title) or ("test" in pending and not block.words)
    ):
        raise ValueError(f"line {number}: {pending} says nothing about this block")
    return block


def commands(code: str) -> Iterator[str]:
    """The commands of a shell block: continued lines are one, comments and prompts are none."""
    for line in code.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command and not command.startswith("#"):
            yield command


def run(text: str, folder: Path, pico: Callable[[list[str]], None], words: Callable[[Block], list[str]]) -> None:
    """Execute a page in `folder`, which is the current one. pico: runs one command line; words: what is added to it."""
    names: dict[str, Any] = {"__name__": "__page__"}
    sys.path.insert(0, str(folder))  # as for `python` started there
    for block in blocks(text):
        if not block.runs:
            continue
        if block.title is not None:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.code)
        elif block.language in PYTHON:
            exec(compile("\n" * block.line + block.code, "page", "exec"), names)
        else:
            for command in commands(block.code):
                _shell(command, folder, pico, words(block))


def _shell(command: str, folder: Path, pico: Callable[[list[str]], None], words: list[str]) -> None:
    command = re.sub(r"(^|\s)\.venv/bin/", r"\1", command)
    plain = shlex.split(command, comments=True)
    if plain[0] == "pico" and not set(plain) & {"|", ">", "&&", ";"}:
        return pico([*plain[1:], *words])
    if words:
        raise ValueError(f"{command}: only pico takes words for the test")
    done = subprocess.run(["bash", "-ec", command], cwd=folder, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{command}: code {done.returncode}\n{done.stdout}{done.stderr}")
