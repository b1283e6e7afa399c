"""The queue on disk and the thread that works it off: in order, whatever is deleted meanwhile, and never in the way."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests.exchange.conftest import commit, digests
from tests.hub_writing import WritableHub
from tests.planted import TOKEN, holders

from picolm.address import Address
from picolm.exchange.outbox import Outbox
from picolm.exchange.push import Sender
from picolm.exchange.uploader import Uploader
from picolm.store import Run
from picolm.store.hub import open_branch
from picolm.store.repository import Branch
from picolm.store.writer import BackgroundWriter, Retention


@pytest.fixture
def start() -> Iterator[Callable[..., Uploader]]:
    """A function that starts an uploader; it is closed at the end."""
    started: list[Uploader] = []

    def begin(run: Run, steps: tuple[int, ...] = (), patience_s: float = 30.0) -> Uploader:
        started.append(Uploader(Sender(run, "lab/run"), steps, patience_s=patience_s, first_wait_s=0.01))
        return started[-1]

    yield begin
    for uploader in started:
        uploader._patience_s = 0.1
        uploader.close()


def there() -> Run:
    return open_branch(Branch("lab/run", "toy"))


def whole_steps(hub: WritableHub) -> list[str]:
    commits = reversed(hub.repository("lab/run").commits("toy") or [])
    return [commit.body.split()[1] for commit in commits if "is whole with this commit" in commit.body]


@pytest.mark.slow
def test_steps_are_sent_in_order_as_they_come(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader]
) -> None:
    run = make_run(steps=(0,))
    uploader = start(run, (0,))
    for step in (2, 4):
        commit(run, step)
        uploader.add(step)
    uploader.close()
    assert whole_steps(hub) == ["0", "2", "4"]
    assert digests(there()) == digests(run)
    assert Outbox(run).held == []
    assert "from step 0 to step 4" in (hub.repository("lab/run").commits("toy") or [])[0].files["README.md"].decode()


@pytest.mark.slow
def test_what_retention_deletes_is_sent_first_or_kept_for_it(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], tmp_path: Path
) -> None:
    run, copy = make_run(steps=()), make_run("copy", ())
    hub.down = True
    uploader = start(run)
    rules = Retention(run, {"weights": "last 1", "optimizer": "last 1", "dynamics": "last 1"}, lambda checkpoint: True)
    with BackgroundWriter(run, rules, uploader.add) as writer:
        for step in (0, 2, 4):
            tensors = {
                Address("weights", "", "a"): torch.full((3,), step),
                Address("gradients", "train", "a"): torch.ones(step + 1),
            }
            writer.submit(step, tensors, meta={"step": step})
            copy.commit(step, tensors, meta={"step": step})
    assert run.steps == [4]
    hub.down = False
    uploader.close()
    assert there().steps == [0, 2, 4]
    assert {key: value for key, value in digests(there()).items() if key[1].count("/") == 2} == {
        key: value for key, value in digests(copy).items() if key[1].count("/") == 2
    }
    assert [path.name for path in (run.path / ".hub").iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_an_outage_is_one_warning_and_one_sentence_at_the_end(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "picolm")
    run = make_run()
    hub.down = True
    uploader = start(run, (0, 2, 4), patience_s=1.0)
    end = time.monotonic() + 20
    while len(hub.log) < 15 and time.monotonic() < end:
        threading.Event().wait(0.01)
    begin = time.monotonic()
    uploader.close()
    assert time.monotonic() - begin < 5
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert warnings[0].startswith(
        "Steps cannot be sent to the Hub now; they are kept and tried again beside the training: lab/run@toy"
    )
    assert warnings[1].startswith("Not on the Hub yet: 3 steps (0, 2, 4) (lab/run@toy")
    assert warnings[1].endswith(f"To send the rest:  pico push {run.path}")
    assert Outbox(run).place == "hub:lab/run@toy"


@pytest.mark.slow
def test_what_was_saved_before_a_kill_and_deleted_since_is_sent_by_the_next_start(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader]
) -> None:
    run = make_run()
    before = digests(run)
    Outbox(run).hold(0)
    Outbox(run).hold(2)
    run.remove(0)
    run.thin(2, {"optimizer"})
    start(run, (2, 4)).close()
    assert digests(there()) == before
    assert Outbox(run).held == []


def test_adding_never_waits_and_never_fails(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    hub.down = True
    uploader = start(run, patience_s=0.1)
    begin = time.monotonic()
    uploader.add(2)
    uploader.add(3)  # a step that is not there
    assert time.monotonic() - begin < 2
    assert "Step 3 waits for the Hub only as long as it is in the run" in caplog.text


def test_a_disk_that_is_full_does_not_stop_the_run(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    run = make_run()

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("picolm.exchange.outbox.write_atomically", full)
    monkeypatch.setattr("picolm.exchange.outbox.os.rename", full)
    uploader = start(run)
    uploader.add(2)
    uploader.close()
    assert "where the run is sent to cannot be written" in caplog.text
    assert there().steps == [2]
    assert Outbox(run).held == []


@pytest.mark.slow
def test_a_step_that_is_gone_or_damaged_does_not_hold_up_the_others(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    (run.step_path(2) / "config.json").write_text("{}")
    commit(run, 3)
    (run.step_path(3) / "manifest.json").write_text("{}")
    uploader = start(run, (0, 1, 2, 3, 4))
    uploader.close()
    assert there().steps == [0, 4]
    assert "Step 1 was deleted before it could be sent" in caplog.text
    assert "step 2 is not sent: " in caplog.text
    assert "step 3 is not sent: " in caplog.text


@pytest.mark.slow
def test_a_queue_that_cannot_be_read_costs_nothing(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader]
) -> None:
    run = make_run()
    (run.path / ".hub").mkdir()
    (run.path / ".hub/outbox.json").write_bytes(b"\0\0\0")
    start(run, (0, 2, 4)).close()
    assert digests(there()) == digests(run)


@pytest.mark.slow
def test_a_bug_in_sending_does_not_end_the_run(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*arguments: object) -> bool:
        raise ZeroDivisionError("not foreseen")

    monkeypatch.setattr("picolm.exchange.push.Sender.send", broken)
    start(make_run(), (0,), patience_s=0.5).close()
    assert "Not on the Hub yet: step 0 (ZeroDivisionError: not foreseen)" in caplog.text


@pytest.mark.slow
def test_no_token_is_kept(
    hub: WritableHub, make_run: Callable[..., Run], start: Callable[..., Uploader], tmp_path: Path
) -> None:
    run = make_run()
    start(run, (0, 2, 4)).close()
    assert any(TOKEN in value for value in hub.tokens)  # it was used
    assert holders(tmp_path) == []
    assert [raw[:80] for raw in hub.raw if TOKEN.encode() in raw] == []
