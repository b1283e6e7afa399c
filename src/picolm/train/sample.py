"""A model out of a run, and text out of the model."""

from dataclasses import dataclass
from typing import Any

import torch

from picolm.errors import PicoError
from picolm.models import MODELS
from picolm.store import Checkpoint, Run
from picolm.train.config import TrainConfig, stored_config
from picolm.train.state import State
from picolm.trusted import parse_json


def config_of(run: Run) -> TrainConfig:
    """The typed configuration of a run. Raises PicoError where it names code of its own, unless that is trusted."""
    return stored_config(run.config, str(run.path))


def checkpoint_at(run: Run, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the latest that holds weights. Raises PicoError, naming the steps there are."""
    if step is not None:
        checkpoint = run[step]
        if not checkpoint.select(kind="weights"):
            holding = [number for number in run if run[number].select(kind="weights")]
            there = ", ".join(map(str, holding)) or "none"
            raise PicoError(f"{checkpoint.path} was saved without weights (there are weights of steps: {there})")
        return checkpoint
    for number in reversed(run.step_directories()):  # the newest first: each manifest costs a file to open
        if number in run and (newest := run[number]).select(kind="weights"):
            return newest
    raise PicoError(f"{run.path} has no checkpoint with weights yet")


def load_model(run: Run, step: int | None = None) -> Any:
    """The model of a run with the weights of `step` (default: the latest), in float32 on the CPU."""
    config = config_of(run).model
    model = MODELS.get(config.model_type)(config)
    State(model, []).restore_weights(checkpoint_at(run, step))
    return model.eval()


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json` of a step, as far as it is used here."""

    eos_token_id: int | None = None


def end_of_text(checkpoint: Checkpoint) -> int | None:
    """Return the id of the token that ends a text; None where the checkpoint does not say. Raises PicoError for no id."""
    name = "generation_config.json"
    if name not in checkpoint.files:
        return None
    return parse_json(checkpoint.read(name), f"{checkpoint.path / name}", GenerationConfig).eos_token_id


def sample(place: str, step: int | None, prompt: str, *, max_new_tokens: int, seed: int, **options: Any) -> str:
    """The prompt and what the model writes after it, as text. Raises PicoError where the prompt does not fit."""
    from tokenizers import Tokenizer

    run = Run.open(place)
    checkpoint = checkpoint_at(run, step)
    if "tokenizer.json" not in checkpoint.files:
        raise PicoError(
            f"{checkpoint.path} has no tokenizer.json: its data came without one, so it cannot read or write text"
        )
    tokenizer = Tokenizer.from_str(checkpoint.read("tokenizer.json").decode())
    eos = end_of_text(checkpoint)
    if eos is None:
        raise PicoError(f"{checkpoint.path} has no generation_config.json that names an eos_token_id: text has no end")
    tokens = tokenizer.encode(prompt).ids or [eos]  # nothing to go on from: the start of a document
    model = load_model(run, step)
    generator = torch.Generator().manual_seed(seed)
    try:
        written = model.generate(torch.tensor([tokens]), max_new_tokens, eos=eos, generator=generator, **options)
    except ValueError as error:
        raise PicoError(f"{error}; the prompt has {len(tokens)} tokens") from error
    return tokenizer.decode(written[0].tolist())
