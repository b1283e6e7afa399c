"""Whatever a file holds, each command that reads it succeeds or says in words what is wrong, within bounds of time and memory."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.siege import camp, planting
from tests.siege.conftest import CASES, FEW, Attack
from tests.siege.mutations import damaged, put

MANY = settings(
    max_examples=CASES or FEW, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", camp.KINDS)
def test_a_mutated_file_is_read_or_refused_in_words(kind: str, attack: Attack) -> None:
    name = attack.newest(kind)
    original = (attack.healthy / name).read_bytes()
    others = [(attack.healthy / other).read_bytes() for other in list(camp.files(attack.healthy))[::9]]

    @MANY
    @given(damaged(name, original, others), st.integers(0, 3))
    def case(data: bytes, number: int) -> None:
        for command in attack.commands(kind, attack.cases):
            folder = attack.copy()
            put(folder, name, data, seal=number > 0)
            attack.run(command, folder, f"{name} {data[:100]!r}")

    case()
    attack.judge()


SIZES = [
    "runs/toy/training_config.yaml", "runs/toy/environment.json", "runs/toy/checkpoints/step_N/manifest.json",
    "runs/toy/checkpoints/step_N/config.json", "runs/toy/checkpoints/step_N/trainer_state.json",
    "legacy/training_config.yaml", "model/config.json", "state/model_config.json", "rows/manifest.json",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", SIZES)
def test_a_size_is_not_believed(kind: str, attack: Attack) -> None:
    name = attack.newest(kind)
    tree = planting.read(attack.healthy / name)
    cases = [(path, size) for path in planting.sites(tree, is_number) for size in (10**9, 2**62, 10**30)]
    for number, (path, size) in attack.some(cases, 8):
        for command in attack.commands(kind, number):
            folder = attack.copy()
            put(folder, name, planting.write(name, planting.with_value(tree, path, size)), seal=True)
            attack.run(command, folder, f"{name} {path} {size}")
    attack.judge()


def is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@pytest.mark.slow
def test_the_kinds_of_files_are_those_that_commands_open(attack: Attack) -> None:
    assert set(attack.readers) - camp.TYPED == set(camp.KINDS)
