"""Sending a run: commits as published runs have them, whole steps, nothing twice, and what is there can be read."""

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.exchange.conftest import commit, digests
from tests.hub_server import Chaos
from tests.hub_writing import WritableHub

from picolm.errors import StoreError
from picolm.exchange.outbox import Outbox
from picolm.exchange.pull import pull
from picolm.exchange.push import Sender, push
from picolm.store import Run
from picolm.store.hub import open_branch
from picolm.store.repository import Branch


def read(branch: str = "toy") -> Run:
    return open_branch(Branch("lab/run", branch))


def titles(hub: WritableHub, branch: str = "toy") -> list[str]:
    """From the first commit on."""
    return [commit.title for commit in reversed(hub.repository("lab/run").commits(branch) or [])]


def sent_files(hub: WritableHub) -> int:
    """Large files whose content was sent."""
    return len(hub.requests("PUT", "/large/"))


@pytest.mark.slow
def test_a_run_that_was_sent_is_the_run(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    assert push(Sender(run, "lab/run")) == ([0, 2, 4], [])
    there = read()
    assert (there.name, there.steps, there.config) == ("toy", [0, 2, 4], run.config)
    assert digests(there) == digests(run)
    assert [there.evaluation(step) for step in there] == [run.evaluation(step) for step in run]
    assert there.metrics() == run.metrics()
    assert all(there.problems(step) == [] for step in there)


@pytest.mark.slow
def test_commits_are_called_as_those_of_published_runs(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    push(Sender(make_run(steps=(0, 2)), "lab/run"))
    artefacts = [
        "Learning Dynamics Data (train)", "Learning Dynamics Data (val)", "Fabric Checkpoint", "Evaluation Results", "HF Model"
    ]  # fmt: skip
    expected = ["Saving Training Config -- Step 0", "Saving Tokenizer -- Step 0"]
    expected += [f"Saving {kind} -- Step {step}" for step in (0, 2) for kind in artefacts]
    assert titles(hub) == ["initial commit", *expected, "Saving Model Card"]
    commits = hub.repository("lab/run").commits("toy") or []
    model = next(commit for commit in commits if commit.title == "Saving HF Model -- Step 2")
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json", "metrics.jsonl"} <= set(model.files)


@pytest.mark.slow
def test_git_agrees(hub: WritableHub, make_run: Callable[..., Run], tmp_path: Path) -> None:
    """The commits are a real repository: cloned, its pointers name the large files by the digests of the manifest."""
    run = make_run()
    push(Sender(run, "lab/run"))
    place = hub.storage / "models/lab/run"
    subprocess.run(
        ["git", "clone", "-q", "-b", "toy", str(place), str(tmp_path / "clone")], check=True, capture_output=True
    )
    pointer = (tmp_path / "clone/model.safetensors").read_text()
    assert re.search(r"oid sha256:(\w+)", pointer)[1] == run[4].files["model.safetensors"].sha256  # type: ignore[index, union-attr]
    assert (tmp_path / "clone/config.json").read_bytes() == run[4].read("config.json")


@pytest.mark.slow
def test_what_is_there_is_not_sent_again(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run"), [0, 2])
    before, files = titles(hub), sent_files(hub)
    assert push(Sender(run, "lab/run"), [0, 2]) == ([], [])
    assert (titles(hub), sent_files(hub)) == (before, files)
    assert push(Sender(run, "lab/run")) == ([4], [])
    assert read().steps == [0, 2, 4]


@pytest.mark.slow
def test_older_steps_sent_late_leave_the_newest_in_front(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run"), [4])
    push(Sender(run, "lab/run"))
    for step in run:  # that of step 4 was known by its digest
        assert len(hub.requests("PUT", run[step].files["model.safetensors"].sha256)) == 1  # type: ignore[union-attr, call-overload]
    newest = (hub.repository("lab/run").commits("toy") or [])[0]
    assert newest.files["model.safetensors"] == run[4].read("model.safetensors")
    assert digests(read()) == digests(run)


@pytest.mark.slow
def test_parts_are_sent_alone_and_together_are_the_step(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run"), only=["weights"])
    assert {address.kind for address in read()[2]} == {"weights"}
    assert push(Sender(run, "lab/run"), only=["weights"]) == ([], [])
    push(Sender(run, "lab/run"), only=["dynamics"])
    assert {address.kind for address in read()[2]} == {"weights", "activations", "gradients"}
    push(Sender(run, "lab/run"))
    assert digests(read()) == digests(run)
    run.thin(2, {"optimizer"})
    assert push(Sender(run, "lab/run")) == ([], [])  # the Hub has more of it


@pytest.mark.slow
def test_a_step_that_lacks_something_hides_that_of_the_step_before(
    hub: WritableHub, make_run: Callable[..., Run]
) -> None:
    run = make_run()
    run.thin(4, {"optimizer", "gradients"})
    push(Sender(run, "lab/run"))
    shown = (hub.repository("lab/run").commits("toy") or [])[0].files
    assert "optimizer.safetensors" not in shown
    assert set(run[4].files) <= set(shown)
    assert digests(read()) == digests(run)


@pytest.mark.slow
def test_a_step_trained_again_takes_the_place_of_the_other(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run"))
    run.remove(4)
    commit(run, 4, weight_prefix="pico_decoder.")
    assert push(Sender(run, "lab/run")) == ([4], [])
    assert digests(read()) == digests(run)


@pytest.mark.slow
def test_a_damaged_step_is_not_sent(
    hub: WritableHub, make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    (run.step_path(2) / "config.json").write_text('{"model_type": "pico_decodes"}')
    assert push(Sender(run, "lab/run")) == ([0, 4], [2])
    assert read().steps == [0, 4]
    assert re.search(r"step 2 is not sent: .*config.json: damaged", caplog.text)


@pytest.mark.slow
def test_a_branch_of_another_run_is_left_alone(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    push(Sender(make_run(), "lab/run"))
    before = titles(hub)
    with pytest.raises(StoreError, match=r"lab/run@toy holds another run already \('toy', made 2.*\); choose another"):
        push(Sender(make_run("other", (0,)), "lab/run", "toy"))
    assert titles(hub) == before
    push(Sender(make_run("third", (0,)), "lab/run"))
    assert titles(hub, "third")[:2] == [
        "initial commit",
        "Saving Training Config -- Step 0",
    ]  # nothing of the other run


@pytest.mark.slow
def test_whatever_fails_in_between_the_run_arrives(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    hub.chaos = Chaos(seed=3, rate=0.3, most=60, kinds=(503, (429, {"Retry-After": "1"}), "cut", "lost"))
    failures = 0
    while True:
        try:
            push(Sender(run, "lab/run"))
            break
        except StoreError:
            failures += 1
            assert failures < 20
    assert len(hub.chaos.seen) >= 20
    hub.chaos = None
    assert digests(read()) == digests(run)
    for step in (0, 2, 4):  # a lost answer does not make a second commit
        assert titles(hub).count(f"Saving HF Model -- Step {step}") == 1


@pytest.mark.slow
def test_two_senders_do_not_mix_their_steps(hub: WritableHub, make_run: Callable[..., Run], tmp_path: Path) -> None:
    """A commit of somebody else between two of a step: the step is begun again, and whole."""
    run = make_run()
    push(Sender(run, "lab/run"), [0])
    repository, real = hub.repository("lab/run"), hub.repository("lab/run").commit
    meddled: list[str] = []

    def commit_after_another(branch: str, title: str, *arguments: object, **options: object) -> str:
        if title.startswith("Saving HF Model -- Step 2") and not meddled:
            meddled.append(real("toy", "Edited on the page", {"notes.md": b"hello"}))
        return real(branch, title, *arguments, **options)  # type: ignore[arg-type]

    repository.commit = commit_after_another  # type: ignore[method-assign, assignment]
    push(Sender(run, "lab/run"))
    assert digests(read()) == digests(run)
    assert "notes.md" in (repository.commits("toy") or [])[0].files


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            401,
            r"lab/run@toy: the Hub \(http://127.*\) refuses access \(401\); check HF_TOKEN, or `hf auth login` again",
        ),
        (403, r"refuses access \(403\)"),
        (
            (404, {"X-Error-Code": "RepoNotFound"}),
            r"check the name, or for a private one `hf auth login` or set HF_TOKEN",
        ),
    ],
)
def test_refusals_are_said_at_once(hub: WritableHub, make_run: Callable[..., Run], fault: object, message: str) -> None:
    hub.faults["/branch/toy"] += [fault]
    with pytest.raises(StoreError, match=message):
        push(Sender(make_run(steps=(0,)), "lab/run"))
    assert len(hub.requests("POST", "/branch/")) == 1


def test_without_a_token_the_message_says_so(
    hub: WritableHub, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(StoreError, match=r"refuses access \(401\); check HF_TOKEN"):
        push(Sender(make_run(steps=(0,)), "lab/run"))


def test_offline_nothing_is_sent(
    hub: WritableHub, make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StoreError, match=r"lab/run: offline mode \(HF_HUB_OFFLINE\) is on, nothing is sent"):
        push(Sender(make_run(steps=(0,)), "lab/run"))


def test_one_process_sends_at_a_time(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run(steps=(0,))
    with Outbox(run).sending(), pytest.raises(StoreError, match="another process is sending its steps to the Hub"):
        push(Sender(run, "lab/run"))


@pytest.mark.slow
def test_private_and_collection(
    hub: WritableHub, make_run: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    push(Sender(make_run(steps=(0,)), "lab/run", private=True, collection="lab/suite-0a1b"))
    assert hub.repository("lab/run").private
    assert hub.collected == [("lab/suite-0a1b", "lab/run")]
    hub.faults["/api/collections/"] += [403]
    push(Sender(make_run("other", (0,)), "lab/run", collection="lab/suite-ffff"))
    assert "lab/run is not in the collection: collection lab/suite-ffff: the Hub" in caplog.text


@pytest.mark.slow
def test_the_card_says_what_the_run_is(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run()
    push(Sender(run, "lab/run"))
    card = (hub.repository("lab/run").commits("toy") or [])[0].files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {
        "library_name": "transformers", "tags": ["pico", "learning-dynamics", "custom_code"], "datasets": ["lab/rows"]
    }  # fmt: skip
    for said in (
        "model.d_model: 8",
        "█▅▁",
        "| 4 | 3.0000 |",
        "revision=",
        "pico analyze",
        "--branch toy",
        "pico pull lab/run@toy",
    ):
        assert said in card
    assert "model.n_heads" not in card
    for step in run:
        assert read().whole[step].commit in card  # type: ignore[attr-defined]
    assert (hub.repository("lab/run").commits("main") or [])[0].files["README.md"].decode() == card


@pytest.mark.slow
def test_what_people_wrote_on_a_card_stays(hub: WritableHub, make_run: Callable[..., Run]) -> None:
    run = make_run(steps=(0,))
    push(Sender(run, "lab/run"))
    repository = hub.repository("lab/run")
    card = (repository.commits("toy") or [])[0].files["README.md"].decode()
    repository.commit("toy", "licence", {"README.md": card.replace("---\n", "---\nlicense: mit\n", 1).encode()})
    repository.commit("main", "page", {"README.md": b"# Our suite\n"})
    commit(run, 2)
    push(Sender(run, "lab/run"))
    card = (repository.commits("toy") or [])[0].files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert "from step 0 to step 2" in card
    assert (repository.commits("main") or [])[0].files["README.md"] == b"# Our suite\n"


@pytest.mark.slow
def test_a_run_that_was_pulled_can_be_sent_on(hub: WritableHub, make_run: Callable[..., Run], tmp_path: Path) -> None:
    push(Sender(make_run(), "lab/run"))
    pull(read(), tmp_path / "here")  # type: ignore[arg-type]
    run = Run.open(tmp_path / "here")
    commit(run, 6)
    assert push(Sender(run, "lab/run", "toy")) == ([6], [])
    assert read().steps == [0, 2, 4, 6]
