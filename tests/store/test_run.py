"""A run keeps what it is given, under its names, and refuses what would make it lie."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Checkpoint, Directories, Missing, Run
from picolm.store.run import OPENERS

O_PROJ = "layers.2.attention.o_proj"


def names(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_symlink() or not entry.is_dir()}


def test_what_was_committed_comes_back(run: Run, content: dict[str, Any]) -> None:
    run.commit(3, **content)
    checkpoint = Run.open(run.path)[3]
    assert set(checkpoint) == set(content["tensors"])
    for address, tensor in content["tensors"].items():
        assert checkpoint[address].dtype == tensor.dtype
        assert torch.equal(checkpoint[address], tensor)
        assert checkpoint.record(address).shape == tuple(tensor.shape)
    assert checkpoint.meta == content["meta"]
    rows = checkpoint.rows("train").to_pydict()
    assert rows["input_ids"] == content["tables"]["train"]["input_ids"].tolist()
    assert rows["text"] == content["tables"]["train"]["text"]
    assert checkpoint.read("config.json") == content["texts"]["config.json"].encode()
    assert checkpoint.verify() == []


def test_a_step_on_disk_is_laid_out_as_documented(run: Run, content: dict[str, Any]) -> None:
    path = run.commit(0, **content).path
    assert path == run.path / "checkpoints" / "step_0"
    assert names(path) == {
        "model.safetensors", "optimizer.safetensors", "trainer_state.json", "manifest.json", "config.json",
        "modeling_x.py", "tokenizer.json", "learning_dynamics/train_gradients.safetensors",
        "learning_dynamics/train_activations.safetensors", "learning_dynamics/val_activations.safetensors",
        "learning_dynamics/train_data.parquet",
    }  # fmt: skip
    assert set(load_file(path / "model.safetensors")) == {
        f"pico_decoder.{name}"
        for name in (f"{O_PROJ}.weight", f"{O_PROJ}.bias", "layers.10.attention.o_proj.weight", "layers.2.mixer.A_log")
    }
    assert set(load_file(path / "optimizer.safetensors")) == {f"exp_avg.{O_PROJ}.weight", f"exp_avg_sq.{O_PROJ}.weight"}
    assert set(load_file(path / "learning_dynamics" / "train_gradients.safetensors")) == {O_PROJ}
    assert names(run.path) - {f"checkpoints/step_0/{name}" for name in names(path)} == {
        "run.json", "training_config.yaml", "environment.json", "checkpoints/latest", ".lock",
    }  # fmt: skip


def test_the_manifest_says_what_is_there(run: Run, content: dict[str, Any]) -> None:
    first, second = run.commit(0, **content), run.commit(7, **content, about={"replayed": True})
    manifest = json.loads((second.path / "manifest.json").read_bytes())
    data = (second.path / "model.safetensors").read_bytes()
    assert manifest["files"]["model.safetensors"] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    gradient = content["tensors"][Address("gradients", "train", O_PROJ)]
    assert manifest["tensors"][f"gradients/train/{O_PROJ}"] == {
        "file": "learning_dynamics/train_gradients.safetensors",
        "key": O_PROJ,
        "shape": [6, 4],
        "dtype": "float32",
        "sha256": hashlib.sha256(gradient.numpy().tobytes()).hexdigest(),
    }
    assert manifest["parent"] == {"step": 0, "digest": first.manifest.digest}
    assert manifest["about"] == {"replayed": True}
    assert first.manifest.parent is None


def test_equal_states_give_equal_files(tmp_path: Path, content: dict[str, Any]) -> None:
    """Bitwise, whatever the order of the mapping, in another run."""
    one = Run.create(tmp_path / "one", {}, {}).commit(5, **content)
    content["tensors"] = dict(reversed(content["tensors"].items()))
    other = Run.create(tmp_path / "other", {}, {}).commit(5, **content)
    assert one.files == other.files
    assert all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in one.files)


def test_any_subset_of_kinds_is_a_step(run: Run, content: dict[str, Any]) -> None:
    tensors = content["tensors"]
    for step, kind in enumerate(("weights", "exp_avg", "gradients", "activations")):
        part = {address: tensor for address, tensor in tensors.items() if address.kind == kind}
        checkpoint = run.commit(step, part, meta={})
        assert list(part) == list(run[step]) or set(part) == set(run[step])
        assert checkpoint.verify() == []
    assert run.commit(9, {}, meta={}).verify() == []


def test_select_takes_shell_patterns_and_keeps_layers_in_order(run: Run, content: dict[str, Any]) -> None:
    checkpoint = run.commit(0, **content)
    assert [address.layer for address in checkpoint.select(kind="weights", module="*.o_proj")] == [2, 10]
    assert checkpoint.select(split="val") == [Address("activations", "val", O_PROJ)]
    assert {address.kind for address in checkpoint.select(kind="exp_*")} == {"exp_avg", "exp_avg_sq"}
    assert checkpoint.select(kind="hessian") == []


def test_a_tensor_that_is_not_there_names_what_is(run: Run, content: dict[str, Any]) -> None:
    checkpoint = run.commit(0, **content)
    with pytest.raises(
        Missing, match=r"step_0 has no weights//layers\.2\.attention\.q_proj; did you mean '.*o_proj'\?"
    ) as e:
        checkpoint[Address("weights", "", "layers.2.attention.q_proj")]
    assert isinstance(e.value, KeyError)
    assert isinstance(e.value, StoreError)
    assert checkpoint.get(Address("weights", "", "nothing")) is None
    with pytest.raises(Missing, match=r"it holds: activations/train, activations/val, exp_avg, .*, weights\)"):
        checkpoint[Address("hessian", "train", O_PROJ)]
    with pytest.raises(Missing, match=r"no rows of 'val' \(there are: learning_dynamics/train_data.parquet\)"):
        checkpoint.rows("val")
    with pytest.raises(Missing, match=r"no file 'confg.json'; did you mean 'config.json'\?"):
        checkpoint.read("confg.json")
    with pytest.raises(Missing, match=r"demo has no step 7 \(there are: 0\)"):
        run[7]


def test_steps_are_sorted_numbers_and_latest_is_the_highest(run: Run) -> None:
    for step in (10, 2, 0, 100):
        run.commit(step, {}, meta={})
    run.commit(50, {}, meta={})  # as a replay does
    (run.checkpoints_path / "step_007").mkdir()
    (run.checkpoints_path / "step_8").mkdir()  # no manifest: not a step
    (run.checkpoints_path / "notes").mkdir()
    assert run.steps == list(run) == [0, 2, 10, 50, 100]
    assert len(run) == 5
    assert 10 in run
    assert 8 not in run
    latest = run.latest()
    assert latest is not None
    assert latest.step == 100
    assert os.readlink(run.checkpoints_path / "latest") == "step_100"
    assert run[50].manifest.parent == {"step": 10, "digest": run[10].manifest.digest}


def test_committing_the_same_again_keeps_the_step(run: Run, content: dict[str, Any]) -> None:
    first = run.commit(4, **content)
    again = run.commit(4, **content)
    assert first.manifest.to_bytes() == again.manifest.to_bytes()
    assert names(run.checkpoints_path) == {f"step_4/{name}" for name in names(first.path)} | {"latest"}


def test_committing_something_else_under_its_name_is_refused(run: Run, content: dict[str, Any]) -> None:
    before = run.commit(4, **content).manifest.to_bytes()
    content["meta"] = {"step": 5}
    with pytest.raises(StoreError, match=r"step_4 exists, with other content in trainer_state\.json; .*replace=True"):
        run.commit(4, **content)
    assert run[4].manifest.to_bytes() == before
    assert run.commit(4, **content, replace=True).meta == {"step": 5}
    assert run[4].verify() == []
    assert [path.name for path in run.checkpoints_path.iterdir() if path.name.startswith(".")] == []


def test_a_damaged_step_makes_way(run: Run, content: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    path = run.commit(4, **content).path
    (path / "model.safetensors").write_bytes(b"gone")
    run.commit(4, **content)
    assert run[4].verify() == []
    assert "damaged step makes way" in caplog.text


def test_latest_whole_falls_back_and_says_why(run: Run, content: dict[str, Any]) -> None:
    for step in (1, 2, 3, 4):
        run.commit(step, **content)
    (run.step_path(4) / "manifest.json").unlink()
    model = run.step_path(3) / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    checkpoint, problems = run.latest_whole()
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert len(problems) == 2
    assert "step_4/manifest.json: cannot be read" in problems[0]
    assert "step_3/model.safetensors" in problems[1]
    assert "where" in problems[1]
    earlier, _ = run.latest_whole(accept=lambda checkpoint: checkpoint.step < 2)
    assert earlier is not None
    assert earlier.step == 1
    assert run.latest_whole(accept=lambda checkpoint: False)[0] is None


def test_thinning_deletes_a_kind_and_the_step_stays_whole(run: Run, content: dict[str, Any]) -> None:
    before = run.commit(4, **content)
    after = run.thin(4, {"optimizer", "activations"})
    assert after.verify() == []
    assert {address.kind for address in after} == {"weights", "gradients"}
    assert names(after.path) == {
        name for name in names(before.path) if "activations" not in name and "optimizer" not in name
    }
    assert after.manifest.about["thinned"][0]["was"] == before.manifest.digest
    assert torch.equal(after[Address("gradients", "train", O_PROJ)], content["tensors"]["gradients", "train", O_PROJ])
    assert run.thin(4, {"optimizer"}).manifest.to_bytes() == after.manifest.to_bytes()
    with pytest.raises(StoreError, match="'other' cannot be dropped"):
        run.thin(4, {"other"})


def test_open_knows_a_run_by_its_directory_its_checkpoints_and_its_steps(run: Run) -> None:
    run.commit(0, {}, meta={})
    for place in (run.path, run.checkpoints_path, run.checkpoints_path / "latest", run.step_path(0)):
        assert Run.open(place).path == run.path
    (run.path / "run.json").unlink()  # a run that was copied without it
    assert Run.open(str(run.path)).steps == [0]


@pytest.mark.parametrize(("place", "found"), [("", "another kind"), ("demo/typo", "no such"), ("demo/logs", "another")])
def test_open_says_what_it_expected(run: Run, tmp_path: Path, place: str, found: str) -> None:
    (run.path / "logs").mkdir()
    with pytest.raises(
        StoreError, match=rf"no run here \(.*{found}.*expected run.json in it, or checkpoints/step_N/man"
    ):
        Run.open(tmp_path / place)


def test_open_takes_further_formats(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("picolm.store.run.OPENERS", [*OPENERS, lambda place: run if place.startswith("zoo:") else None])
    assert Run.open("zoo:lab/x") is run


def test_a_run_is_created_once(run: Run) -> None:
    with pytest.raises(StoreError, match="holds a run already; continue it, or choose another run_name"):
        Run.create(run.path, {}, {})
    assert Run.open(run.path).config == {"model": {"d_model": 96}}


def test_configuration_and_environment_come_back_as_written(tmp_path: Path) -> None:
    config = {"b": 1e-5, "a": [1, None, True], "name": "größe", "nested": {"x": "1e-3"}}
    run = Run.create(tmp_path / "r", config, {"seeds": {"init": 1}, "speed": float("inf")})
    assert Run.open(run.path).config == config
    assert list(run.config) == list(config)
    assert run.environment == {"seeds": {"init": 1}, "speed": float("inf")}


def test_directories_may_have_other_names_and_are_found_again(tmp_path: Path, content: dict[str, Any]) -> None:
    own = Directories("ckpt", "dynamics", "evals", "log")
    Run.create(tmp_path / "r", {}, {}, own).commit(1, **content)
    run = Run.open(tmp_path / "r")
    run.write_evaluation(1, {"paloma": 12.5})
    assert run.directories == own
    assert run[1].rows("train").num_rows == 5
    assert (tmp_path / "r/ckpt/step_1/dynamics/train_gradients.safetensors").exists()
    assert (tmp_path / "r/evals/step_1.json").exists()
    assert Run.open(tmp_path / "r/ckpt/step_1").path == run.path


@pytest.mark.parametrize("name", ["../out", "/abs", "a/b", "", ".", "a\\b"])
def test_directories_stay_inside_of_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="checkpoints_dir"):
        Directories(checkpoints_dir=name)
    run = Run.create(tmp_path / "r", {}, {})
    about = json.loads((run.path / "run.json").read_bytes())
    about["directories"]["checkpoints_dir"] = name
    (run.path / "run.json").write_text(json.dumps(about))
    with pytest.raises(StoreError, match="checkpoints_dir"):
        Run.open(run.path)


def test_a_run_of_another_version_is_refused(run: Run) -> None:
    (run.path / "run.json").write_text('{"format": "pico-run", "version": 99}')
    with pytest.raises(StoreError, match=r"run\.json: format 'pico-run' version 99; .* reads 'pico-run' version 1"):
        Run.open(run.path)


def test_evaluations_are_kept_beside_the_steps(run: Run) -> None:
    run.write_evaluation(20, {"paloma": 13.25, "by source": {"1790s": float("nan")}})
    stored = run.evaluation(20)
    assert stored is not None
    assert repr(stored["by source"]["1790s"]) == "nan"
    assert json.loads((run.path / "eval_results/step_20.json").read_bytes())["paloma"] == 13.25
    assert run.evaluation(21) is None


def test_metrics_beyond_a_step_are_dropped_before_they_are_made_again(run: Run) -> None:
    for step in range(5):
        run.append_metrics({"step": step, "train/loss": 8.0 - step})
    assert run.truncate_metrics(after_step=2) == 2
    run.append_metrics({"step": 3, "train/loss": 1.0})
    assert [entry["step"] for entry in run.metrics()] == [0, 1, 2, 3]


X, X_WEIGHT = Address("weights", "", "x"), Address("weights", "", "x.weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensors": {X: torch.zeros(1, dtype=torch.complex64)}}, "weights//x: tensors of type complex64 cannot be"),
        ({"tensors": {Address("gradients", "", "x"): torch.zeros(1)}}, "gradients//x: not an address that a step can"),
        ({"tensors": {Address("weights", "train", "x"): torch.zeros(1)}}, "weights/train/x: not an address"),
        ({"tensors": {Address("activations", "..", "x"): torch.zeros(1)}}, "activations/../x: not an address"),
        (
            {"tensors": {X: torch.zeros(1), X_WEIGHT: torch.zeros(1)}, "parameters": ["x.weight"]},
            "weights//x.weight and weights//x would both be 'x.weight' in model.safetensors",
        ),
        ({"texts": {"trainer_state.json": ""}}, "the file name 'trainer_state.json' is taken"),
        ({"texts": {"manifest.json": ""}}, "the file name 'manifest.json' is taken"),
        ({"texts": {"../x": ""}}, "'../x' is not a plain relative path"),
        ({"tables": {"a/b": {}}}, "'a/b' is not the name of a split"),
    ],
)
def test_what_cannot_be_stored_is_named(run: Run, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=re.escape(message)):
        run.commit(0, **{"tensors": {}, "meta": {}, **arguments})
    assert run.steps == []
    assert names(run.checkpoints_path) == set()


def test_a_run_travels_to_another_process(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    with run.lock():
        copy = pickle.loads(pickle.dumps(run))
    checkpoint = pickle.loads(pickle.dumps(run[0]))
    assert isinstance(checkpoint, Checkpoint)
    assert copy.steps == [0]
    assert set(checkpoint) == set(copy[0])


@pytest.mark.slow
def test_listing_and_verifying_do_not_import_torch(run: Run, content: dict[str, Any]) -> None:
    run.commit(0, **content)
    code = (
        "import sys; from picolm.store import Run; from picolm.store.listing import contents, table, verify;"
        f"run = Run.open({str(run.path)!r}); table(contents(run));"
        "assert not {'torch', 'numpy', 'pyarrow', 'safetensors'} & set(sys.modules);"
        "assert list(verify(run)) == [(0, [])]; assert not {'torch', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
