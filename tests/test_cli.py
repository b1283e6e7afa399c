"""The command line as a user meets it: in processes of its own where that matters, else through `main`."""

import fcntl
import hashlib
import os
import pty
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from picolm import __version__
from picolm.cli import main
from picolm.store import Run

COMMAND = [sys.executable, "-c", "from picolm.cli import main; main()"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color", "COLUMNS": "160"}
STEPS = 120


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Call = Callable[..., Answer]


def pico(*arguments: str | Path) -> Answer:
    """What `pico ARGUMENTS` answers, in a process of its own whose output is no terminal."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The same within this process, which has imported everything already."""

    def run(*arguments: str | Path) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["pico", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Answer(int(caught.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared rows of a made-up language, with their tokenizer."""
    from picolm.data.prepare import prepare

    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    words = ["".join(draw.choices("abcdeilmnorstu", k=draw.randint(2, 8))) for _ in range(200)]
    for number in range(40):
        (folder / f"{number}.txt").write_text(". ".join(" ".join(draw.choices(words, k=12)) for _ in range(40)) + ".\n")
    rows = folder.with_name(f"{folder.name}-rows")
    prepare([folder], rows, vocab_size=300, seq_len=24, val_fraction=0.1)
    return rows


def write_config(corpus: Path, folder: Path) -> Path:
    """The file of a small run of `STEPS` steps in `folder`/runs/small."""
    file = folder / "small.yaml"
    file.write_text(f"""\
data: {{dataset: {{name: {corpus}}}, dataloader: {{batch_size: 8}}, tokenizer: {{vocab_size: 300}}}}
model: {{d_model: 24, n_layers: 2, attention_n_heads: 4, attention_n_kv_heads: 2, activation_hidden_dim: 48,
  vocab_size: 300, max_seq_len: 24}}
training:
  max_steps: {STEPS}
  fabric: {{accelerator: cpu, precision: 32-true}}
  optimization: {{lr: 0.01, lr_warmup_steps: 2, gradient_accumulation_steps: 2}}
checkpointing: {{run_name: small, runs_dir: {folder}/runs, save_every_n_steps: {STEPS // 2}}}
monitoring: {{logging: {{log_every_n_steps: 10}}}}
""")
    return file


@pytest.fixture
def config(corpus: Path, tmp_path: Path) -> Path:
    return write_config(corpus, tmp_path)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, argv = tmp_path_factory.mktemp("trained"), sys.argv
    options = ["training.max_steps=4", "checkpointing.save_every_n_steps=2"]
    sys.argv = ["pico", "train", str(write_config(corpus, folder)), *options]
    with pytest.raises(SystemExit) as caught:
        main()
    sys.argv = argv
    assert caught.value.code == 0
    return folder / "runs" / "small"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """The folder of a finished run of 4 steps, to be damaged at will."""
    return shutil.copytree(trained, tmp_path / "copy", symlinks=True)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def digests(run: Path) -> list[str]:
    step = run / "checkpoints" / f"step_{STEPS}"
    return [
        hashlib.sha256((step / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "optimizer.safetensors")
    ]


def test_help_lists_the_commands() -> None:
    answer = pico("--help")
    assert answer.code == 0
    assert answer.err == ""
    for command in ("train", "list", "verify", "generate", "data"):
        assert re.search(rf"\b{command}\b", answer.out)
    assert "\x1b" not in answer.out


def test_without_a_command_the_help_is_shown(call: Call) -> None:
    assert "train" in "".join(call()[1:])
    assert call("--version") == Answer(0, f"{__version__}\n", "")


@pytest.mark.slow
def test_a_wrong_configuration_is_a_message_and_exit_code_2(config: Path) -> None:
    config.write_text(config.read_text().replace("max_seq_len: 24", "max_seq_len: 24, n_layer: 3"))
    answer = pico("train", config, "training.max_steps=soon")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.splitlines() == [
        f"{config}:3: model.n_layer: unknown key; did you mean 'n_layers'?",
        'command line: training.max_steps: "soon": should be a valid integer. Updates in all.',
    ]


def test_a_file_that_is_not_there(call: Call, config: Path) -> None:
    answer = call("train", config.with_name("smal.yaml"))
    assert answer == Answer(
        2, "", f"{config.with_name('smal.yaml')}: there is no such file; did you mean 'small.yaml'?\n"
    )


@pytest.mark.parametrize("arguments", [(), ("training.max_steps=1",)])
def test_no_file_at_all(call: Call, arguments: tuple[str, ...]) -> None:
    assert call("train", *arguments) == Answer(2, "", "which configuration? pico train CONFIG [key=value …]\n")


def test_words_that_are_no_keys(call: Call, config: Path) -> None:
    answer = call("train", config, "fast", "training.max_step=1")
    assert answer.code == 2
    assert "command line: fast: should have the form dotted.key=value" in answer.err
    assert "command line: training.max_step: unknown key; did you mean 'max_steps'?" in answer.err


@pytest.mark.parametrize("option", ["--config_path", "--config-path"])
def test_the_configuration_may_be_an_option_as_published(call: Call, config: Path, option: str) -> None:
    positional = call("train", config, "training.max_steps=7", "--dry-run")
    assert call("train", option, config, "--dry-run", "training.max_steps=7") == positional
    assert "saved steps      2: 0, 7" in positional.out


def test_a_dry_run_says_what_would_be_done_and_does_nothing(call: Call, config: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    answer = call("train", config, "--dry-run", "training.fabric.accelerator=cuda", "training.fabric.num_devices=4")
    assert answer.code == 0
    for words in (
        "max_steps: 120",
        "parameters",
        "tokens per step  192",
        "saved steps      3: 0, 60, 120",
        "memory",
        "disk",
    ):
        assert words in answer.out
    assert "Not on this machine: training.fabric.accelerator is cuda" in answer.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_device_that_is_not_there_is_a_message(call: Call, config: Path) -> None:
    answer = call("train", config, "training.fabric.accelerator=mps")
    assert answer.code == 1
    assert "this machine has no MPS device; set training.fabric.accelerator=auto (or cpu)" in answer.err


@pytest.mark.slow
def test_a_run_is_listed_verified_and_lets_its_model_write(call: Call, run: Path) -> None:
    listed = call("list", run)
    assert listed.code == 0
    assert re.search(
        r"step +weights +optimizer +activations +gradients +data +tokenizer +other +total +minimum +over", listed.out
    )
    *rows, loss = [line.split() for line in listed.out.splitlines()[-5:] if line.strip()]
    assert [row[0] for row in rows] == ["0", "2", "4"]
    assert " ".join(loss).endswith("(steps 0 to 4, nats per token)")
    assert call("verify", run) == Answer(0, f"3 checkpoints of {run}: every digest holds\n", "")
    written = call("generate", run, "--prompt", "ab", "--max-new-tokens", "8")
    assert written.code == 0
    assert written.out.startswith("ab")
    assert len(written.out) > len("ab\n")
    assert call("generate", run, "--prompt", "ab", "--max-new-tokens", "8") == written
    assert call("generate", run, "--prompt", "ab", "--max-new-tokens", "8", "--seed", "1") != written
    assert call("generate", run, "--max-new-tokens", "8", "--step", "0", "--temperature", "0").code == 0


def test_a_flipped_byte_is_found_and_its_file_named(call: Call, run: Path) -> None:
    damaged = run / "checkpoints" / "step_2" / "optimizer.safetensors"
    flip(damaged)
    answer = call("verify", run)
    assert answer.code == 1
    assert str(damaged) in answer.err
    assert f"1 problem(s) in 3 checkpoints of {run}" in answer.err


@pytest.mark.parametrize("command", ["list", "verify", "generate"])
def test_a_place_without_a_run(call: Call, tmp_path: Path, command: str) -> None:
    answer = call(command, tmp_path / "nothing")
    assert answer.code == 1
    assert f"{tmp_path}/nothing: no run here (there is no such directory)" in answer.err


ANALYSIS = "metrics: [{metric_name: gini, components: [{layer_suffixes: w_2}]}]\n"


@pytest.mark.parametrize("deep", [False, True], ids=["a file", "below a file"])
@pytest.mark.parametrize(
    "command",
    [
        "analyze analysis.yaml --run RUN monitoring.output_dir=OUT",
        "analyze analysis.yaml --run RUN analysis_name=OUT",
        "report RUN -o OUT/report.html",
        "report RUN -o report.html --figures OUT",
        "train small.yaml checkpointing.runs_dir=OUT training.max_steps=1",
        "data prepare text.txt --out OUT",
        "export RUN --out OUT",
        "fork RUN --step 2 --run-name OUT",
        "replay RUN --steps 1 --out OUT",
        "observe RUN --out OUT",
    ],
)
def test_a_file_where_a_folder_is_to_be_made_is_a_message(
    call: Call, run: Path, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, deep: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "analysis.yaml").write_text(ANALYSIS)
    (tmp_path / "text.txt").write_text("some words of text\n" * 50)
    (tmp_path / "taken").write_text("mine")
    out = "taken/deeper" if deep and "name=" not in command and "--run-name" not in command else "taken"
    for folder in (tmp_path / "analysis_results", run.parent):
        folder.mkdir(exist_ok=True)
        (folder / "taken").write_text("mine")
    answer = call(*command.replace("OUT", out).replace("RUN", str(run)).split())
    assert answer.code in (1, 2)
    assert "taken" in answer.err
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "3"), "has no step 3 (there are: 0, 2, 4)"),
        (("--max-new-tokens", "100"), "ask for at most"),
        (("--prompt", "word " * 40), "this model takes between 1 and 24"),
        (("--max-new-tokens", "5", "--temperature", "-1"), "temperature must be a number of at least 0"),
    ],
)
def test_what_cannot_be_written_is_told(call: Call, run: Path, arguments: tuple[str, ...], message: str) -> None:
    answer = call("generate", run, *arguments)
    assert answer.code == 1
    assert message in answer.err


@pytest.mark.slow
def test_a_step_without_weights_or_tokenizer_cannot_write(
    call: Call, config: Path, tmp_path: Path, toy_data: Path
) -> None:
    options = ("training.max_steps=4", "checkpointing.save_every_n_steps=2")
    call("train", config, *options, "checkpointing.save_weights=4", "checkpointing.run_name=sparse")
    answer = call("generate", tmp_path / "runs" / "sparse", "--step", "2")
    assert answer.code == 1
    assert "step_2 was saved without weights (there are weights of steps: 0, 4)" in answer.err
    call(
        "train",
        config,
        "training.max_steps=0",
        f"data.dataset.name={toy_data}",
        "model.max_seq_len=16",
        "checkpointing.run_name=mute",
    )
    answer = call("generate", tmp_path / "runs" / "mute")
    assert answer.code == 1
    assert "has no tokenizer.json: its data came without one" in answer.err


@pytest.mark.slow
def test_the_story_of_a_run(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "small"
    trained = pico("train", config, "training.max_steps=20")
    assert trained.code == 0
    assert trained.out == ""
    assert "\x1b" not in trained.err  # plain lines where there is no terminal
    assert "\r" not in trained.err
    line = r"step 20/20  loss \d\.\d{4}  lr [\d.e+-]+  grad norm \d+\.\d{3}  [\d,]+ tokens/s  0:00 left"
    assert re.search(rf"^{line}$", trained.err, re.MULTILINE)
    assert trained.err.splitlines()[-1] == f"Let the model write:  pico generate {run} --prompt 'The'"
    assert (run / "logs" / "train.log").read_text().count("loss") >= 3
    again = pico("train", config, "training.max_steps=20")
    assert again.code == 0
    assert f"Continuing {run} from step 20." in again.err
    listed, verified = pico("list", run), pico("verify", run)
    assert (listed.code, verified.code) == (0, 0)
    assert "\x1b" not in listed.out
    assert verified.out == f"2 checkpoints of {run}: every digest holds\n"
    written = pico("generate", run, "--prompt", "The", "--max-new-tokens", "5")
    assert written.code == 0
    assert written.out.startswith("The")
    flip(run / "checkpoints" / "step_20" / "model.safetensors")
    found = pico("verify", run)
    assert found.code == 1
    assert "step_20/model.safetensors: damaged" in found.err
    assert "Traceback" not in found.err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_same_bytes(
    config: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = ("train", config, f"training.max_steps={STEPS}", "monitoring.logging.log_every_n_steps=1")
    with subprocess.Popen(
        [*COMMAND, *map(str, command)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 5/"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == 128 + number
    run = tmp_path / "runs" / "small"
    assert f"{number.name}: finishing this step and saving" in rest
    stopped = Run.open(run).steps[-1]
    assert 5 < stopped < STEPS
    assert f"Stopped at step {stopped} of {STEPS}; everything is saved in {run}." in rest
    assert rest.splitlines()[-1] == "To go on: give the same command again."
    assert "Traceback" not in rest
    continued = pico(*command)
    assert continued.code == 0
    assert f"Continuing {run} from step {stopped}." in continued.err
    interrupted = digests(run)
    shutil.rmtree(run)
    assert pico(*command).code == 0
    assert digests(run) == interrupted


def read(terminal: int) -> bytes:
    """What is shown next; nothing when the other end is closed."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


@pytest.mark.slow
def test_a_terminal_shows_a_bar(config: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [*COMMAND, "train", str(config)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        shown = b""
        while piece := read(ours):
            shown += piece
    os.close(ours)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(
        rf"training [━╸╺]+ *\d+/{STEPS} loss \d\.\d{{3}} lr \d\.\de-\d\d [\d,]+ tokens/s \d+:\d\d:\d\d", text
    )
    assert f"{STEPS}/{STEPS}" in text
    assert "Let the model write:" in text
    assert "step 10/" not in text  # the bar says it


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_traceback(run: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "list", str(run)], stdout=writing, stderr=subprocess.PIPE, env=ENVIRONMENT)
    os.close(writing)
    assert b"Traceback" not in done.stderr
