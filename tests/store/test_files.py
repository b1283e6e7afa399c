"""JSON keeps every number; small files are replaced whole; a journal survives the death of its writer."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from picolm.errors import StoreError
from picolm.store.files import _NOT_FINITE, dump_json, load_json, size, write_atomically
from picolm.store.records import Journal

# Texts that would be read back as numbers are refused, see below.
texts = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text not in _NOT_FINITE)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=10,
)


@pytest.mark.slow
@given(value=values)
def test_json_round_trip_is_exact(value: object) -> None:
    assert repr(load_json(dump_json(value), "x", Any)) == repr(value)  # repr tells nan, inf and -0.0 apart


@pytest.mark.slow
@given(value=values)
def test_what_is_written_is_json_for_every_reader(value: object) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads(dump_json(value), parse_constant=refuse)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    value = {"a": np.float64(0.1), "b": torch.tensor(2), "c": torch.tensor([1.0, math.nan]), 3: (1, 2)}
    assert dump_json(value) == '{"a":0.1,"b":2,"c":[1.0,"NaN"],"3":[1,2]}'


def test_a_text_that_would_come_back_as_a_number_is_refused() -> None:
    with pytest.raises(StoreError, match="'NaN' cannot be stored"):
        dump_json({"source": "NaN"})


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_atomically(tmp_path / "x.json", b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "x.json", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x.json", b"old")]


def test_sizes_read_well() -> None:
    assert [size(n) for n in (0, 999, 1000, 123_456, 10**6, 45 * 10**9)] == [
        "0 B", "999 B", "1.0 kB", "123.5 kB", "1.0 MB", "45.0 GB",
    ]  # fmt: skip


def test_metrics_come_back_as_they_were(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    entries = [{"step": 0, "loss": 8.3}, {"step": 1, "loss": math.inf}, {"step": 2, "text": "zwölf\n"}]
    for entry in entries:
        journal.append(entry)
    assert list(journal.entries()) == entries


def test_a_torn_last_line_is_not_read_and_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1,"lo')
    assert list(Journal(path).entries()) == [{"step": 0}]
    Journal(path).append({"step": 1})
    assert path.read_bytes() == b'{"step":0}\n{"step":1}\n'


def test_a_damaged_line_in_the_middle_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"st\n{"step":2}\n')
    with pytest.raises(StoreError, match=r"metrics\.jsonl:2: damaged"):
        list(Journal(path).entries())


def test_no_metrics_yet_is_no_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    assert list(journal.entries()) == []
    assert journal.keep(lambda entry: True) == 0
    assert not journal.path.exists()
