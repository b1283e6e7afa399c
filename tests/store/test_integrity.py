"""Every byte of a step is covered by a digest, and nothing in it leads out of the run."""

import dataclasses
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picolm.errors import StoreError
from picolm.store import Run
from picolm.store.files import FileRecord
from picolm.store.manifest import Manifest


def flip(path: Path, position: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.slow
def test_any_flipped_bit_anywhere_is_found(run: Run, content: dict[str, Any]) -> None:
    """Half of the flips fall on the manifest, the other half anywhere by size; the damage is named by its file."""
    path = run.commit(0, **content).path
    files = [entry for entry in sorted(path.rglob("*")) if entry.is_file()]
    chance = random.Random(0)
    for number in range(1000):
        if number < len(files):
            file = files[number]
        elif number % 2:
            file = path / "manifest.json"
        else:
            file = chance.choices(files, [entry.stat().st_size for entry in files])[0]
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, position, bit)
        problems = run.problems(0)
        assert problems, f"bit {bit} of byte {position} of {file.name}"
        assert file.name in problems[0]
        flip(file, position, bit)
    assert run.problems(0) == []


@pytest.mark.slow
def test_a_damaged_tensor_is_never_handed_out(run: Run, content: dict[str, Any]) -> None:
    """Without any verification beforehand: what is read is what was written, or an error."""
    checkpoint = run.commit(0, **content)
    chance = random.Random(1)
    refused = 0
    for _ in range(200):
        file = checkpoint.path / chance.choice([name for name in checkpoint.files if name.endswith(".safetensors")])
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, position, bit)
        fresh = run[0]
        for address in fresh:
            try:
                assert torch.equal(fresh[address], content["tensors"][address])
            except StoreError:
                refused += 1
        flip(file, position, bit)
    assert refused >= 150


def cut(path: Path) -> None:
    os.truncate(path / "model.safetensors", (path / "model.safetensors").stat().st_size // 2)


def cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 100)


def append_to_manifest(path: Path) -> None:
    with open(path / "manifest.json", "ab") as file:
        file.write(b"\n")


def swap(path: Path) -> None:
    shutil.copy(path / "config.json", path / "trainer_state.json")


def link_file(path: Path) -> None:
    shutil.copy(path / "config.json", path.parent.parent.parent / "outside.json")
    (path / "config.json").unlink()
    (path / "config.json").symlink_to(path.parent.parent.parent / "outside.json")


def link_inside(path: Path) -> None:
    (path / "config.json").rename(path.parent / "config.json")
    (path / "config.json").symlink_to("../config.json")


def link_directory(path: Path) -> None:
    outside = path.parent.parent.parent / "elsewhere"
    (path / "learning_dynamics").rename(outside)
    (path / "learning_dynamics").symlink_to(outside)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors: [0-9]+ bytes where [0-9]+ were written"),
        (cut_manifest, "manifest.json: damaged"),
        (append_to_manifest, "manifest.json: damaged: its content does not match its own digest"),
        (swap, "trainer_state.json: (damaged; its sha-256 is .* as written|[0-9]+ bytes where)"),
        (lambda path: (path / "optimizer.safetensors").unlink(), "optimizer.safetensors: missing"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: cannot be read .*not a whole checkpoint"),
        (lambda path: (path / "pytorch_model.bin").touch(), "pytorch_model.bin: not in the manifest"),
        (lambda path: (path / "learning_dynamics" / "x").mkdir(), "learning_dynamics/x: not in the manifest"),
        (link_file, "config.json: is a link"),
        (link_inside, "config.json: is a link"),
        (link_directory, "is a link"),
        (lambda path: path.rename(path.with_name("step_5")), "holds step 0; the directory was renamed"),
    ],
)
def test_damage_is_named(run: Run, content: dict[str, Any], damage: Callable[[Path], None], message: str) -> None:
    damage(run.commit(0, **content).path)
    (problem, *_) = run.problems(run.step_directories()[0])
    assert re.search(message, problem), problem


def test_reading_does_not_follow_a_link_out_of_the_step(run: Run, content: dict[str, Any]) -> None:
    checkpoint = run.commit(0, **content)
    link_file(checkpoint.path)
    link_directory(checkpoint.path)
    with pytest.raises(StoreError, match="is a link"):
        checkpoint.read("config.json")
    with pytest.raises(StoreError, match="is a link"):
        checkpoint["gradients", "train", "layers.2.attention.o_proj"]  # type: ignore[index]


def test_a_step_or_checkpoints_behind_a_link_is_no_part_of_the_run(run: Run, tmp_path: Path) -> None:
    run.commit(0, {}, meta={})
    run.step_path(0).rename(tmp_path / "step_0")
    run.step_path(0).symlink_to(tmp_path / "step_0")
    assert run.steps == []
    with pytest.raises(StoreError, match="a symbolic link is not a step"):
        run[0]
    with pytest.raises(StoreError, match="not a directory of this run; move it out of the way"):
        run.commit(0, {}, meta={})
    run.checkpoints_path.rename(tmp_path / "checkpoints")
    run.checkpoints_path.symlink_to(tmp_path / "checkpoints")
    with pytest.raises(StoreError, match="checkpoints: is a link"):
        Run.open(run.path)


@pytest.mark.parametrize(
    "name", ["../../run.json", "/etc/hostname", "a/../../x", "a//b", "./x", "", "a\\..\\b", "manifest.json"]
)
def test_a_manifest_cannot_name_files_outside_of_its_step(run: Run, name: str) -> None:
    """Even one whose own digest is right."""
    checkpoint = run.commit(0, {}, meta={})
    forged = dataclasses.replace(checkpoint.manifest, files={name: FileRecord(1, "0" * 64)})
    (checkpoint.path / "manifest.json").write_bytes(forged.to_bytes())
    with pytest.raises(StoreError, match=r"manifest\.json: (.* is not a plain relative path|damaged)"):
        run[0]


def test_a_manifest_of_another_version_says_so(run: Run) -> None:
    path = run.commit(0, {}, meta={}).path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(StoreError, match="format 'pico-checkpoint' version 2; this version of picolm reads"):
        run[0]


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format":"pico-checkpoint","version":1}', "[" * 100_000, "\xff"]
)
def test_no_manifest_makes_its_reader_fail_otherwise(text: str) -> None:
    with pytest.raises(StoreError, match=r"^here: damaged"):
        Manifest.from_bytes(text.encode("latin-1"), "here")


def test_a_tensor_table_that_disagrees_with_the_file_is_found(run: Run, content: dict[str, Any]) -> None:
    checkpoint = run.commit(0, **content)
    address = next(iter(checkpoint))
    record = dataclasses.replace(checkpoint.record(address), shape=(999,))
    forged = dataclasses.replace(checkpoint.manifest, tensors={**checkpoint.manifest.tensors, address: record})
    (checkpoint.path / "manifest.json").write_bytes(forged.to_bytes())
    assert run.problems(0) == [f"{checkpoint.path / record.file}: its tensors are not those of the manifest"]
    with pytest.raises(StoreError, match="is not as the manifest says"):
        run[0][address]


def test_a_step_that_its_writer_replaces_during_verification_is_reported_or_whole(
    run: Run, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the digests of its files and a look at their headers, a file may go: that is a sentence, not an exception."""
    from picolm.store import checkpoint as module

    checkpoint = run.commit(0, **content)
    real = module.read_header

    def thinned_meanwhile(path: Path) -> Any:
        monkeypatch.setattr(module, "read_header", real)
        run.thin(0, {"optimizer", "activations", "gradients"})
        return real(path)

    monkeypatch.setattr(module, "read_header", thinned_meanwhile)
    (problem,) = checkpoint.verify()
    assert "there is no such file" in problem
    monkeypatch.setattr(module, "read_header", thinned_meanwhile)
    assert run.problems(0) == []
