"""What the pages show is run: every command and snippet, in order, in a folder of its own; and the site holds together."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import typer.main
import yaml
from filelock import FileLock
from hooks.reference import configuration_keys, on_page_markdown
from pages import Block, blocks, given, run
from tests.hub_server import FakeHub, History
from tests.picotrain import push_step, write_step

from picolm.address import Address
from picolm.analyze import config as analysis
from picolm.analyze.components import COMPONENTS
from picolm.analyze.metrics import METRICS
from picolm.cli import app
from picolm.probes import PROBES
from picolm.suite.config import SuiteConfig
from picolm.train.canaries import CanaryGroup
from picolm.train.config import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The demo with its steps, its layers and its vocabulary, but each step small: what a page says of steps holds for it.
SMALL = [
    "data.dataloader.batch_size=4", "model.d_model=24", "model.activation_hidden_dim=48", "model.max_seq_len=32",
    "training.optimization.optimizer=adamw", "training.optimization.gradient_accumulation_steps=1",
    "training.fabric.precision=32-true", "checkpointing.learning_dynamics.max_rows=4", "evaluation.paloma.max_rows=8",
]  # fmt: skip

# Lightning says so on a machine with SLURM's client, on which nobody asked for SLURM.
pytestmark = pytest.mark.filterwarnings("ignore:The .srun. command is available")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def words(block: Block) -> list[str]:
    """The words that a test adds; `small` stands for SMALL."""
    return [word for given in block.words for word in (SMALL if given == "small" else [given])]


def pico(arguments: list[str]) -> None:
    """`pico ARGUMENTS`, in this process."""
    from picolm.cli import main

    before, sys.argv = sys.argv, ["pico", *arguments]
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
    assert not end.value.code, f"pico {' '.join(arguments)}: code {end.value.code}"


def pico_elsewhere(arguments: list[str]) -> None:
    """The same in a process of its own, which reads the environment anew."""
    code = "from picolm.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, f"pico {' '.join(arguments)}: code {done.returncode}\n{done.stderr}"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """runs/demo with its steps and layers, each step small; made once for all processes of the test run."""
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    with FileLock(shared / "docs.lock"):
        if not (shared / "docs" / "done").exists():
            pico(["train", str(ROOT / "configs/demo.yaml"), *SMALL, f"checkpointing.runs_dir={shared}/docs"])
            (shared / "docs" / "done").touch()
    return shared / "docs" / "demo"


@pytest.fixture
def apart() -> Iterator[None]:
    """What a page registers, imports and draws is gone after it."""
    from picolm.data import SOURCES
    from picolm.models import MODELS
    from picolm.train.optim import OPTIMIZERS, SCHEDULES

    registries: list[Any] = [COMPONENTS, METRICS, SOURCES, MODELS, OPTIMIZERS, SCHEDULES]
    parts, modules, path = [dict(registry._parts) for registry in registries], set(sys.modules), list(sys.path)
    yield
    for registry, before in zip(registries, parts):
        registry._parts = before
    sys.path[:] = path
    here = [name for name in set(sys.modules) - modules if name.split(".")[0] in ("my_lab", "examples")]
    for name in here:
        del sys.modules[name]


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: None) -> Path:
    """A folder that looks like a clone of the repository, and that commands start in."""
    for name in ("configs", "examples", "docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH")))))
    return tmp_path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with pico-lm/pico-decoder-tiny and its branch pico-decoder-tiny-1, as pico-train pushes them, of a small width."""
    shapes = {"attention.v_proj": (8, 24), "attention.o_proj": (24, 24), "swiglu.w_2": (24, 48)}
    config = {
        "model": {"d_model": 24, "n_layers": 12, "attention_n_heads": 12, "attention_n_kv_heads": 4},
        "training": {"fabric": {"num_nodes": 4, "num_devices": 4}},
    }
    history, branch = History(), "pico-decoder-tiny-1"
    history.commit(
        branch, "Saving Training Config -- Step 0", {"training_config.yaml": yaml.safe_dump(config).encode()}
    )
    for step in range(0, 6000, 1000):
        draw = torch.Generator().manual_seed(step)
        tensors = {}
        for name, (out, into) in ((f"layers.{i}.{n}", shape) for i in range(12) for n, shape in shapes.items()):
            tensors[Address("weights", "", name)] = torch.randn(out, into, generator=draw)
            for split in ("train", "val"):
                tensors[Address("gradients", split, name)] = torch.randn(out, into, generator=draw)
                tensors[Address("activations", split, name)] = torch.randn(30, out, generator=draw)
        rows = {split: torch.arange(30 * 5).reshape(30, 5) for split in ("train", "val")}
        push_step(history, branch, step, write_step(tmp_path / f"hub/{step}", tensors, rows, sub_batch=None))
    with serving("pico-lm/pico-decoder-tiny", history, tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def pythia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with EleutherAI/pythia-70m: four of its branches, of a small width, with its kinds of files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([(ROOT / "docs/index.md").read_text()], trainer)
    config = GPTNeoXConfig(
        vocab_size=300, hidden_size=48, num_hidden_layers=6, num_attention_heads=8, intermediate_size=96,
        max_position_embeddings=128, eos_token_id=0, bos_token_id=0,
    )  # fmt: skip
    history = History()
    for step in (0, 1000, 64000, 143000):
        torch.manual_seed(step)
        GPTNeoXForCausalLM(config).half().save_pretrained(tmp_path / f"series/{step}")
        tokenizer.save(str(tmp_path / f"series/{step}/tokenizer.json"))
        files = {file.name: file.read_bytes() for file in (tmp_path / f"series/{step}").iterdir()}
        history.commit(f"step{step}", "as published", files)
    history.commit("main", "a card", {"README.md": b"# A series"})
    with serving("EleutherAI/pythia-70m", history, tmp_path, monkeypatch) as server:
        yield server


@contextmanager
def serving(name: str, history: History, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub with one repository, which is the Hub of every process that is started from here."""
    with FakeHub({f"models/{name}": history}).serving() as server:
        settings = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": f"{folder}/home",
            "HF_HUB_OFFLINE": "0",
            "PICO_CACHE": f"{folder}/cache",
        }
        for key, value in settings.items():
            monkeypatch.setenv(key, value)
        yield server


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.runs for b in blocks(page.read_text()))], ids=page_name
)
def test_everything_a_page_shows_runs(page: Path, room: Path, request: pytest.FixtureRequest) -> None:
    text = page.read_text()
    if "demo" in given(text):
        copytree(request.getfixturevalue("demo"), room / "runs" / "demo", symlinks=True)
    hubs = given(text) & {"hub", "pythia"}
    for name in hubs:
        request.getfixturevalue(name)
    run(text, room, pico_elsewhere if hubs else pico, words)


@pytest.mark.parametrize(
    ("page", "within", "schema"),
    [
        ("train", "", TrainConfig),
        ("train", "canaries.", CanaryGroup),
        ("suite", "", SuiteConfig),
        ("analyze", "file.", analysis.AnalysisConfig),
        ("analyze", "metrics.", analysis.Entry),
        ("analyze", "components.", analysis.Component),
        ("analyze", "layer_suffixes.", analysis.Suffixes),
        ("analyze", "target.", analysis.Target),
        ("analyze", "steps.", analysis.StepRange),
        ("analyze", "steps.", analysis.EachStep),
    ],
)
def test_every_key_of_a_configuration_is_on_its_page_with_default_and_meaning(
    page: str, within: str, schema: Any
) -> None:
    lines = on_page_markdown((ROOT / f"docs/reference/{page}.md").read_text()).splitlines()
    rows = {line.split('"')[1]: line.replace("\\|", "|") for line in lines if line.startswith('| <a id="')}
    for key, field in configuration_keys(schema):
        if not field["section"]:
            row = rows[within + key]
            assert field["description"], key
            assert " ".join(field["description"].split()).replace("<", "&lt;") in row
            assert "default" not in field or f"`{json.dumps(field['default'])}`" in row


def test_every_part_and_command_has_its_place_in_the_reference() -> None:
    pages = {
        name: on_page_markdown(f"<!-- generated: {name} -->\n")
        for name in ("metrics", "components", "probes", "command-line")
    }
    for name in PROBES:
        assert f"\n## {name}\n" in pages["probes"]
        assert all(f"| `{name}.{reading}` |" in pages["probes"] for reading in PROBES.get(name).gives)
    for name in METRICS:
        assert f"\n## {name}\n" in pages["metrics"]
    for name in COMPONENTS:
        assert f"\n## {name}\n" in pages["components"]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        for member in getattr(command, "commands", [None]):
            assert f"\n## pico {' '.join(filter(None, (name, member)))}\n" in pages["command-line"]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_other_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stderr
    loaded = re.compile(
        r"""<(?:script|img|iframe|source|link(?! rel="(?:canonical|next|prev)"))[^>]*(?:src|href)="((?:https?:)?//[^"]+)"""
    )
    for file in (tmp_path / "site").rglob("*.html"):
        assert not loaded.findall(file.read_text()), file
    for file in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import )["']?(?:https?:)?//""", file.read_text()), file


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_each_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.reason is None or len(block.reason.split()) >= 3, f"{page}:{block.line}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- test: a=1 -->\n\nWords.\n", "stands in front of no block"),
        ("<!-- test: a=1 -->\n```yaml\na: 1\n```\n", "says nothing about this block"),
        ("<!-- not run: -->\n```sh\npico\n```\n", "says nothing about this block"),
        ("```fish\npico\n```\n", "is no language that is known here"),
        ("```sh\npico\n", "is never closed"),
    ],
)
def test_a_mark_that_says_nothing_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(blocks(text))


def test_a_page_is_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = """
```python title="lab/numbers.txt"
12
```
<!-- test: x=1 -->
```sh
pico train \\
    demo.yaml   # a comment
# pico generate
cat lab/numbers.txt > copy.txt
```
```python
from pathlib import Path
value = 3
```
- In a list:
  ```python
  assert int(Path("copy.txt").read_text()) == 4 * value
  ```
<!-- not run: it would fail -->
```sh
false
```
"""
    with pytest.raises(ValueError, match="only pico takes words"):
        run(text, tmp_path, lambda words: None, lambda block: list(block.words))
    seen: list[list[str]] = []
    run(text, tmp_path, seen.append, lambda block: [])
    assert seen == [["train", "demo.yaml"]]
    with pytest.raises(SystemExit, match="false: code 1"):
        run("```sh\nfalse\n```\n", tmp_path, seen.append, lambda block: [])
