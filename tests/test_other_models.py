"""Models that are no causal decoder, as a user's own code beside the YAML: every command serves them as it serves ours."""

import math
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

import picolm.analyze
from picolm.cli import main
from picolm.registry import code_policy, set_code_policy
from picolm.store import Run
from picolm.store.checkpoint import stored_weights_digest

HERE = Path(__file__).parent
Pico = Callable[..., str]
YAML = """
data: {{dataset: {{name: rows}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 4096}}}}
model: {{model_type: "{model}", vocab_size: 4096, max_seq_len: 32}}
training:
  max_steps: 6
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{optimizer: {optimizer}, lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 2}}
checkpointing: {{run_name: whole, save_every_n_steps: 2, learning_dynamics: {{layer_suffixes: [{captured}], max_rows: 16}}}}
evaluation: {{paloma: {{max_rows: 12}}}}
monitoring: {{logging: {{log_every_n_steps: 1}}}}
"""
ANALYSIS = """
analysis_name: found
metrics:
  - {{metric_name: cka, target: {{checkpoint: last}}, components: [{{data_type: activations, layer_suffixes: {module}}}]}}
  - {{metric_name: per, components: [{{layer_suffixes: {module}}}, {{data_type: gradients, layer_suffixes: {module}}}]}}
  - {{metric_name: gini, components: [{parts}]}}
  - {{metric_name: cka, target: {{layer: all}}, components: [{{component_name: residual, data_type: activations}}]}}
"""


@pytest.fixture
def pico(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pico:
    """A function that runs a command in a folder with rows and the models, and returns all that it prints."""
    with tarfile.open(HERE / "golden" / "rows.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for file in (HERE / "elsewhere").glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    policy = code_policy()

    def run(*words: str, fails: bool = False) -> str:
        monkeypatch.setattr("sys.argv", ["pico", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert bool(ended.value.code) is fails, printed.err
        set_code_policy(policy)
        return printed.out + printed.err

    return run


def train(pico: Pico, model: str, optimizer: str, captured: str) -> Run:
    """A run of 6 steps, and beside it one that stopped at step 4 and was continued."""
    Path("config.yaml").write_text(YAML.format(model=model, optimizer=optimizer, captured=captured))
    pico("train", "config.yaml")
    pico(
        "train",
        "config.yaml",
        "checkpointing.run_name=stopped",
        "training.max_steps=4",
        "training.optimization.lr_scheduler=constant",
    )
    pico("train", "config.yaml", "checkpointing.run_name=straight", "training.optimization.lr_scheduler=constant")
    pico("train", "config.yaml", "checkpointing.run_name=stopped", "training.optimization.lr_scheduler=constant")
    run = Run.open("runs/whole")
    assert stored_weights_digest(Run.open("runs/stopped")[6]) == stored_weights_digest(Run.open("runs/straight")[6])
    assert "every digest holds" in pico("verify", "runs/whole")
    pico("replay", "runs/whole", "--step", "5", "--verify", "--trust-remote-code")
    losses = [entry["train/loss"] for entry in run.metrics() if "train/loss" in entry]
    assert losses[0] == pytest.approx(math.log(4096), rel=0.05)
    assert losses[-1] < losses[0]
    return run


def analyze(pico: Pico, module: str, *components: str) -> None:
    parts = ", ".join(f"{{component_name: {name}, layers: [0, 1]}}" for name in components)
    Path("analysis.yaml").write_text(ANALYSIS.format(module=module, parts=parts))
    assert "0 things were missing" in pico("analyze", "analysis.yaml", "--run", "runs/whole")
    table = picolm.analyze.load("analysis_results/found")
    assert table.value.notna().all()
    assert set(table.component) == {"simple", "residual", *components}
    assert set(table.layer.dropna()) == {0, 1}
    assert set(table.kind) == {"activations", "weights", "gradients"}
    assert (
        table[(table.metric == "cka") & (table.step == table.against_step) & (table.layer == table.against_layer)].value
        > 0.999
    ).all()


def observed_as_captured(pico: Pico, modules: str) -> None:
    """What is observed on the held-out rows is what was captured there, to the last bit, whatever the model predicts."""
    said = pico("observe", "runs/whole", "--steps", "4,6", "--what", "activations,gradients", "--modules", modules,
                "--out", "runs/seen", "--trust-remote-code")  # fmt: skip
    assert "2 steps of runs/whole" in said
    for step in (4, 6):
        captured, seen = Run.open("runs/whole")[step], Run.open("runs/seen")[step]
        stored = captured.select(split="val")
        assert set(stored) == set(seen)
        assert all(torch.equal(captured[address], seen[address]) for address in stored)


def evaluated(step: int) -> dict[str, float]:
    return Run.open("runs/whole").evaluation(step) or {}


@pytest.mark.slow
def test_a_masked_model_is_trained_analyzed_and_says_that_it_has_no_likelihood(pico: Pico) -> None:
    run = train(pico, "masked_lab:Bert", "adamw", "encoder.layer.0, encoder.layer.1, attention.output, mlp.output")
    entry = next(iter(run.metrics()))
    assert not {"train/perplexity", "train/bits_per_byte"} & set(entry)
    assert len(run[0].rows("train")["input_ids"][0]) == 32  # no target beyond the row
    assert math.isnan(evaluated(6)["paloma"])
    said = pico("evaluate", "runs/whole", "--steps", "6", "--trust-remote-code")
    assert "paloma has no value: the likelihood of a text cannot be computed" in said
    said = pico("batch", "runs/whole", "--step", "2", "--loss", "--trust-remote-code", fails=True)
    assert "the likelihood of a text cannot be computed" in said
    written = pico(
        "generate", "runs/whole", "--prompt", "The people of", "--max-new-tokens", "5", "--trust-remote-code"
    )
    assert written.startswith("The people of")
    observed_as_captured(pico, "encoder.layer.0,encoder.layer.1,attention.output,mlp.output")
    analyze(pico, "attention.output", "attention", "mlp", "embedding", "per_head", "ov_circuit", "qk_circuit")
    said = pico(
        "report", "runs/whole", "--analysis", "analysis_results/found", "--out", "report.html", "--trust-remote-code"
    )
    assert "The text of whole is left out: the likelihood of a text cannot be computed" in said
    assert "attention.dense" in Path("report.html").read_text()


@pytest.mark.slow
def test_a_recurrent_model_is_trained_evaluated_generated_from_and_analyzed(pico: Pico) -> None:
    run = train(pico, "recurrent_lab:Recurrent", "muon", "blocks.0, blocks.1, mlp.output")
    results = evaluated(6)
    assert results["paloma"] == pytest.approx(math.exp(results["paloma/nats_per_token"]))
    assert results["paloma/nats_per_token"] < evaluated(0)["paloma/nats_per_token"]
    pico("evaluate", "runs/whole", "--steps", "6", "--trust-remote-code")
    assert evaluated(6) == pytest.approx(results, rel=1e-6)
    pico("batch", "runs/whole", "--step", "2", "--loss", "--out", "batch.csv", "--trust-remote-code")
    assert len(pd.read_csv("batch.csv")) == 8 * 32
    written = pico(
        "generate", "runs/whole", "--prompt", "The people of", "--max-new-tokens", "5", "--trust-remote-code"
    )
    assert written.startswith("The people of")
    observed_as_captured(pico, "blocks.0,blocks.1,mlp.output")
    analyze(pico, "mlp.output", "mlp", "embedding")
    pico("report", "runs/whole", "--analysis", "analysis_results/found", "--out", "report.html", "--trust-remote-code")
    assert "What the model read at a step" in Path("report.html").read_text()
    assert run[6].select(kind="momentum_buffer")


def test_a_state_that_is_carried_gives_the_tokens_of_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE / "elsewhere")
    from recurrent_lab import Recurrent, RecurrentConfig

    model = Recurrent(RecurrentConfig())
    model.init_parameters(torch.Generator().manual_seed(0))
    prompt = torch.tensor([[1, 2, 3]])
    carried, again = (model.generate(prompt, 9, temperature=1.0, use_cache=cached,
                                     generator=torch.Generator().manual_seed(1)) for cached in (True, False))  # fmt: skip
    assert torch.equal(carried, again)
