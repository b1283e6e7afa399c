"""Runs on the Hub, against a loopback server: found by titles, fetched as needed and once, in parallel, with patience."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub_server import FakeHub, History, clients_of
from tests.picotrain import configuration, content, files_of, push_step, write_run

from picolm.address import Address
from picolm.errors import StoreError
from picolm.store import Missing, Run
from picolm.store.hub import open_branch
from picolm.store.repository import Branch

V0 = Address("activations", "train", "layers.0.attention.v_proj")
GRADIENT = Address("gradients", "val", "layers.10.swiglu.w_2")
WEIGHT = Address("weights", "", "layers.1.attention.o_proj")
IDS = torch.arange(21 * 5).reshape(21, 5)
STEPS = [0, 1000, 2000]


@pytest.fixture
def legacy(tmp_path: Path) -> Path:
    return write_run(tmp_path / "tiny-1", STEPS, tables={"train": IDS, "val": IDS[:5]})


@pytest.fixture
def history(legacy: Path) -> History:
    """The repository `lab/run` with the branch `tiny-1`, as pico-train would have pushed it."""
    history = History()
    history.commit("tiny-1", "Saving Tokenizer -- Step 0", {"tokenizer.json": b"{}"})
    config = (legacy / "training_config.yaml").read_bytes()
    history.commit("tiny-1", "Saving Training Config -- Step 0", {"training_config.yaml": config})
    for step in STEPS:
        push_step(history, "tiny-1", step, legacy / f"checkpoints/step_{step}")
    return history


@pytest.fixture
def hub(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"models/lab/run": history}).serving() as server, clients_of(monkeypatch, tmp_path):
        yield server


@pytest.fixture
def opened(hub: FakeHub) -> Callable[..., Run]:
    """A function that opens a branch of `lab/run` on the loopback Hub."""

    def open_it(branch: str = "tiny-1", repository: str = "lab/run") -> Run:
        return open_branch(Branch(repository, branch, hub.url))

    return open_it


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fetched(hub: FakeHub) -> list[str]:
    """The files whose content was asked for, in order."""
    return [path.split("/", 5)[5] for verb, path, _ in hub.log if verb == "GET" and "/resolve/" in path]


def cached(tmp_path: Path) -> list[str]:
    return sorted(
        path.name for path in (tmp_path / "hub_cache").rglob("*") if path.is_symlink() or ".incomplete" in path.name
    )


@pytest.mark.slow
def test_a_run_on_the_hub_is_the_same_as_on_disk(opened: Callable[..., Run], legacy: Path) -> None:
    there, here = opened(), Run.open(legacy)
    assert (there.name, there.steps, there.config) == ("tiny-1", STEPS, here.config)
    for step in here:
        assert list(there[step]) == list(here[step])
        for address, tensor in here[step].items():
            assert torch.equal(there[step][address], tensor), address
            assert there[step].digest(address) == here[step].digest(address)
        assert there[step].rows_digest("val") == here[step].rows_digest("val") is not None
        assert there[step].meta == here[step].meta
        assert there.evaluation(step) == {"paloma": 50.0 + step}
    assert there[0].read("config.json") == b'{"model_type": "pico_decoder"}'
    assert there[0].location(V0) == "hub:lab/run@tiny-1/step_0/learning_dynamics/train_activations.pt"


def test_only_what_is_needed_is_fetched_and_only_once(opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened()
    assert len(hub.requests("GET", "/commits/")) == 5  # 17 commits and the first, 4 to a page
    assert fetched(hub) == []
    assert torch.equal(run[1000][GRADIENT], content(1000)[GRADIENT])
    assert fetched(hub) == ["training_config.yaml", "learning_dynamics/val_gradients.pt"]
    hub.log.clear()
    assert torch.equal(opened()[1000][GRADIENT], content(1000)[GRADIENT])
    assert fetched(hub) == []
    assert len(hub.requests("GET", "/commits/")) == 1  # the newest commit is known


def test_new_commits_are_found_and_the_newest_of_one_title_counts(
    opened: Callable[..., Run], hub: FakeHub, history: History, legacy: Path, tmp_path: Path
) -> None:
    opened()
    again = write_run(tmp_path / "again", [5]) / "checkpoints/step_5"
    push_step(history, "tiny-1", 2000, again)
    push_step(history, "tiny-1", 3000, again)
    run = opened()
    assert run.steps == [0, 1000, 2000, 3000]
    assert torch.equal(run[2000][V0], content(5)[V0])
    assert torch.equal(run[1000][V0], content(1000)[V0])


def test_names_seen_in_one_step_need_no_file_of_another(opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened()
    assert run[0].select(kind="activations", split="train")
    hub.log.clear()
    for step in STEPS:
        (address,) = run[step].select(kind="activations", split="train", module=V0.module)
        assert address in run[step]
        assert run[step].digest(address)
        assert str(step) in run[step].location(address)
    assert fetched(hub) == []
    assert [path for verb, path, _ in hub.log if verb == "HEAD"] == []
    assert len(hub.requests("GET", "/tree/")) == 2  # the identity of each file not fetched


def test_weights_of_a_step_without_a_model_are_those_captured(
    opened: Callable[..., Run], history: History, legacy: Path
) -> None:
    files = files_of(legacy / "checkpoints/step_0")
    part = {name: data for name, data in files.items() if name.startswith("learning_dynamics/train_")}
    history.commit("bare", "Saving Learning Dynamics Data (train) -- Step 7", part)
    checkpoint = opened("bare")[7]
    assert checkpoint.location(WEIGHT).endswith("learning_dynamics/train_weights.pt")
    assert torch.equal(checkpoint[WEIGHT], content(0)[WEIGHT])
    assert GRADIENT not in checkpoint
    with pytest.raises(Missing, match=r"hub:lab/run@bare/step_7 has no gradients/val/.* \(it holds: .*, weights\)"):
        checkpoint[GRADIENT]
    with pytest.raises(
        StoreError, match=r"lab/run@bare: without training_config.yaml it is not known on how many devices"
    ):
        checkpoint[V0]


def test_files_that_a_commit_inherits_belong_to_another_step(
    opened: Callable[..., Run], history: History, legacy: Path
) -> None:
    """The last step of a run has no gradients of a batch; the tree of its commits still shows those of the step before."""
    history.commit("tiny-1", "Saving HF Model -- Step 3000", files_of(legacy / "checkpoints/step_2000"))
    checkpoint = opened()[3000]
    assert {address.kind for address in checkpoint} == {"weights"}
    assert V0 not in checkpoint


def test_prefetch_fetches_in_parallel_and_tells(
    opened: Callable[..., Run], hub: FakeHub, offline: Callable[[], None]
) -> None:
    run, told = opened(), list[tuple[int, int]]()
    run.prefetch(
        [*STEPS, 99], [V0, WEIGHT._replace(module="*")], rows=["val"], progress=lambda *state: told.append(state)
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    names = ["training_config.yaml", *["learning_dynamics/train_activations.pt", "model.safetensors"] * 3]
    rows = [
        "state.json",
        "data-00000-of-00002.arrow",
        "data-00001-of-00002.arrow",
    ]  # the same in each step: fetched once
    assert sorted(fetched(hub)) == sorted([*names, *(f"learning_dynamics/val_data/{name}" for name in rows)])
    offline()
    hub.log.clear()
    for step in STEPS:
        assert torch.equal(run[step][V0], content(step)[V0])
        assert torch.equal(run[step][WEIGHT], content(step)[WEIGHT])
        assert run[step].rows_digest("val") is not None
    assert hub.log == []


def test_prefetch_ends_with_the_first_file_that_cannot_be_had(opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened()
    hub.faults["val_gradients.pt"] = [404] * 1000
    with pytest.raises(
        StoreError, match=r"hub:lab/run@tiny-1: learning_dynamics/val_gradients.pt: could not be fetched"
    ):
        run.prefetch(STEPS, [GRADIENT])


@pytest.mark.parametrize("fault", [503, (429, {"Retry-After": "7"}), 500, "cut"])
def test_a_busy_server_is_tried_again(opened: Callable[..., Run], hub: FakeHub, fault: Any) -> None:
    hub.faults["/commits/"] = [fault, fault]
    run = opened()
    assert run.steps == STEPS
    hub.faults["/resolve/"] = [fault, fault, fault]
    assert torch.equal(run[0][V0], content(0)[V0])


def test_patience_ends_and_nothing_half_written_stays(opened: Callable[..., Run], hub: FakeHub, tmp_path: Path) -> None:
    run = opened()
    assert run.config
    there = cached(tmp_path)
    for fault, why in ((503, "503 Service Unavailable"), ("cut", ".*")):
        hub.faults["/resolve/"] = [fault] * 1000
        with pytest.raises(
            StoreError,
            match=rf"hub:lab/run@tiny-1: learning_dynamics/train_activations.pt: could not be fetched from .*{why}",
        ):
            run[0][V0]
        assert cached(tmp_path) == there
    hub.faults.clear()
    assert torch.equal(run[0][V0], content(0)[V0])


def test_a_list_of_commits_that_stops_midway_is_not_kept(
    opened: Callable[..., Run], hub: FakeHub, tmp_path: Path
) -> None:
    hub.faults["/commits/"] = [None, None, *[503] * 1000]
    with pytest.raises(StoreError, match=r"hub:lab/run@tiny-1: could not be fetched from the Hub .*503"):
        opened()
    assert not list((tmp_path / "pico_cache").rglob("*.json"))
    hub.faults.clear()
    assert opened().steps == STEPS


def test_what_is_not_there_is_explained(opened: Callable[..., Run], hub: FakeHub, history: History) -> None:
    with pytest.raises(StoreError, match=r"lab/run has no branch 'tiny-9' on the Hub \(there are: main, tiny-1\)"):
        opened("tiny-9")
    for repository in ("lab/nothing", "secret/run"):
        with pytest.raises(
            StoreError, match=rf"hub:{repository}@tiny-1: is neither a folder here nor a repository .*HF_TOKEN"
        ):
            opened(repository=repository)
    with pytest.raises(
        StoreError, match=r"hub:lab/run@main: no run here: none of its 1 commits is called 'Saving HF Model"
    ):
        opened("main")
    hub.faults["/commits/"] = [(401, {})]
    with pytest.raises(StoreError, match=r"hub:lab/run@tiny-1: the Hub \(.*\) refuses access \(401\); check HF_TOKEN"):
        opened()
    with pytest.raises(Missing, match=r"hub:lab/run@tiny-1 has no step 7 \(there are: 0, 1000, 2000\)"):
        opened()[7]
    with pytest.raises(Missing, match=r"step_0 has no file 'config.jsn'; did you mean 'config.json'"):
        opened()[0].read("config.jsn")
    with pytest.raises(Missing, match=r"step_0 has no rows of 'test'"):
        opened()[0].rows("test")


@pytest.mark.parametrize("place", ["hub:lab", "hub:", "hub:lab/run@", "hub:a/b/c@x"])
def test_a_place_of_another_form_is_said_so(place: str) -> None:
    with pytest.raises(StoreError, match="is not of the form hub:OWNER/REPOSITORY@BRANCH"):
        Run.open(place)


def test_offline_uses_what_was_fetched_and_says_what_was_not(
    opened: Callable[..., Run], hub: FakeHub, offline: Callable[[], None]
) -> None:
    opened()[1000][V0]
    offline()
    hub.log.clear()
    run = opened()
    assert (run.steps, run.config) == (STEPS, configuration())
    assert torch.equal(run[1000][V0], content(1000)[V0])
    with pytest.raises(
        StoreError, match=r"tiny-1: learning_dynamics/train_activations.pt: is not in the Hub's cache, and offl"
    ):
        run[0][V0]
    with pytest.raises(StoreError, match=r"hub:lab/run@other: offline mode .* this machine has never read this branch"):
        opened("other")
    assert hub.log == []


def test_damage_in_a_file_of_the_hub_is_named(opened: Callable[..., Run], history: History) -> None:
    history.commit(
        "bad",
        "Saving Learning Dynamics Data (train) -- Step 0",
        {"learning_dynamics/train_activations.pt": b"PK\3\4 no"},
    )
    with pytest.raises(StoreError, match=r"train_activations.pt: damaged, or not a file of torch.save"):
        opened("bad")[0][V0]


def test_it_is_read_and_never_written(opened: Callable[..., Run]) -> None:
    with pytest.raises(StoreError, match="hub:lab/run@tiny-1: a run on the Hub can be read and analyzed, not added to"):
        opened().commit(5, {}, meta={})


def test_it_travels_to_another_process(opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened()
    checkpoint = run[0]
    hub.log.clear()
    assert pickle.loads(pickle.dumps(run)).steps == STEPS
    assert torch.equal(pickle.loads(pickle.dumps(checkpoint))[V0], content(0)[V0])
    assert not hub.requests("GET", "/commits/")


def test_it_is_verified(opened: Callable[..., Run]) -> None:
    run = opened()
    assert [run.problems(step) for step in run.step_directories()] == [[], [], []]
    assert run[0].bytes_by_kind().keys() == {"weights", "activations", "gradients", "data", "other", "tokenizer"}


@pytest.fixture
def ours(tmp_path: Path, history: History) -> Run:
    """A run of ours, and its copy on the branch `ours`."""
    run = Run.create(tmp_path / "mine", {"model": {"d_model": 8}}, {})
    history.commit("ours", "Saving Training Config -- Step 0", {"training_config.yaml": b"model: {d_model: 8}\n"})
    for step in (0, 5):
        tables = {"train": {"input_ids": IDS + step}}
        checkpoint = run.commit(step, content(step), meta={"step": step}, tables=tables, weight_prefix="pico_decoder.")
        history.commit("ours", f"Saving HF Model -- Step {step}", files_of(checkpoint.path))
        history.commit("ours", f"Saving Evaluation Results -- Step {step}", {f"eval_results/step_{step}.json": b"{}"})
    return run


@pytest.mark.slow
def test_a_run_of_ours_is_ours_on_the_hub_too(ours: Run, opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened("ours")
    assert (run.steps, run.config) == ([0, 5], {"model": {"d_model": 8}})
    for step in run:
        assert {str(address): run[step].digest(address) for address in run[step]} == {
            str(address): ours[step].digest(address) for address in ours[step]
        }
    assert fetched(hub) == ["training_config.yaml", "manifest.json", "manifest.json"]
    for step in run:
        assert torch.equal(run[step][V0], content(step)[V0])
        assert run[step].rows_digest("train") == ours[step].rows_digest("train")
        assert run[step].meta == {"step": step}
        assert run[step].verify() == []
    assert run[5].location(V0) == "hub:lab/run@ours/step_5/learning_dynamics/train_activations.safetensors"


def test_a_run_of_ours_is_fetched_ahead(ours: Run, opened: Callable[..., Run], hub: FakeHub) -> None:
    run = opened("ours")
    run.prefetch([0, 5], [V0._replace(module="*.v_proj")], rows=["train", "val"])
    names = ["manifest.json", "learning_dynamics/train_activations.safetensors", "learning_dynamics/train_data.parquet"]
    assert sorted(fetched(hub)) == sorted(names * 2)


def test_a_step_of_ours_with_other_bytes_is_refused(ours: Run, opened: Callable[..., Run], history: History) -> None:
    files = files_of(ours[5].path)
    files["learning_dynamics/train_activations.safetensors"] = files["learning_dynamics/val_activations.safetensors"]
    history.commit("ours", "Saving HF Model -- Step 5", files)
    with pytest.raises(StoreError, match=r"run `pico verify`|holds more than [0-9,]+ bytes"):
        opened("ours")[5][V0]
    assert opened("ours").problems(5)
    history.commit("ours", "Saving HF Model -- Step 9", {})
    with pytest.raises(StoreError, match=r"hub:lab/run@ours/step_9: its commit .* holds step 5"):
        opened("ours")[9]


@pytest.mark.slow
def test_the_hub_of_the_environment_is_asked(hub: FakeHub, tmp_path: Path) -> None:
    code = (
        "import sys; from picolm.store import Run; run = Run.open('hub:lab/run@tiny-1');"
        "print(run.steps, len(run[1000].select(kind='gradients')))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

    def run(**changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment | changes, capture_output=True, text=True, timeout=120
        )

    assert run().stdout == "[0, 1000, 2000] 18\n"
    hub.log.clear()
    assert run(HF_HUB_OFFLINE="1").stdout == "[0, 1000, 2000] 18\n"
    assert hub.log == []
