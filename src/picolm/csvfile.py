"""Write and read tables as CSV in which spreadsheets do not find formulas.

A text cell that begins with `=`, `+`, `-`, `@`, a tab or a line break gets an apostrophe in front, the spreadsheet
notation for text; so does a cell that begins with apostrophes followed by such a character. `read` removes one
apostrophe again, so nothing is lost. Numbers, also negative ones, stay as they are. The tables of a report do the same
(`csvOf` in tables.js).
"""

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # full-width forms too: spreadsheets treat them the same
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def guarded(cell: Any) -> Any:
    """Return a cell as it is written: with an apostrophe in front if a spreadsheet would read it as a formula."""
    if not isinstance(cell, str) or not _FORMULA.match(cell) or _NUMBER.fullmatch(cell):
        return cell
    return "'" + cell


def unguarded(cell: Any) -> Any:
    """Return a cell as it was before `guarded`."""
    return cell[1:] if isinstance(cell, str) and cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_text(frame: "pd.DataFrame") -> str:
    """Return a table as CSV, without its index."""
    safe, returns = frame.rename(columns=guarded), "\r" in "".join(map(str, frame.columns))
    for place, column in enumerate(safe.columns):
        if not _holds_numbers(safe[column]):
            safe.isetitem(place, safe[column].astype(object).map(guarded, na_action="ignore"))
            returns |= safe.iloc[:, place].map(lambda cell: isinstance(cell, str) and "\r" in cell).any()
    # Before Python 3.13 a lone carriage return is not quoted, and breaks the line.
    return safe.to_csv(index=False, quoting=csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL)


def read(path: str | Path, **options: Any) -> "pd.DataFrame":
    """Read a table written by `csv_text`. Only empty cells are missing values: text such as `NA` or `null` stays text.

    options: of pandas.read_csv, for example `dtype=str`.
    """
    import pandas as pd

    found = pd.read_csv(path, **{"keep_default_na": False, "na_values": [""], **options})
    for place, column in enumerate(found.columns):
        if not _holds_numbers(found[column]):
            found.isetitem(place, found[column].map(unguarded, na_action="ignore"))
    return found.rename(columns=unguarded)


def _holds_numbers(column: "pd.Series") -> bool:
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(column))
