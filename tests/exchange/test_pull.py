"""Bringing a run here: the same digests, whole steps only, nothing twice, and nowhere else than into its folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.exchange.conftest import commit, digests
from tests.hub_writing import WritableHub
from tests.picotrain import files_of, push_step, write_run

from picolm.address import Address
from picolm.errors import StoreError
from picolm.exchange.pull import pull
from picolm.exchange.push import Sender, push
from picolm.store import Run
from picolm.store.hub import HubRun, open_branch
from picolm.store.legacy_run import LegacyRun
from picolm.store.manifest import Manifest
from picolm.store.repository import Branch


@pytest.fixture
def sent(hub: WritableHub, make_run: Callable[..., Run]) -> Run:
    """A run of the steps 0, 2 and 4 that `lab/run@toy` is a copy of."""
    run = make_run()
    push(Sender(run, "lab/run"))
    return run


def source(branch: str = "toy", repository: str = "lab/run") -> HubRun:
    found = open_branch(Branch(repository, branch))
    assert isinstance(found, HubRun)
    return found


def downloads(hub: WritableHub) -> list[str]:
    return [path.split("/", 5)[5] for verb, path, _ in hub.log if verb == "GET" and "/resolve/" in path]


@pytest.mark.slow
def test_what_is_brought_is_the_run_byte_for_byte(sent: Run, tmp_path: Path) -> None:
    sent.write_evaluation(3, {"paloma": 1.5})  # of a step without a checkpoint
    commit(sent, 6)
    push(Sender(sent, "lab/run"))
    assert pull(source(), tmp_path / "here") == [0, 2, 4, 6]
    here = files_of(tmp_path / "here")
    there = files_of(sent.path)
    assert {name: data for name, data in here.items() if name != ".lock"} == {
        name: data for name, data in there.items() if name != ".lock" and not name.startswith(".hub/")
    }
    run = Run.open(tmp_path / "here")
    assert digests(run) == digests(sent)
    assert [run.problems(step) for step in run] == [[]] * 4
    assert (tmp_path / "here/checkpoints/latest").readlink() == Path("step_6")
    commit(run, 8)  # it is a run of ours like any other, and goes on


@pytest.mark.slow
def test_what_is_here_is_not_fetched_again(sent: Run, tmp_path: Path, hub: WritableHub) -> None:
    pull(source(), tmp_path / "here")
    hub.log.clear()
    assert pull(source(), tmp_path / "here") == []
    assert downloads(hub) == []
    damaged = tmp_path / "here/checkpoints/step_2/model.safetensors"
    damaged.write_bytes(bytes(damaged.stat().st_size))
    (tmp_path / "here/checkpoints/step_4/learning_dynamics/val_gradients.safetensors").unlink()
    assert pull(source(), tmp_path / "here") == [2, 4]
    assert downloads(hub) == ["model.safetensors", "learning_dynamics/val_gradients.safetensors"]
    assert digests(Run.open(tmp_path / "here")) == digests(sent)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("only", "kinds"),
    [("weights", {"weights"}), ("optimizer", {"exp_avg"}), ("dynamics", {"activations", "gradients"})],
)
def test_parts_come_alone_and_together_are_the_step(sent: Run, tmp_path: Path, only: str, kinds: set[str]) -> None:
    here = tmp_path / "here"
    assert pull(source(), here, [2, 4], [only]) == [2, 4]
    run = Run.open(here)
    assert run.steps == [2, 4]
    assert {address.kind for address in run[2]} == kinds
    assert run.problems(2) == []
    assert run[2].dropped == set(sent[2].files) - set(run[2].files)
    assert pull(source(), here, [2]) == [2]
    assert files_of(here / "checkpoints/step_2") == files_of(sent.step_path(2))
    assert pull(source(), here, [2], [only]) == []


@pytest.mark.slow
def test_an_interrupted_pull_goes_on_and_shows_nothing_half_done(
    sent: Run, tmp_path: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    hub.faults["/learning_dynamics/val_gradients.safetensors"] += [None, 404]
    with pytest.raises(StoreError, match="val_gradients"):
        pull(source(), here)
    assert Run.open(here).steps == [0]
    assert Run.open(here).problems(0) == []
    hub.log.clear()
    assert pull(source(), here) == [2, 4]
    assert len(downloads(hub)) < 2 * len(sent[2].files) + 1  # what had come of step 2 was there
    assert digests(Run.open(here)) == digests(sent)
    assert not (here / ".pull").exists()


@pytest.mark.slow
def test_bytes_that_are_not_those_of_the_manifest_are_refused(sent: Run, tmp_path: Path, hub: WritableHub) -> None:
    repository = hub.repository("lab/run")
    commits = repository.commits("toy")
    assert commits is not None
    whole = next(c for c in commits if "Step 2 is whole" in c.body)
    other = bytes(len(whole.files["model.safetensors"]))
    monkey = dict(whole.files) | {"model.safetensors": other}
    monkey_commit = whole._replace(files=monkey)
    repository.commits = lambda revision: (
        [monkey_commit] if revision == whole.sha else type(repository).commits(repository, revision)
    )  # type: ignore[method-assign]
    with pytest.raises(StoreError, match=r"hub:lab/run@toy: model.safetensors: what came is not the file"):
        pull(source(), tmp_path / "here")
    assert Run.open(tmp_path / "here").steps == [0]


@pytest.mark.slow
def test_no_name_leads_out_of_the_folder(sent: Run, hub: WritableHub, tmp_path: Path) -> None:
    whole = Manifest.from_bytes((sent.step_path(2) / "manifest.json").read_bytes(), "x")
    for step, name in enumerate(["../outside", "/tmp/outside", "a/../../outside", "a\\..\\outside"], start=10):
        forged = dataclasses.replace(whole, step=step, files={**whole.files, name: next(iter(whole.files.values()))})
        body = f"Step {step} is whole with this commit; its manifest has the digest {forged.digest}."
        title = f"Saving HF Model -- Step {step}"
        hub.repository("lab/run").commit("toy", title, {"manifest.json": forged.to_bytes()}, body)
        with pytest.raises(StoreError, match=r"is not a plain relative path; it could lead out"):
            pull(source(), tmp_path / "deep/here", [step])
    assert not list(tmp_path.rglob("*outside"))


@pytest.mark.slow
def test_a_folder_of_another_run_is_left_alone(sent: Run, make_run: Callable[..., Run], tmp_path: Path) -> None:
    other = make_run("other", (0,))
    before = files_of(other.path)
    with pytest.raises(StoreError, match=r"other holds another run than hub:lab/run@toy; choose another --out"):
        pull(source(), other.path)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/a.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"letters is not empty \(it holds a.txt\); choose another --out"):
        pull(source(), tmp_path / "letters")
    assert {k: v for k, v in files_of(other.path).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


@pytest.mark.slow
def test_what_retention_deleted_comes_back_from_the_hub(sent: Run) -> None:
    before = digests(sent)
    sent.thin(2, {"optimizer", "gradients"})
    sent.remove(0)
    assert pull(source(), sent.path) == [0, 2]
    assert digests(Run.open(sent.path)) == before


def test_steps_and_parts_that_there_are_not(sent: Run, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"has no step 3 \(there are: 0, 2, 4\)"):
        pull(source(), tmp_path / "here", [2, 3])
    with pytest.raises(StoreError, match="--only gradient: no part of a step; there are weights, optimizer, dynamics"):
        pull(source(), tmp_path / "here", only=["gradient"])
    assert not (tmp_path / "here").exists()


def published(hub: WritableHub, folder: Path, **options: Any) -> Path:
    """A run as pico-train leaves it, and the repository `lab/published` as pico-train pushes it."""
    run = write_run(folder / "tiny-1", (0, 1000), tables={"train": torch.arange(21 * 5).reshape(21, 5)}, **options)
    repository = hub.create("lab/published")
    assert repository is not None
    repository.create_branch("tiny-1", None)
    repository.commit("tiny-1", "Saving Tokenizer -- Step 0", {"tokenizer.json": b"{}"})
    repository.commit(
        "tiny-1",
        "Saving Training Config -- Step 0",
        {"training_config.yaml": (run / "training_config.yaml").read_bytes()},
    )

    class Pushing:
        def commit(self, branch: str, title: str, files: dict[str, bytes]) -> None:
            large = {name: data for name, data in files.items() if name.endswith((".pt", ".safetensors", ".arrow"))}
            import hashlib

            kept: dict[str, Any] = dict(files)
            for name, data in large.items():
                digest = hashlib.sha256(data).hexdigest()
                repository.store(digest, data)
                kept[name] = (digest, len(data))
            repository.commit(branch, title, kept)

    for step in (0, 1000):
        push_step(Pushing(), "tiny-1", step, run / f"checkpoints/step_{step}")  # type: ignore[arg-type]
    return run


@pytest.mark.slow
def test_a_published_run_is_brought_as_it_is(hub: WritableHub, tmp_path: Path) -> None:
    original = Run.open(published(hub, tmp_path))
    here = tmp_path / "here"
    assert pull(source("tiny-1", "lab/published"), here) == [0, 1000]
    run = Run.open(here)
    assert isinstance(run, LegacyRun)
    assert (run.steps, run.config) == ([0, 1000], original.config)
    for step in run:
        assert list(run[step]) == list(original[step])
        assert all(torch.equal(run[step][address], original[step][address]) for address in run[step])
        assert run[step].rows_digest("train") == original[step].rows_digest("train")
        assert run.evaluation(step) == {"paloma": 50.0 + step}
    assert (here / "checkpoints/step_1000/checkpoint/checkpoint.pt").read_bytes() == b"state 1000"
    assert pull(source("tiny-1", "lab/published"), here) == []


@pytest.mark.slow
def test_parts_of_a_published_run(hub: WritableHub, tmp_path: Path) -> None:
    published(hub, tmp_path)
    here = tmp_path / "here"
    assert pull(source("tiny-1", "lab/published"), here, [1000], ["dynamics"]) == [1000]
    assert Run.open(here).steps == [1000]
    assert not (here / "checkpoints/step_1000/model.safetensors").exists()
    assert pull(source("tiny-1", "lab/published"), here, [1000], ["weights"]) == [1000]
    assert Address("weights", "", "output_norm") in Run.open(here)[1000]
    assert Address("gradients", "val", "layers.0.swiglu.w_2") in Run.open(here)[1000]
