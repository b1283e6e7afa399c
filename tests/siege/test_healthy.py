"""What the siege attacks works before the attack: each command succeeds in a healthy camp."""

from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from tests.siege import camp
from tests.siege.sandbox import Sandbox

from picolm.cli import app


def test_every_command_is_besieged() -> None:
    top = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    there = {name for name in top if name != "data"} | {f"data {name}" for name in top["data"].commands}
    spoken = {" ".join(words.split()[: 2 if words.startswith("data ") else 1]) for words in camp.COMMANDS.values()}
    serving = {"view"}  # does not end by itself; tests/view/test_siege.py attacks it
    assert spoken == there - serving


@pytest.mark.slow
@pytest.mark.parametrize("name", camp.COMMANDS)
def test_each_command_succeeds_in_a_healthy_camp(name: str, sandbox: Sandbox, copy: Callable[[], Path]) -> None:
    result = camp.run(sandbox, name, copy())
    assert result.code == 0, result.output
    assert result.fault is None
