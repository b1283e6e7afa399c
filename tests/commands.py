"""Commands in the process of a test."""

from collections.abc import Callable

import pytest

from picolm.cli import main

Pico = Callable[..., str]


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pico:
    """A function that runs a command of pico, which has to succeed, and returns what it prints."""

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["pico", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert not ended.value.code, printed.err
        return printed.out

    return run
