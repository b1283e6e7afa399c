"""No text of a CSV is a formula, and reading it gives the same text."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from picolm.csvfile import csv_text, guarded, read, unguarded

FORMULAS = [
    '=HYPERLINK("http://x","y")',
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "'=1",
    "=",
    "-",
    "''@",
]
words = st.text(st.sampled_from(list("=+-@\t\r\n'1e., aé\"")), max_size=6)


@pytest.mark.parametrize("text", FORMULAS)
def test_text_that_a_spreadsheet_would_compute_begins_with_an_apostrophe(text: str) -> None:
    assert guarded(text) == "'" + text
    cells = list(csv.reader(io.StringIO(csv_text(pd.DataFrame({text: [text]})), newline="")))
    assert cells == [["'" + text], ["'" + text]]


@pytest.mark.parametrize("cell", ["-1", "+0.5", "-1e-05", ".5", "plain", "it's", "'quoted'", "", -1.5, None, "a=b"])
def test_numbers_and_plain_text_stay_as_they_are(cell: object) -> None:
    assert guarded(cell) is cell


@given(words)
def test_guarding_is_undone_and_leaves_no_formula(text: str) -> None:
    written = guarded(text)
    assert unguarded(written) == text
    assert not re.match(r"[=+\-@\t\r\n]", written) or re.fullmatch(r"[+-]?[\d.]+(e[+-]?\d+)?", written)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "run": FORMULAS,
            "value": [-1.5, np.nan, -np.inf, np.inf, 0.0, 1e-300, -2, 3, 4, 5, 6, 7],
            "layer": pd.array([-1, None, *range(10)], dtype="Int64"),
            "token": ["NA", "null", "nan", "None", "-", "a,b", 'a"b', "a\nb", " x", "x ", "é", "你好"],
            "=evil": ["a"] * 12,
        }
    )
    (tmp_path / "t.csv").write_text(csv_text(frame), encoding="utf-8", newline="")
    found = read(tmp_path / "t.csv")
    assert list(found.columns) == list(frame.columns)
    for column in ("run", "token", "=evil"):
        assert list(found[column]) == list(frame[column])
    assert np.array_equal(found["value"], frame["value"], equal_nan=True)
    assert found["layer"].isna().tolist() == frame["layer"].isna().tolist()
