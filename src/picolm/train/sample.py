"""Load the model of a run, and generate text with it."""

from dataclasses import dataclass
from typing import Any

import torch

from picolm.data.tokenizer import encode_text, parse_tokenizer
from picolm.errors import PicoError
from picolm.models import find_model
from picolm.models.generate import NotFinite
from picolm.readers.series import Series
from picolm.store import Checkpoint, Run
from picolm.train.config import TrainConfig, stored_config
from picolm.train.state import State, check_sizes
from picolm.trusted import parse_json


def config_of(run: Run) -> TrainConfig:
    """Return the configuration of a run. Raises PicoError if it is not valid, or its model is code that is not trusted."""
    if isinstance(run, Series):
        raise PicoError(
            f"{run.path}: its model is a {run.config['model'].get('model_type')} of transformers, which Pico reads and does not "
            f"run; "
            f"AutoModelForCausalLM.from_pretrained({str(run.step_path(run.steps[-1]))!r}) does"
        )
    return stored_config(run.config, str(run.path))


def checkpoint_at(run: Run, step: int | None) -> Checkpoint:
    """Return the checkpoint of `step`, or for None the latest one with weights.

    Raises PicoError if it has no weights, with the steps that do, and if no checkpoint has weights.
    """
    if step is not None:
        checkpoint = run[step]
        if not checkpoint.select(kind="weights"):
            holding = [number for number in run if run[number].select(kind="weights")]
            there = ", ".join(map(str, holding)) or "none"
            raise PicoError(f"{checkpoint.path} was saved without weights (there are weights of steps: {there})")
        return checkpoint
    for number in reversed(run.step_directories()):  # newest first, because each manifest is a file to open
        if number in run and (newest := run[number]).select(kind="weights"):
            return newest
    raise PicoError(f"{run.path} has no checkpoint with weights yet")


def load_model(run: Run, step: int | None = None) -> Any:
    """Return the model of a run with the weights of `step` (default: the latest), on the CPU and in evaluation mode.

    The weights are float32, or float64 if they are stored as float64: no weight is rounded.
    """
    config, checkpoint = config_of(run).model, checkpoint_at(run, step)
    check_sizes(config, checkpoint)
    model = find_model(config.model_type)(config)
    if checkpoint[checkpoint.select(kind="weights")[0]].dtype == torch.float64:
        model.double()
    State(model, []).restore_weights(checkpoint)
    return model.eval()


@dataclass(frozen=True)
class GenerationConfig:
    """The fields of `generation_config.json` that are used here."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the content of generation_config.json; empty without the file. Raises PicoError for invalid token ids."""
    name = "generation_config.json"
    if name not in checkpoint.files:
        return {}
    content, where = checkpoint.read(name), f"{checkpoint.path / name}"
    parse_json(content, where, GenerationConfig)
    return parse_json(content, where, dict[str, Any])


def ends_of_text(checkpoint: Checkpoint) -> list[int]:
    """Return the ids of the tokens that end a text; empty if the checkpoint does not define them."""
    ends = generation_config(checkpoint).get("eos_token_id")
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def sample(place: str, step: int | None, prompt: str, *, max_new_tokens: int, seed: int, **options: Any) -> str:
    """Generate text from a prompt with the model of a run. Returns the prompt and the generated text as one string.

    The prompt is encoded as in training. options: passed to `generate` of the model; suffix: a text that follows the new tokens,
    for a model that fills gaps. Raises PicoError for a prompt that is too long, for options and seeds out of range or of another
    kind of model, without a tokenizer, and for a model that computes NaN.
    """
    if max_new_tokens < 1:
        raise PicoError(f"max_new_tokens is {max_new_tokens}; ask for at least 1 token")
    if not 0 <= seed < 2**64:
        raise PicoError(f"the seed {seed} is out of range; take a whole number from 0 to 2^64 - 1")
    run = Run.open(place)
    config_of(run)  # without a model that can be built, nothing else matters
    checkpoint = checkpoint_at(run, step)
    if "tokenizer.json" not in checkpoint.files:
        raise PicoError(
            f"{checkpoint.path} has no tokenizer.json: its data came without one, so it cannot read or write text"
        )
    tokenizer = parse_tokenizer(checkpoint.read("tokenizer.json"), f"{checkpoint.path}/tokenizer.json")
    tokens, ends = encode_text(tokenizer, prompt, "the prompt"), ends_of_text(checkpoint)
    if not tokens and not ends:
        raise PicoError("the prompt is empty, and the run does not say what ends a document; give a --prompt")
    tokens = tokens or ends[:1]  # an empty prompt becomes the start of a document
    model = load_model(run, checkpoint.step)
    eos = ends[0] if len(ends) == 1 else ends or None
    if not hasattr(model, "infill") and (others := sorted({"order", "steps", "block_length", "suffix"} & set(options))):
        raise PicoError(
            f"{', '.join(others)}: only a diffusion model can be asked for that; this one writes left to right"
        )
    generator = torch.Generator().manual_seed(seed)
    after = encode_text(tokenizer, str(options.pop("suffix", "")), "the suffix")
    try:
        if after:
            gap_1T = torch.tensor([[*tokens, *[model.mask] * max_new_tokens, *after]])
            written = model.infill(gap_1T, generator=generator, **options)
        else:
            written = model.generate(torch.tensor([tokens]), max_new_tokens, eos=eos, generator=generator, **options)
    except NotFinite as error:
        raise PicoError(f"{checkpoint.path}: {error}") from error
    except ValueError as error:
        raise PicoError(f"{error}; the prompt has {len(tokens)} tokens") from error
    return str(tokenizer.decode(written[0].tolist()))
