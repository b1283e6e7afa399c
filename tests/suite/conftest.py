"""Toy suites, trained in this process where the processes themselves are not what is tested."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ANALYSIS = """
analysis_name: both
metrics:
  - {metric_name: cka, target: {checkpoint: last}, components: [{component_name: mlp, data_type: activations}]}
  - {metric_name: per, components: [{component_name: mlp}]}
"""


@pytest.fixture
def toy_suite(make_config: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A function from lines of YAML to the file of a suite over the toy configuration; two sizes when nothing is given."""

    def write(text: str = "matrix: {size: {small: {model.d_model: 24}, wide: {model: {d_model: 32}}}}") -> Path:
        (tmp_path / "analysis.yaml").write_text(ANALYSIS)
        file = tmp_path / "suite.yaml"
        head = f"suite_name: toys\nbase: toy.yaml\noutput_dir: {tmp_path}/suites\nanalysis: analysis.yaml\n"
        file.write_text(head + text + "\n")
        return file

    return write


@pytest.fixture
def trained_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Members are trained in this process; the names of those that were, in order."""
    from picolm.suite import command
    from picolm.train import run_training

    names: list[str] = []

    def train(files: dict[str, Path], logs: Path, jobs: int) -> Any:
        from picolm.schema import load
        from picolm.train.config import schema_for

        for name, file in files.items():
            names.append(name)
            run_training(load(file, schema_for))
        return [], None

    monkeypatch.setattr(command, "train_locally", train)
    return names
