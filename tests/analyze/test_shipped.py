"""The analyses that are shipped run: those in configs/analyses, and the examples."""

from pathlib import Path

import pytest

from picolm.address import Address
from picolm.analyze.command import analyze_runs
from picolm.analyze.table import load
from picolm.cli import main
from picolm.store import Run

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "configs" / "analyses").glob("*.yaml")), *sorted((ROOT / "examples").glob("*.yaml"))]


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_analysis_runs(
    file: Path, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    outcome = analyze_runs(file, [f"monitoring.output_dir={tmp_path}"], [str(runs["narrow"])])
    assert outcome is not None
    assert not outcome.absent
    frame = load(next(tmp_path.glob("*/results.parquet")))
    assert set(frame["step"]) == {0, 2, 4, 6}
    assert set(frame["layer"].dropna()) == {0, 1}
    lacking = frame[frame["value"].isna()]
    assert (lacking["reason"] != "").all()
    assert len(lacking) < 0.05 * len(frame)  # step 0 has seen no rows


def test_the_component_of_the_example(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "a.yaml").write_text(
        "metrics: [{metric_name: norm, norm_type: inf, components: [{component_name: 'examples.curvature:attention_update'}]}]\n"
        f"steps: [4]\nmonitoring: {{output_dir: {tmp_path}}}\n"
    )
    analyze_runs(tmp_path / "a.yaml", [], [str(runs["narrow"])])
    frame = load(tmp_path / "analysis")
    step = Run.open(runs["narrow"])[4]
    module = "layers.1.attention.o_proj"
    first, second = (step[Address(kind, "", module)].double() for kind in ("exp_avg", "exp_avg_sq"))
    assert frame["value"][1] == pytest.approx((first / (second.sqrt() + 1e-8)).abs().max().item(), rel=1e-5)


@pytest.mark.parametrize(("family", "word"), [("metrics", "condition_number"), ("components", "W_O[:, h] W_V[g]")])
def test_what_there_is_can_be_listed(
    family: str, word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["pico", "list", family])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert word in capsys.readouterr().out
