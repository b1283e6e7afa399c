"""A series in one line, and output that stays plain where no terminal can show more."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from picolm.console import ASCII, BLOCKS, can_redraw, shows_blocks, sparkline

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
