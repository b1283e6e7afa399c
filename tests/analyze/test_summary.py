"""The summary that an analysis ends with, in a window of any width."""

import io
from typing import Any

import pytest
from rich.console import Console

from picolm.analyze.table import summary

VALUES = {0: [4.0, 2.0], 10: [2.0, 2.0], 20: [1.0, 1.0], 30: [None, None]}


def rows(run: str = "demo") -> list[dict[str, Any]]:
    return [
        {"run": run, "metric": "norm", "options": "norm_type=nuclear", "component": "ov_circuit", "kind": "weights",
         "split": "", "step": step, "value": value, "target": ""}
        for step, values in VALUES.items() for value in values
    ]  # fmt: skip


def drawn(width: int, *runs: str) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(summary([row for run in runs for row in rows(run)], width))
    return [line for line in console.export_text().splitlines() if line.strip()]


def test_the_mean_of_the_first_and_the_last_step_and_the_course_between_them() -> None:
    heading, _, row, options = drawn(116, "demo")
    assert " ".join(heading.split()) == "metric component kind split values missing first last over steps"
    cells = row.split()
    assert cells[:3] == ["norm", "ov_circuit", "weights"]
    assert cells[3:7] == ["6", "2", "3", "1"]
    assert len(cells[7]) == 3
    assert options.split() == ["norm_type=nuclear"]


def test_runs_are_named_where_there_are_several() -> None:
    heading, _, *lines = drawn(116, "demo", "other")
    assert heading.split()[:2] == ["run", "metric"]
    assert [line.split()[0] for line in lines if "ov_circuit" in line] == ["demo", "other"]


@pytest.mark.parametrize("width", [50, 60, 80, 100])
def test_a_narrow_window_folds_names_and_cuts_no_number(width: int) -> None:
    lines = drawn(width, "demo", "a_run_with_a_name_of_some_length")
    text = " ".join(lines)
    assert "…" not in text
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["metric", "of", "first", "last", "over", "steps"]
    for line in lines[2:]:
        if line.split()[0] == "norm":
            assert line.split()[-3:-1] == ["3", "1"]


def test_without_a_value_there_is_no_course() -> None:
    console = Console(width=116, record=True, file=io.StringIO())
    console.print(summary([row for row in rows() if row["step"] == 30]))
    assert console.export_text().splitlines()[3].split()[-1] == "2"
