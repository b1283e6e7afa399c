"""Observed tensors in an analysis and as a run of their own: the same bytes every time, kept within bounds, computed once."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from tests.commands import Pico, command
from tests.readers.conftest import make

from picolm.address import Address
from picolm.analyze.command import analyze_runs
from picolm.analyze.table import load
from picolm.cli import main
from picolm.document import ConfigError
from picolm.errors import PicoError
from picolm.observe import observed
from picolm.observe.command import observe_steps
from picolm.observe.config import Observe
from picolm.store import Run

Analyze = Callable[..., tuple[object, pd.DataFrame]]
METRICS = """
metrics:
- metric_name: cka
  target: {checkpoint: last}
  components: [{component_name: mlp, data_type: activations}, {component_name: ov_circuit, data_type: activations}]
- metric_name: norm
  norm_type: frobenius
  components: [{data_type: gradients}, {component_name: per_head, data_type: gradients}]
"""
HELD_OUT = "observe: {rows: val, positions: all}" + METRICS


@pytest.fixture
def pico(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pico:
    return command(monkeypatch, capsys)


@pytest.fixture
def analyze(runs: dict[str, Path], tmp_path: Path) -> Analyze:
    """A function from YAML and names of runs to (outcome, table); each call in a folder of its own."""
    calls = iter(range(100))

    def run(text: str, *names: str, **options: object) -> tuple[object, pd.DataFrame]:
        folder = tmp_path / f"call-{next(calls)}"
        (tmp_path / "analysis.yaml").write_text(f"{text}\nmonitoring: {{output_dir: {folder}}}\n")
        places = [str(runs.get(name, name)) for name in names]
        outcome = analyze_runs(tmp_path / "analysis.yaml", [], places, **options)  # type: ignore[arg-type]
        return outcome, load(folder / "analysis")

    return run


def kept(cache: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in cache.glob("*.safetensors")}


@pytest.mark.slow
def test_one_and_three_workers_give_the_same_bytes(analyze: Analyze, cache: Path) -> None:
    _, alone = analyze(HELD_OUT, "narrow", "wide")
    first = kept(cache)
    assert len(first) == 8
    shutil.rmtree(cache)
    _, together = analyze(HELD_OUT, "narrow", "wide", workers=3)
    assert kept(cache) == first
    pd.testing.assert_frame_equal(alone, together)
    assert alone.value.notna().all()
    assert set(alone.split) == {"val"}


@pytest.mark.slow
def test_what_was_captured_and_what_is_observed_are_measured_alike(analyze: Analyze) -> None:
    asked = "observe: {rows: val, positions: [3, 9, 15], modules: [v_proj, o_proj, w_2]}" + METRICS
    stored = METRICS.replace("norm_type: frobenius", "norm_type: frobenius\n  data_split: val")
    _, observed_values = analyze(asked, "narrow")
    _, stored_values = analyze(stored, "narrow")
    order = ["component", "kind", "module", "head", "step"]
    one, other = (
        table[table.component != "simple"].sort_values(order).reset_index(drop=True)
        for table in (observed_values, stored_values)
    )
    pd.testing.assert_frame_equal(one, other)
    assert len(one) > 50


@pytest.mark.slow
def test_a_step_is_observed_once(analyze: Analyze, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from picolm.observe.subject import Subject

    asked: list[int] = []
    tensors = Subject.tensors
    monkeypatch.setattr(
        Subject, "tensors", lambda self, *words: asked.append(self.checkpoint.step) or tensors(self, *words)
    )  # type: ignore[func-returns-value]
    analyze(HELD_OUT, "narrow")
    assert sorted(asked) == [0, 2, 4, 6]
    analyze(HELD_OUT, "narrow")
    assert len(asked) == 4
    file = max(cache.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    analyze(HELD_OUT, "narrow")
    assert len(asked) == 5
    assert file.read_bytes() != bytes(content)


@pytest.mark.slow
def test_what_is_kept_is_bounded(analyze: Analyze, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = analyze(HELD_OUT, "narrow")
    size = max(file.stat().st_size for file in cache.glob("*.safetensors"))
    shutil.rmtree(cache)
    monkeypatch.setattr(observed, "MOST_BYTES", 2 * size)
    _, found = analyze(HELD_OUT, "narrow")
    pd.testing.assert_frame_equal(found, expected)
    assert len(kept(cache)) <= 2
    assert len(list(cache.glob("*.json"))) == len(kept(cache))


@pytest.mark.slow
def test_a_dry_run_computes_nothing(
    runs: dict[str, Path], tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.yaml").write_text(HELD_OUT)
    analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])], dry_run=True)
    assert "step_6: observed with its weights" in capsys.readouterr().out
    assert not cache.exists()


def test_what_an_analysis_cannot_observe_is_a_message(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("observe: {what: [patterns, logits]}" + METRICS)
    with pytest.raises(
        ConfigError, match="an analysis measures activations and gradients; `pico observe` writes logits, patterns"
    ):
        analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])])


@pytest.mark.slow
def test_runs_on_different_rows_are_not_compared(
    runs: dict[str, Path], save: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a series and a run of ours with tokenizers that differ there are no common token ids, but ids are ids."""
    place = save(make("llama", vocab_size=64), "step7")
    import numpy as np

    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 64, (6, 10)))
    asked = Observe(rows=str(tmp_path / "ids.npy"), positions="all")
    found = observed.observers(asked, {"a": Run.open(place), "b": Run.open(runs["narrow"])})
    assert found["a"].rows.identity == found["b"].rows.identity


@pytest.mark.slow
def test_observed_tensors_are_a_run(pico: Pico, runs: dict[str, Path], tmp_path: Path) -> None:
    what = "activations,gradients,patterns,logits,scores"
    words = ("observe", str(runs["narrow"]), "--what", what, "--positions", "all", "--out", str(tmp_path / "seen"))
    pico(*words, "--steps", "2,4")
    said = pico(*words)  # goes on with the other steps
    assert f"4 steps of {runs['narrow']}" in said
    assert "every digest holds" in pico("verify", str(tmp_path / "seen"))
    run, seen = Run.open(runs["narrow"]), Run.open(tmp_path / "seen")
    assert seen.steps == [0, 2, 4, 6]
    stored = run[4][Address("activations", "val", "layers.1.swiglu.w_2")]
    assert torch.equal(seen[4][Address("activations", "val", "layers.1.swiglu.w_2")][:, [3, 9, 15]], stored)
    gradient = Address("gradients", "val", "layers.1.swiglu.w_2")
    assert torch.equal(seen[4][gradient], run[4][gradient])
    assert seen[4].rows_digest("val") == run[4].rows_digest("val")
    logits_RTV = seen[4][Address("logits", "val", "de_embedding_proj")]
    scores_RT = seen[4][Address("scores", "val", "de_embedding_proj")]
    ids = torch.tensor(seen[4].rows("val")["input_ids"].to_pylist())
    torch.testing.assert_close(
        -logits_RTV.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0], scores_RT, rtol=1e-5, atol=1e-5
    )
    assert seen[4][Address("patterns", "val", "layers.1.attention")].shape == (len(ids), 4, 16, 16)
    (tmp_path / "a.yaml").write_text(
        "metrics: [{metric_name: cka, target: {checkpoint: last}, components: [{component_name: mlp, data_type: activations}]}]"
    )
    assert "cka" in pico(
        "analyze", str(tmp_path / "a.yaml"), "--run", str(tmp_path / "seen"), f"monitoring.output_dir={tmp_path}/out"
    )
    with pytest.raises(AssertionError, match="holds another run, or what was observed otherwise"):
        pico("observe", str(runs["narrow"]), "--out", str(tmp_path / "seen"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", ["--steps 2,3", "--prompt x", "--modules nothing", "--positions 99", "--batch-size 0"]
)
def test_nothing_is_written_where_nothing_can_be_observed(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    command = ["pico", "observe", str(runs["narrow"]), "--out", str(tmp_path / "seen"), *words.split()]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (1, 2)
    assert not (tmp_path / "seen").exists()


@pytest.mark.slow
def test_a_step_without_weights_has_nothing_to_observe(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["narrow"], tmp_path / "narrow")
    run = Run.open(tmp_path / "narrow")
    run.thin(2, {"weights"})
    observer = observed.observers(Observe(), {"narrow": run})["narrow"]
    assert not observer.at(run[2]).observed
    assert observer.at(run[4]).observed
    with pytest.raises(PicoError, match=r"step_2 was saved without weights \(there are weights of steps: 0, 4, 6\)"):
        list(observe_steps(run, [2], Observe(), tmp_path / "seen"))
    assert not (tmp_path / "seen").exists()
    for step in (0, 4, 6):
        run.thin(step, {"weights"})
    with pytest.raises(PicoError, match="no step has weights"):
        observed.observers(Observe(), {"narrow": run})


@pytest.mark.slow
def test_an_unknown_architecture_is_observed_by_the_names_of_its_modules(save: Callable[..., Path]) -> None:
    """Of one whose parts are described in series.yaml, those that are described are taken where none is named."""
    from picolm.readers.families import FAMILIES

    known = FAMILIES.pop("mistral")
    try:
        place = save(make("mistral"), "step7")
        run = Run.open(place)
        with pytest.raises(PicoError, match="it is not known what the parts of this model are called; name modules"):
            observed.observers(Observe(rows=ids(place)), {"a": run})
        found = observed.observers(Observe(rows=ids(place), modules=("down_proj",)), {"a": run})["a"]
        assert {address.suffix for address in found.addresses} == {"mlp.down_proj"}
        part = "{module: self_attn.v_proj, cut: kv_heads}"
        (place / "series.yaml").write_text(
            f"anatomy: {{block: 'model.layers.{{}}', parts: {{attention.value: {part}}}}}\n"
        )
        found = observed.observers(Observe(rows=ids(place)), {"a": Run.open(place)})["a"]
        assert {address.suffix for address in found.addresses} == {"self_attn.v_proj"}
    finally:
        FAMILIES["mistral"] = known


def ids(folder: Path) -> str:
    import numpy as np

    np.save(folder / "ids.npy", np.arange(12).reshape(2, 6))
    return str(folder / "ids.npy")
