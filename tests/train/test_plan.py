"""What happens at which step, and that it is what a run then holds."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.store import Run
from picolm.train.job import Due, Plan

Train = Callable[..., Run]


def plan(make_config: Any, *overrides: str) -> Plan:
    return Plan(make_config(*overrides))


@pytest.mark.parametrize(
    ("schedule", "every", "last", "steps"),
    [
        ("every", 2, 6, [0, 2, 4, 6]),
        ("every", 4, 6, [0, 4, 6]),
        ("every", 1000, 3, [0, 3]),
        ("every", 5, 0, [0]),
        ("log", 1000, 20, [0, 1, 2, 4, 8, 16, 20]),
        ("log", 1000, 2500, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 2000, 2500]),
        ("log", 3, 9, [0, 1, 2, 3, 4, 6, 8, 9]),
    ],
)
def test_the_saved_steps(make_config: Any, schedule: str, every: int, last: int, steps: list[int]) -> None:
    found = plan(
        make_config, f"checkpointing.save_schedule={schedule}", f"checkpointing.save_every_n_steps={every}",
        f"training.max_steps={last}",
    )  # fmt: skip
    assert found.saved_steps() == steps


@pytest.mark.parametrize(
    ("cadence", "steps"), [("all", [0, 2, 4, 6, 8, 9]), ("last", [9]), (4, [0, 4, 8]), (3, [0, 6, 9]), (5, [0])]
)
@pytest.mark.parametrize("kind", ["weights", "optimizer", "dynamics"])
def test_each_kind_has_its_own_cadence(make_config: Any, kind: str, cadence: Any, steps: list[int]) -> None:
    key = "learning_dynamics" if kind == "dynamics" else kind
    found = plan(make_config, f"checkpointing.save_{key}={cadence}", "training.max_steps=9")
    assert [step for step in range(10) if getattr(found.due(step), kind)] == steps
    others = {"weights", "optimizer", "dynamics"} - {kind}
    assert all(
        getattr(found.due(step), other) is (step in (0, 2, 4, 6, 8, 9)) for step in range(10) for other in others
    )


CADENCES = st.one_of(st.sampled_from(["all", "last"]), st.integers(1, 9))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    last=st.integers(0, 600), every=st.integers(1, 40), schedule=st.sampled_from(["every", "log"]),
    cadences=st.tuples(CADENCES, CADENCES, CADENCES),
)  # fmt: skip
def test_the_steps_that_are_listed_are_those_where_something_is_saved(
    make_config: Any, last: int, every: int, schedule: str, cadences: tuple[Any, Any, Any]
) -> None:
    config = make_config()
    names = ("save_weights", "save_optimizer", "save_learning_dynamics")
    changed = {"save_every_n_steps": every, "save_schedule": schedule} | dict(zip(names, cadences))
    checkpointing = config.checkpointing.model_copy(update=changed)
    training = config.training.model_copy(update={"max_steps": last})
    found = Plan(config.model_copy(update={"checkpointing": checkpointing, "training": training}))
    assert found.saved_steps() == [step for step in range(last + 1) if found.due(step).checkpoint]


def test_evaluation_and_log_have_their_own_cadence(make_config: Any) -> None:
    steps = range(10)
    options = ("training.max_steps=9", "checkpointing.save_every_n_steps=4", "monitoring.logging.log_every_n_steps=6")
    default = plan(make_config, *options)
    assert [step for step in steps if default.due(step).evaluation] == [0, 4, 8, 9]
    assert [step for step in steps if default.due(step).log] == [0, 6, 9]
    apart = plan(make_config, *options, "evaluation.every_n_steps=3")
    assert [step for step in steps if apart.due(step).evaluation] == [0, 3, 6, 9]
    for nothing in ("null", "[]"):
        never = plan(make_config, *options, f"evaluation.metrics={nothing}")
        assert not any(never.due(step).evaluation for step in steps)


def test_digests_come_with_the_log_unless_asked_for_otherwise(make_config: Any) -> None:
    options = ("training.max_steps=9", "monitoring.logging.log_every_n_steps=6")
    for chosen, steps in (("null", [0, 6, 9]), ("4", [0, 4, 8, 9]), ("0", [])):
        found = plan(make_config, *options, f"monitoring.logging.digest_every_n_steps={chosen}")
        assert [step for step in range(10) if found.due(step).digest] == steps


def test_a_stop_saves_what_it_takes_to_continue_and_what_was_due_anyway(make_config: Any) -> None:
    found = plan(make_config, "checkpointing.save_weights=last", "checkpointing.save_optimizer=last")
    assert found.when_stopping(3) == Due(weights=True, optimizer=True, log=True)
    assert found.when_stopping(4) == Due(
        weights=True, optimizer=True, dynamics=True, evaluation=True, log=True, digest=True
    )


@pytest.mark.slow
def test_a_run_holds_what_the_plan_says(train: Train, make_config: Any) -> None:
    options = (
        "checkpointing.save_weights=4", "checkpointing.save_optimizer=last", "checkpointing.save_learning_dynamics=6",
        "training.max_steps=9",
    )  # fmt: skip
    run, found = train(*options), plan(make_config, *options)
    assert run.steps == found.saved_steps() == [0, 4, 6, 8, 9]
    for step in run:
        kinds = {address.kind for address in run[step]}
        due = found.due(step)
        assert ("weights" in kinds) is due.weights
        assert ("exp_avg" in kinds) is due.optimizer
        assert ({"activations", "gradients"} <= kinds) is due.dynamics
        assert ("config.json" in run[step].files) is due.weights
    assert not [step for step in run if run[step].meta["resumable"]]


@pytest.mark.slow
def test_a_run_without_a_step_to_continue_from_says_that_it_starts_again(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("checkpointing.save_optimizer=last", "checkpointing.save_weights=4")
    train(*options, "training.max_steps=6")
    run = train(*options, "training.max_steps=8")
    assert (
        "holds no whole checkpoint with weights and optimizer state; starting again from step 0"
        in capsys.readouterr().err
    )
    assert [entry["step"] for entry in run.metrics() if "train/loss" in entry] == [0, 2, 4, 6, 8]
    assert run[8].meta["resumable"]
