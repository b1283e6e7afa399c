"""Code is imported if the user named it, in the command or in a YAML file of their own, or gave --trust-remote-code; else never.

The user is in the folder of a run that somebody else made. Modules lie there, some called like families of data or like modules
of Python; each leaves a mark when it is imported.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.test_nothing_is_executed import text_keys

from picolm.analyze.config import AnalysisConfig
from picolm.cli import main
from picolm.data.prepare import prepare
from picolm.registry import CodePolicy, set_code_policy
from picolm.schema import code_keys, load
from picolm.train import run_training
from picolm.train.config import TrainConfig, schema_for

TEXT = "The quick brown fox jumps over the lazy dog, and the dog, being lazy, lets it. " * 3
PLANTED = "from pathlib import Path\nPath({!r}).touch()\nclass Part:\n    pass\n"
SHADOWS = ("yaml", "random", "torch", "typer", "numpy", "wandb", "tqdm")
OWN_NAMES = ("evil_lab", "hub", "embedded", "parquet")
KEYS = code_keys(TrainConfig)
TRAINING = {"fork", "train", "suite"}
MAKING_AGAIN = {"replay", "batch --loss"}

# Which commands need what a key names: they refuse it, and do everything else without it.
NEEDED = {
    "model.model_type": {"generate", "export", "batch", "evaluate"} | MAKING_AGAIN | TRAINING,
    "data.dataset.name": {"batch", "evaluate"} | MAKING_AGAIN | TRAINING,
    "training.fabric.strategy": MAKING_AGAIN | TRAINING,
    "training.optimization.optimizer": MAKING_AGAIN | TRAINING,
    "training.optimization.lr_scheduler": MAKING_AGAIN | TRAINING,
    "checkpointing.learning_dynamics.eval_data": MAKING_AGAIN | TRAINING,
    "evaluation.metrics": {"evaluate"} | TRAINING,
    "evaluation.paloma.dataset_name": {"evaluate"} | MAKING_AGAIN | TRAINING,
    "evaluation.lm_eval.include_path": TRAINING,  # `evaluate` where lm_eval is asked for, see below
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps in two starts, on text with a tokenizer."""
    folder = tmp_path_factory.mktemp("theirs")
    for number in range(30):
        (folder / "texts").mkdir(exist_ok=True)
        (folder / "texts" / f"{number}.txt").write_text(TEXT + str(number))
    prepare([folder / "texts"], folder / "rows", vocab_size=280, seq_len=16, val_fraction=0.1)
    file = folder / "config.yaml"
    file.write_text(f"""
data: {{dataset: {{name: {folder}/rows}}, dataloader: {{batch_size: 4}}, tokenizer: {{vocab_size: 280}}}}
model: {{d_model: 16, n_layers: 1, attention_n_heads: 2, attention_n_kv_heads: 1, activation_hidden_dim: 32,
  vocab_size: 280, max_seq_len: 16}}
training:
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 1, gradient_accumulation_steps: 1}}
evaluation: {{paloma: {{max_rows: 2}}}}
checkpointing: {{run_name: run, runs_dir: {folder}/runs, save_every_n_steps: 2, learning_dynamics: {{max_rows: 2}}}}
""")
    for steps in (2, 4):
        run_training(load(file, schema_for, [f"training.max_steps={steps}"]))
    return folder / "runs" / "run"


@pytest.fixture
def theirs(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator["Theirs"]:
    run = Theirs(tmp_path)
    shutil.copytree(original, run.path)
    run.plant(run.path)
    monkeypatch.chdir(run.path)
    yield run
    run.forget()
    set_code_policy(CodePolicy())


class Theirs:
    """A run that somebody else made, and what the user makes of it."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.sprung = folder, folder / "run", folder / "sprung"

    def plant(self, folder: Path) -> None:
        for name in (*OWN_NAMES, *SHADOWS):
            (folder / f"{name}.py").write_text(PLANTED.format(str(self.sprung)))

    def forget(self) -> None:
        """Let nothing that was imported count for the next command."""
        for name in OWN_NAMES:
            sys.modules.pop(name, None)
        self.sprung.unlink(missing_ok=True)

    def store(self, key: str, value: Any) -> None:
        """Let the configuration of the run say something."""
        config = yaml.safe_load((self.path / "training_config.yaml").read_text())
        section = config
        *sections, last = key.split(".")
        for part in sections:
            section = section[part]
        section[last] = value
        (self.path / "training_config.yaml").write_text(yaml.safe_dump(config))

    def record(self, key: str, value: Any) -> None:
        """Let the record of its second start say that the key had another value before it."""
        environment = json.loads((self.path / "environment.json").read_text())
        environment["starts"][1]["changed"][key] = [value, None]
        (self.path / "environment.json").write_text(json.dumps(environment))

    def commands(self) -> dict[str, list[str]]:
        """Each command on the run; what it makes goes elsewhere."""
        made = self.folder / "made"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        (made / "analysis.yaml").write_text(
            f"metrics: [{{metric_name: per, components: [{{data_type: weights}}]}}]\n"
            f"monitoring: {{output_dir: {made}/analyses}}\n"
        )
        (made / "suite.yaml").write_text(
            f"suite_name: s\nbase: {self.path}/training_config.yaml\noutput_dir: {made}\n"
            f"overrides: {{checkpointing: {{runs_dir: {made}/runs}}, training: {{max_steps: 1}}}}\n"
        )
        place = str(self.path)
        return {
            "list": ["list", place],
            "verify": ["verify", place],
            "generate": ["generate", place, "--prompt", "The", "--max-new-tokens", "2"],
            "export": ["export", place, "--out", f"{made}/exported"],
            "report": ["report", place, "-o", f"{made}/report.html"],
            "analyze": ["analyze", f"{made}/analysis.yaml", "--run", place, "--report"],
            "batch": ["batch", place, "--step", "1"],
            "batch --loss": ["batch", place, "--step", "1", "--loss"],
            "evaluate": ["evaluate", place, "--steps", "4"],
            "replay": ["replay", place, "--step", "1", "--out", f"{made}/replay"],
            "fork": ["fork", place, "--step", "1", "--run-name", "forked", "training.max_steps=1"],
            "train": ["train", f"{place}/training_config.yaml", "training.max_steps=1", "checkpointing.run_name=again",
                      f"checkpointing.runs_dir={made}"],
            "suite": ["suite", f"{made}/suite.yaml", "--dry-run"],
        }  # fmt: skip

    def run(self, capsys: Any, *words: str) -> tuple[int, str]:
        """Exit code and messages of a command in this process."""
        self.forget()
        shutil.rmtree(self.folder / "forked", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["pico", *words])
            with pytest.raises((SystemExit, TypeError, AttributeError, ValueError)) as ended:  # a planted part is none
                main()
        code = ended.value.code if isinstance(ended.value, SystemExit) else 1
        return int(code or 0), capsys.readouterr().err


def test_the_keys_that_may_name_code_are_declared() -> None:
    assert set(KEYS) == set(NEEDED)
    assert set(code_keys(AnalysisConfig)) == {
        "metrics.metric_name",
        "metrics.components.component_name",
        "probes.probe_name",
    }


def value_for(key: str) -> Any:
    """Code, where the key names no data under the name of a family of data."""
    value = "evil_lab:Part" if KEYS[key].names == "data source" else "hub:Part"
    return [value] if key == "evaluation.metrics" else value


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_code_of_a_stored_configuration_is_refused_by_the_commands_that_need_it(
    theirs: Theirs, key: str, capsys: Any
) -> None:
    theirs.store(key, value_for(key))
    for command, words in theirs.commands().items():
        code, told = theirs.run(capsys, *words)
        assert not theirs.sprung.exists(), command
        if command in NEEDED[key]:
            assert (code, f"names code of its own, {key}: " in told, "--trust-remote-code" in told) == (
                1,
                True,
                True,
            ), (command, told)
            assert not (theirs.folder / "made" / command).exists(), command
        else:
            assert code == 0, (command, told)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_code_of_the_record_of_starts_is_refused_by_the_commands_that_need_it(
    theirs: Theirs, key: str, capsys: Any
) -> None:
    theirs.record(key, value_for(key))
    for command in ("batch", "batch --loss", "replay", "fork"):  # the others look at the latest configuration alone
        code, told = theirs.run(capsys, *theirs.commands()[command])
        assert not theirs.sprung.exists(), command
        if command in NEEDED[key]:
            assert (code, f"names code of its own, {key}: " in told) == (1, True), (command, told)
        else:
            assert code == 0, (command, told)


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in KEYS if key != "evaluation.lm_eval.include_path"])
def test_with_the_flag_the_commands_that_need_it_import_it_and_no_others(theirs: Theirs, key: str, capsys: Any) -> None:
    theirs.store(key, value_for(key))
    shown = (
        {"report", "analyze"} if key == "model.model_type" else set()
    )  # its losses on text, its default configuration
    for command in sorted(NEEDED[key] - {"suite"} | shown | {"generate", "batch"}):
        theirs.run(capsys, *theirs.commands()[command], "--trust-remote-code")
        assert theirs.sprung.exists() == (command in NEEDED[key] | shown), command
    theirs.run(capsys, *theirs.commands()["fork"])  # the flag is not remembered
    assert not theirs.sprung.exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted({*text_keys(TrainConfig)} - {*KEYS}))
def test_text_of_any_other_key_is_no_code(theirs: Theirs, key: str, capsys: Any) -> None:
    """A project called `pico:v2`."""
    theirs.store(key, "hub:Part")
    for command in ("generate", "batch", "evaluate", "fork"):
        _, told = theirs.run(capsys, *theirs.commands()[command])
        assert not theirs.sprung.exists(), command
        assert "names code of its own" not in told, (command, told)


@pytest.mark.slow
def test_a_model_folder_names_no_code(theirs: Theirs, capsys: Any) -> None:
    folder = theirs.folder / "model"
    assert theirs.run(capsys, "export", str(theirs.path), "--format", "torch", "--out", str(folder))[0] == 0
    file = folder / "model_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "hub:Part"}))
    theirs.plant(folder)
    words = ["import", str(folder), "--out", str(theirs.folder / "imported")]
    code, told = theirs.run(capsys, *words)
    assert (code, f"{file} names code of its own, model.model_type: hub:Part" in told) == (1, True), told
    assert not theirs.sprung.exists()
    assert not (theirs.folder / "imported").exists()
    theirs.run(capsys, *words, "--trust-remote-code")
    assert theirs.sprung.exists()


def test_an_analysis_that_came_with_its_table_names_no_code(theirs: Theirs, capsys: Any) -> None:
    """One that lies elsewhere is the user's own; a metric of it is found beside it."""
    for name, entry in (
        ("metric_name", "metrics: [{metric_name: evil_lab:Part}]"),
        ("components.0.component_name", "metrics: [{metric_name: per, components: [{component_name: evil_lab:Part}]}]"),
    ):
        (theirs.folder / "file.yaml").write_text(entry)
        (theirs.folder / "results.parquet").touch()
        words = ["analyze", str(theirs.folder / "file.yaml"), "--run", str(theirs.path), "--dry-run"]
        code, told = theirs.run(capsys, *words)
        assert (code, f"metrics.0.{name}: " in told, "only with --trust-remote-code" in told) == (2, True, True), told
        assert not theirs.sprung.exists()
        theirs.run(capsys, *words, "--trust-remote-code")
        assert theirs.sprung.exists()
        (theirs.folder / "results.parquet").unlink()
        theirs.run(capsys, *words)
        assert theirs.sprung.exists()


def test_what_the_user_types_is_imported(theirs: Theirs, capsys: Any) -> None:
    theirs.run(capsys, *theirs.commands()["batch"], "data.dataset.name=evil_lab:Part")
    assert theirs.sprung.exists()
    theirs.store("training.optimization.optimizer", "hub:Part")
    code, told = theirs.run(capsys, *theirs.commands()["fork"], "training.optimization.lr_scheduler=evil_lab:Part")
    assert (code, "training.optimization.optimizer: hub:Part" in told) == (1, True), told  # which they did not type


@pytest.mark.slow
def test_a_folder_of_tasks_that_a_run_names_is_not_read(theirs: Theirs, capsys: Any) -> None:
    """A file of tasks names functions of modules beside it (`!function`), which lm-evaluation-harness imports."""
    tasks = theirs.path / "tasks"
    tasks.mkdir()
    theirs.plant(tasks)
    (tasks / "theirs.yaml").write_text("task: theirs\ndataset_path: json\ndoc_to_text: !function evil_lab.Part\n")
    theirs.store("evaluation.metrics", ["lm_eval"])
    theirs.store("evaluation.lm_eval.tasks", ["theirs"])
    theirs.store("evaluation.lm_eval.include_path", str(tasks))
    code, told = theirs.run(capsys, "evaluate", str(theirs.path), "--steps", "4")
    assert (code, f"evaluation.lm_eval.include_path: {tasks}; to import" in told) == (1, True), told
    assert not theirs.sprung.exists()
    theirs.run(capsys, "evaluate", str(theirs.path), "--steps", "4", "--trust-remote-code")
    assert theirs.sprung.exists()


def test_a_suite_hands_on_no_name_of_a_run(theirs: Theirs, capsys: Any) -> None:
    theirs.store("training.optimization.lr_scheduler", "hub:Part")
    words = [word for word in theirs.commands()["suite"] if word != "--dry-run"]
    code, told = theirs.run(capsys, *words)
    assert (code, "names code of its own, training.optimization.lr_scheduler: hub:Part" in told) == (1, True), told
    assert not (theirs.folder / "made" / "s").exists()


def metrics_of_my_own(folder: Path) -> Path:
    """An analysis with a metric in a file beside it, which takes its neighbour when it is called."""
    folder.mkdir()
    (folder / "my_lab.py").write_text("def gini(x):\n    from my_numbers import HALF\n    return HALF\n")
    (folder / "my_numbers.py").write_text("HALF = 0.5\n")
    (folder / "mine.yaml").write_text(
        f"metrics: [{{metric_name: my_lab:gini, components: [{{data_type: weights}}]}}]\nmonitoring: {{output_dir: {folder}}}\n"
    )
    return folder / "mine.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_metric_of_the_users_own_is_found_beside_their_file(theirs: Theirs, workers: str) -> None:
    mine = metrics_of_my_own(theirs.folder / "mine")
    (theirs.path / "joblib.py").write_text(PLANTED.format(str(theirs.sprung)))
    done = python("-m", "picolm", "analyze", mine, "--run", theirs.path, "--workers", workers, at=theirs.path)
    assert done.returncode == 0, done.stderr
    assert not theirs.sprung.exists()


@pytest.mark.slow
def test_the_flag_goes_to_the_processes_of_an_analysis(theirs: Theirs) -> None:
    mine = metrics_of_my_own(theirs.folder / "mine")
    (mine.parent / "results.parquet").touch()
    words = ["-m", "picolm", "analyze", mine, "--run", theirs.path, "--workers", "2"]
    assert "my_lab:gini; to import is to run it" in python(*words, at=mine.parent).stderr
    done = python(*words, "--trust-remote-code", at=mine.parent)
    assert done.returncode == 0, done.stderr


def python(*words: str | Path, at: Path) -> subprocess.CompletedProcess[str]:
    """Python as a user starts it in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=at, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-m", "picolm"], ["-c", "from picolm.cli import main; main()"]], ids=["m", "c"])
def test_modules_of_the_working_folder_take_no_place_of_installed_ones(theirs: Theirs, start: list[str]) -> None:
    for words in (["generate", ".", "--max-new-tokens", "2"], ["batch", ".", "--step", "1"]):
        done = python(*start, *words, at=theirs.path)
        assert (done.returncode, theirs.sprung.exists()) == (0, False), done.stderr


@pytest.mark.slow
def test_members_and_processes_start_without_the_modules_of_the_working_folder(theirs: Theirs) -> None:
    """`picolm.py` too, which `python -m picolm` itself would take before anything of ours runs."""
    theirs.commands()
    own = theirs.folder / "own.yaml"
    own.write_text((theirs.path / "training_config.yaml").read_text())
    file = theirs.folder / "made" / "suite.yaml"
    file.write_text(file.read_text().replace(str(theirs.path / "training_config.yaml"), str(own)))
    (theirs.path / "picolm.py").write_text(PLANTED.format(str(theirs.sprung)))
    start = "import sys; sys.path.remove(''); from picolm.cli import main; main()"  # as the installed command does
    done = python("-c", start, "suite", file, "--no-report", at=theirs.path)
    assert (done.returncode, theirs.sprung.exists()) == (0, False), done.stderr
    two = ["training.fabric.num_devices=2", f"checkpointing.runs_dir={theirs.folder}/two", "training.max_steps=1"]
    script = Path(sys.executable).with_name("pico")
    done = python(script, "train", own, *two, at=theirs.path)
    assert (done.returncode, theirs.sprung.exists()) == (0, False), done.stderr
