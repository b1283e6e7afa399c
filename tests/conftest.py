"""Small corpora, models and runs that the tests share."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of the test run in parallel already; before numpy reads it

# isort: split
import numpy as np
import pytest
import torch
from hypothesis import settings
from tests.planted import SECRETS, holders, told

from picolm.registry import code_policy, set_code_policy

settings.register_profile("tests", deadline=None)  # a busy machine is no error
settings.load_profile("tests")
os.environ.update(SECRETS)
os.environ["HF_HUB_OFFLINE"] = "1"
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell starts what runs in its background so, and children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["WANDB_MODE"] = "offline"
os.fsync = lambda descriptor: None  # no test cuts the power, and a tenth of their time was spent waiting for the disk

VOCABULARY = 64
LENGTH = 16


@pytest.fixture(autouse=True)
def no_secret_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """In any file that a test leaves."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    assert folder is None or holders(folder) == []


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands that run in the process of the tests set variables for their children, trust, the number of threads, and where the
    log goes, and import modules of folders that only this test has: the next one may have others of the same name.
    """
    log = logging.getLogger("picolm")
    log.propagate = True  # to the handler of `caplog`
    log.setLevel(logging.NOTSET)
    environment, policy, modules = dict(os.environ), code_policy(), set(sys.modules)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:  # sums on a CPU are split by threads
        torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        module = sys.modules[name]
        place = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
        if place is not None and Path(place).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]
    os.environ.clear()
    os.environ.update(environment)
    set_code_policy(policy)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No secret is said by a test either, on its outputs, in the log, or in the message of a failure."""
    report = yield
    said = told(report.longreprtext + report.capstdout + report.capstderr + report.caplog)
    if said:
        report.outcome, report.sections = "failed", []
        report.longrepr = f"{item.nodeid} says what stands in {', '.join(said)}; the report is withheld"
    return report


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards, `train` and `val`, in which every second token repeats the one before it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("toy_data")
    generator = np.random.default_rng(0)
    for split, rows in (("train", 120), ("val", 12)):
        tokens = generator.integers(0, VOCABULARY, (rows, LENGTH + 1)).astype(np.int32)
        tokens[:, 1::2] = tokens[:, :-1:2]
        table = pa.table({"input_ids": list(tokens), "source": ["even" if i % 2 == 0 else "odd" for i in range(rows)]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def make_config(toy_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function from `key=value` overrides to the configuration of a tiny run in `tmp_path`, on one CPU in float32."""
    from picolm.schema import load
    from picolm.train.config import schema_for

    file = tmp_path / "toy.yaml"
    file.write_text(f"""
data: {{dataset: {{name: {toy_data}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: {VOCABULARY}}}}}
model: {{d_model: 24, n_layers: 2, attention_n_heads: 4, attention_n_kv_heads: 2, activation_hidden_dim: 48,
  vocab_size: {VOCABULARY}, max_seq_len: {LENGTH}}}
training:
  max_steps: 6
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 2}}
checkpointing: {{run_name: toy, runs_dir: {tmp_path}/runs, save_every_n_steps: 2}}
monitoring: {{logging: {{log_every_n_steps: 2}}}}
""")

    def make(*overrides: str) -> Any:
        return load(file, schema_for, overrides)

    return make


@pytest.fixture
def train(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """A function from overrides to the finished run."""
    from picolm.store import Run
    from picolm.train import run_training

    def run(*overrides: str) -> Any:
        config = make_config(*overrides)
        run_training(config)
        return Run.open(Path(config.checkpointing.runs_dir) / config.checkpointing.run_name)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 3 MB; only root can mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount")
    if not mounted or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]).returncode:
        pytest.skip("a small disk cannot be mounted here (this needs root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
