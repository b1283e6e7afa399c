"""A training that is killed again and again ends as if nobody had touched it, and nobody ever sees half of a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "crashes.py"


@pytest.mark.slow
def test_ten_kills_cost_steps_and_nothing_else() -> None:
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "10", "--json", "--seed", "1"], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    figures = json.loads(ended.stdout)
    assert figures["kills"] >= 10
    assert figures["continued"] > 0
    assert figures["verified"] > 100
    assert figures["torn"] == figures["lost"] == figures["different"] == []
    assert max(figures["steps_done_again"]) <= 2 * 3 + 1  # a save each 3 steps, and one more may be under way
