"""What a step costs is what lies on disk, next to the least that its tensors can take."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from picolm.address import Address
from picolm.store import Run
from picolm.store.listing import contents, loss_line, table, verify


def test_bytes_by_kind_are_those_on_disk(run: Run, content: dict[str, Any]) -> None:
    path = run.commit(3, **content).path
    (entry,) = contents(run)
    on_disk = {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    assert entry.total_bytes == sum(on_disk.values())
    assert entry.bytes == {
        "weights": on_disk["model.safetensors"],
        "optimizer": on_disk["optimizer.safetensors"],
        "activations": on_disk["learning_dynamics/train_activations.safetensors"]
        + on_disk["learning_dynamics/val_activations.safetensors"],
        "gradients": on_disk["learning_dynamics/train_gradients.safetensors"],
        "data": on_disk["learning_dynamics/train_data.parquet"],
        "tokenizer": on_disk["tokenizer.json"],
        "other": sum(on_disk[name] for name in ("manifest.json", "trainer_state.json", "config.json", "modeling_x.py")),
    }


def test_the_minimum_is_elements_times_their_size(run: Run, content: dict[str, Any]) -> None:
    run.commit(3, **content)
    (entry,) = contents(run)
    assert entry.minimum_bytes == sum(t.numel() * t.element_size() for t in content["tensors"].values())
    assert entry.overhead is not None
    beyond = entry.total_bytes - entry.bytes["tokenizer"] - entry.minimum_bytes
    assert entry.overhead == beyond / entry.minimum_bytes


def test_a_realistic_step_stays_within_two_percent_of_its_minimum(run: Run) -> None:
    """The smallest shape that is of use: 6 layers, d_model 96, vocabulary 4096, all captures of 64 rows."""
    shapes = {"attention.q_proj": (96, 96), "attention.v_proj": (32, 96), "attention.o_proj": (96, 96),
              "swiglu.w_0": (384, 96), "swiglu.w_1": (384, 96), "swiglu.w_2": (96, 384)}  # fmt: skip
    parameters = {"embedding_proj": (4096, 96), "de_embedding_proj": (4096, 96)}
    parameters |= {f"layers.{layer}.{name}": shape for layer in range(6) for name, shape in shapes.items()}
    tensors = {Address(kind, "", name): torch.randn(shape) for name, shape in parameters.items()
               for kind in ("weights", "exp_avg", "exp_avg_sq")}  # fmt: skip
    for name, shape in parameters.items():
        if name.endswith(("v_proj", "o_proj", "w_2")):
            tensors[Address("gradients", "train", name)] = torch.randn(shape)
            tensors[Address("activations", "train", name)] = torch.randn(64, shape[0])
    run.commit(0, tensors, meta={"rng": "00" * 5056})
    (entry,) = contents(run)
    assert entry.overhead is not None
    assert 0 < entry.overhead < 0.01


def test_a_step_without_tensors_has_no_overhead_to_speak_of(run: Run) -> None:
    run.commit(0, {}, meta={})
    assert contents(run)[0].overhead is None


def test_the_table_shows_every_step_and_the_damaged_ones_as_such(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    run.commit(500, content["tensors"], meta={})
    (run.commit(1000, {}, meta={}).path / "manifest.json").write_bytes(b"{")
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table(contents(run), "demo"))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["demo"]
    assert lines[1] == ["step", "weights", "optimizer", "activations", "gradients", "data", "tokenizer", "other",
                        "total", "minimum", "over"]  # fmt: skip
    assert [line[0] for line in lines[3:]] == ["0", "500", "1000"]
    assert lines[3][-1].endswith("%")
    assert lines[5] == ["1000", "damaged"]


SMALLER = [
    ("step", "weights", "optimizer", "activations", "gradients", "total", "over"),
    ("step", "total", "minimum", "over"),
]


def headings(run: Run, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table(contents(run), width=width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    return next(line.split() for line in lines if line.strip())


def test_a_narrow_screen_gets_fewer_columns_rather_than_cut_ones(run: Run, content: dict[str, Any]) -> None:
    run.commit(123456, **content)
    whole = [
        "step",
        "weights",
        "optimizer",
        "activations",
        "gradients",
        "data",
        "tokenizer",
        "other",
        "total",
        "minimum",
        "over",
    ]
    assert {tuple(headings(run, width)) for width in range(70, 140)} == {tuple(whole), *SMALLER}
    assert headings(run, 80) == ["step", "weights", "optimizer", "activations", "gradients", "total", "over"]
    assert headings(run, 44) == ["step", "total", "minimum", "over"]


def test_the_loss_in_a_line(run: Run) -> None:
    assert loss_line(run) == ""
    for step, loss in ((0, 8.25), (10, 6.0), (20, 4.5)):
        run.append_metrics({"step": step, "train/loss": loss})
    first, drawn, last = loss_line(run).split()[1:4]
    assert (first, len(drawn), last) == ("8.25", 3, "4.5")
    assert loss_line(run).endswith("(steps 0 to 20, nats per token)")


def test_verify_goes_through_every_step_damaged_ones_too(run: Run, content: dict[str, Any]) -> None:
    for step in (0, 1, 2):
        run.commit(step, **content)
    (run.step_path(1) / "manifest.json").write_bytes(b"{")
    (run.step_path(2) / "config.json").write_bytes(b"")
    results = dict(verify(run))
    assert results[0] == []
    assert "step_1/manifest.json: damaged" in results[1][0]
    assert "step_2/config.json: 0 bytes where 20 were written" in results[2][0]


@pytest.mark.slow
def test_the_runs_of_a_folder_are_listed(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from picolm.cli import main

    run = train("monitoring.logging.log_level=ERROR")
    (run.path.parent / "notes").mkdir()
    run.path.rename(run.path.with_name("[one]"))
    monkeypatch.setattr("sys.argv", ["pico", "list", str(run.path.parent)])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert ended.value.code == 0
    row = next(line.split() for line in said.splitlines() if "[one]" in line)
    assert row[:3] == ["[one]", "4", "6"]
    assert float(row[3]) > 0
    assert "notes" not in said
    monkeypatch.setattr("sys.argv", ["pico", "list", str(run.path.parent / "notes")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "no run here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_listed_and_reported_where_the_locale_is_not_utf_8(train: Callable[..., Any], tmp_path: Path) -> None:
    run = train("monitoring.logging.log_level=ERROR")
    place = run.path.with_name("Größe [1] 你")
    run.path.rename(place)
    environment = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    for words in (
        ["list", str(place)],
        ["list", str(place.parent)],
        ["report", str(place), "--out", str(tmp_path / "r.html")],
    ):
        done = subprocess.run([sys.executable, "-m", "picolm", *words], env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        done.stdout.decode("ascii")
    assert "Größe [1] 你" in (tmp_path / "r.html").read_text(encoding="utf-8")
