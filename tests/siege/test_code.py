"""No file of somebody else's makes a command run code, whatever stands in it, without --trust-remote-code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.siege import camp, planting
from tests.siege.conftest import Attack
from tests.siege.mutations import put
from tests.siege.sandbox import SOURCE, Result, Sandbox

STRUCTURED = [kind for kind in camp.KINDS if Path(kind).suffix in (".json", ".jsonl", ".yaml", ".lock")]


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", STRUCTURED)
def test_a_name_of_code_in_any_key_is_not_imported(kind: str, attack: Attack) -> None:
    name = attack.newest(kind)
    tree, config = planting.read(attack.healthy / name), planting.read(attack.healthy / "runs/toy/training_config.yaml")
    for number, (where, forged) in attack.some(planting.forgeries(name, tree, config), 7):
        for command in attack.commands(kind, number):
            folder = attack.copy()
            planting.plant_modules(folder)
            put(folder, name, planting.write(name, forged), seal=True)
            attack.run(command, folder, f"{name} {where}")
            attack.note(planting.markers(folder) or None, "imported", command, f"{name} {where}")
    attack.judge()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_name_of_code_where_users_name_theirs_is_not_imported_from_a_run(attack: Attack) -> None:
    run = "runs/toy"
    tree, environment = (
        planting.read(attack.healthy / run / name) for name in ("training_config.yaml", "environment.json")
    )
    commands = [name for name, words in camp.COMMANDS.items() if run in words.split()]
    for number, (where, name, forged) in enumerate(planting.named(tree, environment)):
        for command in attack.turn(commands, number):
            folder = attack.copy()
            planting.plant_modules(folder)
            (folder / run / name).write_bytes(planting.write(name, forged))
            attack.run(command, folder, where)
            attack.note(planting.markers(folder) or None, "imported", command, where)
    attack.judge()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", STRUCTURED)
def test_a_terminal_gets_no_orders_from_a_value_or_a_key(kind: str, attack: Attack) -> None:
    name = attack.newest(kind)
    tree = planting.read(attack.healthy / name)
    paths = planting.sites(tree)
    cases = [(path, planting.with_value(tree, path, planting.TEXT)) for path in paths]
    cases += [(path, planting.with_key(tree, path, planting.TEXT)) for path in paths if isinstance(path[-1], str)]
    for number, (path, forged) in attack.some(cases, 7):
        for command in attack.commands(kind, number):
            folder = attack.copy()
            put(folder, name, planting.write(name, forged), seal=True)
            result = attack.run(command, folder, f"{name} {path}")
            raw = planting.RAW.search(result.output)
            line = result.output[: raw.start()].rpartition("\n")[2] if raw else ""
            attack.note(f"raw {raw[0]!r} after {line[-80:]!r}" if raw else None, "terminal", command, f"{name} {path}")
    attack.judge()


@pytest.mark.slow
@pytest.mark.parametrize("command", ["list", "generate", "report", "train --dry-run", "data inspect"])
def test_modules_in_the_working_folder_are_not_those_of_the_library(
    command: str, attack: Attack, tmp_path: Path
) -> None:
    """`python -m picolm`, which torchrun and suites also say, puts the working folder first on the path of modules."""
    folder = attack.copy()
    planting.plant_modules(folder)
    environment = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "SIEGE_MARKERS": str(folder / ".markers"),
        "HOME": str(tmp_path),
    }
    process = subprocess.run(
        [sys.executable, "-m", "picolm", *camp.COMMANDS[command].split()],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert planting.markers(folder) == []
    assert process.returncode == 0, process.stderr


@pytest.mark.slow
def test_the_processes_of_a_suite_import_nothing_from_the_working_folder(attack: Attack, sandbox: Sandbox) -> None:
    folder = attack.fresh("runs/toys-seed43")
    planting.plant_modules(folder)
    result: Result = sandbox.run(["suite", "suite.yaml", "--no-report"], folder, seconds=250)
    assert planting.markers(folder) == []
    assert result.code == 0, result.output
    assert (folder / "runs/toys-seed43/run.json").exists()
