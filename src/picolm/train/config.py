"""The training configuration: every key, its default, and what it means.

Keys and meanings are those of the published Pico configurations, with new ones beside them. The docstring under a field is
its help, its documentation and the last part of its error message. The `model` section belongs to the architecture:
`schema_for` looks up which one the file asks for.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, create_model

from picolm.data import is_own_source
from picolm.errors import PicoError
from picolm.models import MODELS, find_model
from picolm.models.anatomy import CAPTURED
from picolm.models.decoder import PARTS, DecoderConfig
from picolm.provenance import NamesCode, code_keys, mark_untrusted
from picolm.registry import Registry, Untrusted, UntrustedCode, names_code
from picolm.schema import NoSchema, Place, Rule, Section, flatten, plain
from picolm.train.evaluate import EVALUATIONS
from picolm.train.evaluation_config import Evaluation
from picolm.train.optim import OPTIMIZERS, SCHEDULES

Fraction = Annotated[float, Field(ge=0, lt=1)]
Cadence = Literal["all", "last"] | PositiveInt
Retained = Literal["all"] | Annotated[str, Field(pattern=r"^(last|every) [1-9]\d*$")]

LONGEST_NAME = 255  # bytes of a name in a folder, on all common file systems
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME on the Hub


class Dataset(Section):
    name: Annotated[Place, NamesCode("data source", is_code=is_own_source)] = "pico-lm/pretokenized-dolma"
    """Where the rows come from: a Hub data set, a folder of token shards, `embedded:NAME`, `datatrove:FOLDER`, or a mixture by
    weights, `mix:rows/books*0.7,rows/web*0.3`."""
    shuffle: bool = False
    """Permute the first pass too (prepared and published data are shuffled on disk; later passes always are)."""
    cache_dir: Place | None = None
    """Where fetched and generated shards are kept (default: $PICO_CACHE or ~/.cache/pico)."""


class Dataloader(Section):
    batch_size: PositiveInt = 1024
    """Sequences in one step, over all devices and accumulation steps together."""


class Tokenizer(Section):
    name: Place = "auto"
    """A Hub name, a folder or a tokenizer.json; `auto`: the one that came with the data, else allenai/OLMo-7B-0724-hf."""
    vocab_size: PositiveInt = 50304
    """Entries of the tokenizer; embedded corpora train theirs with this size."""


class Data(Section):
    dataset: Dataset = Dataset()
    dataloader: Dataloader = Dataloader()
    tokenizer: Tokenizer = Tokenizer()


class Fabric(Section):
    num_nodes: PositiveInt = 1
    """Machines that take part."""
    num_devices: PositiveInt = 1
    """Devices (processes) on each machine."""
    precision: Literal["auto", "bf16-mixed", "32-true", "bf16-true", "64-true", "32", "64"] = "auto"
    """Lightning Fabric's precision; `auto`: bf16-mixed where the device computes bfloat16 natively, else 32-true.
    float16 is not offered: its loss scaling would end up in the captured gradients."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps", "tpu"] = "auto"
    """Where to compute; `auto`: CUDA where there is one, else MPS, else CPU."""
    strategy: Annotated[str, NamesCode("strategy")] = "auto"
    """How the model is spread over processes: auto (ddp where there are several), ddp, fsdp2 (also called model_parallel),
    or my_lab.module:attribute."""
    timeout_s: PositiveFloat = 60.0
    """Seconds within which all processes end when one of them fails or is lost."""


class Optimization(Section):
    optimizer: Annotated[str, NamesCode("optimizer")] = "adamw"
    """adamw, muon (matrices of the blocks; AdamW for the rest), sgd, or my_lab.module:attribute."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    lr_scheduler: Annotated[str, NamesCode("schedule")] = "linear_with_warmup"
    """linear_with_warmup, cosine, wsd, constant, or my_lab.module:attribute; all start with the warm-up."""
    lr_warmup_steps: NonNegativeInt = 2500
    """Updates over which the learning rate rises linearly; the first update already has lr / lr_warmup_steps."""
    lr_min_ratio: Fraction = 0.0
    """The schedule ends at this fraction of lr."""
    lr_decay_steps: PositiveInt | None = None
    """Length of the final decay of `wsd` (default: a tenth of max_steps)."""
    gradient_accumulation_steps: PositiveInt = 128
    """Micro-batches per step and device; the result of a step does not depend on it beyond rounding."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment of AdamW."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator of AdamW."""
    momentum: Fraction | None = None
    """Momentum of sgd (default 0) and of muon (default 0.95)."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this global norm; null leaves them as they are."""
    decay_norms_and_embeddings: bool = False
    """Whether weight decay also acts on norms and embeddings (the published models did)."""


class Seeds(Section):
    init: NonNegativeInt = 42
    """Draws the initial weights."""
    data: NonNegativeInt = 42
    """Permutes the rows."""
    noise: NonNegativeInt = 42
    """Everything random inside a step (random capture positions, noise of the model)."""


class Training(Section):
    max_steps: NonNegativeInt = 200_000
    """Updates in all."""
    seeds: Seeds = Seeds()
    deterministic: bool = True
    """Only algorithms that give the same bits every time (on CUDA some operations become slower)."""
    compile: Literal["auto"] | bool = "auto"
    """torch.compile the loss; `auto` does so on CUDA."""
    max_skipped_steps: NonNegativeInt = 10
    """Updates skipped in a row for a non-finite loss or gradient before the run stops."""
    fabric: Fabric = Fabric()
    optimization: Optimization = Optimization()


class LearningDynamics(Section):
    layer_suffixes: tuple[str, ...] = CAPTURED
    """Which modules to record: roles (attention.value, mlp.output, …) or ends of their names, in whole words."""
    sequence_idx: int = -1
    """The position whose activations are kept (the published key; `positions` says more)."""
    positions: Literal["last", "all"] | Annotated[str, Field(pattern=r"^random:[1-9]\d*$")] | tuple[int, ...] | None = (
        None
    )
    """Positions whose activations are kept: last, all, a list, or random:k (k of them, drawn anew each step)."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass over the evaluation rows."""
    eval_data: Annotated[Place | None, NamesCode("data source", is_code=is_own_source)] = "auto"
    """The fixed rows of the `val` split; `auto`: the held-out part of the data; null: no `val` split."""
    what: tuple[Literal["activations", "gradients"], ...] = ("activations", "gradients")
    """What is recorded."""
    layers: Literal["all"] | tuple[NonNegativeInt, ...] = "all"
    """Blocks that are recorded; modules outside of the blocks are not restricted by it."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Element type of activations on disk; `auto` keeps what was computed. Gradients are kept as they are."""
    max_rows: PositiveInt | None = 1024
    """Rows of a batch whose activations are kept; null keeps all."""


class HubCheckpoint(Section):
    repo_id: str = ""
    """owner/name on the Hub."""
    collection_slug: str | None = None
    """A collection the repository is added to."""


class AutoResume(Section):
    auto_resume: bool = True
    """Continue from the latest whole checkpoint of the run of this name."""


class Keep(Section):
    """What of older checkpoints stays; the newest one that training can go on from always does."""

    weights: Retained = "all"
    """Checkpoints whose weights stay on disk: all, `last N`, or `every N` (steps divisible by N, and the newest)."""
    optimizer: Retained = "all"
    """Checkpoints whose optimizer state stays on disk: all, `last N` or `every N`; only these can be continued from."""
    dynamics: Retained = "all"
    """Checkpoints whose activations and gradients stay on disk: all, `last N` or `every N`."""


class EvaluationResults(Section):
    eval_results_dir: Place = "eval_results"
    """Folder of the evaluation results inside the run."""


class Checkpointing(Section):
    run_name: Place | None = None
    """Name of the run and of its folder (default: the time of the start)."""
    runs_dir: Place = "runs"
    """Folder of all runs."""
    checkpoints_dir: Place = "checkpoints"
    """Folder of the checkpoints inside the run."""
    logs_dir: Place = "logs"
    """Folder of the logs inside the run."""
    fabric_checkpoint_dir: str = "fabric_state"
    """Accepted as published; our optimizer state is optimizer.safetensors, beside the weights."""
    fabric_checkpoint_filename: str = "checkpoint.pt"
    """Accepted as published; nothing is pickled here."""
    learning_dynamics_dir: Place = "learning_dynamics"
    """Folder of the captures inside a checkpoint."""
    save_every_n_steps: PositiveInt = 1000
    """Steps between checkpoints; step 0 and the last step are always saved."""
    save_schedule: Literal["every", "log"] = "every"
    """`log` also saves steps 1, 2, 4, … 512."""
    save_weights: Cadence = "all"
    """Which checkpoints hold the weights: all, last (the final one), or those divisible by k."""
    save_optimizer: Cadence = "all"
    """Which checkpoints hold the optimizer state; training can only be continued from these."""
    save_learning_dynamics: Cadence = "all"
    """Which checkpoints hold activations and gradients."""
    keep: Keep = Keep()
    save_in_background: bool = True
    """Write checkpoints while training goes on; false waits for the disk."""
    save_to_hf: bool | None = False
    """Push checkpoints to the Hub."""
    hf_checkpoint: HubCheckpoint = HubCheckpoint()
    training: AutoResume = AutoResume()
    evaluation: EvaluationResults = EvaluationResults()
    learning_dynamics: LearningDynamics = LearningDynamics()


class Logging(Section):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least level that is shown and written to logs/."""
    log_every_n_steps: PositiveInt = 100
    """Steps between lines of metrics.jsonl."""
    digest_every_n_steps: NonNegativeInt | None = None
    """Steps between digests of the weights in metrics.jsonl, which `pico replay --verify` compares (default: at each logged
    step; 0: never)."""


class Wandb(Section):
    project: str = ""
    """Weights & Biases project."""
    entity: str = ""
    """Weights & Biases entity."""


class PicoReport(Section):
    lab_hash: str = ""
    """Accepted as published; nothing is sent."""
    auto_commit: bool = True
    """Accepted as published; nothing is committed."""


class Monitoring(Section):
    logging: Logging = Logging()
    save_to_wandb: bool = False
    """Log to Weights & Biases too (extra `wandb`; WANDB_MODE=offline writes files to send later)."""
    wandb: Wandb = Wandb()
    save_to_tensorboard: bool = False
    """Log to TensorBoard files in logs/ too (extra `tensorboard`)."""
    save_to_trackio: bool = False
    """Log to trackio too, on this machine and without an account (extra `trackio`; `trackio show` opens its pages)."""
    save_to_picolabs: bool = False
    """Accepted as published; nothing is sent to Pico Labs."""
    pico_report: PicoReport = PicoReport()


class TrainConfig(Section):
    """A whole training configuration; every section and key may be left out."""

    data: Data = Data()
    model: Annotated[DecoderConfig, NamesCode("model", below="model_type")] = DecoderConfig()
    training: Training = Training()
    checkpointing: Checkpointing = Checkpointing()
    evaluation: Evaluation = Evaluation()
    monitoring: Monitoring = Monitoring()

    def problems(self) -> Iterator[Rule]:
        yield from _prefixed("model", self.model.problems())
        yield from _batch_rules(self)
        yield from _model_rules(self)
        yield from _name_rules(self)


def schema_for(raw: Mapping[str, Any]) -> type[TrainConfig]:
    """The schema whose `model` section is the configuration of the architecture that `raw` asks for."""
    section = raw.get("model")
    name = section.get("model_type") if isinstance(section, Mapping) else None
    if not isinstance(name, str) or name == "pico_decoder" or (name not in MODELS and ":" not in name):
        return TrainConfig
    try:
        config = MODELS.get(name).Config
        return create_model("TrainConfig", __base__=TrainConfig, model=(config, Field(default_factory=config)))
    except UntrustedCode:
        raise
    except PicoError as error:
        raise NoSchema(("model", "model_type"), str(error)) from error
    except (AttributeError, TypeError) as error:
        reason = f"{name!r} is no model: its Config, a dataclass, is missing or cannot be used ({error})"
        raise NoSchema(("model", "model_type"), reason) from error


def row_length(config: TrainConfig, length: int | None = None) -> int:
    """Return the tokens of a row in which the model predicts `length` (default: model.max_seq_len) of them."""
    return int(find_model(config.model.model_type).row_length(length or config.model.max_seq_len))


def stored_config(raw: Mapping[str, Any], where: str) -> TrainConfig:
    """Return the typed configuration of a run, which imports the code of its model and no other.

    Raises PicoError if it is none, and UntrustedCode if its model is code that is not trusted. where: the run.
    """
    try:
        schema = schema_for(mark_untrusted(raw, where))
        return mark_untrusted(schema.model_validate_json(json.dumps(raw)), where, declared=code_keys(schema))
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        reason = "is not known to this version of picolm" if "extra" in found["type"] else found["msg"]
        key = ".".join(map(str, found["loc"]))
        raise PicoError(f"{where}: its configuration cannot be used: {key}: {reason}") from error
    except (ValueError, TypeError) as error:
        raise PicoError(f"{where}: its configuration cannot be used: {str(error).splitlines()[0]}") from error


def completed(stored: Mapping[str, Any], schema: type[TrainConfig]) -> dict[str, Any]:
    """Return the dotted keys of a stored configuration, with the default of each key of `schema` that it lacks.

    A run is stored with all keys that there were: one that it lacks was added later, and its default is what was done
    without it.
    """
    flat, known = with_roles(flatten(stored)), _defaults(schema)
    emptied = {key for key, value in flat.items() if not value and any(name.startswith(f"{key}.") for name in known)}
    return known | {key: value for key, value in flat.items() if key not in emptied}


def differences(config: Mapping[str, Any], schema: type[TrainConfig] = TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the keys of a configuration whose values are not the defaults of `schema`: (value, default)."""
    defaults = flatten(plain(schema()))
    return {
        key: (value, defaults.get(key))
        for key, value in with_roles(flatten(config)).items()
        if key not in defaults or defaults[key] != value
    }


def with_roles(flat: dict[str, Any]) -> dict[str, Any]:
    """Return dotted keys in which the modules that earlier versions captured by default are called by their roles."""
    key = "checkpointing.learning_dynamics.layer_suffixes"
    before = [PARTS[role].module for role in CAPTURED]
    return flat | {key: list(CAPTURED)} if flat.get(key) == before else flat


def _defaults(schema: type[TrainConfig]) -> dict[str, Any]:
    try:
        return flatten(plain(schema()))
    except (TypeError, ValueError):  # a model whose configuration has no default for some key
        model = schema.model_fields["model"].annotation
        assert is_dataclass(model)
        given = {field.name: field.default for field in fields(model) if field.default is not MISSING}
        others = {key: value for key, value in flatten(plain(TrainConfig())).items() if not key.startswith("model.")}
        return others | flatten({"model": given})


def _prefixed(section: str, rules: Iterator[Rule]) -> Iterator[Rule]:
    for keys, message in rules:
        yield tuple(f"{section}.{key}" for key in keys), message


def _batch_rules(config: TrainConfig) -> Iterator[Rule]:
    fabric, optimization = config.training.fabric, config.training.optimization
    ranks, rows = fabric.num_nodes * fabric.num_devices, config.data.dataloader.batch_size
    if rows % (ranks * optimization.gradient_accumulation_steps):
        yield (
            (
                "data.dataloader.batch_size",
                "training.optimization.gradient_accumulation_steps",
                "training.fabric.num_devices",
                "training.fabric.num_nodes",
            ),
            (
                f"{rows} sequences cannot be divided evenly over {ranks} device(s) x "
                f"{optimization.gradient_accumulation_steps} gradient_accumulation_steps; make it a multiple of "
                f"{ranks * optimization.gradient_accumulation_steps}"
            ),
        )


def _model_rules(config: TrainConfig) -> Iterator[Rule]:
    dynamics, model = config.checkpointing.learning_dynamics, config.model
    if config.data.tokenizer.vocab_size > model.vocab_size:
        yield (
            ("model.vocab_size", "data.tokenizer.vocab_size"),
            (
                f"{model.vocab_size} is less than data.tokenizer.vocab_size ({config.data.tokenizer.vocab_size}): "
                "the model would have no row for some tokens"
            ),
        )
    beyond = [i for i in dynamics.layers if isinstance(i, int) and i >= getattr(model, "n_layers", i + 1)]
    if beyond:
        yield (
            ("checkpointing.learning_dynamics.layers", "model.n_layers"),
            (f"there is no layer {beyond[0]}: the model has {model.n_layers}, counted from 0"),
        )
    asked = dynamics.positions if isinstance(dynamics.positions, tuple) else (dynamics.sequence_idx,)
    key = "positions" if isinstance(dynamics.positions, tuple) else "sequence_idx"
    for position in asked:
        if not -model.max_seq_len <= position < model.max_seq_len:
            yield (
                (f"checkpointing.learning_dynamics.{key}", "model.max_seq_len"),
                (f"there is no position {position} in sequences of {model.max_seq_len} tokens"),
            )
    if (config.evaluation.paloma.max_length or 1) > model.max_seq_len:
        yield (
            ("evaluation.paloma.max_length", "model.max_seq_len"),
            (f"{config.evaluation.paloma.max_length} is longer than the model's max_seq_len ({model.max_seq_len})"),
        )
    for metric, key in (("minimal_pairs", "path"), ("lm_eval", "tasks")):
        if metric in (config.evaluation.metrics or ()) and not getattr(getattr(config.evaluation, metric), key):
            yield (f"evaluation.{metric}.{key}", "evaluation.metrics"), f"is empty, and {metric} is asked for"


def _name_rules(config: TrainConfig) -> Iterator[Rule]:
    optimization = config.training.optimization
    named: list[tuple[str, Registry[Any], str]] = [
        ("training.optimization.optimizer", OPTIMIZERS, optimization.optimizer),
        ("training.optimization.lr_scheduler", SCHEDULES, optimization.lr_scheduler),
        *(("evaluation.metrics", EVALUATIONS, name) for name in config.evaluation.metrics or ()),
        ("model.model_type", MODELS, config.model.model_type),
    ]
    for key, registry, name in named:
        if isinstance(name, Untrusted) and names_code(name):
            continue  # resolved where it is needed
        try:
            registry.get(name)
        except PicoError as error:
            yield (key,), str(error)
    run_name = config.checkpointing.run_name
    if run_name is not None and (not run_name or run_name in (".", "..") or "/" in run_name or "\0" in run_name):
        yield ("checkpointing.run_name",), f"{run_name!r} cannot be the name of a folder"
    if run_name is not None and len(os.fsencode(run_name)) > LONGEST_NAME:
        yield (
            ("checkpointing.run_name",),
            f"{len(os.fsencode(run_name))} bytes are too long for the name of a folder; it may have {LONGEST_NAME}",
        )
    chosen = config.checkpointing
    if chosen.save_to_hf and not REPOSITORY.fullmatch(chosen.hf_checkpoint.repo_id):
        yield (
            ("checkpointing.hf_checkpoint.repo_id", "checkpointing.save_to_hf"),
            f"{chosen.hf_checkpoint.repo_id!r}: save_to_hf sends steps to OWNER/NAME on the Hub; say which",
        )
