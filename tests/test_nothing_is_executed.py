"""Whatever a run holds, reading it runs no code of it: not its pickles, its YAML, its modelling files, its names of modules."""

import ast
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import BaseModel

from picolm.cli import main
from picolm.errors import PicoError, StoreError
from picolm.registry import trust_remote_code
from picolm.store import Run
from picolm.train.history import config_at
from picolm.train.sample import config_of, load_model

SOURCE = Path(__file__).parents[1] / "src" / "picolm"
EVIL = "from pathlib import Path\nPath({!r}).touch()\nclass Part:\n    pass\n"
FAMILIES = ("hub", "embedded", "parquet")  # of data: a module may be called so too


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that appears when the module `evil_lab` is imported; it is on the path."""
    sprung = tmp_path / "sprung"
    (tmp_path / "evil_lab.py").write_text(EVIL.format(str(sprung)))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield sprung
    trust_remote_code(False)
    sys.modules.pop("evil_lab", None)


@pytest.fixture
def run(train: Callable[..., Run]) -> Run:
    return train("training.max_steps=2")


def rewrite(run: Run, key: str, value: Any) -> None:
    """Let the configuration that lies in the run say something else."""
    config = run.config
    section = config
    *sections, last = key.split(".")
    for part in sections:
        section = section[part]
    section[last] = value
    (run.path / "training_config.yaml").write_text(yaml.safe_dump(config))


def pico(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["pico", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def text_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a configuration that may hold free text."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from text_keys(kind, f"{prefix}{name}.")
        elif "str" in str(kind):
            yield prefix + name


@pytest.mark.slow
def test_a_model_that_a_stored_run_names_is_not_imported(run: Run, trap: Path) -> None:
    rewrite(run, "model.model_type", "evil_lab:Part")
    message = (
        rf"{run.path} names code of its own, model.model_type: evil_lab:Part; .* done only with --trust-remote-code"
    )
    for read in (config_of, load_model, lambda run: config_at(run, 0)):
        with pytest.raises(PicoError, match=message):
            read(run)  # type: ignore[operator]
    assert not trap.exists()


def test_the_flag_imports_it(run: Run, trap: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    rewrite(run, "model.model_type", "evil_lab:Part")
    shutil.copy(Path(__file__), run.path / "x")
    assert pico(monkeypatch, "batch", run.path, "--step", "1") == 1
    assert "only with --trust-remote-code" in capsys.readouterr().err
    assert not trap.exists()
    assert pico(monkeypatch, "batch", run.path, "--step", "1", "--trust-remote-code") != 0
    assert "evil_lab:Part' is no model: its Config, a dataclass, is missing" in capsys.readouterr().err
    assert trap.exists()
    trap.unlink()
    assert pico(monkeypatch, "batch", run.path, "--step", "1") == 1  # it is not remembered


@pytest.mark.slow
def test_no_command_imports_what_the_configuration_of_a_run_names(
    run: Run, trap: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key in ("model.model_type", "evaluation.metrics"):
        rewrite(run, key, ["evil_lab:Part"] if key.endswith("metrics") else "evil_lab:Part")
    for arguments in (["report", run.path, "-o", tmp_path / "r"], ["evaluate", run.path], ["replay", run.path, "--step", "1"],
                      ["export", run.path, "--out", tmp_path / "o"], ["list", run.path], ["generate", run.path],
                      ["fork", run.path, "--step", "1", "--run-name", "f"]):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            pico(patch, *arguments)
        assert not trap.exists(), arguments


@pytest.mark.slow
def test_no_command_imports_the_code_that_lies_in_a_run(
    run: Run, trap: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its modelling files are for transformers, where its user says so; here they are bytes."""
    for place in (run.path, run.step_path(2)):
        for name in ("pico_decoder.py", "attention.py", "sitecustomize.py", "conftest.py", "torch.py", "evil_lab.py"):
            (place / name).write_text(EVIL.format(str(trap)))
    config = json.loads((run.step_path(2) / "config.json").read_text())
    (run.step_path(2) / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil_lab.Part"}}))
    analysis = tmp_path / "analysis.yaml"
    analysis.write_text(f"metrics: [{{metric_name: per}}]\nmonitoring: {{output_dir: {tmp_path}/out}}\n")
    monkeypatch.chdir(run.step_path(2))
    for arguments in (["list", run.path], ["verify", run.path], ["generate", run.path], ["batch", run.path, "--step", "1"],
                      ["replay", run.path, "--step", "1"], ["analyze", analysis, "--run", run.path]):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            code = pico(patch, *arguments)
        assert code == (arguments[0] in ("verify", "generate")), arguments  # strange files; no tokenizer
        assert not trap.exists(), arguments


@pytest.mark.parametrize("text", ["!!python/object/apply:os.mkdir [{}]", "a: !!python/object/new:os.mkdir [{}]"])
def test_yaml_with_code_is_refused(run: Run, tmp_path: Path, text: str) -> None:
    (run.path / "training_config.yaml").write_text(text.format(tmp_path / "made"))
    with pytest.raises(StoreError, match=r"training_config\.yaml.*: is not valid YAML: .* is no plain list or mapping"):
        run.config  # noqa: B018
    assert not (tmp_path / "made").exists()


class Malice:
    def __init__(self, place: Path):
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


@pytest.mark.slow
def test_pickles_beside_the_tensors_of_a_run_are_not_opened(
    run: Run, tmp_path: Path, train: Callable[..., Run]
) -> None:
    """A state as pico-train keeps it, and one in the place of ours: the first is passed over, the second no such file."""
    sprung = tmp_path / "sprung"
    malice = pickle.dumps({"optimizer": Malice(sprung)})
    (run.step_path(2) / "fabric_state").mkdir()
    (run.step_path(2) / "fabric_state" / "checkpoint.pt").write_bytes(malice)
    (run.step_path(2) / "optimizer.safetensors").write_bytes(malice)
    assert any("optimizer.safetensors" in problem for problem in run.problems(2))
    assert train("training.max_steps=4").problems(4) == []
    assert not sprung.exists()


def test_rows_with_a_pickled_type_are_not_opened(tmp_path: Path) -> None:
    from picolm.store.foreign import read_arrow

    sprung = tmp_path / "sprung"
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Malice(sprung)),
    }
    schema = pa.schema([pa.field("input_ids", pa.int32(), metadata=metadata)])
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(pa.table([pa.array([1], pa.int32())], schema=schema))
    assert read_arrow(tmp_path / "x.arrow", "here").num_rows == 1
    assert not sprung.exists()


CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
           "joblib.load", "marshal.loads", "os.system"}  # fmt: skip


@pytest.mark.slow
def test_the_package_has_no_door_to_foreign_code() -> None:
    """torch.load only with weights_only, and nothing else that runs what it reads; one place that imports by a name."""
    found, importers = set(), set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            safe = called == "torch.load" and options.get("weights_only") == "True"
            dangerous = called in CALLS | METHODS and not safe
            if dangerous or options.get("trust_remote_code") == "True" or options.get("allow_pickle") == "True":
                found.add((str(file.relative_to(SOURCE)), called))
            if called.endswith("import_module") and not isinstance(node.args[0], ast.Constant):
                importers.add(str(file.relative_to(SOURCE)))
    assert found == set()
    assert importers == {"registry.py"}
