"""Sizes that a stored configuration states are held against the shapes that are stored, before memory is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from picolm.errors import PicoError
from picolm.formats import export
from picolm.formats.importing import import_model
from picolm.store import Run
from picolm.train.job import Due
from picolm.train.replay import replay
from picolm.train.sample import load_model

SIZES = [("n_layers", 10**9, "of more tensors than the"), ("d_model", 2**24, "embedding_proj.weight is stored as"),
         ("vocab_size", 10**12, "embedding_proj.weight is stored as"), ("activation_hidden_dim", 2**62, "cannot be built"),
         ("d_model", 2**62, "cannot be built")]  # fmt: skip


@pytest.fixture
def run(train: Callable[..., Run]) -> Run:
    return train("training.max_steps=2")


@pytest.mark.slow
@pytest.mark.parametrize(("key", "size", "message"), SIZES)
def test_a_size_of_a_stored_configuration_is_not_believed(
    run: Run, key: str, size: int, message: str, tmp_path: Path
) -> None:
    config = run.config
    config["model"][key] = size
    (run.path / "training_config.yaml").write_text(yaml.safe_dump(config))
    uses: list[Callable[[Run], Any]] = [
        load_model,
        lambda run: replay(run, [1], kinds=Due(weights=True)),
        lambda run: export(run, None, "torch", tmp_path / "exported"),
    ]
    for use in uses:
        with pytest.raises(PicoError, match=message):
            use(Run.open(run.path))


@pytest.mark.slow
@pytest.mark.parametrize("size", [10**9, 2**62])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
def test_a_size_of_a_model_to_be_imported_is_not_believed(run: Run, key: str, size: int, tmp_path: Path) -> None:
    import json

    export(run, None, "llama", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: size, "head_dim": None}))
    with pytest.raises(PicoError, match=r"holds|hold|shape|says|cannot"):
        import_model(str(tmp_path / "model"), tmp_path / "imported", None)


@pytest.mark.slow
def test_fewer_layers_than_are_stored_can_be_asked_for_as_before(run: Run) -> None:
    config = run.config
    config["model"]["n_layers"] = 1
    (run.path / "training_config.yaml").write_text(yaml.safe_dump(config))
    assert len(load_model(Run.open(run.path)).layers) == 1
