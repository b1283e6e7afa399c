"""What a released version wrote stays readable, and goes on as that version would have gone on.

released/VERSION.tar.xz holds prepared rows, a run of 8 steps on them with its optimizer state, its analysis, and in
expected.json what the same version gives when it trains to step 12. The file was made once, by that version.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import Pico, command

from picolm.document import parse_yaml
from picolm.schema import declared_keys, flatten, plain
from picolm.train.config import TrainConfig

RELEASES = sorted((Path(__file__).parent / "released").glob("*.tar.xz"))


@pytest.fixture(params=RELEASES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def pico(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Pico:
    """A function that runs a command in the folder of a released version, and returns what it prints."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return command(monkeypatch, capsys)


def expected() -> dict[str, Any]:
    return dict(json.loads(Path("expected.json").read_text()))


def same_arithmetic() -> bool:
    """Whether this machine computes the bits of the one that wrote the file."""
    return expected()["cpu_capability"] == [torch.backends.cpu.get_cpu_capability(), torch.__version__]


def logged(run: str) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, Path("runs", run, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def check_course(lines: dict[int, dict[str, Any]], first: int) -> None:
    wanted = expected()
    for step, loss in wanted["train_loss"].items():
        if int(step) > first:
            assert lines[int(step)]["train/loss"] == pytest.approx(loss, rel=1e-5)
    if same_arithmetic():
        ours = {str(step): line["weights_digest"] for step, line in lines.items() if step > first}
        assert ours == {step: digest for step, digest in wanted["weights_digest"].items() if int(step) > first}


@pytest.mark.slow
def test_a_run_is_listed_verified_and_reported(pico: Pico) -> None:
    firsts = [line.split()[0] for line in pico("list", "runs/old").splitlines() if line.strip()]
    assert [word for word in firsts if word.isdigit()] == ["0", "4", "8"]
    assert "every digest holds" in pico("verify", "runs/old")
    pico("report", "runs/old", "--analysis", "analysis_results/old", "--out", "report.html")
    assert "condition_number" in Path("report.html").read_text()


def test_keys_that_a_version_did_not_have_are_declared_as_newer(pico: Pico, request: pytest.FixtureRequest) -> None:
    version = request.node.callspec.params["pico"].name.removeprefix("v").removesuffix(".tar.xz")
    stored = flatten(parse_yaml(Path("runs/old/training_config.yaml").read_text(), "config"))
    missing = set(flatten(plain(TrainConfig()))) - set(stored)
    newer = {name for name, key in declared_keys(TrainConfig).items() if number(key.since) > number(version)}
    assert missing == newer


def number(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


@pytest.mark.slow
def test_a_run_goes_on_to_the_bytes_that_its_own_version_would_have_made(pico: Pico) -> None:
    pico("train", "config.yaml", "training.max_steps=12")
    check_course(logged("old"), first=8)
    found = json.loads(Path("runs/old/eval_results/step_12.json").read_text())
    for name, value in expected()["eval"].items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_a_run_is_replayed_and_forked(pico: Pico) -> None:
    if same_arithmetic():
        assert "Identical" in pico("replay", "runs/old", "--step", "7", "--verify")
    pico("fork", "runs/old", "--step", "4", "--run-name", "again")
    lines = logged("again")
    kept = logged("old")
    for step in range(5, 9):
        if same_arithmetic():
            assert lines[step]["weights_digest"] == kept[step]["weights_digest"]
    assert lines[8]["train/loss"] == pytest.approx(kept[8]["train/loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_is_analyzed_to_the_same_table(pico: Pico) -> None:
    import picolm.analyze

    old = picolm.analyze.load("analysis_results/old")
    Path("analysis_results/.values.sqlite").unlink()
    pico("analyze", "analysis.yaml", "--run", "runs/old", "analysis_name=new")
    new = picolm.analyze.load("analysis_results/new")
    key = ["step", "split", "component", "kind", "layer", "head", "module", "metric", "options", "against_step"]
    joined = old.merge(new, on=key, suffixes=("_old", "_new"))
    assert len(joined) == len(old) == len(new) > 100
    # 16 rows span at most 15 dimensions, as 16 columns do: every correlation is 1, which v0.1.0 took for a value of pwcca
    forced = joined.metric == "pwcca"
    assert joined[forced].value_new.isna().all()
    assert joined[forced].reason_new.str.contains("all that 16 centred rows can have").all()
    kept = joined[~forced]
    assert kept.value_new.to_numpy() == pytest.approx(kept.value_old.to_numpy(), rel=1e-6, nan_ok=True)


@pytest.mark.slow
def test_a_run_is_generated_from_exported_and_evaluated(pico: Pico) -> None:
    wanted = expected()["greedy"]
    text = pico(
        "generate", "runs/old", "--prompt", wanted["prompt"],
        "--temperature", "0", "--max-new-tokens", str(wanted["max_new_tokens"]),
    )  # fmt: skip
    assert text.strip() == wanted["text"]
    pico("export", "runs/old", "--out", "exported")
    assert Path("exported/model.safetensors").is_file()
    before = json.loads(Path("runs/old/eval_results/step_8.json").read_text())
    pico("evaluate", "runs/old", "--steps", "8")
    after = json.loads(Path("runs/old/eval_results/step_8.json").read_text())
    assert {name: after[name] for name in before} == pytest.approx(before, rel=1e-6)
