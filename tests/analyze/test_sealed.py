"""Results are what was written, or an error: flipped bytes, forged values, two writers, interruptions, damaged steps."""

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from picolm.analyze import table
from picolm.analyze.table import COLUMNS, load, read_parquet
from picolm.analyze.values import Value, Values, _checksum, rename_damaged
from picolm.errors import FileError, PicoError
from picolm.store.files import RunLock

Analyze = Callable[..., tuple[Any, pd.DataFrame]]
GINI = "metrics: [{metric_name: gini, components: [{layer_suffixes: w_2}]}]"
CKA = "metrics: [{metric_name: cka, target: {checkpoint: last}, components: [{component_name: mlp, data_type: activations}]}]"


def rows(count: int, value: float) -> list[dict[str, Any]]:
    row = dict.fromkeys(COLUMNS) | {"run": "demo", "metric": "gini", "options": "", "target": "", "kind": "weights"}
    return [row | {"step": step, "value": value + step, "asked_split": "train", "module": "m"} for step in range(count)]


@pytest.mark.slow
def test_no_flipped_byte_of_the_results_is_believed(tmp_path: Path) -> None:
    path = table.write(rows(30, 0.5), tmp_path, csv=True)
    table.seal(tmp_path, table.AGGREGATED, table.to_parquet(load(tmp_path)))
    for file in (path, tmp_path / table.AGGREGATED):
        content = file.read_bytes()
        for place in range(0, len(content), 7):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
            with pytest.raises(FileError, match="is not what was written"):
                read_parquet(file)
        file.write_bytes(content[:-10])
        with pytest.raises(FileError, match="is not what was written"):
            read_parquet(file)
        file.write_bytes(content)
        assert len(read_parquet(file)) == 30
    assert (tmp_path / table.SUMS).read_text().count("  results.csv\n") == 1


@pytest.mark.slow
def test_pages_have_checksums_where_the_file_was_copied_alone(tmp_path: Path) -> None:
    written = table.write(rows(3000, 0.1), tmp_path)
    alone = tmp_path / "elsewhere" / "results.parquet"
    alone.parent.mkdir()
    content, wrong = written.read_bytes(), 0
    for place in range(100, len(content) // 2, 997):
        alone.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            pd.testing.assert_frame_equal(load(alone), load(written))
        except FileError:
            wrong += 1
    assert wrong > 0
    shutil.copy(written, alone)
    pd.testing.assert_frame_equal(load(alone), load(written))


@pytest.mark.parametrize("text", ["", "nonsense\n", "0" * 64 + "  results.parquet\n"])
def test_a_damaged_digest_is_an_error_and_an_analysis_mends_it(tmp_path: Path, text: str) -> None:
    table.write(rows(3, 0.5), tmp_path)
    (tmp_path / table.SUMS).write_text(text)
    if text:
        with pytest.raises(FileError, match="run the analysis again"):
            load(tmp_path)
    if text != "nonsense\n":
        table.write(rows(3, 1.5), tmp_path)
        assert load(tmp_path)["value"].tolist() == [1.5, 2.5, 3.5]


def test_an_interruption_leaves_the_old_table_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = table.write_atomically
    for last in range(4):
        folder = tmp_path / str(last)
        table.write(rows(2, 1.0), folder)
        calls: list[Path] = []

        def interrupted(path: Path, content: bytes, calls: list[Path] = calls, last: int = last) -> None:
            if len(calls) == last:
                raise KeyboardInterrupt
            calls.append(path)
            real(path, content)

        monkeypatch.setattr(table, "write_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.write(rows(2, 5.0), folder)
        monkeypatch.setattr(table, "write_atomically", real)
        assert load(folder)["value"].tolist() == ([1.0, 2.0] if last < 2 else [5.0, 6.0])


def test_results_are_not_read_through_a_link(tmp_path: Path) -> None:
    table.write(rows(2, 1.0), tmp_path / "real")
    (tmp_path / "results.parquet").symlink_to(tmp_path / "real" / "results.parquet")
    with pytest.raises(FileError, match="is a link"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["results.parquet", "results.csv", "aggregated.parquet", "checksums.sha256", "narrow/step_0/gini_train.json"],
)
def test_a_folder_where_a_file_of_results_is_to_be_is_a_message(analyze: Analyze, tmp_path: Path, name: str) -> None:
    blocked = tmp_path / "results" / "analysis" / name
    blocked.mkdir(parents=True)
    with pytest.raises(PicoError, match=blocked.name.replace(".", r"\.")):
        analyze(GINI, "narrow", "other", csv=True, aggregated=True)


def test_results_are_not_written_through_a_link(analyze: Analyze, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "analysis").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="results/analysis: is a link"):
        analyze(GINI)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_table_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "results").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="results: is a link"):
        table.write(rows(2, 1.0), tmp_path / "results")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_two_analyses_do_not_write_into_one_folder(analyze: Analyze, tmp_path: Path) -> None:
    _, before = analyze(GINI)
    folder = tmp_path / "results" / "analysis"
    with (
        RunLock(folder / ".lock", "analysis", "analysis_name").held(),
        pytest.raises(PicoError, match=r"another process is writing this analysis \(process .*another analysis_name"),
    ):
        analyze(GINI.replace("gini", "hoyer"))
    pd.testing.assert_frame_equal(load(folder), before)
    analyze(GINI.replace("gini", "hoyer"))
    assert set(load(folder)["metric"]) == {"hoyer"}


def test_a_forged_value_is_computed_again_and_told(
    analyze: Analyze, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, right = analyze(GINI)
    kept = tmp_path / "results" / ".values.sqlite"
    with sqlite3.connect(kept) as database:
        database.execute("UPDATE kept SET value = 0.123")
    outcome, again = analyze(GINI)
    pd.testing.assert_frame_equal(again, right)
    assert outcome.computed == 8
    assert "8 values do not match their checksums): the file is now .values.sqlite.damaged-1" in capsys.readouterr().err
    assert (tmp_path / "results" / ".values.sqlite.damaged-1").is_file()


@pytest.mark.parametrize("column", ["value", "reason", "forced", "chance", "chance_std"])
@pytest.mark.parametrize("forged", [b"\xff", "12 or so", 1.5])
def test_a_kept_value_of_another_type_is_not_believed_though_its_checksum_holds(
    tmp_path: Path, column: str, forged: Any
) -> None:
    path = tmp_path / "v.sqlite"
    values = Values(path)
    values.add({"key": Value(0.5, "", 3, 0.1, 0.2), "other": Value(0.25)})
    held = Value(0.5, "", 3, 0.1, 0.2)._replace(**{column: forged})
    with sqlite3.connect(path) as database:
        database.execute(
            f"UPDATE kept SET {column} = ?, checksum = ? WHERE key = 'key'", (forged, _checksum("key", held))
        )
    (stored,) = sqlite3.connect(path).execute(f"SELECT {column} FROM kept WHERE key = 'key'").fetchone()
    fits = stored == forged and isinstance(stored, str if column == "reason" else float) and column != "forced"
    assert list(values.get(["key", "other"])) == (["key", "other"] if fits else ["other"])
    assert values.damage() == (None if fits else "1 values do not match their checksums")
    values.close()


@pytest.mark.slow
def test_no_flipped_byte_of_the_kept_values_is_believed(tmp_path: Path) -> None:
    wanted = {f"key {number}": Value(number / 7, "", None, 0.5, 0.1) for number in range(60)}
    path, pristine = tmp_path / "v.sqlite", tmp_path / "pristine"
    values = Values(path)
    values.add(wanted)
    values.close()
    shutil.copy(path, pristine)
    content = pristine.read_bytes()
    for place in [*range(100), *range(100, len(content), 211)]:
        for leftover in tmp_path.glob("v.sqlite*"):
            leftover.unlink()
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        rename_damaged(path)
        values = Values(path)
        found = values.get(wanted)
        assert all(wanted[key] == value for key, value in found.items())
        values.add(wanted)
        assert values.get(wanted) == wanted
        values.close()


@pytest.mark.parametrize("content", [b"", b"no database at all, but long enough to be looked at as one" * 40])
def test_what_is_no_database_is_set_aside(analyze: Analyze, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".values.sqlite").write_bytes(content)
    assert analyze(GINI)[0].computed == 8
    assert analyze(GINI)[0].computed == 0


def test_kept_values_are_not_written_through_a_link(analyze: Analyze, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".values.sqlite").symlink_to(tmp_path / "precious")
    with pytest.raises(PicoError, match="is a link, or no regular file; remove it"):
        analyze(GINI)
    assert not (tmp_path / "precious").exists()


def damage(run: Path, how: str) -> str:
    """Damage step 4 of a run in one way; returns what the analysis has to say of it."""
    step = run / "checkpoints" / "step_4"
    if how == "manifest cut":
        (step / "manifest.json").write_bytes((step / "manifest.json").read_bytes()[:50])
    elif how == "manifest gone":
        (step / "manifest.json").unlink()
    elif how == "another number":
        step.rename(step.with_name("step_5"))
        return "step 5 of hurt"
    elif how == "another name":
        step.rename(step.with_name("step_004"))
        return "holds step 4 under another name; call it step_4"
    elif how == "link":
        step.rename(run / "aside")
        step.symlink_to(run / "aside")
    return "step 4 of hurt"


@pytest.mark.slow
@pytest.mark.parametrize("text", [GINI, CKA], ids=["one", "pairs"])
@pytest.mark.parametrize("how", ["manifest cut", "manifest gone", "another number", "another name", "link"])
def test_a_step_that_cannot_be_read_is_missing_and_not_dropped(
    analyze: Analyze, runs: dict[str, Path], tmp_path: Path, how: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["narrow"], tmp_path / "hurt", symlinks=True)
    for file in ("run.json",):
        assert (tmp_path / "hurt" / file).is_file()
    said = damage(tmp_path / "hurt", how)
    outcome, frame = analyze(text, str(tmp_path / "hurt"))
    assert set(frame["step"]) == {0, 2, 6}
    assert any(said in line for line in outcome.absent), outcome.absent
    assert "; 0 things were missing" not in capsys.readouterr().err
    with pytest.raises(PicoError, match=r"asked for (is|are) missing \(--strict\)"):
        analyze(text, str(tmp_path / "hurt"), strict=True)


def test_a_range_of_any_size_is_an_answer(analyze: Analyze) -> None:
    outcome, frame = analyze(f"steps: {{start: 0, end: {10**30}, step: 1}}\n{GINI}")
    assert sorted(frame["step"].unique()) == [0, 2, 4, 6]
    assert outcome.absent[-1] == "further steps of narrow that were asked for: there are no such checkpoints"
    outcome, frame = analyze(f"steps: [0, {10**40}]\n{GINI}")
    assert outcome.absent == [f"step {10**40} of narrow: there is no such checkpoint"]
