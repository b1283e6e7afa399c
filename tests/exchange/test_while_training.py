"""The whole way: a run is sent while it trains and is killed, by a Hub that fails in every way; it arrives, and is the run."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.exchange.conftest import client_environment, digests
from tests.hub_server import Chaos
from tests.hub_writing import WritableHub
from tests.planted import TOKEN, holders

from picolm.store import Run

ANALYSIS = """
steps: {{start: 0, end: {last}, step: {every}}}
metrics:
- {{metric_name: norm, norm_type: frobenius, components: [{{data_type: gradients, layer_suffixes: swiglu.w_2}}]}}
- {{metric_name: cka, target_checkpoint: {last}, data_split: val, components: [{{data_type: activations,
    layer_suffixes: attention.o_proj}}]}}
- {{metric_name: gini, components: [{{data_type: weights, layer_suffixes: attention.v_proj}}]}}
monitoring: {{output_dir: {folder}}}
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WritableHub]:
    with WritableHub(tmp_path / "hub", TOKEN).serving() as server:
        yield server


@pytest.fixture
def pico(server: WritableHub, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """A function that starts a command of its own; its output goes to a file in `tmp_path/said`."""
    (tmp_path / "said").mkdir()

    def start(*words: str, client: str = "one") -> subprocess.Popen[str]:
        with open(tmp_path / "said" / f"{len(list((tmp_path / 'said').iterdir()))}.txt", "w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "picolm", *words], stdout=output, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
                env=client_environment(server, tmp_path / client), start_new_session=True,
            )  # fmt: skip

    return start


def finish(process: subprocess.Popen[str], limit_s: float = 150) -> int:
    try:
        return process.wait(limit_s)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def said(tmp_path: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((tmp_path / "said").iterdir()))


def table(folder: Path) -> pd.DataFrame:
    (path,) = folder.rglob("results.parquet")
    return pd.read_parquet(path)


def wait_for(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture
def settings(make_config: Callable[..., Any], tmp_path: Path) -> list[str]:
    make_config()  # writes toy.yaml
    return [
        str(tmp_path / "toy.yaml"), "checkpointing.save_to_hf=true", "checkpointing.hf_checkpoint.repo_id=lab/run",
        "training.max_steps=400", "checkpointing.save_every_n_steps=200", "monitoring.logging.log_every_n_steps=50",
    ]  # fmt: skip


def holders_of_the_token(tmp_path: Path, server: WritableHub) -> list[str]:
    return holders(tmp_path) + [raw[:80].decode() for raw in server.raw if TOKEN.encode() in raw]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_run_arrives_whatever_fails(
    pico: Callable[..., Any], server: WritableHub, settings: list[str], tmp_path: Path, seed: int
) -> None:
    server.chaos = Chaos(seed, rate=0.12, most=30)
    path = tmp_path / "runs/toy"
    trainer = pico("train", *settings)
    wait_for(lambda: (path / "checkpoints/step_200").exists())
    os.killpg(trainer.pid, signal.SIGKILL)
    trainer.wait()
    assert finish(pico("train", *settings)) == 0
    run = Run.open(path)
    assert run.steps == [0, 200, 400]
    for _ in range(6):
        if finish(pico("push", str(path))) == 0:
            break
    assert server.chaos.seen
    server.chaos = None
    assert finish(pico("push", str(path))) == 0, said(tmp_path)
    assert "lab/run@toy: nothing was missing" in said(tmp_path)

    assert finish(pico("pull", "lab/run@toy", "--out", "elsewhere", client="two")) == 0, said(tmp_path)
    pulled = Run.open(tmp_path / "elsewhere")
    assert digests(pulled) == digests(run)
    assert {step: pulled[step].manifest.digest for step in pulled} == {step: run[step].manifest.digest for step in run}  # type: ignore[attr-defined]
    assert (pulled.metrics(), pulled.config, pulled.environment) == (run.metrics(), run.config, run.environment)
    assert [pulled.problems(step) for step in pulled] == [[], [], []]

    for name in ("here", "there"):
        (tmp_path / f"{name}.yaml").write_text(ANALYSIS.format(last=400, every=200, folder=tmp_path / name))
    assert finish(pico("analyze", "here.yaml", "--run", str(path))) == 0, said(tmp_path)
    assert finish(pico("analyze", "there.yaml", "--repo_id", "lab/run", "--branch", "toy", client="three")) == 0, said(
        tmp_path
    )
    pd.testing.assert_frame_equal(table(tmp_path / "here"), table(tmp_path / "there"), check_exact=True)
    assert len(table(tmp_path / "here")) > 10
    assert holders_of_the_token(tmp_path, server) == []


@pytest.mark.slow
def test_a_hub_that_is_away_neither_slows_nor_stops_the_run(
    pico: Callable[..., Any], server: WritableHub, settings: list[str], tmp_path: Path
) -> None:
    server.down = True
    trainer = pico("train", *settings, "checkpointing.keep.optimizer=last 1")
    wait_for(lambda: "Not on the Hub yet" in said(tmp_path) or trainer.poll() is not None, 150)
    assert finish(trainer) == 0
    words = said(tmp_path)
    assert words.count("Steps cannot be sent to the Hub now; they are kept and tried again beside the training") == 1
    assert "3 steps (0, 200, 400)" in words
    assert f"To send the rest:  pico push {tmp_path}/runs/toy" in words
    assert len(re.findall(r"\b503 (Server|Service)", words)) <= 3  # the words of a Hub that is away, not each try's
    assert "Traceback" not in words
    server.down = False
    assert finish(pico("push", str(tmp_path / "runs/toy"))) == 0, said(tmp_path)
    assert finish(pico("pull", "lab/run@toy", "--out", "elsewhere", client="two")) == 0, said(tmp_path)
    pulled = Run.open(tmp_path / "elsewhere")
    assert [pulled.problems(step) for step in pulled] == [[], [], []]
    here = Run.open(tmp_path / "runs/toy")
    assert "optimizer.safetensors" not in here[200].files
    assert "optimizer.safetensors" in pulled[200].files  # held for the Hub when keep deleted it here
    assert not (tmp_path / "runs/toy/.hub/step_0").exists()
    assert holders_of_the_token(tmp_path, server) == []
