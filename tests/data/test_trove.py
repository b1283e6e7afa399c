"""Who does the work changes no byte: one process, four, tasks on SLURM, and any of them killed on the way."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from picolm.data.documents import Document
from picolm.data.filters import load_filter
from picolm.data.manifest import read_manifest
from picolm.data.prepare import prepare
from picolm.errors import DataError, PicoError

trove = pytest.importorskip(
    "picolm.data.trove", reason="datatrove is not installed (the extra corpora)", exc_type=DataError
)

EXAMPLES = Path(__file__).parents[2] / "examples" / "corpora"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
OPTIONS: dict[str, Any] = {
    "vocab_size": 400, "seq_len": 32, "seed": 3, "val_fraction": 0.1, "deduplicate": True,
    "filters": ["length,min_characters=20"], "run_bytes": 8000,
}  # fmt: skip
PROGRAM = """
import sys
from picolm.data.prepare import prepare
from picolm.data.trove import executor
options = eval(sys.argv[3])
prepare([sys.argv[1]], sys.argv[2], executor=executor("local", 4, 2), **options)
"""


@pytest.fixture
def corpus(write_texts: Any, story: Callable[[int], str]) -> Path:
    """Some hundred texts of two sources in six files, among them short ones and duplicates."""
    return write_texts({
        **{
            f"web/{part}.jsonl": [{"text": story(i % 50)} for i in range(40 * part, 40 * part + 40)] + [{"text": "short"}]
            for part in range(4)
        },
        "books/a.txt": "".join(story(i) for i in range(100, 140)),
        "books/b.txt.gz": gzip.compress("".join(story(i) for i in range(140, 160)).encode()),
    })  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    """sha-256 of all files of a prepared folder."""
    from hashlib import sha256

    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def start(corpus: Path, out: Path) -> subprocess.Popen[bytes]:
    """The program in a process group of its own; what it says of errors goes to a file beside the texts."""
    with (corpus.parent / "said").open("wb") as said:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(corpus), str(out), repr(OPTIONS)], start_new_session=True, stderr=said
        )


@pytest.mark.slow
def test_one_process_and_four_tasks_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    alone = prepare([corpus], tmp_path / "alone", **OPTIONS)
    with start(corpus, tmp_path / "several") as several:
        several.wait(120)
    assert (tmp_path / "said").read_text() == ""  # datatrove's lines are in the logs
    assert several.returncode == 0
    assert digests(tmp_path / "several") == digests(tmp_path / "alone")
    assert alone is not None
    assert alone.left_out == {"length,min_characters=20": 4, "duplicates": 110}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "said", "several", "texts"]


@pytest.mark.slow
def test_killed_in_any_stage_and_started_again_it_ends_in_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    prepare([corpus], tmp_path / "alone", **OPTIONS)
    out, reports = tmp_path / "killed", dict[Path, int]()
    for stage in ("read", "shuffle", "tokenize", "cut", "write"):
        with start(corpus, out) as process:
            while process.poll() is None and not list(tmp_path.glob(f".killed.*/reports/{stage}/*.json")):
                time.sleep(0.005)
            os.killpg(process.pid, signal.SIGKILL)
        assert not out.exists()
        for path, written in reports.items():
            assert path.stat().st_mtime_ns == written  # what was finished was not done again
        reports = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".killed.*/reports/*/*.json")}
    assert len(reports) > 25
    with start(corpus, out) as process:
        process.wait(60)
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert digests(out) == digests(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "killed", "said", "texts"]


@pytest.mark.slow
def test_another_number_of_workers_goes_on_where_the_first_was_left(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepare([corpus], tmp_path / "alone", **OPTIONS)
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr("picolm.data.rows._rows_of", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DataError, match=r"No space left.*; what is done is kept in"):
            prepare([corpus], tmp_path / "out", **OPTIONS)
    monkeypatch.chdir(tmp_path)
    with pytest.MonkeyPatch.context() as forbidden:
        forbidden.setattr("picolm.data.rows._encoded", lambda *_: pytest.fail("done again"))
        spread = trove.executor("local", 3, 1)  # one worker: in this process
        assert prepare([corpus.relative_to(tmp_path)], "out", **OPTIONS, executor=spread) == alone
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


SBATCH = """#!{python}
# Runs the tasks of an array, one after the other, as SLURM would: each with its number in the environment.
import os, pathlib, re, subprocess, sys
script = pathlib.Path(sys.argv[-1]).read_text()
here = pathlib.Path(__file__).parent
number = len(list(here.glob("job-*"))) + 1
(here / f"job-{{number}}").write_text(" ".join(sys.argv[1:-1]) + chr(10) + script)
if "launch_pickled_pipeline" in script:
    first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups())
    for task in range(first, last + 1):
        environment = os.environ | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "n1", "RUN_OFFSET": "0"}}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
        (here / f"out-{{number}}-{{task}}").write_text(done.stdout + done.stderr)
        if done.returncode:
            break
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with stand-ins for the commands of SLURM, that run the jobs at once and keep their scripts."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": SBATCH.format(python=sys.executable),
        "srun": '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do [ "$1" = -n ] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/sh\necho n1\n",
        "squeue": f"#!/bin/sh\ncat {folder}/queue 2>/dev/null || true\n",
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + PATH)
    return folder


@pytest.mark.slow
def test_jobs_for_slurm_do_the_same(corpus: Path, tmp_path: Path, slurm: Path) -> None:
    options = OPTIONS | {"run_bytes": 40_000}
    spread = trove.executor("slurm", 2, None, ["partition=cpu", "time=01:00:00", "mem_per_cpu_gb=3"])
    assert prepare([corpus], tmp_path / "out", **options, executor=spread) is None  # it was handed in, nobody waits
    scripts = [path.read_text() for path in slurm.glob("job-*")]
    work = [script for script in scripts if "launch_pickled_pipeline" in script]
    assert len(work) == 12  # stages
    assert all("#SBATCH --partition=cpu\n" in text and "--time=01:00:00" in text for text in work)
    assert all("--mem-per-cpu=3G" in text and "--kill-on-invalid-dep=yes" in text for text in work)
    assert sum("--dependency=afterok:" in text.partition("\n")[0] for text in work) == 11
    alone = prepare([corpus], tmp_path / "alone", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "alone"), [p.read_text() for p in slurm.glob("out-*")]
    assert prepare([corpus], tmp_path / "out", **options, executor=spread) == alone  # once finished it is simply there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "slurm", "texts"]


@pytest.mark.slow
def test_the_example_for_dolma_fetches_and_hands_in(corpus: Path, tmp_path: Path, slurm: Path) -> None:
    prepare([corpus], tmp_path / "tokenizer", vocab_size=300, seq_len=32)
    files = sorted(path for path in corpus.rglob("*.*") if path.is_file())
    (tmp_path / "urls").write_text("".join(f"file://{path}\n" for path in files))
    given = {
        "DOLMA": tmp_path / "dolma", "PARTITION": "cpu", "TASKS": 2, "TOKENIZER": tmp_path / "tokenizer", "SEQ_LEN": 32,
        "LIST": f"file://{tmp_path}/urls",
    }  # fmt: skip
    environment = os.environ | {name: str(value) for name, value in given.items()}
    jobs = list[int]()
    for _ in range(2):
        done = subprocess.run(["bash", EXAMPLES / "dolma.sh"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        jobs.append(len(list(slurm.glob("job-*"))))
    assert jobs[0] == jobs[1]  # the second time nothing is handed in
    assert "documents, " in done.stdout
    alone = prepare([corpus], tmp_path / "alone", tokenizer=tmp_path / "tokenizer", seq_len=32)
    assert alone is not None
    there = read_manifest(tmp_path / "dolma" / "rows")
    assert there is not None
    assert (there.splits, there.documents) == (alone.splits, alone.documents)


@pytest.mark.slow
def test_the_example_for_a_laptop(corpus: Path, tmp_path: Path) -> None:
    environment = os.environ | {"VOCAB_SIZE": "300", "SEQ_LEN": "32", "MIN_CHARACTERS": "20", "PATH": PATH}
    words = ["bash", str(EXAMPLES / "laptop.sh"), str(corpus), str(tmp_path / "rows")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Most frequent tokens:" in done.stdout


def test_jobs_in_the_queue_are_not_handed_in_again(
    corpus: Path, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trove.SlurmPipelineExecutor, "launch_job", lambda self: setattr(self, "job_id", "7"))
    spread = trove.executor("slurm", 2, None, ["partition=cpu", "time=01:00:00"])
    assert prepare([corpus], tmp_path / "out", **OPTIONS, executor=spread) is None
    (slurm / "queue").write_text("7 cpu pico-read\n")
    monkeypatch.setattr(trove.SlurmPipelineExecutor, "launch_job", lambda self: pytest.fail("handed in twice"))
    assert prepare([corpus], tmp_path / "out", **OPTIONS, executor=spread) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("slurm", 2), r"--executor slurm needs --slurm partition=… and --slurm time=…"),
        (("slurm", 2, None, ["partiton=x"]), r"--slurm partiton=x: is not KEY=VALUE .*did you mean 'partition'"),
        (("lokal", 2), r"unknown executor 'lokal'; did you mean 'local'"),
        (("local", 0), r"tasks is 0"),
        (("local", 2, None, ["time=1"]), r"--slurm time=1: is for --executor slurm"),
    ],
)
def test_what_no_executor_can_do(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        trove.executor(*arguments)


def test_ray_is_asked_for_by_name_where_it_is_missing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        DataError, match=r"--executor ray needs Ray: pip install 'picolm\[ray\]', or use --executor local"
    ):
        prepare([corpus], tmp_path / "out", **OPTIONS, executor=trove.executor("ray", 2))


@pytest.mark.slow
def test_tasks_of_ray_do_the_same(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
    options = OPTIONS | {"run_bytes": 40_000}
    prepare([corpus], tmp_path / "alone", **options)
    program = PROGRAM.replace('executor("local", 4, 2)', 'executor("ray", 2)')
    command = [sys.executable, "-c", program, str(corpus), str(tmp_path / "rays"), repr(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "datatrove" not in done.stdout + done.stderr  # its lines are in the logs
    assert digests(tmp_path / "rays") == digests(tmp_path / "alone")


def test_a_filter_of_datatrove_judges_our_documents() -> None:
    keep = load_filter("datatrove.pipeline.filters:RegexFilter,regex_exp=forbidden")
    assert keep(Document("a fine text", None))
    assert not keep(Document("a forbidden text", None))
    with pytest.raises(PicoError, match=r"RegexFilter,nothing=1': .*nothing"):
        load_filter("datatrove.pipeline.filters:RegexFilter,nothing=1")


def test_a_failure_in_a_task_is_told_as_it_is(write_texts: Any, tmp_path: Path) -> None:
    texts = write_texts({"a.jsonl.gz": b"no gzip", "b.txt": "fine"})
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read"):
        prepare([texts], tmp_path / "out", **OPTIONS | {"run_bytes": 1}, executor=trove.executor("local", 2, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts"]
