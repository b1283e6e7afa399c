"""Trained runs and saved models, as the tests of the analysis and of the readers have them."""

from pathlib import Path

import pytest
from tests.analyze.conftest import runs
from tests.fox import make_run
from tests.readers.conftest import save

__all__ = ["make_run", "runs", "save"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is observed, empty for each test."""
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "observed"
