"""Saving beside the training stores the moment of `submit`, one step at a time, and no error is lost."""

import threading
from typing import Any

import pytest
import torch

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Run
from picolm.store.writer import BackgroundWriter

W = Address("weights", "", "w")


def test_the_step_is_the_state_at_submit_whatever_the_training_does_next(run: Run) -> None:
    weights = torch.nn.Parameter(torch.zeros(1000))
    with BackgroundWriter(run) as writer:
        for step in range(5):
            writer.submit(step, {W: weights}, meta={"step": step})
            with torch.no_grad():
                weights += 1
    assert run.steps == [0, 1, 2, 3, 4]
    assert all(torch.equal(run[step][W], torch.full((1000,), float(step))) for step in run)


def test_it_stores_the_same_files_as_a_commit(run: Run, content: dict[str, Any]) -> None:
    with BackgroundWriter(run) as writer:
        writer.submit(1, **content)
    assert run.commit(2, **content).files == run[1].files


class Slow(Run):
    """Commits when it is let; counts how many are under way."""

    def __init__(self, run: Run):
        super().__init__(run.path, run.directories)
        self.go = threading.Event()
        self.under_way = self.most = 0

    def commit(self, *arguments: Any, **options: Any) -> Any:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.go.wait(10)
        self.go.clear()
        self.under_way -= 1
        return super().commit(*arguments, **options)


def test_training_goes_on_while_one_step_is_written_and_waits_for_the_second(run: Run) -> None:
    slow = Slow(run)
    with BackgroundWriter(slow) as writer:
        writer.submit(0, {W: torch.zeros(3)}, meta={})
        writer.check()  # does not wait
        assert run.steps == []
        threading.Timer(0.05, slow.go.set).start()
        writer.submit(1, {W: torch.zeros(3)}, meta={})
        assert run.steps == [0]
        slow.go.set()
    assert slow.most == 1
    assert writer.waiting_s >= 0.03
    assert writer.writing_s >= writer.snapshot_s > 0


@pytest.mark.parametrize("call", ["submit", "check", "wait", "close"])
def test_an_error_comes_out_at_the_next_call_and_once(run: Run, call: str) -> None:
    writer = BackgroundWriter(run)
    writer.submit(0, {W: torch.zeros(1, dtype=torch.complex64)}, meta={})
    while writer._under_way is not None and not writer._under_way.done():
        pass
    arguments = (1, {W: torch.zeros(1)}) if call == "submit" else ()
    with pytest.raises(StoreError, match="complex64 cannot be stored"):
        getattr(writer, call)(*arguments, **({"meta": {}} if arguments else {}))
    writer.close()
    assert run.steps == []


def test_leaving_raises_the_error_of_the_last_step(run: Run) -> None:
    with pytest.raises(StoreError, match="complex64"), BackgroundWriter(run) as writer:
        writer.submit(0, {W: torch.zeros(1, dtype=torch.complex64)}, meta={})


def leave_by_an_error(run: Run, tensor: torch.Tensor) -> None:
    with BackgroundWriter(run) as writer:
        writer.submit(0, {W: tensor}, meta={})
        raise ZeroDivisionError


def test_leaving_by_an_error_keeps_that_error_and_finishes_the_step(run: Run) -> None:
    with pytest.raises(ZeroDivisionError):
        leave_by_an_error(run, torch.zeros(1))
    assert run.steps == [0]


def test_a_second_error_while_leaving_is_noted_on_the_first(run: Run) -> None:
    with pytest.raises(ZeroDivisionError) as error:
        leave_by_an_error(run, torch.zeros(1, dtype=torch.complex64))
    assert "besides, saving failed: weights//w" in error.value.__notes__[0]
