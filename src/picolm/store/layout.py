"""The file and the key in a step that hold a tensor, and the names of the directories of a run."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

from picolm.address import Address
from picolm.errors import StoreError
from picolm.trusted import refuse_links

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
MANIFEST = "manifest.json"
RUN = "run.json"
CONFIG = "training_config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
LATEST = "latest"
TOKENIZER = {
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
}
_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Directories:
    """Names of the directories in a run; the configuration may change them."""

    checkpoints_dir: str = "checkpoints"
    learning_dynamics_dir: str = "learning_dynamics"
    eval_results_dir: str = "eval_results"
    logs_dir: str = "logs"

    def __post_init__(self) -> None:
        for field in fields(self):
            if "/" in check_name(getattr(self, field.name), field.name):
                raise StoreError(
                    f"{field.name}: {getattr(self, field.name)!r} has a slash; it is one name inside of the run"
                )


def step_directory(step: int) -> str:
    return f"step_{step}"


def step_of(name: str) -> int | None:
    """Return the step number in the name of a directory; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def check_name(name: str, where: str) -> str:
    """Return `name`. Raises StoreError when it could lead out of the directory it is relative to."""
    if not isinstance(name, str):
        raise StoreError(f"{where}: {name!r} is no name")
    parts = PurePosixPath(name).parts
    odd = not name or name.startswith("/") or "\\" in name or "\0" in name
    if odd or ".." in parts or str(PurePosixPath(name)) != name or name == ".":
        raise StoreError(f"{where}: {name!r} is not a plain relative path; it could lead out of the run directory")
    return name


def inside(root: Path, name: str) -> Path:
    """Return `root/name`. Raises StoreError when it leads out of `root`, or a part of it below `root` is a link."""
    path = root / check_name(name, str(root))
    refuse_links(path, root)
    return path


def place(address: Address, prefix: str, parameters: Collection[str], dynamics: str) -> tuple[str, str]:
    """Return the file of a step that holds a tensor, and the key in it. Raises StoreError for an impossible address.

    prefix: put before a parameter's name in `model.safetensors`.
    parameters: full names of parameters, needed for those that end in neither `.weight` nor `.bias`.
    """
    kind, split, module = address
    if kind == "weights" and not split:
        return WEIGHTS, prefix + parameter_name(module, parameters)
    if not split and kind not in ("gradients", "activations"):
        return OPTIMIZER, f"{kind}.{parameter_name(module, parameters)}"
    if kind == "weights" or not (_WORD.fullmatch(kind) and _WORD.fullmatch(split)):
        raise StoreError(
            f"{address}: not an address that a step can hold (kind and split are words; weights have no split)"
        )
    return f"{dynamics}/{split}_{kind}.safetensors", module


def parameter_name(module: str, parameters: Collection[str]) -> str:
    """Return the name of the parameter at an address: `x.weight` unless `x` itself is a parameter."""
    return module if module in parameters or module.endswith(".bias") else module + ".weight"


def table_file(split: str, dynamics: str) -> str:
    if not _WORD.fullmatch(split):
        raise StoreError(f"{split!r} is not the name of a split (one word such as 'train')")
    return f"{dynamics}/{split}_data.parquet"


def kind_of_file(name: str, tensor_kind: str | None) -> str:
    """Return the kind that a file of a step is counted as.

    tensor_kind: the address kind of the tensors in it, None when it has none.
    """
    if name == OPTIMIZER:
        return "optimizer"
    if tensor_kind is not None:
        return tensor_kind
    if name.endswith("_data.parquet"):
        return "data"
    return "tokenizer" if name in TOKENIZER else "other"
