"""Write and read tables as CSV whose text no spreadsheet takes for a formula.

A cell of text that begins with `=`, `+`, `-`, `@`, a tab or a line break gets an apostrophe in front, as one types it into a
spreadsheet; so does one that begins with apostrophes and then such a character. `read` takes one away again, so nothing is lost.
Cells that are numbers, also negative ones, stay as they are. The tables of a report do the same (`csvOf` in tables.js).
"""

import csv
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")  # the wide forms too: spreadsheets take them for the narrow ones
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def guarded(cell: Any) -> Any:
    """Return a cell as it is written: text that a spreadsheet would compute begins with an apostrophe."""
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
    """Return a table that `csv_text` made. Only empty cells are missing: text such as `NA` or `null` stays text.

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
