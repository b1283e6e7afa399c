"""What does not fit is refused before it is allocated."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.errors import DataError, PicoError
from picolm.models import Decoder, DecoderConfig
from picolm.store import Run
from picolm.train.preview import preview
from picolm.train.resources import memory_bytes, parameter_count

SMALL = {
    "d_model": 24,
    "attention_n_heads": 4,
    "attention_n_kv_heads": 2,
    "activation_hidden_dim": 48,
    "vocab_size": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3, 64, 65, 100])
def test_parameters_are_counted_without_building_all_of_them(layers: int) -> None:
    config = DecoderConfig(n_layers=layers, **SMALL)
    assert parameter_count(config) == sum(p.numel() for p in Decoder(config).parameters())


TOO_LARGE = {
    "model.n_layers=1000000000": "n_layers=1000000000",
    "model.vocab_size=1000000000000": "vocab_size=1000000000000",
    "model.activation_hidden_dim=100000000000": "activation_hidden_dim=100000000000",
    "model.d_model=4000000000": "d_model=4000000000",
    "model.vocab_size=9000000000000000000": "vocab_size=9000000000000000000",
}


@pytest.mark.parametrize("word", TOO_LARGE)
def test_a_model_that_no_memory_holds_is_refused_at_once(train: Callable[..., Run], word: str) -> None:
    begun = time.process_time()
    with pytest.raises(PicoError, match=rf"^model: .*{TOO_LARGE[word]}"):
        train(word)
    assert time.process_time() - begun < 20  # it is not built


@pytest.mark.parametrize("word", ["model.n_layers=1000000000", "model.vocab_size=9000000000000000000"])
def test_a_dry_run_of_it_is_refused_too(make_config: Callable[..., Any], word: str) -> None:
    with pytest.raises(PicoError, match="too large to be built"):
        preview(make_config(word))


def test_the_memory_of_a_cgroup_counts(tmp_path: Path) -> None:
    whole = memory_bytes(tmp_path)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert memory_bytes(tmp_path) == whole
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000000\n")
    assert memory_bytes(tmp_path) == 1e6


@pytest.mark.parametrize("token", [-1, -100, 64])
def test_a_held_out_row_with_an_impossible_id_is_named(
    train: Callable[..., Run], toy_data: Path, tmp_path: Path, token: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    held_out = pq.read_table(toy_data / "val-00000-of-00001.parquet")["input_ids"].to_pylist()
    held_out[7][3] = token
    (tmp_path / "few").mkdir()
    pq.write_table(pa.table({"input_ids": held_out}), tmp_path / "few" / "val-00000-of-00001.parquet")
    with pytest.raises(DataError, match=rf"val-00000-of-00001.parquet.* row 7.*{token}"):
        train(f"evaluation.paloma.dataset_name={tmp_path}/few")


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["123456789012345678901234567890", "18446744073709551616"])
def test_a_huge_seed_is_a_seed(train: Callable[..., Run], seed: str) -> None:
    run = train(*(f"training.seeds.{name}={seed}" for name in ("init", "data", "noise")), "data.dataset.shuffle=true")
    assert math.isfinite(run.latest().meta["loss"])


@pytest.mark.slow
def test_an_unknown_home_is_told(make_config: Callable[..., Any], tmp_path: Path) -> None:
    code = (
        "import pwd\ndef unknown(uid): raise KeyError(uid)\npwd.getpwuid = unknown\nfrom picolm.cli import main\nmain()"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "PICO_CACHE")}
    make_config()
    for word in ("data.dataset.name=~/rows", "data.dataset.name=embedded:state_of_the_union"):
        done = subprocess.run(
            [sys.executable, "-c", code, "train", str(tmp_path / "toy.yaml"), word],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode in (1, 2)
        assert "Traceback" not in done.stderr
        assert "home folder is not known; set HOME" in done.stderr
