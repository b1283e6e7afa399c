"""Trained runs and saved models, as the tests of the analysis and of the readers have them."""

from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor
from tests.analyze.conftest import runs
from tests.fox import make_run
from tests.readers.conftest import save

__all__ = ["make_run", "runs", "save"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is observed, empty for each test; workers of an earlier test, which know another one, are ended."""
    get_reusable_executor(max_workers=1, kill_workers=True).shutdown()
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "observed"
