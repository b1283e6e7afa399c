"""The example that tokenizes with datatrove, on a real cluster: an array of tasks, whose files are read as they lie."""

import json
import sys
from pathlib import Path

import pytest
from tests.slurm.conftest import Slurm, wait_for

from picolm.data import open_source

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
EXAMPLE = Path(__file__).parents[2] / "examples" / "corpora" / "tokenize_with_datatrove.py"


def test_tasks_on_two_nodes_tokenize_as_one_machine_does(slurm: Slurm, tmp_path: Path) -> None:
    pytest.importorskip("datatrove", reason="the extra corpora is not installed")
    (tmp_path / "texts").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": f"Ship {number} came home with {sacks} sacks. " * 20}) for sacks in range(30)]
        (tmp_path / "texts" / f"{number}.jsonl").write_text("\n".join(lines))
    slurm("pico", "data", "prepare", "texts", "--out", "rows", "--vocab-size", "300", "--seq-len", "32")
    command = [sys.executable, str(EXAMPLE), "texts"]
    options = ["--tokenizer", "rows/tokenizer.json", "--seq-len", "32", "--tasks", "2"]
    slurm(*command, "here", *options)
    slurm(*command, "there", *options, "--executor", "slurm", "--partition", "cpu", "--time", "00:10:00")
    assert slurm.jobs
    wait_for(lambda: not slurm.jobs, 400)
    here, there = (open_source(f"datatrove:{tmp_path}/{name}", row_length=33) for name in ("here", "there"))
    assert len(there) > 100
    assert there.fingerprint == here.fingerprint
