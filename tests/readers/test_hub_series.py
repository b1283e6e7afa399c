"""A series on the Hub, a branch for each step: verified by the Hub's digests alone, and read file by file."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save
from tests.hub_server import FakeHub, History, ask, clients_of

from picolm.address import Address
from picolm.analyze.config import AnalysisConfig
from picolm.analyze.engine import analyze
from picolm.cli import main
from picolm.errors import PicoError, StoreError
from picolm.schema import load
from picolm.store import Run

STEPS = [*range(0, 190, 10), 1000]
CONFIG = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
          "vocab_size": 11, "intermediate_size": 12}  # fmt: skip
SHAPES = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
COPIES, MIXED = (20, 30, 150), 70


def shards(step: int) -> dict[str, bytes]:
    """The weights of a step in three files, with their index."""
    generator = torch.Generator().manual_seed(step)
    tensors = {"model.embed_tokens.weight": torch.randn(11, 8, generator=generator)}
    for layer in range(2):
        for name, shape in SHAPES.items():
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.randn(shape, generator=generator)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for number, (key, tensor) in enumerate(tensors.items()):
        files.setdefault(f"model-{number % 3 + 1:05}-of-00003.safetensors", {})[key] = tensor
    places = {key: file for file, held in files.items() for key in held}
    index = {"model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": places}).encode()}
    return index | {file: save(held) for file, held in files.items()}


@pytest.fixture(scope="module")
def history() -> History:
    """20 branches; three of them are copies of the last, and one has a shard of it."""
    history = History()
    for step in STEPS:
        files = shards(STEPS[-1] if step in COPIES else step)
        if step == MIXED:
            first = "model-00001-of-00003.safetensors"
            files[first] = shards(STEPS[-1])[first]
        history.commit(f"step{step}", "as published", {"config.json": json.dumps(CONFIG).encode(), **files})
    history.commit("main", "a card", {"README.md": b"# A series"})
    return history


@pytest.fixture
def hub(history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub({"models/lab/series": history}).serving() as server, clients_of(monkeypatch, tmp_path):
        ask(monkeypatch, server.url)
        yield server


def fetched(hub: FakeHub) -> Counter[str]:
    return Counter(path.rsplit("/", 1)[1] for verb, path, _ in hub.log if verb == "GET" and "/resolve/" in path)


def test_the_steps_are_its_branches(hub: FakeHub) -> None:
    run = Run.open("hub:lab/series")
    assert (run.name, run.steps) == ("series", STEPS)


def test_copies_and_mixed_shards_are_named_without_a_download(hub: FakeHub) -> None:
    run = Run.open("hub:lab/series")
    problems = {step: run.problems(step) for step in run}
    assert {step for step, found in problems.items() if found} == {*COPIES, MIXED}
    for step in COPIES:
        assert problems[step] == [
            f"hub:lab/series@step{step}: holds the weights of step 1000 (the last one), to the byte"
        ]
    assert problems[MIXED] == [
        "hub:lab/series@step70: mixes two steps: model-00001-of-00003.safetensors of step 1000 (the last one) with 2 other "
        "file(s)"
    ]
    assert fetched(hub) == {}


@pytest.mark.slow
def test_an_analysis_fetches_what_it_needs_once_and_goes_on_after_the_server_failed(
    hub: FakeHub, tmp_path: Path
) -> None:
    def values(steps: str) -> Any:
        (tmp_path / "a.yaml").write_text(
            f"steps: {steps}\nmetrics: [{{metric_name: norm, components: [{{component_name: ov_circuit}}]}}]\n"
            f"monitoring: {{output_dir: {tmp_path}/results}}\n"
        )
        return analyze(load(tmp_path / "a.yaml", AnalysisConfig), ["hub:lab/series"])

    hub.faults["model-00002"] += [503, "cut"]
    outcome = values("[0, 10, 40]")
    assert outcome.computed == 3 * 2 * 4
    once = fetched(hub)
    assert values("[0, 10, 40]").computed == 0
    assert fetched(hub) == once
    assert (once["model-00001-of-00003.safetensors"], once["model-00003-of-00003.safetensors"]) == (3, 3)
    assert (once["config.json"], once["model.safetensors.index.json"]) == (1, 1)  # the same content in each branch
    weights = Run.open("hub:lab/series")[40]
    value = weights[Address("weights", "", "model.layers.1.self_attn.v_proj")]
    assert torch.equal(value, _tensor(40, "model.layers.1.self_attn.v_proj.weight"))


CIRCUITS = "metrics: [{metric_name: norm, components: [{component_name: ov_circuit}]}]"
COMPARED = CIRCUITS.replace("norm,", "subspace_overlap, k: 2, target: {checkpoint: TARGET},")


def shards_on_disk(tmp_path: Path) -> list[str]:
    """The weights in the Hub's cache: large files, whatever names them."""
    cache = Path(constants.HF_HUB_CACHE)
    return [blob.name for blob in cache.glob("models--*/blobs/*") if len(blob.name) == 64 and blob.stat().st_size > 300]


@pytest.fixture
def listed(hub: FakeHub) -> str:
    """A place of three steps: two branches of the series, and a repository of its own."""
    other = History()
    other.commit("main", "weights", {"config.json": json.dumps(CONFIG).encode(), **shards(7)})
    hub.repositories["models/lab/series-step-7"] = other
    return "hub:lab/series@step40,lab/series-step-7,hub:lab/series@step1000"


@pytest.mark.slow
def test_checkpoints_that_are_named_one_by_one_are_a_series(listed: str, hub: FakeHub, tmp_path: Path) -> None:
    run = Run.open(listed)
    assert (run.name, run.steps) == ("series", [7, 40, 1000])
    assert [run.problems(step) for step in run] == [[], [], []]
    assert not [name for name in fetched(hub) if name.endswith(".safetensors")]
    (tmp_path / "a.yaml").write_text(f"{CIRCUITS}\nmonitoring: {{output_dir: {tmp_path}/results}}\n")
    config = load(tmp_path / "a.yaml", AnalysisConfig)
    outcome = analyze(config, [listed], keep_downloads=0)
    assert {row["step"] for row in outcome.rows} == {7, 40, 1000}
    assert shards_on_disk(tmp_path) == []
    name = Address("weights", "", "model.layers.1.self_attn.v_proj")
    assert torch.equal(run[7][name], _tensor(7, "model.layers.1.self_attn.v_proj.weight"))


@pytest.mark.slow
def test_a_description_names_places_on_the_hub_and_here(listed: str, hub: FakeHub, tmp_path: Path) -> None:
    here = tmp_path / "mine" / "start"
    here.mkdir(parents=True)
    for name, content in ({"config.json": json.dumps(CONFIG).encode()} | shards(3)).items():
        (here / name).write_bytes(content)
    (here.parent / "series.yaml").write_text(
        "steps: {start: 3, 'hub:lab/series@step40': 4, 'hub:lab/series-step-7': 5}\n"
    )
    run = Run.open(here.parent)
    assert run.steps == [3, 4, 5]
    name = "model.layers.0.self_attn.k_proj"
    for step, seed in ((3, 3), (4, 40), (5, 7)):
        assert torch.equal(run[step][Address("weights", "", name)], _tensor(seed, f"{name}.weight"))
    assert [run.problems(step) for step in run] == [[], [], []]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("hub:lab/series@step40,lab/series@main", "hub:lab/series@main: no step in its name"),
        ("hub:lab/series@step40,lab/series-step-40", "are both step 40"),
        ("hub:lab/series@step40,lab/series@step41", "hub:lab/series@step41: there is no such branch, tag or commit"),
        ("here/step1,here/step2", "here/step1: there is no such folder"),
    ],
)
def test_a_place_in_a_list_that_cannot_be_read_is_named(hub: FakeHub, place: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        list(Run.open(place)[41])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metrics", "keep", "most"),
    [
        (CIRCUITS, 0, 1),  # that which is fetched meanwhile
        (CIRCUITS, 2, 3),
        (COMPARED.replace("TARGET", "first"), 0, 2),
        (COMPARED.replace("TARGET", "previous"), 0, 2),
        (CIRCUITS, None, 20),
    ],
)
def test_the_disk_is_bounded_and_nothing_is_fetched_twice(
    hub: FakeHub, tmp_path: Path, metrics: str, keep: int | None, most: int
) -> None:
    (tmp_path / "a.yaml").write_text(f"{metrics}\nmonitoring: {{output_dir: {tmp_path}/results}}\n")
    seen: list[int] = []
    config = load(tmp_path / "a.yaml", AnalysisConfig)
    outcome = analyze(
        config, ["hub:lab/series"], keep_downloads=keep, progress=lambda *_: seen.append(len(shards_on_disk(tmp_path)))
    )
    assert len(outcome.rows) >= 19 * 8
    copies = 3 * len(COPIES) + 1  # files that the last step holds too
    assert max(seen) <= 3 * most + (
        0 if keep is None else copies // copies * 3
    )  # the last step's, which copies hold early
    weights = {name: count for name, count in fetched(hub).items() if name.endswith(".safetensors")}
    assert sum(weights.values()) == 3 * len(STEPS) - copies
    before = len(hub.log)
    again = analyze(config, ["hub:lab/series"], keep_downloads=keep)
    assert again.computed == 0
    assert again.rows == outcome.rows
    assert not [path for _, path, _ in hub.log[before:] if ".safetensors" in path]


@pytest.mark.slow
def test_what_was_in_the_cache_before_stays(hub: FakeHub, tmp_path: Path) -> None:
    Run.open("hub:lab/series")[40][Address("weights", "", "model.embed_tokens")]
    before = set(shards_on_disk(tmp_path))
    assert before
    (tmp_path / "a.yaml").write_text(f"steps: [0, 40]\n{CIRCUITS}\nmonitoring: {{output_dir: {tmp_path}/results}}\n")
    analyze(load(tmp_path / "a.yaml", AnalysisConfig), ["hub:lab/series"], keep_downloads=0)
    assert set(shards_on_disk(tmp_path)) == before


def _tensor(step: int, key: str) -> torch.Tensor:
    from safetensors.torch import load as parse

    return next(
        held[key]
        for name, data in shards(step).items()
        if name.endswith("safetensors") and key in (held := parse(data))
    )


def test_what_was_read_once_is_read_offline(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    name = Address("weights", "", "model.embed_tokens")
    before = Run.open("hub:lab/series")[50][name]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    run = Run.open("hub:lab/series")
    assert run.steps == STEPS
    assert torch.equal(run[50][name], before)
    assert len(hub.log) == asked


def test_a_repository_without_steps_is_told_apart(hub: FakeHub, history: History) -> None:
    other = History()
    other.commit("release", "weights", {"config.json": b"{}"})
    hub.repositories["models/lab/other"] = other
    with pytest.raises(StoreError, match=r"no run here, and no series .*\(branches: main, release\)"):
        Run.open("hub:lab/other")


def test_a_series_is_not_pulled(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pico", "pull", "lab/series"])
    with pytest.raises(SystemExit):
        main()
    assert "is not pulled: it is read where it is, as --run hub:lab/series" in capsys.readouterr().err


def test_two_branches_of_one_step_are_an_error(hub: FakeHub) -> None:
    other = History()
    for name in ("stage1-step5", "stage2-step5"):
        other.commit(name, "weights", {"config.json": name.encode()})
    hub.repositories["models/lab/stages"] = other
    with pytest.raises(StoreError, match=re.escape("the branches stage1-step5 and stage2-step5 are both step 5")):
        Run.open("hub:lab/stages")


def test_a_repository_that_was_renamed_is_read_under_its_old_name(hub: FakeHub, history: History) -> None:
    hub.repositories["models/lab/moved"] = hub.repositories.pop("models/lab/series")
    hub.renamed["lab/series"] = "lab/moved"
    run = Run.open("hub:lab/series")
    assert run.steps == STEPS
    assert run[0][Address("weights", "", "model.embed_tokens")].shape == (11, 8)


@pytest.mark.parametrize(
    ("path", "fault", "message"),
    [
        ("/refs", (403, {"X-Error-Code": "GatedRepo"}), r"access is restricted; ask for it on its page on the Hub"),
        ("/resolve/", (403, {"X-Error-Code": "GatedRepo"}), r"access is restricted; ask for it on its page on the Hub"),
        ("/refs", (404, {"X-Error-Code": "RepoNotFound"}), r"is neither a folder here nor a repository on the Hub"),
    ],
)
def test_a_repository_that_may_not_be_read_is_a_message(path: str, fault: Any, message: str, hub: FakeHub) -> None:
    hub.faults[path] = [fault] * 20
    with pytest.raises(PicoError, match=rf"^hub:lab/series@.*{message}"):
        _ = Run.open("hub:lab/series")[0][Address("weights", "", "model.embed_tokens")]
