"""`pico evaluate` and evaluations while training say the same, and no result is lost to another."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fox import TEXT

from picolm.cli import app
from picolm.data.tokenizer import load_tokenizer, train_tokenizer, write_tokenizer
from picolm.errors import DataError, PicoError
from picolm.formats import export
from picolm.formats.importing import import_model
from picolm.store import Run
from picolm.store.checkpoint import stored_weights_digest
from picolm.train.afterwards import _rows, evaluate_steps
from picolm.train.history import stored_with
from picolm.train.sample import load_model


@pytest.fixture
def reading(tmp_path: Path) -> list[str]:
    """Overrides of the toy configuration that make it a model of text, and pairs of sentences to ask it for."""
    folder = tmp_path / "text"
    folder.mkdir()
    write_tokenizer(train_tokenizer([TEXT], 300), folder, 16)
    tokens = np.array((load_tokenizer(folder).encode(TEXT).ids * 9)[: 17 * 120], dtype=np.int32).reshape(120, 17)
    for split, rows in (("train", tokens), ("val", tokens[::10])):
        pq.write_table(pa.table({"input_ids": list(rows)}), folder / f"{split}-00000-of-00001.parquet")
    pairs = [{"sentence_good": f"The {a}", "sentence_bad": f"{a} The", "UID": "order"} for a in ("dog", "fox", "cold")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return [f"data.dataset.name={folder}", "model.vocab_size=320", "data.tokenizer.vocab_size=300"]


def pico(*words: str) -> None:
    app(list(words), standalone_mode=False)


@pytest.mark.slow
def test_pairs_are_counted_while_training_and_change_nothing_of_it(
    train: Callable[..., Run], reading: list[str], tmp_path: Path
) -> None:
    plain = train(*reading)
    asked = ["evaluation.metrics=[paloma,minimal_pairs]", f"evaluation.minimal_pairs.path={tmp_path}/pairs.jsonl"]
    run = train(*reading, *asked, "checkpointing.run_name=asked")
    assert stored_weights_digest(run[6]) == stored_weights_digest(plain[6])
    logged = {entry["step"]: entry for entry in run.metrics() if "val/minimal_pairs" in entry}
    assert list(logged) == [0, 2, 4, 6]
    for step, entry in logged.items():
        results = run.evaluation(step)
        assert results is not None
        assert set(results) >= {"paloma", "paloma/bits_per_byte", "minimal_pairs", "minimal_pairs/order"}
        assert {name: entry[f"val/{name}"] for name in results} == results
        assert results["minimal_pairs/order"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)


@pytest.mark.slow
def test_afterwards_gives_what_training_gave_and_keeps_what_was_there(
    train: Callable[..., Run], reading: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*reading)
    then = {step: run.evaluation(step) for step in run.steps}
    pico("evaluate", str(run.path), "--pairs", f"{tmp_path}/pairs.jsonl", "--steps", "2,6")
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["evaluation", "step", "2", "step", "6"]
    assert next(line.split() for line in said if line.split()[:1] == ["minimal_pairs"])[1:] == [
        f"{run.evaluation(step)['minimal_pairs']:.6g}"
        for step in (2, 6)  # type: ignore[index]
    ]
    assert run.evaluation(0) == then[0]
    found = run.evaluation(6)
    assert found is not None and found.keys() - then[6].keys() == {"minimal_pairs", "minimal_pairs/order"}  # type: ignore[union-attr]  # noqa: PT018
    pico("evaluate", str(run.path), "--metrics", "paloma")
    for step in run.steps:
        again = run.evaluation(step)
        assert again is not None
        assert {name: again[name] for name in then[step]} == pytest.approx(then[step], rel=1e-6)  # type: ignore[union-attr]
    assert "minimal_pairs" in run.evaluation(6)  # type: ignore[operator]


@pytest.mark.slow
def test_afterwards_in_the_precision_of_the_run(train: Callable[..., Run], reading: list[str]) -> None:
    """The results of one curve are comparable: in float32 those of a run in bfloat16 would be shifted."""
    run = train(*reading, "training.fabric.precision=bf16-mixed")
    then = {step: run.evaluation(step) for step in run.steps}
    pico("evaluate", str(run.path), "--metrics", "paloma")
    assert {step: run.evaluation(step) for step in run.steps} == then


@pytest.mark.slow
def test_a_continued_run_keeps_results_of_its_first_step_alone(
    train: Callable[..., Run], reading: list[str], tmp_path: Path
) -> None:
    run = train(*reading)
    pico("evaluate", str(run.path), "--pairs", f"{tmp_path}/pairs.jsonl")
    (run.path / "checkpoints" / "step_6" / "manifest.json").write_bytes(b"")  # so that it goes on from step 4
    run = train(*reading)
    assert ["minimal_pairs" in (run.evaluation(step) or {}) for step in (2, 4, 6)] == [True, True, False]


def test_other_keys_and_nothing_to_do_are_refused(train: Callable[..., Run], reading: list[str]) -> None:
    run = train(*reading, "evaluation.metrics=[]", "training.max_steps=0")
    with pytest.raises(PicoError, match="nothing to evaluate: name evaluations with --metrics, --tasks or --pairs"):
        pico("evaluate", str(run.path))
    with pytest.raises(PicoError, match=r"model.d_model=12: evaluating changes nothing of a run"):
        pico("evaluate", str(run.path), "model.d_model=12", "--metrics", "paloma")
    with pytest.raises(PicoError, match="--tasks says which of them to run"):
        pico("evaluate", str(run.path), "--include-path", "tasks")
    with pytest.raises(PicoError, match=r"has no step 3 \(there are: 0\)"):
        pico("evaluate", str(run.path), "--metrics", "paloma", "--steps", "3")


def test_without_the_package_the_command_to_install_it_is_named(
    train: Callable[..., Run], reading: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    run = train(*reading, "training.max_steps=0")
    monkeypatch.delitem(sys.modules, "picolm.train.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(PicoError, match=r"lm_eval needs: pip install 'picolm\[lm_eval\]'"):
        pico("evaluate", str(run.path), "--tasks", "blimp")


@pytest.mark.slow
def test_lm_eval_runs_while_training_and_afterwards_with_the_same_numbers(
    train: Callable[..., Run], reading: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval", reason="needs: pip install 'picolm[lm_eval]'")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("The dog", "fox")))
    (tmp_path / "task.yaml").write_text(f"""
task: fox_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/documents.jsonl}}, cache_dir: {tmp_path}/cache}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""")
    asked: list[Any] = [
        "evaluation.metrics=[paloma,lm_eval]",
        "evaluation.lm_eval.tasks=[fox_texts]",
        f"evaluation.lm_eval.include_path={tmp_path}",
    ]
    plain, run = train(*reading), train(*reading, *asked, "checkpointing.run_name=asked")
    assert stored_weights_digest(run[6]) == stored_weights_digest(plain[6])
    pico("evaluate", str(plain.path), "--tasks", "fox_texts", "--include-path", str(tmp_path))
    for step in (0, 2, 4, 6):
        during, after = run.evaluation(step), plain.evaluation(step)
        assert during is not None
        assert "lm_eval/fox_texts/bits_per_byte" in during
        assert after == pytest.approx(during, rel=1e-6)
    assert [entry["step"] for entry in run.metrics() if "val/lm_eval/fox_texts/bits_per_byte" in entry] == [0, 2, 4, 6]


@pytest.fixture
def another_tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "another"
    folder.mkdir()
    write_tokenizer(train_tokenizer(["completely other words " * 9], 290), folder, 16)
    return folder


def prepared(tmp_path: Path, name: str, **options: Any) -> Path:
    from picolm.data.prepare import prepare

    (tmp_path / "texts").mkdir(exist_ok=True)
    for number in range(40):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"{number} {TEXT}")
    options = {"vocab_size": 300, "seq_len": 16, "val_fraction": 0.2} | options
    prepare([tmp_path / "texts"], tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.slow
def test_a_tokenizer_that_is_not_that_of_the_rows_is_refused_with_both_digests(
    train: Callable[..., Run], tmp_path: Path, another_tokenizer: Path
) -> None:
    rows = prepared(tmp_path, "rows")
    words = [f"data.dataset.name={rows}", "model.vocab_size=320", "data.tokenizer.vocab_size=300"]
    digests = [
        hashlib.sha256((place / "tokenizer.json").read_bytes()).hexdigest() for place in (rows, another_tokenizer)
    ]
    with pytest.raises(
        DataError, match=f"rows: .*sha-256 {digests[0]}.* than data.tokenizer.name .*{digests[1]}.* auto"
    ):
        train(*words, f"data.tokenizer.name={another_tokenizer}")
    renamed = tmp_path / "renamed.json"  # the same one, written in another way
    renamed.write_text(json.dumps(json.loads((rows / "tokenizer.json").read_text())))
    run = train(*words, f"data.tokenizer.name={renamed}")

    other = prepared(tmp_path, "other", tokenizer=another_tokenizer)
    for key in ("checkpointing.learning_dynamics.eval_data", "evaluation.paloma.dataset_name"):
        with pytest.raises(DataError, match=f"other: its rows .*{digests[1]}.* than those of .*rows .*{digests[0]}"):
            train(*words, f"{key}={other}", "checkpointing.run_name=held", "evaluation.metrics=[paloma]")
    with pytest.raises(DataError, match=f"other: its rows .*{digests[1]}.* than the run .*sha-256 "):
        pico("evaluate", str(run.path), "--metrics", "paloma", "--steps", "6", f"data.dataset.name={other}")


def test_a_held_out_shard_that_is_cut_is_an_error(
    train: Callable[..., Run], reading: list[str], tmp_path: Path
) -> None:
    shard = tmp_path / "text" / "val-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"val-00000-of-00001.parquet: cannot be read as parquet"):
        train(*reading)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_files_beside_a_tokenizer_that_are_links_do_not_get_into_a_checkpoint(
    train: Callable[..., Run], reading: list[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text('{"key": "secret"}')
    (tmp_path / "text" / name).unlink(missing_ok=True)
    (tmp_path / "text" / name).symlink_to(tmp_path / "secret")
    with pytest.raises(PicoError, match=f"{name}: is a link"):
        train(*reading)


def test_imported_weights_in_float64_are_evaluated_unrounded(train: Callable[..., Run], tmp_path: Path) -> None:
    """The precision of an imported run is not known: what its weights are stored in is."""
    run = train("training.max_steps=2")
    export(run, 2, "llama", tmp_path / "llama")
    file = tmp_path / "llama" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: tensor.double() + 1e-9 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, {"format": "pt"})
    imported, step = import_model(str(tmp_path / "llama"), tmp_path / "imported", None)
    data = run.config["data"]["dataset"]["name"]
    words = [f"data.dataset.name={data}", "evaluation.metrics=[paloma]"]
    ((_, results),) = evaluate_steps(imported, [step], words)
    rows = _rows(stored_with(imported, words), imported, [step])
    assert rows is not None
    with torch.no_grad():
        ln_p = load_model(imported, step)(rows.tokens_RS[:, :-1]).log_softmax(-1)
    assert ln_p.dtype == torch.float64
    exact = -ln_p.gather(-1, rows.tokens_RS[:, 1:, None].long()).mean().item()
    assert results["paloma/nats_per_token"] == pytest.approx(exact, rel=1e-12)
