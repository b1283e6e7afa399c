"""The files of a run have forms: what does not fit is a message with file and key; files are not held whole."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.address import Address
from picolm.errors import PicoError, StoreError
from picolm.exchange.outbox import Outbox
from picolm.store import Missing, Run
from picolm.store.files import write_bytes
from picolm.store.foreign import PickledTensors
from picolm.store.legacy import LegacyCheckpoint, LocalFiles
from picolm.store.manifest import Manifest, natural
from picolm.store.records import Journal
from picolm.store.roworder import RowOrder
from picolm.store.tensors import read_header

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture
def full(run: Run, content: dict[str, Any]) -> Run:
    run.commit(0, **content)
    run.append_metrics({"step": 0, "train/loss": 2.0, "weights_digest": "ab", "rows": [1, 2]})
    run.write_evaluation(0, {"paloma": 3.0})
    return run


def reseal(run: Run, name: str, data: bytes) -> None:
    """Change a file of step 0 and its manifest, as somebody who publishes a run can."""
    import dataclasses

    manifest = run._sealed(0).manifest
    path = run.step_path(0)
    (path / name).unlink()
    files = {**manifest.files, name: write_bytes(path / name, data)}
    (path / "manifest.json").write_bytes(dataclasses.replace(manifest, files=files).to_bytes())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "metrics.jsonl:2: damaged: should be a valid dictionary"),
        ("{}", "metrics.jsonl:2: damaged: step: Field required"),
        ('{"step": "1"}', "metrics.jsonl:2: damaged: step: should be a valid integer"),
        ('{"step": -1}', "metrics.jsonl:2: damaged: step: should be greater than or equal to 0"),
        ('{"step": true}', "metrics.jsonl:2: damaged: step: should be a valid integer"),
        ('{"step": 1.5}', "metrics.jsonl:2: damaged: step: should be a valid integer"),
        ('{"step": 1, "train/loss": "low"}', "metrics.jsonl:2: damaged: train/loss: should be a number"),
        ('{"step": 1, "train/loss": null}', "metrics.jsonl:2: damaged: train/loss: should be a number"),
        ('{"step": 1, "train/loss": [1]}', "metrics.jsonl:2: damaged: train/loss: should be a number"),
        ('{"step": 1, "train/loss": {"a": 1}}', "metrics.jsonl:2: damaged: train/loss: should be a number"),
        ('{"step": 1, "lr": "low"}', "metrics.jsonl:2: damaged: lr: should be a number"),
        ('{"step": 1, "train/loss": 1' + "0" * 400 + "}", "metrics.jsonl:2: damaged: train/loss"),
        (
            '{"step": 1, "weights_digest": 5, "train/loss": 1}',
            "metrics.jsonl:2: damaged: weights_digest: should be a valid string",
        ),
        ('{"step": 1, "rows": 5, "train/loss": 1}', "metrics.jsonl:2: damaged: rows: should be a valid list"),
        (DEEP + '"train/loss"', "metrics.jsonl:2: damaged: Invalid JSON: recursion limit exceeded"),
        ("\xff", "metrics.jsonl:2: damaged: "),
        ("", "metrics.jsonl:2: damaged: Invalid JSON"),
    ],
)
def test_a_line_of_metrics_that_does_not_fit_is_named(full: Run, line: str, message: str) -> None:
    with (full.path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    keyed = ("train/loss", "weights_digest", "rows", "lr")
    reads = not line.startswith('{"step":') or any(f'"{key}"' in line for key in keyed)
    for keys in (None, keyed) if reads else (None,):
        with pytest.raises(StoreError) as raised:
            list(Run.open(full.path).read_metrics(keys))
        assert message in str(raised.value)
        assert "remove that line to go on" in str(raised.value)


def test_lines_with_what_is_wanted_alone_are_parsed(full: Run) -> None:
    full.append_metrics({"step": 1, "val/paloma": 7.5, "note": 1})
    full.append_metrics({"step": 2, "train/loss": float("nan"), "lr": 0.5})
    assert list(full.read_metrics(("val/paloma",))) == [{"step": 1, "val/paloma": 7.5}]
    first, second = full.read_metrics(("train/loss",))
    assert first == {"step": 0, "train/loss": 2.0}
    assert second["train/loss"] != second["train/loss"]
    assert [entry["step"] for entry in full.metrics()] == [0, 1, 2]


@pytest.mark.slow
def test_a_file_of_metrics_is_never_held_whole(tmp_path: Path) -> None:
    """40 MB of lines of 4 kB; what is held is a few lines."""
    line = (
        json.dumps({"step": 7, **{f"update_ratio/layers.{i}.attention.q_proj": 0.123456789 for i in range(70)}}) + "\n"
    )
    count = 10_000
    (tmp_path / "metrics.jsonl").write_text(line * count)
    journal = Journal(tmp_path / "metrics.jsonl")
    tracemalloc.start()
    assert sum(1 for _ in journal.entries(("train/loss",))) == 0
    assert sum(1 for _ in journal.entries(("step",))) == count
    assert journal.keep(lambda entry: True) == 0
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_dropping_lines_leaves_the_others_byte_for_byte(tmp_path: Path) -> None:
    lines = ['{"step":  1, "a": 1.0}', '{"step": 3}', '{"step":2 , "a": "NaN"}']
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + '{"step": 9')
    assert Journal(tmp_path / "metrics.jsonl").keep(lambda entry: entry["step"] < 3) == 1
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(lines[i] + "\n" for i in (0, 2))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 200_000])
def test_a_torn_line_of_any_length_is_cut_off(tmp_path: Path, size: int) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + b"x" * size)
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"step": 2})
    assert [entry["step"] for entry in journal.entries()] == [1, 2]


@pytest.mark.parametrize(
    ("environment", "key"),
    [
        ([], "environment.json: should be"),
        ({"starts": 5}, "environment.json: starts: should be a valid list"),
        ({"starts": [5]}, "environment.json: starts.0"),
        ({"starts": [{"time": "x"}]}, "environment.json: starts.0.step: Field required"),
        ({"starts": [{"step": "1"}]}, "environment.json: starts.0.step: should be a valid integer"),
        (
            {"starts": [{"step": 1, "changed": {"a": 5}}]},
            "environment.json: starts.0.changed.a: should be a valid list",
        ),
        ({"starts": [{"step": 1, "changed": {"a": [1]}}]}, "environment.json: starts.0.changed.a"),
        ({"data": "x"}, "environment.json: data"),
        ({"data": {"fingerprint": 5}}, "environment.json: data.fingerprint: should be a valid string"),
        ({"data": {"rows": "many"}}, "environment.json: data.rows: should be a valid integer"),
        ({"packages": ["torch"]}, "environment.json: packages"),
        ({"hardware": {"threads": 10**9}}, "environment.json: hardware.threads"),
        ({"forked_from": {"step": 1}}, "environment.json: forked_from.run: Field required"),
        ({"replay_of": []}, "environment.json: replay_of"),
        ({"seeds": {"init": "x"}}, "environment.json: seeds.init"),
    ],
)
def test_an_environment_that_does_not_fit_is_named(full: Run, environment: Any, key: str) -> None:
    (full.path / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(StoreError) as raised:
        _ = full.environment
    assert key in str(raised.value)


def test_an_environment_of_an_older_version_is_read(full: Run) -> None:
    for old in ({}, {"torch": "2"}, {"starts": [{"step": 0}], "new": {"key": [1]}}):
        (full.path / "environment.json").write_text(json.dumps(old))
        assert full.environment == old


@pytest.mark.parametrize(
    ("state", "key"),
    [
        ([], "trainer_state.json: should be"),
        ({"step": "0"}, "trainer_state.json: step: should be a valid integer"),
        ({"step": 0, "resumable": 1}, "trainer_state.json: resumable: should be a valid boolean"),
        ({"resumable": True}, "trainer_state.json: step: Field required"),
        ({"step": 0, "resumable": True}, "trainer_state.json: skipped_updates: Field required"),
        ({"step": 0, "capture": [1]}, "trainer_state.json: capture"),
        ({"step": 0, "capture": {"positions": "all"}}, "trainer_state.json: capture.positions"),
        ({"step": 0, "optimizer_scalars": {"step.a": "x"}}, "trainer_state.json: optimizer_scalars.step.a"),
        ({"step": 0, "meters": {"losses": 5}}, "trainer_state.json: meters.losses"),
    ],
)
def test_a_state_that_does_not_fit_is_named(full: Run, state: Any, key: str) -> None:
    reseal(full, "trainer_state.json", json.dumps(state).encode())
    with pytest.raises(StoreError) as raised:
        _ = full[0].meta
    assert key in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run.json", "environment.json", "eval_results/step_0.json", "trainer_state.json"])
@pytest.mark.parametrize("text", [DEEP, '{"a": ' + DEEP + "}", "", "{", "\xff", "null", '"x"', "9" * 5000, "[1]"])
def test_no_json_of_a_run_ends_in_a_traceback(full: Run, name: str, text: str) -> None:
    if name == "trainer_state.json":
        reseal(full, name, text.encode("latin-1"))
    else:
        (full.path / name).write_bytes(text.encode("latin-1"))

    def use() -> None:
        run = Run.open(full.path)
        _ = run.environment, run.evaluation(0), run[0].meta

    with pytest.raises(StoreError, match=name):
        use()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "should be a mapping of sections"),
        ("just text", "should be a mapping of sections"),
        ("a: [", "is not valid YAML"),
        ("a: &a [*a]", "is not valid YAML"),
        ("a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{n}: &{n} [{', '.join([f'*{p}'] * 10)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 100000 values"),
        ("a: " + "[" * 10_000 + "]" * 10_000, ""),
        ("\xff", "is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_stored_configuration_that_is_none_is_a_message(full: Run, text: str, message: str) -> None:
    (full.path / "training_config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError) as raised:
        _ = Run.open(full.path).config
    assert "training_config.yaml" in str(raised.value)
    assert message in str(raised.value)


def test_an_empty_configuration_is_an_empty_mapping(full: Run) -> None:
    (full.path / "training_config.yaml").write_text("")
    assert full.config == {}


def test_manifests_with_wrong_types_are_named(full: Run) -> None:
    content = json.loads((full.step_path(0) / "manifest.json").read_bytes())
    name, address = next(iter(content["files"])), next(iter(content["tensors"]))
    for change, key in (
        ({"step": "0"}, "step: should be a valid integer"),
        ({"step": -1}, "step: should be greater"),
        ({"parent": 5}, "parent"),
        ({"about": []}, "about"),
        ({"about": {"thinned": [5]}}, "about: thinned.0"),
        ({"about": {"thinned": [{"was": "x", "without": "all"}]}}, "about: thinned.0.without"),
        ({"files": {name: 5}}, f"files.{name}"),
        ({"files": {name: {"bytes": -1, "sha256": "0" * 64}}}, f"files.{name}.bytes"),
        ({"files": {"../x": {"bytes": 1, "sha256": "0" * 64}}}, "'../x' is not a plain relative path"),
        ({"tensors": {address: {**content["tensors"][address], "shape": "x"}}}, f"tensors.{address}.shape"),
        ({"tensors": {address: {**content["tensors"][address], "shape": [-1]}}}, f"tensors.{address}.shape.0"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ):
        with pytest.raises(StoreError) as raised:
            Manifest.from_bytes(json.dumps({**content, **change}).encode(), "manifest.json")
        assert key in str(raised.value), change


def test_names_with_numbers_of_any_length_are_sorted() -> None:
    names = ["layers.10.a", "layers.2.a", "layers." + "9" * 5000, "a²", "a", "7", "layers.02.b", ""]
    assert sorted(names, key=natural) == ["", "7", "a", "a²", "layers.02.b", "layers.2.a", "layers.10.a", names[2]]


@pytest.mark.parametrize(
    "header",
    [
        DEEP, "[]", '{"a": 5}', '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        '{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [1000000000000], "data_offsets": [0, 4000000000000]}}',
        '{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)  # fmt: skip
def test_headers_of_tensors_are_not_believed(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    with pytest.raises(StoreError, match=r"a.safetensors: damaged, or not a safetensors file"):
        read_header(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(StoreError, match="header too large"):
        read_header(tmp_path / "a.safetensors")


def test_a_pickled_tensor_of_any_size_in_a_few_bytes_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    with pytest.raises(StoreError, match=r"'a' has shape \[1000000, 1000000\], more than the file holds"):
        PickledTensors(tmp_path / "a.pt")


def test_rows_of_pico_train_may_not_lie_elsewhere(tmp_path: Path) -> None:
    folder = tmp_path / "step_0/learning_dynamics/train_data"
    folder.mkdir(parents=True)
    step = LegacyCheckpoint(0, LocalFiles(tmp_path / "step_0"), RowOrder({}, "x"))
    for listed, message in (
        ([{"filename": "../../../outside.arrow"}], "could lead out"),
        ([{"filename": 5}], "_data_files.0.filename"),
        (5, "_data_files"),
    ):
        (folder / "state.json").write_text(json.dumps({"_data_files": listed}))
        with pytest.raises(StoreError, match=message):
            step.rows("train")


def test_a_queue_that_does_not_fit_is_begun_anew(full: Run) -> None:
    (full.path / ".hub").mkdir()
    for text in (DEEP, "[]", '{"place": 5, "steps": [1]}', '{"place": "x", "steps": ["1"]}', "\x00"):
        (full.path / ".hub/outbox.json").write_text(text)
        assert Outbox(full).place == ""
    (full.path / ".hub/outbox.json").write_text('{"place": "hub:lab/x@y", "steps": [1]}')
    assert Outbox(full).place == "hub:lab/x@y"  # as an earlier version wrote it


def test_one_step_is_found_without_opening_the_others(
    run: Run, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(6):
        run.commit(step, **content | {"meta": {"step": step}})
    opened: list[str] = []
    original: Callable[..., Manifest] = Manifest.from_bytes
    monkeypatch.setattr(
        Manifest, "from_bytes", lambda data, where: opened.append(where.split("/")[-2]) or original(data, where)
    )
    again = Run.open(run.path)
    assert 3 in again
    assert again[3].step == 3
    assert set(opened) == {"step_3"}
    newest = again.latest()
    assert newest is not None
    assert newest.step == 5
    with pytest.raises(Missing, match="has no step 77 "):
        again[77]
    assert set(opened) == {"step_3", "step_5"}
    assert (-1 in again, "3" in again, 10**30 in again) == (False, False, False)


def test_a_step_that_is_thinned_while_it_is_read_is_missing(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    reader = Run.open(run.path)[0]
    run.thin(0, {"activations"})
    with pytest.raises(Missing, match=r"activations.safetensors: there is no such file any more"):
        reader[Address("activations", "train", "layers.2.attention.o_proj")]
    run.remove(0)
    with pytest.raises(StoreError, match="there is no such file"):
        reader.read("config.json")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_is_a_message(full: Run, data: st.DataObject) -> None:
    names = ["run.json", "environment.json", "metrics.jsonl", "eval_results/step_0.json", "training_config.yaml"]
    path = full.path / data.draw(st.sampled_from(names))
    saved = path.read_bytes()
    at = data.draw(st.integers(0, len(saved) - 1))
    length = data.draw(st.integers(0, 8))
    path.write_bytes(saved[:at] + data.draw(st.binary(max_size=8)) + saved[at + length :])
    try:
        run = Run.open(full.path)
        _ = run.config, run.environment, list(run.metrics()), run.evaluation(0)
    except PicoError as error:
        told = str(error)
    else:
        told = path.name
    path.write_bytes(saved)
    assert path.name in told


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 300, "cannot be read (File name too long)"),
        ("dangling", "no run here (there is no such directory)"),
        ("file", "no run here (it is no directory)"),
        ("pipe", "no run here (it is no directory)"),
        ("empty", "no run here (it is another kind of directory)"),
        ("a\0b", "no run here"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StoreError) as raised:
        Run.open(tmp_path / name)
    assert message in str(raised.value)


def test_brackets_and_stars_in_the_path_of_a_run_are_no_pattern(tmp_path: Path, content: dict[str, Any]) -> None:
    run = Run.create(tmp_path / "a[1]*?{x}", {}, {})
    run.commit(0, **content)
    (run.path / "run.json").unlink()  # so that it is known by its steps
    for place in (run.path, run.checkpoints_path, run.step_path(0)):
        assert Run.open(place).steps == [0]
    assert Address("weights", "", f"layers.{'9' * 5000}.x").layer is None
