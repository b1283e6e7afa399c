"""Runs of pico-train: the same tensors under the same addresses, in the right order, lazily, and nothing executed."""

import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from tests.picotrain import configuration, content, scrambled, write_rows, write_run, write_step

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Missing, Run
from picolm.store.listing import contents
from picolm.store.roworder import RowOrder

V0 = Address("activations", "train", "layers.0.attention.v_proj")
IDS = torch.randint(0, 50304, (21, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    return write_run(tmp_path / "tiny-1", tables={"train": IDS, "val": IDS[:5]})


@pytest.fixture
def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files whose tensors are looked into, in order."""
    from picolm.store import foreign

    seen: list[str] = []
    for kind in (foreign.PickledTensors, foreign.SafeTensors):

        def opening(self: Any, path: Path, name: str = "", init: Callable[..., None] = kind.__init__) -> None:
            seen.append(path.name)
            init(self, path, name)

        monkeypatch.setattr(kind, "__init__", opening)
    return seen


def test_a_run_is_the_same_tensors_as_in_our_layout(legacy: Path, tmp_path: Path) -> None:
    ours = Run.create(tmp_path / "ours", {}, {})
    theirs = Run.open(legacy)
    assert (theirs.name, theirs.steps, theirs.config) == ("tiny-1", [0, 1000, 2000], configuration())
    for step in theirs:
        ours.commit(step, content(step), meta={}, tables={"train": {"input_ids": IDS}, "val": {"input_ids": IDS[:5]}})
        assert theirs[step].step == step
        assert set(theirs[step]) == set(ours[step])
        for address, tensor in ours[step].items():
            read = theirs[step][address]
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor), address
        for split in ("train", "val"):
            assert theirs[step].rows_digest(split) == ours[step].rows_digest(split) is not None
            assert theirs[step].rows(split)["input_ids"].to_pylist() == ours[step].rows(split)["input_ids"].to_pylist()
    assert theirs[0].rows("train")["text"][0].as_py() == "row 0"


def test_the_digest_of_rows_is_that_of_their_ids_as_int64(run: Run) -> None:
    import hashlib

    checkpoint = run.commit(0, {}, meta={}, tables={"train": {"input_ids": IDS.int()}, "val": {"text": ["no ids"]}})
    assert checkpoint.rows_digest("train") == hashlib.sha256(IDS.long().numpy().tobytes()).hexdigest()
    assert checkpoint.rows_digest("val") is None
    assert checkpoint.rows_digest("other") is None
    flat = run.commit(1, {}, meta={}, tables={"train": {"input_ids": [1, 2]}, "val": {"input_ids": [[1], None]}})
    with pytest.raises(
        StoreError, match=r"step_1: the column input_ids of its rows holds int64; expected lists of token ids"
    ):
        flat.rows_digest("train")
    with pytest.raises(StoreError, match=r"step_1: the column input_ids of its rows has gaps"):
        flat.rows_digest("val")


def test_layers_come_in_order_and_names_lose_their_wrappers(legacy: Path) -> None:
    checkpoint = Run.open(legacy)[0]
    assert [address.layer for address in checkpoint.select(kind="gradients", split="val")] == [
        0,
        0,
        0,
        1,
        1,
        1,
        10,
        10,
        10,
    ]
    assert checkpoint.select(module="layers.10.attention.v_proj", split="train") == [
        Address("activations", "train", "layers.10.attention.v_proj"),
        Address("gradients", "train", "layers.10.attention.v_proj"),
    ]
    assert V0 in checkpoint
    assert tuple(V0) in checkpoint
    assert "weights//embedding_proj" not in checkpoint


@pytest.mark.parametrize("prefix", ["", "_forward_module.", "module._orig_mod.pico_decoder.", "pico_decoder."])
def test_the_prefix_of_any_wrapper_is_left_off(tmp_path: Path, prefix: str) -> None:
    write_run(tmp_path / "r", [0], prefix=prefix)
    assert set(Run.open(tmp_path / "r")[0]) == set(content())


@pytest.mark.slow
@given(
    rows=st.integers(1, 30), width=st.integers(1, 9), sub_batch=st.integers(1, 12) | st.sampled_from([2**62, 10**30])
)
def test_mixed_up_rows_are_put_in_order(rows: int, width: int, sub_batch: int) -> None:
    rows_NH = torch.arange(rows * width).reshape(rows, width)
    order = RowOrder(configuration(sub_batch=sub_batch), "run")
    assert torch.equal(order.restore(scrambled(rows_NH, min(sub_batch, rows))), rows_NH)
    assert torch.equal(RowOrder(configuration(devices=4, sub_batch=sub_batch), "run").restore(rows_NH), rows_NH)


@pytest.mark.parametrize("sub_batch", [None, 4])
def test_rows_are_put_in_order_where_the_configuration_says_so(tmp_path: Path, sub_batch: int | None) -> None:
    write_run(tmp_path / "r", [0], sub_batch=sub_batch)
    assert torch.equal(Run.open(tmp_path / "r")[0][V0], content()[V0])


def test_keys_that_are_left_out_mean_what_they_mean_to_pico_train(tmp_path: Path) -> None:
    write_run(tmp_path / "r", [0], config={"model": {"d_model": 8}}, sub_batch=8)
    assert torch.equal(Run.open(tmp_path / "r")[0][V0], content()[V0])


def test_putting_rows_in_order_is_said_once(legacy: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="picolm"):
        run = Run.open(legacy)
        assert run[0][Address("weights", "", "embedding_proj")].shape == (6, 8)
        assert caplog.messages == []
        for step in run:
            for address in run[step].select(kind="activations"):
                run[step][address]
    (message,) = caplog.messages
    assert (
        "tiny-1 was trained on one device, where pico-train mixes up the activations in sub-batches of 8 rows"
        in message
    )


def test_without_a_configuration_the_order_of_rows_is_not_guessed(legacy: Path) -> None:
    (legacy / "training_config.yaml").unlink()
    run = Run.open(legacy)
    assert run.config == {}
    checkpoint = run[0]
    gradient = Address("gradients", "train", V0.module)
    assert torch.equal(checkpoint[gradient], content()[gradient])
    assert V0 in checkpoint
    for asked in (checkpoint.__getitem__, checkpoint.digest):
        with pytest.raises(
            StoreError, match=r"tiny-1: without training_config.yaml .* put that file there, with training.fab"
        ):
            asked(V0)


@pytest.mark.parametrize("value", ["auto", 0, 1.5, True])
def test_a_configuration_that_makes_no_sense_is_named(tmp_path: Path, value: Any) -> None:
    write_run(tmp_path / "r", [0], config={"training": {"fabric": {"num_devices": value}}})
    with pytest.raises(
        StoreError, match=r"r: training.fabric.num_devices is .* in training_config.yaml; expected a whole"
    ):
        Run.open(tmp_path / "r")


def test_a_tensor_that_is_asked_for_opens_its_file_only(legacy: Path, opened_files: list[str]) -> None:
    run = Run.open(legacy)
    assert (run.steps, opened_files) == ([0, 1000, 2000], [])
    checkpoint = run[1000]
    checkpoint[V0]
    assert opened_files == ["train_activations.pt"]
    for address in checkpoint.select(kind="activations", split="train"):
        assert address in checkpoint
        checkpoint[address]
        checkpoint.digest(address)
    assert opened_files == ["train_activations.pt"]
    checkpoint[Address("weights", "", "layers.1.swiglu.w_2")]
    assert opened_files == ["train_activations.pt", "model.safetensors"]


def test_weights_that_are_not_in_a_model_file_are_those_that_were_captured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", [0]) / "checkpoints/step_0"
    address = Address("weights", "", "layers.1.swiglu.w_2")
    assert Run.open(tmp_path / "r")[0].location(address) == str(folder / "model.safetensors")
    pickled = {
        f"pico_decoder.{name.module}.weight": tensor for name, tensor in content().items() if name.kind == "weights"
    }
    (folder / "model.safetensors").unlink()
    torch.save(pickled, folder / "pytorch_model.bin")
    assert torch.equal(Run.open(tmp_path / "r")[0][address], content()[address])
    (folder / "pytorch_model.bin").unlink()
    checkpoint = Run.open(tmp_path / "r")[0]
    assert checkpoint.location(address) == str(folder / "learning_dynamics/train_weights.pt")
    assert torch.equal(checkpoint[address], content()[address])
    assert Address("weights", "", "embedding_proj") not in checkpoint
    (folder / "learning_dynamics/train_weights.pt").unlink()
    assert torch.equal(Run.open(tmp_path / "r")[0][address], content()[address])


def test_a_tensor_lives_on_without_its_file(legacy: Path) -> None:
    checkpoint = Run.open(legacy)[0]
    tensor = checkpoint[V0]
    os.truncate(legacy / "checkpoints/step_0/learning_dynamics/train_activations.pt", 0)
    del checkpoint
    assert torch.equal(tensor, content()[V0])


def test_equal_content_has_equal_digests_and_other_content_others(legacy: Path, tmp_path: Path) -> None:
    shutil.copytree(legacy, tmp_path / "copy", symlinks=True)
    run, copy = Run.open(legacy), Run.open(tmp_path / "copy")
    digests = {address: run[0].digest(address) for address in run[0]}
    assert digests == {address: copy[0].digest(address) for address in copy[0]}
    assert len(set(digests.values())) == len(digests)
    assert run[1000].digest(V0) != digests[V0]
    (tmp_path / "copy/training_config.yaml").write_text(yaml.safe_dump(configuration(devices=2)))
    assert Run.open(tmp_path / "copy")[0].digest(V0) != digests[V0]  # the same file stands for other rows


def test_the_digest_of_ours_is_that_of_the_manifest(run: Run, content: dict[str, Any]) -> None:
    checkpoint = run.commit(0, **content)
    address = Address("gradients", "train", "layers.2.attention.o_proj")
    assert checkpoint.digest(address) == checkpoint.record(address).sha256
    assert checkpoint.location(address) == str(checkpoint.path / "learning_dynamics/train_gradients.safetensors")


def test_a_run_is_found_by_its_directory_its_checkpoints_and_its_steps(legacy: Path) -> None:
    for place in ("", "checkpoints", "checkpoints/latest", "checkpoints/step_0"):
        assert Run.open(legacy / place).path == legacy


def test_renamed_directories_are_followed(tmp_path: Path) -> None:
    names = {"checkpoints_dir": "ckpt", "learning_dynamics_dir": "dynamics", "logs_dir": "log"}
    folder = write_run(tmp_path / "r", [0], config=configuration(**names))
    (folder / "checkpoints").rename(folder / "ckpt")
    (folder / "ckpt/step_0/learning_dynamics").rename(folder / "ckpt/step_0/dynamics")
    assert torch.equal(Run.open(folder)[0][V0], content()[V0])


def test_what_is_missing_is_said_with_what_there_is(legacy: Path, tmp_path: Path) -> None:
    run = Run.open(legacy)
    with pytest.raises(Missing, match=r"tiny-1 has no step 7 \(there are: 0, 1000, 2000\)"):
        run[7]
    with pytest.raises(
        Missing, match=r"did you mean 'activations/train/layers.0.attention.v_proj'\? \(activations/train is"
    ):
        run[0][V0._replace(module="layers.0.attention.vproj")]
    with pytest.raises(
        Missing, match=r"no gradients/test/x \(it holds: activations/train, activations/val, grad.*, weights\)"
    ):
        run[0].digest(Address("gradients", "test", "x"))
    with pytest.raises(Missing, match=r"step_0 has no rows of 'test'"):
        run[0].rows("test")
    with pytest.raises(Missing, match=r"step_0 has no file 'tokenizer.json'"):
        run[0].read("tokenizer.json")
    write_run(tmp_path / "bare", [0])
    assert Run.open(tmp_path / "bare")[0].rows_digest("train") is None


def test_a_step_without_captures_has_its_weights(legacy: Path) -> None:
    shutil.rmtree(legacy / "checkpoints/step_2000/learning_dynamics")
    checkpoint = Run.open(legacy)[2000]
    assert {address.kind for address in checkpoint} == {"weights"}
    assert V0 not in checkpoint


def test_an_empty_run_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/step_0").mkdir(parents=True)
    (tmp_path / "training_config.yaml").write_text("model: {}\n")
    with pytest.raises(StoreError, match=r"no run here .* or a run of pico-train"):
        Run.open(tmp_path)


class Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_with_code_is_refused_and_not_run(legacy: Path, tmp_path: Path, old_format: bool) -> None:
    file = legacy / "checkpoints/step_0/learning_dynamics/train_activations.pt"
    torch.save({"layers.0.attention.v_proj": Code()}, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(
        StoreError, match=r"train_activations.pt: holds code, not only tensors .*posix.system.*; it is not load"
    ):
        Run.open(legacy)[0][V0]
    assert not Path("executed").exists()
    assert not (tmp_path / "executed").exists()
    assert torch.equal(Run.open(legacy)[1000][V0], content(1000)[V0])


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_named(legacy: Path, kept: float) -> None:
    for name in (
        "learning_dynamics/train_activations.pt",
        "model.safetensors",
        "learning_dynamics/val_data/data-00000-of-00002.arrow",
    ):
        file = legacy / "checkpoints/step_0" / name
        os.truncate(file, int(file.stat().st_size * kept))
    checkpoint = Run.open(legacy)[0]
    with pytest.raises(StoreError, match=r"train_activations.pt: damaged"):
        checkpoint[V0]
    with pytest.raises(StoreError, match=r"model.safetensors: damaged, or not a safetensors file"):
        checkpoint[Address("weights", "", "embedding_proj")]
    with pytest.raises(StoreError, match=r"data-00000-of-00002.arrow: (damaged|ends too early)"):
        checkpoint.rows("val")
    assert len(checkpoint.verify()) == 3


def test_rows_with_two_columns_of_one_name_are_refused(legacy: Path) -> None:
    file = legacy / "checkpoints/step_0/learning_dynamics/train_data/data-00000-of-00002.arrow"
    table = pa.ipc.open_stream(file.read_bytes()).read_all()
    twice = table.append_column("input_ids", table.column("input_ids"))
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(StoreError, match=r"arrow: has more than one column 'input_ids'; write it again"):
        Run.open(legacy)[0].rows_digest("train")


def test_rows_cut_between_two_batches_are_noticed(legacy: Path) -> None:
    file = legacy / "checkpoints/step_0/learning_dynamics/train_data/data-00000-of-00002.arrow"
    os.truncate(file, file.stat().st_size - 8)  # without the mark at its end, a stream reads as whole
    with pytest.raises(StoreError, match=r"arrow: ends too early; fetch or copy it again"):
        Run.open(legacy)[0].rows_digest("train")
    file.unlink()
    with pytest.raises(StoreError, match=r"data-00000-of-00002.arrow: missing, though the data set beside it lists it"):
        Run.open(legacy)[0].rows_digest("train")


def test_a_flipped_bit_is_noticed(legacy: Path) -> None:
    file = legacy / "checkpoints/step_0/learning_dynamics/train_activations.pt"
    data = bytearray(file.read_bytes())
    start = data.find(scrambled(content()[V0], 8).view(torch.uint8).numpy().tobytes())
    data[start + 100] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"train_activations.pt: damaged: the checksum of its part .* does not hold"):
        Run.open(legacy)[0][V0]
    assert len(Run.open(legacy).problems(0)) == 1


@pytest.mark.parametrize(
    ("stored", "found"),
    [
        ([torch.zeros(1)], "holds list, where a mapping from names to tensors was expected"),
        ({"layers.0.x": 3}, "holds 'layers.0.x', where a mapping"),
        ({1: torch.zeros(1)}, "holds 1, where a mapping"),
        (
            {"layers.0.x": torch.zeros(1), "module.layers.0.x": torch.zeros(1)},
            "'layers.0.x' and 'module.layers.0.x' are both",
        ),
    ],
)
def test_other_content_is_named(legacy: Path, stored: Any, found: str) -> None:
    torch.save(stored, legacy / "checkpoints/step_0/learning_dynamics/train_activations.pt")
    with pytest.raises(StoreError, match=f"train_activations.pt: {found}"):
        Run.open(legacy)[0][V0]


def test_files_of_old_versions_of_torch_are_read(legacy: Path) -> None:
    tensor = content()[Address("gradients", "train", V0.module)]
    file = legacy / "checkpoints/step_0/learning_dynamics/train_gradients.pt"
    torch.save({"layers.0.attention.v_proj": tensor}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(Run.open(legacy)[0][Address("gradients", "train", V0.module)], tensor)


def test_rows_without_a_list_of_files_are_all_of_the_folder(tmp_path: Path) -> None:
    folder = write_step(tmp_path / "checkpoints/step_0", content())
    write_rows(folder / "learning_dynamics/train_data", IDS)
    for name in ("state.json", "cache-0a1b.arrow"):
        (folder / "learning_dynamics/train_data" / name).unlink()
    assert Run.open(tmp_path)[0].rows("train")["input_ids"].to_pylist() == IDS.tolist()


def test_it_is_read_and_never_written(legacy: Path) -> None:
    run = Run.open(legacy)
    before = sorted(legacy.rglob("*"))
    with pytest.raises(StoreError, match="written by pico-train; it can be read and analyzed, not added to"):
        run.commit(5, {}, meta={})
    with pytest.raises(StoreError, match="written by pico-train"):
        run.thin(0, {"gradients"})
    assert sorted(legacy.rglob("*")) == before


def test_fetching_ahead_costs_nothing_on_disk(legacy: Path, opened_files: list[str]) -> None:
    run = Run.open(legacy)
    run.prefetch([0, 1000], [V0], rows=["train"], progress=lambda done, total: pytest.fail("nothing is fetched"))
    assert opened_files == []


def test_it_travels_to_another_process(legacy: Path) -> None:
    run = Run.open(legacy)
    checkpoint = run[0]
    tensor = checkpoint[V0]
    assert torch.equal(pickle.loads(pickle.dumps(run))[0][V0], tensor)
    assert len(pickle.dumps(checkpoint)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint))[V0], tensor)


def test_it_is_listed_and_verified(legacy: Path) -> None:
    run = Run.open(legacy)
    entries = contents(run)
    assert [entry.step for entry in entries] == [0, 1000, 2000]
    on_disk = sum(file.stat().st_size for file in (legacy / "checkpoints/step_0").rglob("*") if file.is_file())
    assert entries[0].total_bytes == on_disk
    assert set(entries[0].bytes) == {"weights", "activations", "gradients", "optimizer", "data", "other"}
    assert entries[0].overhead is None
    assert [run.problems(step) for step in run] == [[], [], []]
    assert run[0].meta == {"step": 0, "capture": {"positions": [-1], "val_positions": [-1]}}
    assert run[0].read("config.json") == b'{"model_type": "pico_decoder"}'
    (legacy / "eval_results").mkdir()
    (legacy / "eval_results/step_0.json").write_text('{"paloma": 51.5}')
    assert run.evaluation(0) == {"paloma": 51.5}
