"""Folders of checkpoints as others leave them: which folder is which step, what is read of it, what is doubtful."""

import hashlib
import json
import math
import os
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from picolm.address import Address
from picolm.analyze import load
from picolm.cli import main
from picolm.errors import PicoError, StoreError
from picolm.readers.families import BIASES, NORM_AFTER, NORMED
from picolm.readers.series import step_of
from picolm.store import Run

ARCHIVE = Path(__file__).with_name("series.tar.xz")
NAMES = ("pythia-like", "crfm-like", "olmo2-like", "trainer-llama")


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """The folder of small real series of four architectures, each with a reference.json made by transformers and numpy."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def two(series: Path) -> Path:
    """A series of GPT-NeoX with the steps 0 and 200."""
    return series / "pythia-like"


def pico(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["pico", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


ANALYSIS = """
analysis_name: series
metrics:
- {metric_name: effective_rank, components: [{component_name: simple}]}
- metric_name: norm
  norm_type: frobenius
  components: [{component_name: simple}, {component_name: ov_circuit}, {component_name: qk_circuit}]
- {metric_name: norm, norm_type: nuclear, components: [{component_name: ov_circuit}]}
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_analysis_of_ordinary_yaml_gives_the_reference_values(
    name: str, series: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(series)
    Path("analysis.yaml").write_text(ANALYSIS)
    assert pico(monkeypatch, "analyze", "analysis.yaml", "--run", name) == 0
    table = load("analysis_results/series")
    reference = json.loads((series / name / "reference.json").read_text())
    compared = 0
    left_out = {
        "pythia-like": {"ov_circuit": [BIASES], "qk_circuit": [BIASES]},
        "crfm-like": {"ov_circuit": [BIASES], "qk_circuit": [BIASES]},
        "olmo2-like": {"ov_circuit": [NORM_AFTER], "qk_circuit": [NORMED]},
    }
    for component in ("simple", "ov_circuit", "qk_circuit"):
        notes = table[table.component == component].note.unique().tolist()
        assert notes == left_out.get(name, {}).get(component, [""])
    for step, expected in reference.items():
        rows = table[table.step == int(step)]
        for metric, key in (("effective_rank", "effective_rank"), ("norm", "weight_frobenius")):
            found = rows[(rows.metric == metric) & (rows.component == "simple")].set_index("module").value
            for parameter, value in expected[key].items():
                assert found[parameter.removesuffix(".weight")] == pytest.approx(value, rel=1e-10), parameter
                compared += 1
        for layer, heads in expected["heads"].items():
            for key, values in heads.items():
                circuit, kind = key.split("_")
                chosen = rows[(rows.component == f"{circuit}_circuit") & (rows.layer == int(layer))]
                chosen = chosen[chosen.options.str.contains(kind)].sort_values("head")
                assert chosen.value.tolist() == pytest.approx(values, rel=1e-10), (layer, key)
                compared += len(values)
    assert compared > 50 * len(reference)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step0", 0), ("step143000", 143_000), ("checkpoint-500", 500), ("step-0001000", 1000), ("ckpt_010", 10),
        ("stage1-step150-tokens1B", 150), ("stage2-ingredient3-step11931-tokens50B", 11_931), ("step-001000-2BT", 1000),
        ("TinyLlama-1.1B-intermediate-step-50K-105b", 50_000), ("step-480k-token-1007B", 480_000), ("128000", 128_000),
        ("global_step1000", 1000), ("iter-0200", 200), ("main", None), ("final", None), ("step", None),
        ("step1-checkpoint-2", None), ("stage1", None), ("v2", None), ("footstep12", None),
    ],
)  # fmt: skip
def test_the_step_is_in_the_name_of_the_folder(name: str, step: int | None) -> None:
    assert step_of(name) == step


def test_a_step_is_opened_as_its_series(two: Path) -> None:
    assert Run.open(two).steps == Run.open(two / "step0").steps == [0, 200]
    assert Run.open(two).name == "pythia-like"


def test_two_folders_of_one_step_are_an_error_that_says_what_to_write(two: Path) -> None:
    shutil.copytree(two / "step0", two / "stage2-step0")
    with pytest.raises(StoreError, match=r"stage2-step0 and step0 are both step 0; say in .*series.yaml which folder"):
        Run.open(two)
    (two / "series.yaml").write_text("steps: {step0: 0, step200: 200, stage2-step0: 201}\n")
    assert Run.open(two).steps == Run.open(two / "series.yaml").steps == [0, 200, 201]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: {../step0: 0}", "not a plain relative path"), ("steps: {nowhere: 0}", "nowhere holds no checkpoint"),
        ("steps: [step0]", "steps: should be a valid dictionary"), ("stages: {}", "stages: Extra inputs are not permitted"),
        ("steps: {step0: a}", "valid integer"), ("steps: {/etc: 0}", "not a plain relative path"),
        ("steps: {step0: -1}", "greater"),
        ("steps: {step0: 1, step200: 1}", "step0 and step200 are both step 1"),
    ],
)  # fmt: skip
def test_a_wrong_description_is_a_message(two: Path, text: str, words: str) -> None:
    (two / "series.yaml").write_text(text + "\n")
    with pytest.raises(PicoError, match=words):
        Run.open(two)


def test_a_folder_without_a_step_in_its_name_is_left_out_and_named(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(two / "step200", two / "main")
    assert Run.open(two).steps == [0, 200]
    assert "main has no step in its name and is left out" in caplog.text


def in_bin(folder: Path, **more: Any) -> dict[str, Any]:
    """Replace model.safetensors by a pickle, with more entries."""
    tensors: dict[str, Any] = dict(load_file(folder / "model.safetensors")) | more
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return tensors


def same_weights(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[address], other[address]) for address in one)


def test_pickled_weights_are_read_without_their_buffers(two: Path) -> None:
    before = dict(Run.open(two)[200].items())
    in_bin(two / "step200", **{
        "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2),
    })  # fmt: skip
    assert same_weights(before, Run.open(two)[200])


def test_shards_are_one_checkpoint(two: Path) -> None:
    folder = two / "step200"
    before = dict(Run.open(two)[200].items())
    tensors = load_file(folder / "model.safetensors")
    names: dict[str, str] = {}
    shards: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for number, (key, tensor) in enumerate(tensors.items()):
        names[key] = f"model-0000{number % 2 + 1}-of-00002.safetensors"
        shards[number % 2][key] = tensor
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-0000{number + 1}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "model.safetensors").unlink()
    checkpoint = Run.open(two)[200]
    assert same_weights(before, checkpoint)
    assert checkpoint.verify() == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    (problem,) = Run.open(two)[200].verify()
    assert problem.endswith("has no file 'model-00002-of-00002.safetensors'; it is half a checkpoint")


def test_half_a_checkpoint_is_named_and_the_others_are_read(two: Path) -> None:
    (two / "step200" / "model.safetensors").unlink()
    run = Run.open(two)
    assert len(run[0]) > 10
    assert "holds no weights (looked for model.safetensors" in run.problems(200)[0]


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("executed",))


def test_no_pickle_is_executed(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two)
    (two / "step0" / "training_args.bin").write_bytes(pickle.dumps(Boom()))
    in_bin(two / "step200", boom=Boom())
    run = Run.open(two)
    assert run.problems(0) == []
    assert "holds code, not only tensors" in run.problems(200)[0]
    assert not Path("executed").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_keep_their_element_type(two: Path, dtype: torch.dtype) -> None:
    file = two / "step200" / "model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(file).items()}, file)
    checkpoint = Run.open(two)[200]
    assert {tensor.dtype for tensor in checkpoint.values()} == {dtype}


def test_steps_with_the_weights_of_others_are_named(two: Path) -> None:
    """Of equal steps the last of the series counts as right, else the earliest."""
    shutil.copytree(two / "step0", two / "step1")
    shutil.copytree(two / "step200", two / "step150")
    run = Run.open(two)
    found = {step: run.problems(step) for step in run}
    assert {step for step, problems in found.items() if problems} == {1, 150}
    assert found[1][0].endswith("holds the weights of step 0, to the byte")
    assert found[150][0].endswith("holds the weights of step 200 (the last one), to the byte")


@pytest.mark.slow
def test_an_analysis_says_what_is_doubtful_before_its_first_number(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(two / "step200", two / "step150")
    monkeypatch.chdir(two.parent)
    Path("analysis.yaml").write_text("metrics: [{metric_name: norm, components: [{component_name: simple}]}]\n")
    assert pico(monkeypatch, "analyze", "analysis.yaml", "--run", "pythia-like") == 0
    printed = capsys.readouterr()
    assert "Doubtful: " in printed.err
    assert "step150: holds the weights of step 200 (the last one), to the byte." in printed.err
    notes = load("analysis_results/analysis").groupby("step").note.unique()
    assert [notes[step].tolist() for step in (0, 200)] == [[""], [""]]
    assert notes[150].tolist()[0].endswith("step150: holds the weights of step 200 (the last one), to the byte")
    assert pico(monkeypatch, "analyze", "analysis.yaml", "--run", "pythia-like", "steps=[0, 200]") == 0
    assert "Doubtful" not in capsys.readouterr().err


def test_a_step_that_mixes_two_is_named(series: Path) -> None:
    folder = series / "olmo2-like"
    last = next(path for path in folder.iterdir() if path.is_dir())
    other = shutil.copytree(last, folder / "stage1-step100-tokens51B")
    shards = sorted(other.glob("model-*.safetensors"))
    for shard in shards[1:]:
        save_file({key: tensor + 1 for key, tensor in load_file(shard).items()}, shard)
    run = Run.open(folder)
    assert run.problems(200) == []
    (problem,) = run.problems(100)
    assert (
        f"mixes two steps: {shards[0].name} of step 200 (the last one) with {len(shards) - 1} other file(s)" in problem
    )


def in_cache(series: Path, root: Path) -> Path:
    """The layout of huggingface_hub: refs name commits, whose snapshots are links to blobs named by their digests."""
    cache = root / "models--lab--pythia-like"
    (cache / "refs").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, step in enumerate(("step0", "step200")):
        snapshot = cache / "snapshots" / f"{number:040x}"
        snapshot.mkdir(parents=True)
        (cache / "refs" / step).write_text(snapshot.name)
        for file in (series / step).iterdir():
            data = file.read_bytes()
            blob = (
                cache
                / "blobs"
                / (
                    hashlib.sha256(data).hexdigest()
                    if file.suffix == ".safetensors"
                    else hashlib.sha1(data).hexdigest()
                )
            )
            blob.write_bytes(data)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    return cache


def test_the_cache_of_the_hub_is_read_as_it_lies(two: Path, tmp_path: Path) -> None:
    cache = in_cache(two, tmp_path / "hub")
    run, plain = Run.open(cache), Run.open(two)
    assert run.steps == [0, 200]
    assert all(same_weights(run[step], plain[step]) for step in run)
    assert [run[200].digest(address) for address in run[200]] == [plain[200].digest(address) for address in plain[200]]
    assert run.problems(0) == run.problems(200) == []


def test_a_link_in_the_cache_that_leads_out_of_it_is_not_followed(two: Path, tmp_path: Path) -> None:
    cache = in_cache(two, tmp_path / "hub")
    file = cache / "snapshots" / f"{1:040x}" / "model.safetensors"
    file.unlink()
    file.symlink_to(two / "step200" / "model.safetensors")
    with pytest.raises(StoreError, match="leads out of the cache"):
        len(Run.open(cache)[200])


def test_what_the_trainer_logged_are_the_metrics(series: Path) -> None:
    run = Run.open(series / "trainer-llama")
    lines = run.metrics()
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    assert lines[0]["train/loss"] == pytest.approx(5.986410522460938)
    assert {"grad_norm", "lr"} <= lines[0].keys()
    assert next(iter(run.read_metrics(("lr",)))) == {"step": 20, "lr": 0.00475}
    file = series / "trainer-llama/checkpoint-200/trainer_state.json"
    state = json.loads(file.read_text())
    state["log_history"] = [{"step": 1, "loss": "low", "lr": None, "eval_loss": float("nan"), "epoch": 2}]
    file.write_text(json.dumps(state))
    (line,) = Run.open(series / "trainer-llama").metrics()
    assert math.isnan(line.pop("trainer/eval_loss"))
    assert line == {"step": 1, "trainer/epoch": 2}  # what is no number is not a metric


def test_a_number_in_the_configuration_that_is_none_is_a_message(two: Path) -> None:
    file = two / "step200" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": "four"}))
    assert "num_attention_heads" in Run.open(two).problems(200)[0] or "heads" in Run.open(two).problems(200)[0]


def test_an_unknown_architecture_is_read_by_the_names_of_its_weights(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in ("step0", "step200"):
        file = two / step / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "somebodys"}))
    checkpoint = Run.open(two)[200]
    assert "architecture 'somebodys' is not known" in caplog.text
    assert f"say in {two}/series.yaml what its parts are called" in caplog.text
    assert Address("weights", "", "gpt_neox.layers.0.attention.query_key_value") in checkpoint
    assert Address("weights", "", "gpt_neox.layers.0.attention.query") not in checkpoint
    assert checkpoint.anatomy.heads == 4  # type: ignore[attr-defined]
    assert checkpoint.anatomy.parts == {}  # type: ignore[attr-defined]


OF_NEOX = """
anatomy:
  block: gpt_neox.layers.{}
  parts:
    attention.query: {module: attention.q, cut: heads}
    attention.key: {module: attention.k, cut: kv_heads}
    attention.value: {module: attention.v, cut: kv_heads}
    attention.output: {module: attention.dense, cut: heads, by: columns}
  fused: attention.query_key_value
  order: by head
"""


def test_an_architecture_is_described_in_a_few_lines(two: Path) -> None:
    known = dict(Run.open(two)[200])
    for step in ("step0", "step200"):
        file = two / step / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "somebodys"}))
    (two / "series.yaml").write_text(OF_NEOX)
    run = Run.open(two)
    assert run.steps == [0, 200]
    for part, short in (("query", "q"), ("key", "k"), ("value", "v")):
        theirs = Address("weights", "", f"gpt_neox.layers.1.attention.{short}")
        assert torch.equal(run[200][theirs], known[Address("weights", "", f"gpt_neox.layers.1.attention.{part}")])
    assert run[200].anatomy.module("attention.output") == "attention.dense"  # type: ignore[attr-defined]
    assert run[200].anatomy.kv_heads == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("layers.{}", "layers"), "anatomy.block is 'gpt_neox.layers'"),
        (("attention.key:", "attention.keys:"), "no attention.key"),
        (("cut: heads, by", "cut: lines, by"), "cut"), (("order: by head", "order: backwards"), "order"),
        (("  fused", "  used"), "used"),
    ],
)  # fmt: skip
def test_what_cannot_be_an_architecture_is_a_message(two: Path, change: tuple[str, str], words: str) -> None:
    (two / "series.yaml").write_text(OF_NEOX.replace(*change))
    with pytest.raises(PicoError, match=re.escape(words)):
        Run.open(two)


@pytest.mark.slow
def test_a_series_has_a_report(series: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(series)
    assert pico(monkeypatch, "report", "trainer-llama", "-o", "page.html") == 0
    page = Path("page.html").read_text()
    assert "llama of 3 layers, 32 dimensions, 4 heads, trained to step 200" in page
    assert "Differs from the default configuration" not in page
    assert "3.976" in page  # the last loss that the Trainer logged


def test_what_needs_its_code_says_who_has_it(
    two: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pico(monkeypatch, "export", str(two), "--out", "x") == 1
    assert (
        "is a gpt_neox of transformers, which Pico reads and does not run; AutoModelForCausalLM"
        in capsys.readouterr().err
    )


def test_tied_embeddings_of_an_anatomy_without_an_embedding_are_no_part(tmp_path: Path) -> None:
    folder = tmp_path / "series"
    (folder / "step7").mkdir(parents=True)
    save_file({"model.layers.0.mlp.down_proj.weight": torch.zeros(2, 3)}, folder / "step7" / "model.safetensors")
    (folder / "step7" / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    (folder / "series.yaml").write_text(
        "anatomy: {block: 'model.layers.{}', parts: {mlp.output: {module: mlp.down_proj}}}\n"
    )
    anatomy = Run.open(folder)[7].anatomy  # type: ignore[attr-defined]
    assert list(anatomy.parts) == ["mlp.output"]
