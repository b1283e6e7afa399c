"""What somebody else named a run, a source or a text is shown by each command, never obeyed by the terminal."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from picolm.cli import main

EVIL = "e\x1b[2J\x1b]0;x\x07\x9b\x85\u202e[red]x:smile:"
OBEYED = set("\x1b\x07\x9b\x85\u202e\r\x08")
COMMANDS = {
    "list": "list RUN",
    "verify": "verify RUN",
    "analyze": "analyze ANALYSIS --run RUN --csv --report",
    "analyze what is not there": "analyze ANALYSIS --run RUN/EVIL",
    "report": "report RUN --out OUT/EVIL.html",
    "report what is no table": "report RUN --analysis OUT/EVIL",
    "batch": "batch RUN --step 2 --out OUT/EVIL.csv",
    "batch of a step that was never made": "batch RUN --step 99",
    "replay": "replay RUN --step 1",
    "fork": "fork RUN --step 2 --run-name EVILf --no-train",
    "evaluate": "evaluate RUN --steps 2",
    "evaluate what is unknown": "evaluate RUN --metrics EVIL",
    "generate without a tokenizer": "generate RUN",
    "export": "export RUN --format torch --out OUT/EVIL",
    "an option that is unknown": "list RUN --EVIL",
    "an argument too many": "list RUN EVIL",
    "a number that is none": "batch RUN --step EVIL",
    "data inspect": "data inspect DATA",
    "data prepare": "data prepare EVIL --out OUT/EVIL",
    "train": "train EVIL.yaml",
    "train with a wrong key": "train TOY EVIL=1",
    "suite": "suite EVIL.yaml",
}
NOT_NAMED = {"list", "analyze", "replay", "evaluate what is unknown", "a number that is none", "data inspect"}


@pytest.fixture
def place(train: Callable[..., Any], tmp_path: Path) -> Path:
    run = train("monitoring.logging.log_level=ERROR")
    place = run.path.with_name(EVIL)
    run.path.rename(place)
    (tmp_path / "analysis.yaml").write_text(
        "metrics: [{metric_name: per, components: [{layer_suffixes: o_proj, data_type: weights}]}]\n"
    )
    return place


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_prints_what_a_terminal_obeys(
    command: str, place: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = {
        "EVIL": EVIL, "RUN": str(place), "ANALYSIS": str(tmp_path / "analysis.yaml"), "OUT": str(tmp_path),
        "DATA": str(toy_data), "TOY": str(tmp_path / "toy.yaml"),
    }  # fmt: skip
    arguments = []
    for word in COMMANDS[command].split():
        for name in ("RUN", "ANALYSIS", "OUT", "DATA", "TOY", "EVIL"):
            word = word.replace(name, words[name])
        arguments.append(word)
    monkeypatch.setattr("sys.argv", ["pico", *arguments])
    with suppress(SystemExit):
        main()
    said = "".join(capfd.readouterr())
    assert "Traceback" not in said
    assert not OBEYED & set(said)
    assert "\\x1b[2J" in said.replace("\n", "") or command in NOT_NAMED
