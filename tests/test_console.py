"""A series in one line, and output that stays plain where no terminal can show more."""

import ast
import io
import logging
import math
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import picolm
from picolm.console import ASCII, BLOCKS, can_redraw, configure_logging, screen, shows_blocks, sparkline, visible

numbers = st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=100)


def test_least_and_greatest_have_the_lowest_and_the_highest_block() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], blocks=True) == BLOCKS
    assert sparkline([7, 0], blocks=True) == "█▁"
    assert sparkline([7, 0], blocks=False) == "#_"


def test_a_part_without_a_finite_value_is_a_space_and_a_constant_is_low() -> None:
    assert sparkline([1, math.nan, 2, math.inf], blocks=True) == "▁ █ "
    assert sparkline([3, 3, 3], blocks=True) == "▁▁▁"
    assert sparkline([]) == sparkline([math.nan]) == ""


def test_a_long_series_is_shown_by_the_means_of_its_parts() -> None:
    assert sparkline([0, 2, 10, 10, 4, 6], width=3, blocks=True) == sparkline([1, 10, 5], blocks=True)


@given(numbers, st.integers(1, 40))
def test_any_series_is_drawn_in_at_most_the_width_and_free_of_scale(values: list[float], width: int) -> None:
    drawn = sparkline(values, width, blocks=True)
    assert len(drawn) <= min(width, len(values))
    assert set(drawn) <= {*BLOCKS, " "}
    assert bool(drawn) == any(map(math.isfinite, values))
    small = [value for value in values if abs(value) < 1e100 and (abs(value) > 1e-100 or value == 0)]
    assert sparkline([4 * value for value in small], width, blocks=True) == sparkline(small, width, blocks=True)
    plain = sparkline(values, width, blocks=False)
    assert plain.translate(str.maketrans(ASCII, BLOCKS)) == drawn


@pytest.mark.parametrize(("encoding", "shown"), [("utf-8", True), ("UTF8", True), ("ascii", False), ("latin-1", False)])
def test_blocks_need_an_encoding_that_has_them(encoding: str, shown: bool) -> None:
    assert shows_blocks(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) is shown
    assert not shows_blocks(io.StringIO())


@pytest.mark.parametrize(("term", "redraws"), [("xterm-256color", True), ("dumb", False), ("unknown", False)])
def test_a_bar_needs_a_terminal_that_can_go_back(term: str, redraws: bool) -> None:
    terminal = Console(force_terminal=True, file=io.StringIO(), _environ={"TERM": term})
    assert can_redraw(terminal) is redraws
    assert not can_redraw(Console(file=io.StringIO(), _environ={"TERM": term}))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}],
    ids=lambda settings: "".join(settings),
)
def test_piped_output_is_plain_whatever_the_environment(settings: dict[str, str], tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'pico'; from picolm.cli import main; main()"
    command = [sys.executable, "-c", code, "list", "metrics"]
    done = subprocess.run(command, capture_output=True, env=os.environ | settings, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert all(kind in done.stdout for kind in (b"simil", b"quant"))  # folded in a narrow window
    assert "PYTHONIOENCODING" not in settings or done.stdout.isascii()
    assert max(map(len, done.stdout.decode().splitlines())) <= 132


OBEYED = [
    "\x1b[31m",
    "\x1b]0;title\x07",
    "\r",
    "\x00",
    "\x08",
    "\x7f",
    "\x9b2J",
    "\x85",
    "\u202e",
    "\u2066",
    "\u200f",
    "\ud83d",
    "\u2028",
]


@pytest.mark.parametrize("text", OBEYED, ids=ascii)
def test_what_a_terminal_obeys_is_shown_as_an_escape(text: str) -> None:
    shown = visible(f"run {text}\tof\nme")
    assert shown.startswith("run \\")
    assert shown.endswith("\tof\nme")
    assert all(character in "\t\n" or character.isprintable() for character in shown)


@given(st.text())
def test_visible_text_stays_what_it_is(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert shown == text or any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs") for character in text)
    shown.encode()


@pytest.mark.parametrize("text", ["[red]run[/red]", "[/]", ":smile:", "\x1b[2J[bold]"])
def test_cells_of_a_table_are_what_they_say_and_its_colours_stay(text: str) -> None:
    from rich.table import Table

    stream = io.StringIO()
    console = screen(file=stream, force_terminal=True, width=80, color_system="standard", highlight=False)
    table = Table()
    table.add_column(text, style="red")
    table.add_row(text)
    console.print(table)
    console.print(text)
    assert stream.getvalue().count(visible(text)) == 3
    assert "\x1b[2J" not in stream.getvalue()
    assert "\x1b[31m" in stream.getvalue()


def test_lines_of_the_log_are_visible_on_the_screen_and_in_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("INFO", tmp_path / "x.log")
    logging.getLogger("picolm").warning("run %s", "\x1b[2Jevil\u202e")
    for text in (capsys.readouterr().err, (tmp_path / "x.log").read_text()):
        assert "run \\x1b[2Jevil\\u202e" in text
        assert "\x1b" not in text


@pytest.mark.slow
def test_nothing_prints_lines_but_say() -> None:
    source = Path(picolm.__file__).parent
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            called = (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("print", "Console")
            )
            assert not called or file.name == "console.py", f"{file}:{node.lineno}"  # type: ignore[attr-defined]
