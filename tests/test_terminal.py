"""What the command line shows of results."""

import io

from picolm.console import screen, sparkline
from picolm.terminal import evaluations


def shown(results: dict[int, dict[str, float]]) -> list[list[str]]:
    console = screen(width=100, record=True, file=io.StringIO())
    console.print(evaluations(results))
    return [line.split() for line in console.export_text().splitlines() if line.strip()]


def test_few_steps_have_a_column_each_and_what_a_step_lacks_is_left_open() -> None:
    lines = shown({6: {"paloma": 20.5, "pairs[odd]": 0.5}, 0: {"paloma": 300.25}})
    assert lines[0] == ["evaluation", "step", "0", "step", "6"]
    assert lines[2:] == [["paloma", "300.25", "20.5"], ["pairs[odd]", "0.5"]]


def test_of_many_steps_the_first_the_last_and_how_it_went() -> None:
    lines = shown({step: {"paloma": 10.0 - step} for step in range(8)})
    assert lines[0] == ["evaluation", "step", "0", "step", "7", "over", "steps"]
    assert lines[2] == ["paloma", "10", "3", sparkline([10.0 - step for step in range(8)])]
