"""Build everything the training loop needs from a configuration: device, data, model, optimizers, run and state."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from lightning_fabric import Fabric

from picolm.capture import Taps
from picolm.capture.taps import find_modules
from picolm.console import configure_logging
from picolm.data import Source, has_own_length, open_source
from picolm.data.batches import Batches
from picolm.errors import DataError, PicoError
from picolm.models import anatomy_of, describe, find_model
from picolm.registry import Registry
from picolm.schema import plain
from picolm.seeds import derive
from picolm.store.files import disk_errors
from picolm.store.writer import BackgroundWriter
from picolm.train import devices
from picolm.train.canaries import open_canaries
from picolm.train.config import TrainConfig, row_length
from picolm.train.devices import make_strategy, mark_forward
from picolm.train.evaluate import Rows
from picolm.train.failure import StopSignal, Together
from picolm.train.job import Job, Plan, taps_of
from picolm.train.metrics import Progress, build_loggers, log_folder
from picolm.train.optim import build_optimizers, left_out, schedule_remarks
from picolm.train.resources import require_memory
from picolm.train.state import FORKED, State, open_run, restore, retention
from picolm.train.text import Text, checkpoint_files

log = logging.getLogger("picolm")

PUBLISHED_TOKENIZER = "allenai/OLMo-7B-0724-hf"
PUBLISHED_VALIDATION = "pico-lm/pretokenized-paloma-tinsy"
UPLOADERS: Registry[Callable[..., Callable[[int], None]]] = Registry("uploader")
HUB = "picolm.exchange.uploader:start_uploads"  # a name, because train must not import exchange, a higher package


def build(config: TrainConfig, stop: StopSignal, stack: ExitStack) -> Job:
    """Build the job of a new run, or of an existing run with its latest state restored. Returns the job.

    Resources that must be closed are added to `stack`. Raises PicoError if the configuration cannot work on this
    machine, with these data or in this run folder.
    """
    devices.choose_threads(config.training.fabric)
    job = equip(config, stop, stack)
    config, first = job.config, job.fabric.is_global_zero
    environment = _environment(job)
    with job.fabric.rank_zero_first():  # the first process creates the folder, the others open it
        job.run = open_run(config, environment, stack, writes=first)
    if first:
        configure_logging(config.monitoring.logging.log_level, log_folder(config, job.run) / "train.log", job.run.path)
    job.continued_from = restore(config, environment, job.run, job.state, writes=first)
    _tell_of_optimizers(job)
    parent = job.run.environment.get(FORKED)
    if parent is not None:
        job.about = {FORKED: parent}
        if job.continued_from == parent["step"]:
            job.continued_from = None  # save this step again, now with the captures of the fork's own first batch
    if first:
        uploads = lambda step: None  # noqa: E731
        if config.checkpointing.save_to_hf:
            start_uploads = UPLOADERS.get(HUB)
            uploads = start_uploads(config, job.run, job.continued_from, stack, lambda: stop.received is not None)
        job.writer = stack.enter_context(BackgroundWriter(job.run, retention(config, job.run), uploads))
        job.loggers = build_loggers(config, job.run)
    for logger in job.loggers:
        stack.callback(logger.close)
    return job


def _tell_of_optimizers(job: Job) -> None:
    """Warn about problems of the schedule, parameters without an optimizer, and learning rates that are not used."""
    for remark in schedule_remarks(job.config.training.optimization, job.config.training.max_steps):
        log.warning("%s", remark)
    names = left_out(job.state.model, job.state.optimizers)
    if names:
        log.warning("No optimizer has these parameters, which keep their values: %s.", _shortened(names))
    if job.rates_differ and not job.state.own_rates:
        log.warning(
            "This run was begun by a version that gave every parameter group the rate of training.optimization.lr, and "
            "continues so. In a new run each group has its own rate, times the factor of the schedule."
        )


def _shortened(names: list[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def equip(config: TrainConfig, stop: StopSignal, stack: ExitStack) -> Job:
    """Build a job at step 0 that has no run and writes nothing: device, data, model, optimizers. Returns the job.

    Resources that must be closed are added to `stack`. Raises PicoError if the configuration cannot work.
    """
    config = _resolved(config)
    devices.tune_allocator()
    devices.set_determinism(bool(config.training.deterministic))
    configure_logging(config.monitoring.logging.log_level)
    fabric = _fabric(config)
    stack.enter_context(Together(fabric, config.training.fabric.timeout_s))
    if not fabric.is_global_zero:  # only the first process prints messages
        configure_logging("ERROR")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # stays open until the process exits
    config = _same_name(config, fabric, stack)
    with fabric.rank_zero_first():  # the first process prepares or downloads the data, the others reuse the result
        batches = open_batches(config, fabric.global_rank, fabric.world_size)
        source = batches.source
        text = Text(tokenizer_file(config, source), config.model.vocab_size)
        captured, evaluated = captured_rows(config, source), evaluated_rows(config, source)
    model = _model(config, fabric)
    wrapped = _setup(config, fabric, model)  # before the optimizers, because sharding replaces the parameters
    state = State(model, build_optimizers(model, model.parameter_roles(), config.training.optimization))
    return Job(
        config=config,
        fabric=fabric,
        model=wrapped,
        state=state,
        batches=batches,
        taps=make_taps(config, state.model),
        plan=Plan(config),
        text=text,
        stop=stop,
        progress=Progress(config.data.dataloader.batch_size * config.model.max_seq_len, shown=fabric.is_global_zero),
        captured_rows=captured,
        evaluated_rows=evaluated,
        texts=checkpoint_files(state.model, text),
        peak_flops=devices.matmul_peak(fabric.device, devices.compute_dtype(config.training.fabric.precision)),
        compiled=devices.want_compile(config.training, fabric.device),
        exact=config.training.deterministic is True and fabric.device.type == "cuda",
    )


def _resolved(config: TrainConfig) -> TrainConfig:
    """Return `config` with the `auto` values of its fabric section resolved for this machine.

    Raises PicoError if the machine lacks the devices.
    """
    fabric = devices.resolve(config.training.fabric)
    devices.check_available(fabric)
    return config.model_copy(update={"training": config.training.model_copy(update={"fabric": fabric})})


def _same_name(config: TrainConfig, fabric: Fabric, stack: ExitStack) -> TrainConfig:
    """Return `config` with a run name. If it has none, the first process chooses it for all, because clocks differ."""
    name = config.checkpointing.run_name
    if name is None and fabric.is_global_zero:
        name = _new_name(Path(config.checkpointing.runs_dir).expanduser(), stack)
    name = fabric.broadcast(name)
    checkpointing = config.checkpointing.model_copy(update={"run_name": name})
    return config.model_copy(update={"checkpointing": checkpointing})


def _new_name(runs: Path, stack: ExitStack) -> str:
    """Create a run folder named after the current time, which no other process has created. Returns the name.

    The folder is removed on exit if it is still empty. Raises PicoError if all names for this second are taken.
    """
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    with disk_errors("a new run", runs):
        runs.mkdir(parents=True, exist_ok=True)
        for name in (now, *(f"{now}-{number}" for number in range(2, 10_000))):
            with suppress(FileExistsError):
                (runs / name).mkdir()
                stack.callback(_remove_empty, runs / name)
                return name
    raise PicoError(f"{runs} holds runs of every name that begins with {now}; give one with checkpointing.run_name=…")


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _fabric(config: TrainConfig) -> Fabric:
    chosen = config.training.fabric
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # hides the start message of each process
    strategy = make_strategy(chosen)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The `srun` command is available")  # srun is not required on a cluster
            fabric = Fabric(
                accelerator=chosen.accelerator,
                devices=chosen.num_devices,
                num_nodes=chosen.num_nodes,
                precision=chosen.precision,  # type: ignore[arg-type]  # the same values, checked by the schema
                strategy=strategy,
            )
    except Exception as error:  # for example an unknown strategy, or a missing package for the accelerator
        raise PicoError(f"training.fabric: {error}") from error
    fabric.launch()
    return fabric


def _open(config: TrainConfig, name: str, split: str, row_length: int | None) -> Source:
    cache = config.data.dataset.cache_dir
    return open_source(
        name,
        split=split,
        row_length=row_length,
        vocab_size=config.data.tokenizer.vocab_size,
        cache_dir=Path(cache).expanduser() if cache else None,
    )


def open_batches(config: TrainConfig, rank: int = 0, world: int = 1) -> Batches:
    """Open the training data and its canaries. Returns the batches of process `rank` of `world`, by step."""
    return Batches(
        _open(config, config.data.dataset.name, "train", row_length(config)),
        rows_per_step=config.data.dataloader.batch_size,
        accumulation=config.training.optimization.gradient_accumulation_steps,
        rank=rank,
        world=world,
        seed=config.training.seeds.data,
        shuffle=config.data.dataset.shuffle,
        length=config.model.max_seq_len,
        row_length=row_length(config),
        vocab_size=config.model.vocab_size,
        canaries=open_canaries(config, row_length(config)) if config.data.canaries else None,
    )


def tokenizer_file(config: TrainConfig, source: Source) -> Path | None:
    """Return the tokenizer.json of the data or of the configuration; None, with a warning, if `auto` finds none.

    Raises PicoError if a configured tokenizer cannot be found or is not the one the data were prepared with.
    """
    from picolm.data.tokenizer import check_same, find_tokenizer

    name = config.data.tokenizer.name
    if name == "auto" and source.tokenizer_file is not None:
        return source.tokenizer_file
    try:
        file = find_tokenizer(PUBLISHED_TOKENIZER if name == "auto" else name)
        check_same(source, config.data.dataset.name, file, None, f"data.tokenizer.name ({name})")
        return file
    except PicoError as error:
        if name != "auto":
            raise
        log.warning("No tokenizer (%s): checkpoints will hold no text, and bits per byte are not known.", error)
        return None


def captured_rows(config: TrainConfig, source: Source) -> Rows | None:
    """Return the held-out rows of the `val` captures; None if there are none."""
    dynamics = config.checkpointing.learning_dynamics
    if dynamics.eval_data is None:
        return None
    held_out = _held_out(config, dynamics.eval_data, "val", source)
    return _sample(held_out, dynamics.max_rows, row_length(config), config.model.vocab_size)


def evaluated_rows(config: TrainConfig, source: Source) -> Rows | None:
    """Return the held-out rows that `paloma` evaluates; None if it is not configured or there are no such rows."""
    paloma = config.evaluation.paloma
    if "paloma" not in (config.evaluation.metrics or ()):
        return None
    held_out = _held_out(config, paloma.dataset_name, paloma.dataset_split, source)
    return _sample(held_out, paloma.max_rows, row_length(config, paloma.max_length), config.model.vocab_size)


def _held_out(config: TrainConfig, name: str, split: str, source: Source) -> Source | None:
    """Return the held-out rows called `name`. `auto` means the `val` split of the training data, or the published
    validation set if the training data are the published ones; None, with a warning, if there is no such split.

    Raises DataError if the rows are damaged or come from another tokenizer.
    """
    from picolm.data.manifest import NoSplit
    from picolm.data.tokenizer import check_same

    own = config.data.dataset.name
    place = name if name != "auto" else PUBLISHED_VALIDATION if own == "pico-lm/pretokenized-dolma" else own
    # If the rows have a fixed length of their own, held-out rows may be shorter than training rows.
    length = None if has_own_length(place) else row_length(config)
    try:
        held_out = _open(config, place, split if name != "auto" else "val", length)
        sha256 = getattr(source, "tokenizer_sha256", None)
        check_same(held_out, place, source.tokenizer_file, sha256, f"those of {own}")
        return held_out
    except NoSplit as error:
        if name != "auto":
            raise
        log.warning("No held-out rows: %s. There will be no validation figures and no val captures.", error)
        return None


def _sample(source: Source | None, max_rows: int | None, length: int, vocab_size: int) -> Rows | None:
    rows = Rows.sample(source, max_rows, length) if source is not None else None
    if rows is None or source is None:
        return None
    wrong = (rows.tokens_RS < 0) | (rows.tokens_RS >= vocab_size)
    if wrong.any():
        row, position = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{source.locate(int(rows.numbers[row]))}: a held-out row holds token id {rows.tokens_RS[row, position]} at "
            f"position {position}, outside of the vocabulary of {vocab_size}; ids are 0 to {vocab_size - 1}, and rows are not "
            "padded: leave such rows out, or cut them"
        )
    return rows


def _model(config: TrainConfig, fabric: Fabric) -> Any:
    require_memory(config.model)
    model = find_model(config.model.model_type)(config.model)
    model.init_parameters(torch.Generator().manual_seed(derive(config.training.seeds.init, "init")))
    return model.to(fabric.device, devices.weight_dtype(config.training.fabric.precision))


def _setup(config: TrainConfig, fabric: Fabric, model: Any) -> Any:
    """Wrap the model with Fabric; add `compiled_loss` if compilation is wanted. Returns the wrapped model.

    The optimizers are not wrapped, because nothing here needs Fabric's handling of them.
    """
    methods = ["loss", "score", "generate"] + ["without_noise"] * hasattr(model, "without_noise")
    if devices.want_compile(config.training, fabric.device):
        devices.set_compiler(config.training)
        compiled = torch.compile(type(model).loss, dynamic=False)  # all micro-batches of a run have one shape
        model.compiled_loss = MethodType(compiled, model)  # Fabric accepts only methods
        methods.append("compiled_loss")
    wrapped = fabric.setup_module(model)
    for name in methods:
        mark_forward(wrapped, model, name)
    return wrapped


def make_taps(config: TrainConfig, model: torch.nn.Module) -> Taps:
    """Return the taps for the captures of the configuration, with the modules looked up in `model`.

    The suffixes of the default mean those that the architecture has. Raises PicoError for a suffix that matches no module.
    """
    dynamics, anatomy = config.checkpointing.learning_dynamics, anatomy_of(model)
    suffixes = anatomy.suffixes(dynamics.layer_suffixes)
    modules = find_modules(model, list(map(anatomy.module, suffixes)), dynamics.layers)
    return taps_of(dynamics, modules, config.training.seeds.noise)


def _environment(job: Job) -> dict[str, Any]:
    """Return the content of environment.json for this start: versions, hardware, seeds, model, data and tokenizer."""
    import hashlib
    import platform

    config, batches, text = job.config, job.batches, job.text
    return {
        "python": platform.python_version(),
        "packages": devices.package_versions(),
        "hardware": devices.hardware(),
        "world_size": job.fabric.world_size,
        "seeds": plain(config.training.seeds),
        "model": describe(job.state.model),
        "data": {"name": config.data.dataset.name, "fingerprint": batches.fingerprint, "rows": len(batches.source)},
        "tokenizer_sha256": hashlib.sha256(text.file.read_bytes()).hexdigest() if text.file else None,
    }
