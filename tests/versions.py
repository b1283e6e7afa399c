"""Print the installed version of each package that pyproject.toml names, on one line."""

import re
from importlib.metadata import PackageNotFoundError, requires, version


def installed() -> list[str]:
    """Return `name version` of each direct dependency, optional ones too; `name -` for one that is not installed."""
    found = []
    for name in sorted(
        {re.split(r"[^\w.-]", line)[0] for line in requires("picolm") or []} - {"picolm"}, key=str.lower
    ):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} -")
    return found


if __name__ == "__main__":
    print("Versions: " + ", ".join(installed()))
