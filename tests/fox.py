"""A run whose model predicts with confidence, and whose tokenizer reads English."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from picolm.models import StateSpace, find_model
from picolm.store import Run

TEXT = (
    "The quick brown fox jumps over the lazy dog; the dog sleeps. It's 1790 again, naïve and cold!\n\nWe don't know. "
    * 9
)
STEP = 7


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> "object":
    """A function from the element type of the weights to a run with one step."""
    from picolm.data.tokenizer import train_tokenizer, write_tokenizer
    from picolm.schema import plain
    from picolm.train.config import schema_for
    from picolm.train.state import weight_address
    from picolm.train.text import Text, checkpoint_files

    def make(dtype: torch.dtype = torch.float32, **model: object) -> Run:
        folder = tmp_path_factory.mktemp("lab")
        write_tokenizer(train_tokenizer([TEXT], 300), folder, 64)
        shape = {"d_model": 64, "n_layers": 3, "attention_n_heads": 4, "attention_n_kv_heads": 2, "vocab_size": 320,
                 "activation_hidden_dim": 96, "max_seq_len": 64, "position_emb_theta": 5000.0}  # fmt: skip
        known = {field.name for field in fields(find_model(model.get("model_type", "pico_decoder")).Config)}
        shape = {key: value for key, value in shape.items() if key in known}
        raw = {"model": shape | model, "data": {"tokenizer": {"vocab_size": 300}}}
        config = schema_for(raw).model_validate(raw)
        decoder = find_model(config.model.model_type)(config.model)
        decoder.init_parameters(torch.Generator().manual_seed(3))
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(8.0) if parameter.ndim == 2 else parameter.add_(
                    torch.linspace(-0.5, 0.5, len(parameter))
                )
        decoder.to(dtype)
        run = Run.create(folder / "fox", plain(config), {})
        run.commit(
            STEP,
            {weight_address(name): tensor for name, tensor in decoder.state_dict().items()},
            meta={"step": STEP},
            texts=checkpoint_files(decoder, Text(folder / "tokenizer.json", 320)),
            weight_prefix=decoder.state_prefix,
        )
        return run

    return make


@pytest.fixture(scope="session")
def fox(make_run: "object") -> Run:
    return make_run()  # type: ignore[operator]


@pytest.fixture(scope="session")
def state_space_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with one step of a state space model, all of whose weights are random."""
    from picolm.schema import plain
    from picolm.train.config import schema_for
    from picolm.train.state import weight_address

    shape = {"model_type": "pico_statespace", "d_model": 24, "n_layers": 2, "vocab_size": 61, "max_seq_len": 40,
             "state_size": 5, "head_dim": 8, "n_groups": 3}  # fmt: skip
    raw = {"model": shape, "data": {"tokenizer": {"vocab_size": 61}}}
    config = schema_for(raw).model_validate(raw)
    model = StateSpace(config.model)
    generator = torch.Generator().manual_seed(3)
    model.init_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    run = Run.create(tmp_path_factory.mktemp("lab") / "ssm", plain(config), {})
    tensors = {weight_address(name): tensor for name, tensor in model.state_dict().items()}
    run.commit(STEP, tensors, meta={"step": STEP}, texts={"anatomy.json": model.anatomy().to_json()})
    return run


@pytest.fixture
def prompt(fox: Run) -> torch.Tensor:
    """[1, T] tokens of text."""
    from picolm.data.tokenizer import load_tokenizer

    return torch.tensor([load_tokenizer(fox.step_path(STEP)).encode("The lazy fox doesn't").ids])


def same(a: Run, b: Run, step: int = STEP) -> bool:
    """Whether two runs hold the same bits of weights at a step."""
    from picolm.store.checkpoint import stored_weights_digest

    return stored_weights_digest(a[step]) == stored_weights_digest(b[step])


def folder_of(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
