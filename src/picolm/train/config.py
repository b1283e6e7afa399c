"""The training configuration: every key, its default, and what it means.

The published Pico configurations stay valid: their keys keep their meaning, and new keys are added. The docstring under
a field is used in `--help`, in the documentation and at the end of error messages. The `model` section depends on the
architecture: `schema_for` finds its schema.
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
from picolm.models import MODELS, block_count, find_model
from picolm.models.anatomy import CAPTURED
from picolm.models.decoder import PARTS, DecoderConfig
from picolm.registry import Registry, Untrusted, UntrustedCode, names_code
from picolm.schema import Key, NoSchema, Place, Rule, Section, code_keys, flatten, mark_untrusted, plain
from picolm.train.canaries import CanaryGroup, canary_rules
from picolm.train.evaluate import EVALUATIONS
from picolm.train.evaluation_config import Evaluation
from picolm.train.optim import OPTIMIZERS, SCHEDULES

Fraction = Annotated[float, Field(ge=0, lt=1)]
Cadence = Literal["all", "last"] | PositiveInt
Retained = Literal["all"] | Annotated[str, Field(pattern=r"^(last|every) [1-9]\d*$")]

LONGEST_NAME = 255  # bytes in the name of a file or folder, on all common file systems
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # OWNER/NAME on the Hub


class Dataset(Section):
    name: Annotated[Place, Key("data source", is_code=is_own_source, on_resume="noted")] = "pico-lm/pretokenized-dolma"
    """Source of the rows: a Hub data set, a folder of token shards, `embedded:NAME`, tokens of other tools
    (`datatrove:FOLDER`, `megatron:`, `olmo:`, `nanogpt:`, `datasets:`), a weighted mixture such as
    `mix:rows/books*0.7,rows/web*0.3`, or the first rows of a source (`first:2000,rows/books`)."""
    shuffle: bool = False
    """Shuffle the first pass too; later passes are always shuffled. Not needed for prepared and published data, which
    are shuffled on disk."""
    cache_dir: Annotated[Place | None, Key(on_resume="noted")] = None
    """Folder for downloaded and generated shards (default: $PICO_CACHE or ~/.cache/pico)."""


class Dataloader(Section):
    batch_size: PositiveInt = 1024
    """Sequences per step, summed over all devices and micro-batches."""


class Tokenizer(Section):
    name: Annotated[Place, Key(on_resume="noted")] = "auto"
    """A Hub name, a folder or a tokenizer.json; `auto`: the tokenizer of the data, else allenai/OLMo-7B-0724-hf."""
    vocab_size: PositiveInt = 50304
    """Number of tokens in the tokenizer; for an embedded corpus, a tokenizer of this size is trained."""


class Data(Section):
    dataset: Dataset = Dataset()
    dataloader: Dataloader = Dataloader()
    tokenizer: Tokenizer = Tokenizer()
    canaries: Annotated[tuple[CanaryGroup, ...], Key(since="0.2")] = ()
    """Rows to plant into the training data, to see how they are memorized: a list of groups, each with its rows and the
    steps that show them."""


class Fabric(Section):
    num_nodes: PositiveInt = 1
    """Number of machines."""
    num_devices: PositiveInt = 1
    """Number of devices on each machine, with one process per device."""
    precision: Literal["auto", "bf16-mixed", "32-true", "bf16-true", "64-true", "32", "64"] = "auto"
    """Precision, as named by Lightning Fabric; `auto`: bf16-mixed if the device computes bfloat16 natively, else
    32-true. float16 is not supported, because its loss scaling would change the captured gradients."""
    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps", "tpu"] = "auto"
    """Type of device; `auto`: CUDA if available, else MPS, else CPU."""
    strategy: Annotated[str, Key("strategy")] = "auto"
    """How the model is distributed over processes: auto (ddp if there are several), ddp, fsdp2 (also called
    model_parallel), or my_lab.module:attribute."""
    timeout_s: PositiveFloat = 60.0
    """Time in seconds within which all processes exit after one of them fails or stops responding."""


class Optimization(Section):
    optimizer: Annotated[str, Key("optimizer", on_resume="refused")] = "adamw"
    """adamw, muon (for the matrices of the blocks, with AdamW for the rest), sgd, or my_lab.module:attribute."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    lr_scheduler: Annotated[str, Key("schedule")] = "linear_with_warmup"
    """linear_with_warmup, cosine, wsd (warm-up, stable, decay), constant, or my_lab.module:attribute; all begin with a
    linear warm-up."""
    lr_warmup_steps: NonNegativeInt = 2500
    """Number of updates in which the learning rate rises linearly to lr, from lr / lr_warmup_steps."""
    lr_min_ratio: Fraction = 0.0
    """Final learning rate of the schedule, as a fraction of lr (no effect on `constant`)."""
    lr_decay_steps: PositiveInt | None = None
    """Number of updates in the final decay of `wsd` (default: a tenth of max_steps); other schedules ignore it."""
    gradient_accumulation_steps: PositiveInt = 128
    """Micro-batches per step on each device; the result of a step does not depend on it, except for rounding."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay, decoupled from the gradient (as in AdamW)."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay rates of the first and second moments of AdamW."""
    eps: PositiveFloat = 1e-8
    """Constant added to the denominator of AdamW."""
    momentum: Fraction | None = None
    """Momentum of sgd (default: 0) and of muon (default: 0.95)."""
    grad_clip_norm: PositiveFloat | None = 1.0
    """Largest global norm of the gradients: larger gradients are scaled down to it; null: no clipping."""
    decay_norms_and_embeddings: bool = False
    """Apply weight decay to norms and embeddings too (as the published models did)."""


class Seeds(Section):
    init: NonNegativeInt = 42
    """Seed of the initial weights."""
    data: NonNegativeInt = 42
    """Seed of the order of the rows."""
    noise: NonNegativeInt = 42
    """Seed of everything random inside a step (random capture positions, noise of the model)."""


class Training(Section):
    max_steps: NonNegativeInt = 200_000
    """Updates in all."""
    seeds: Annotated[Seeds, Key(on_resume="refused")] = Seeds()
    deterministic: Literal["warn"] | bool = True
    """Use only algorithms that give the same bits every time (on CUDA some operations become slower, and one without
    such an algorithm ends the run; `warn`: it warns and goes on, and attention may take faster kernels, too)."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the loss with torch.compile; `auto`: only on CUDA."""
    max_skipped_steps: NonNegativeInt = 10
    """Stop the run after this many updates in a row were skipped because the loss or the gradient was not finite."""
    fabric: Fabric = Fabric()
    optimization: Optimization = Optimization()


class LearningDynamics(Section):
    layer_suffixes: tuple[str, ...] = CAPTURED
    """Modules to record: roles (attention.value, mlp.output, …) or the last parts of module names, as whole words."""
    sequence_idx: int = -1
    """Position in the sequence whose activations are recorded (the published key; `positions` overrides it)."""
    positions: Literal["last", "all"] | Annotated[str, Field(pattern=r"^random:[1-9]\d*$")] | tuple[int, ...] | None = (
        None
    )
    """Positions whose activations are recorded: last, all, a list, or random:k (k positions, drawn again at each step);
    default: sequence_idx."""
    batch_size: PositiveInt = 8
    """Sequences per forward pass over the rows of the `val` split."""
    eval_data: Annotated[Place | None, Key("data source", is_code=is_own_source)] = "auto"
    """Source of the fixed rows of the `val` split; `auto`: the held-out rows of the data; null: no `val` split."""
    what: tuple[Literal["activations", "gradients"], ...] = ("activations", "gradients")
    """What to record: activations, gradients or both."""
    layers: Literal["all"] | tuple[NonNegativeInt, ...] = "all"
    """Blocks to record, counted from 0, or all; modules outside of the blocks are not affected."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of activations on disk; `auto`: the type in which they were computed. Gradients are not converted."""
    max_rows: PositiveInt | None = 1024
    """Largest number of rows of a batch whose activations are recorded; null: all rows."""


class HubCheckpoint(Section):
    repo_id: str = ""
    """Repository on the Hub, as owner/name."""
    collection_slug: str | None = None
    """Collection on the Hub to add the repository to; null: none."""


class AutoResume(Section):
    auto_resume: Annotated[bool, Key(on_resume="ignored")] = True
    """Resume from the latest complete checkpoint if a run of this name exists; false: refuse to start instead."""


class Keep(Section):
    """Which parts of older checkpoints stay on disk; the newest one that training can resume from is always kept."""

    weights: Retained = "all"
    """Checkpoints whose weights stay on disk: all, `last N`, or `every N` (steps divisible by N, and the newest)."""
    optimizer: Retained = "all"
    """Checkpoints whose optimizer state stays on disk: all, `last N` or `every N`; only these can be resumed from."""
    dynamics: Retained = "all"
    """Checkpoints whose activations and gradients stay on disk: all, `last N` or `every N`."""


class EvaluationResults(Section):
    eval_results_dir: Annotated[Place, Key(on_resume="kept")] = "eval_results"
    """Folder for evaluation results, inside the run folder."""


class Checkpointing(Section):
    run_name: Annotated[Place | None, Key(on_resume="ignored")] = None
    """Name of the run and of its folder (default: the start time)."""
    runs_dir: Annotated[Place, Key(on_resume="ignored")] = "runs"
    """Folder that holds all runs."""
    checkpoints_dir: Annotated[Place, Key(on_resume="kept")] = "checkpoints"
    """Folder for checkpoints, inside the run folder."""
    logs_dir: Annotated[Place, Key(on_resume="kept")] = "logs"
    """Folder for logs, inside the run folder."""
    fabric_checkpoint_dir: Annotated[str, Key(on_resume="ignored")] = "fabric_state"
    """Accepted but ignored, so that published configurations stay valid; Pico stores the optimizer state in
    optimizer.safetensors, next to the weights."""
    fabric_checkpoint_filename: Annotated[str, Key(on_resume="ignored")] = "checkpoint.pt"
    """Accepted but ignored, so that published configurations stay valid; Pico pickles nothing."""
    learning_dynamics_dir: Annotated[Place, Key(on_resume="kept")] = "learning_dynamics"
    """Folder for captures, inside each checkpoint."""
    save_every_n_steps: PositiveInt = 1000
    """Steps between checkpoints; step 0 and the last step are always saved."""
    save_schedule: Literal["every", "log"] = "every"
    """When to save: every (every save_every_n_steps), or log (also at steps 1, 2, 4, … 512)."""
    save_weights: Cadence = "all"
    """Which checkpoints hold the weights: all, last (the final one), or a number k (steps divisible by k)."""
    save_optimizer: Cadence = "all"
    """Which checkpoints hold the optimizer state: all, last or k; training can resume only from these."""
    save_learning_dynamics: Cadence = "all"
    """Which checkpoints hold activations and gradients: all, last or k."""
    keep: Keep = Keep()
    save_in_background: bool = True
    """Write checkpoints in the background while training continues; false: wait for the disk."""
    save_to_hf: bool | None = False
    """Upload checkpoints to the Hub."""
    hf_checkpoint: HubCheckpoint = HubCheckpoint()
    training: AutoResume = AutoResume()
    evaluation: EvaluationResults = EvaluationResults()
    learning_dynamics: LearningDynamics = LearningDynamics()


class Logging(Section):
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level of messages to show and to write to logs/."""
    log_every_n_steps: PositiveInt = 100
    """Steps between lines of metrics.jsonl."""
    digest_every_n_steps: NonNegativeInt | None = None
    """Steps between digests of the weights in metrics.jsonl, for `pico replay --verify` to compare (default: the value
    of log_every_n_steps; 0: none)."""


class Wandb(Section):
    project: str = ""
    """Project on Weights & Biases; trackio uses it too (default: pico)."""
    entity: str = ""
    """Entity (user or team) on Weights & Biases."""


class PicoReport(Section):
    lab_hash: str = ""
    """Accepted but ignored, so that published configurations stay valid; nothing is sent."""
    auto_commit: bool = True
    """Accepted but ignored, so that published configurations stay valid; nothing is committed."""


class Monitoring(Section):
    logging: Logging = Logging()
    save_to_wandb: bool = False
    """Log to Weights & Biases too (needs the extra `wandb`; WANDB_MODE=offline writes files to upload later)."""
    wandb: Wandb = Wandb()
    save_to_tensorboard: bool = False
    """Log to TensorBoard files in logs/ too (needs the extra `tensorboard`)."""
    save_to_trackio: bool = False
    """Log to trackio too, on this machine, without an account (needs the extra `trackio`; to view: `trackio show`)."""
    save_to_picolabs: Annotated[bool, Key(on_resume="ignored")] = False
    """Accepted but ignored, so that published configurations stay valid; nothing is sent to Pico Labs."""
    pico_report: Annotated[PicoReport, Key(on_resume="ignored")] = PicoReport()


class TrainConfig(Section):
    """A complete training configuration; every section and every key is optional."""

    data: Annotated[Data, Key(on_resume="refused")] = Data()
    model: Annotated[DecoderConfig, Key("model", below="model_type", on_resume="refused")] = DecoderConfig()
    training: Training = Training()
    checkpointing: Checkpointing = Checkpointing()
    evaluation: Evaluation = Evaluation()
    monitoring: Monitoring = Monitoring()

    def problems(self) -> Iterator[Rule]:
        yield from _prefixed("model", self.model.problems())
        yield from _batch_rules(self)
        if self.data.canaries:
            yield from canary_rules(self.data.canaries, self.model.vocab_size)
        yield from _model_rules(self)
        yield from _name_rules(self)


RECORDED = "recorded"  # section in the configuration of a run that `picolm.Recorder` wrote


def schema_for(raw: Mapping[str, Any]) -> type[TrainConfig]:
    """Return the training schema with the `model` section of the architecture that `raw` names in `model.model_type`.

    Raises NoSchema if the architecture cannot be used or the run was recorded from a loop of the user, and UntrustedCode if it
    is code that is not trusted.
    """
    if RECORDED in raw:
        reason = (
            "this run was recorded from a training loop that Pico does not know: only that loop can continue or repeat it, and "
            "build its model. Its weights, gradients and activations can be analyzed"
        )
        raise NoSchema((RECORDED,), reason)
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
    """Return the number of tokens of a row of which the model predicts `length` (default: model.max_seq_len)."""
    return int(find_model(config.model.model_type).row_length(length or config.model.max_seq_len))


def stored_config(raw: Mapping[str, Any], where: str) -> TrainConfig:
    """Return the stored configuration of a run as a TrainConfig. Imports the code of its model and no other code.

    raw: the stored configuration. where: the run, for messages. Raises PicoError if `raw` is not a valid configuration,
    and UntrustedCode if its model is code that is not trusted.
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
    """Return the dotted keys and values of a stored configuration, with the defaults of `schema` for missing keys.

    A run stores every key of its version. A missing key was therefore added later, and its default describes what the
    earlier version did.
    """
    flat, known = with_roles(flatten(stored)), _defaults(schema)
    emptied = {key for key, value in flat.items() if not value and any(name.startswith(f"{key}.") for name in known)}
    return known | {key: value for key, value in flat.items() if key not in emptied}


def differences(config: Mapping[str, Any], schema: type[TrainConfig] = TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return {dotted key: (value, default)} for the keys of a configuration that are not at the default of `schema`."""
    defaults = flatten(plain(schema()))
    return {
        key: (value, defaults.get(key))
        for key, value in with_roles(flatten(config)).items()
        if key not in defaults or defaults[key] != value
    }


def with_roles(flat: dict[str, Any]) -> dict[str, Any]:
    """Return `flat`; if its layer_suffixes are a former default, modules or roles of a decoder, they are today's."""
    key, former = (
        "checkpointing.learning_dynamics.layer_suffixes",
        ["attention.value", "attention.output", "mlp.output"],
    )
    before = (former, [PARTS[role].module for role in former])
    return flat | {key: list(CAPTURED)} if flat.get(key) in before else flat


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
    counted = block_count(model)
    beyond = [i for i in dynamics.layers if isinstance(i, int) and counted is not None and i >= counted[1]]
    if counted is not None and beyond:
        yield (
            ("checkpointing.learning_dynamics.layers", f"model.{counted[0]}"),
            (f"there is no layer {beyond[0]}: the model has {counted[1]}, counted from 0"),
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
            continue  # resolved later, by the code that needs it
        try:
            registry.get(name)
        except PicoError as error:
            yield (key,), str(error)
    for name, options in config.evaluation.probes.items():
        part: Any = EVALUATIONS.get(name) if name in (config.evaluation.metrics or ()) else None
        if part is None:
            problems = {"": "is not among evaluation.metrics"}
        else:
            problems = (
                part.problems(options) if hasattr(part, "problems") else {"": "is no probe, and has no options here"}
            )
        for key, problem in problems.items():
            yield (".".join(filter(None, ("evaluation.probes", name, key))),), problem
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
