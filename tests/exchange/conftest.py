"""A loopback Hub that takes runs, and small runs to send."""

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.hub_server import ask, clients_of
from tests.hub_writing import WritableHub
from tests.picotrain import content
from tests.planted import TOKEN

from picolm.store import Run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """A Hub that this process is logged in to."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    warnings.filterwarnings("ignore", message="Use 'content=")  # huggingface_hub's own call of httpx
    with WritableHub(tmp_path / "hub", TOKEN).serving() as server, clients_of(monkeypatch, tmp_path):
        ask(monkeypatch, server.url)
        yield server


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """A function from a name and steps to a run with `content(step)` in each of them."""

    def make(name: str = "toy", steps: tuple[int, ...] = (0, 2, 4)) -> Run:
        config = {"model": {"model_type": "pico_decoder", "d_model": 8, "n_layers": 11}, "training": {"max_steps": 4}}
        run = Run.create(
            tmp_path / "runs" / name, config, {"seeds": {"init": 1}, "data": {"name": "lab/rows", "rows": 9}}
        )
        for step in steps:
            commit(run, step)
        return run

    return make


def commit(run: Run, step: int, **options: Any) -> None:
    """What a training leaves at a step: its line of metrics, its evaluation, and a checkpoint."""
    run.append_metrics({"step": step, "train/loss": 5.0 - step / 2})
    run.write_evaluation(step, {"paloma": 50.0 + step})
    tensors = content(step) | {
        address._replace(kind="exp_avg", split=""): torch.ones(2) for address in list(content(step))[:2]
    }
    texts = {"config.json": '{"model_type": "pico_decoder"}', "tokenizer.json": "{}", "tokenizer_config.json": "{}"}
    rows = {"train": {"input_ids": torch.arange(21 * 5).reshape(21, 5).tolist()}}
    run.commit(step, tensors, meta={"step": step}, texts=texts, tables=rows, **options)


def digests(run: Run) -> dict[tuple[int, str], str]:
    """The digest of each tensor and of each file of all steps of a run."""
    found = {(step, str(address)): run[step].digest(address) for step in run for address in run[step]}
    return found | {(step, name): record.sha256 for step in run for name, record in run[step].files.items()}  # type: ignore[union-attr]


def client_environment(hub: WritableHub, folder: Path, token: str = TOKEN) -> dict[str, str]:
    """The environment of another process that uses the Hub, with caches of its own."""
    own = {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(folder / "hf"), "PICO_CACHE": str(folder / "pico"), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000",
    }  # fmt: skip
    return {**os.environ, **own}
