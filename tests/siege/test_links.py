"""Links, pipes and devices at every path that a command opens: nothing outside is touched, read out or waited for."""

import shlex
import shutil
from pathlib import Path

import pytest
from tests.siege import camp, links
from tests.siege.conftest import Attack
from tests.siege.forging_hub import ForgingHub


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("command", camp.COMMANDS)
def test_nothing_outside_is_touched_through_a_link(
    command: str, attack: Attack, tmp_path: Path, hub: ForgingHub
) -> None:
    first, words = attack.copy(), shlex.split(camp.COMMANDS[command])
    opened = links.paths(camp.run(attack.sandbox, command, first, watch=True).paths, first, words)
    assert opened
    outside = links.Outside(tmp_path / "outside")
    cases = [
        (name, what, lay) for name in opened for what, lay in links.replacements(name, attack.healthy, outside).items()
    ]
    for _, (name, what, lay) in attack.some(cases, 8):
        folder = attack.copy()
        if not links.replace(folder / name, lay):
            continue
        before = outside.state()
        hub.raw.clear()
        case = f"{name} is {what}"
        result = attack.run(command, folder, case)
        attack.note("touched" if outside.state() != before else None, "outside", command, case)
        if what != links.COPY:
            told = links.SECRET in result.output
            attack.note("told" if told else None, "output", command, case)
            uploaded = any(links.SECRET.encode() in each for each in hub.raw)
            attack.note("sent" if uploaded else None, "hub", command, case)
            attack.note(links.holders(folder) or None, "copied", command, case)
        if outside.state() != before:
            shutil.rmtree(outside.folder)
            outside = links.Outside(tmp_path / "outside")
    attack.judge()
