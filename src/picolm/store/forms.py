"""Schemas of the JSON files of a run: what each key holds. Other keys may hold anything, except in a manifest.

Files of every released version match these schemas: a key that an older version did not write is optional.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Step = Annotated[int, Field(ge=0, lt=10**18)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class RunFile(_Form):
    """`run.json`."""

    format: str
    version: int
    run_name: str | None = None
    created: str | None = None
    directories: dict[str, str] = {}


class DataFacts(_Form):
    name: str | None = None
    fingerprint: str | None = None
    rows: Count | None = None


class Start(_Form):
    """One start of the training process. changed: key -> [old value, new value]."""

    step: Step
    time: str | None = None
    changed: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]] = {}
    packages: dict[str, str] = {}


class Source(_Form):
    """The run and the step that something was made from."""

    run: str
    path: str | None = None
    step: Step | None = None
    changed: dict[str, Any] | None = None
    weights_digest: str | None = None


class Hardware(_Form):
    platform: str | None = None
    cpu: str | None = None
    threads: Annotated[int, Field(gt=0, le=2**20)] | None = None
    gpus: list[str] | None = None


class Environment(_Form):
    """`environment.json`."""

    python: str | None = None
    packages: dict[str, str] | None = None
    hardware: Hardware | None = None
    world_size: Count | None = None
    seeds: dict[str, int] | None = None
    model: dict[str, Any] | None = None
    data: DataFacts | None = None
    tokenizer_sha256: str | None = None
    starts: list[Start] | None = None
    forked_from: Source | None = None
    replay_of: Source | None = None
    imported: dict[str, Any] | None = None


class Capture(_Form):
    positions: list[int] | None = None
    val_positions: list[int] | None = None
    observed_positions: list[int] | None = None


class MeterState(_Form):
    losses: list[float] = []
    spikes: Count = 0
    noise: float = 0.0
    signal: float = 0.0


class TrainerState(_Form):
    """`trainer_state.json`. A step in which `resumable` is true has the schema `ResumableState`."""

    step: Step | None = None
    resumable: bool = False
    loss: float | None = None
    gradient_norm: float | None = None
    clip_coefficient: float | None = None
    learning_rate: float | None = None
    skipped_updates: Count | None = None
    skipped_in_a_row: Count | None = None
    optimizer_scalars: dict[str, float] | None = None
    meters: MeterState | None = None
    capture: Capture | None = None


class ResumableState(TrainerState):
    step: Step
    skipped_updates: Count
    skipped_in_a_row: Count
    optimizer_scalars: dict[str, float]
    meters: MeterState


class Thinned(_Form):
    was: str
    without: list[str]


class About(_Form):
    """The provenance of a step, in its manifest."""

    thinned: list[Thinned] = []


class Parent(_Form):
    step: Step
    digest: str


class FileForm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    bytes: Count
    sha256: Sha256


class TensorForm(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    file: str
    key: str
    shape: list[Count]
    dtype: str
    sha256: Sha256


class ManifestForm(BaseModel):
    """`manifest.json` of a step."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: str
    version: int
    step: Step
    created: str
    parent: Parent | None
    about: dict[str, Any]
    files: dict[str, FileForm]
    tensors: dict[str, TensorForm]
    digest: str


class Queue(_Form):
    """`.hub/outbox.json`. steps: the queued steps, where an earlier version wrote the file; empty now."""

    place: str
    steps: list[Step] = []


class Holder(_Form):
    """`.lock`."""

    host: str
    pid: int
    since: str


class LogLine(_Form):
    """A line of `metrics.jsonl`. Values under a name with a slash, or a name in `_NUMBERS`, are numbers."""

    step: Step
    weights_digest: str | None = None
    rows: list[int] | None = None

    @model_validator(mode="after")
    def _numbers(self) -> "LogLine":
        for key, value in (self.__pydantic_extra__ or {}).items():
            if ("/" in key or key in _NUMBERS) and not _is_number(value):
                raise ValueError(f"{key[:80]}: should be a number")
        return self


_NUMBERS = {
    "lr", "tokens", "grad_norm", "clip_coefficient", "loss_spikes", "skipped_updates", "weight_norm", "noise_scale",
    "tokens_per_s", "flops_per_s", "share_of_peak", "skipped",
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


class DataFile(BaseModel):
    filename: str


class DataSetState(BaseModel):
    """`state.json` of a data set of the datasets library."""

    data_files: Annotated[list[DataFile], Field(alias="_data_files")]
