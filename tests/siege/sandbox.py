"""Run commands of `pico` in forked children of one process that has imported everything, so that thousands are affordable.

Each case is a child of its own: with a time limit, a limit of memory and of file size,
its own working folder and nothing left
of the case before it. This file is started as a script; `Sandbox` talks to it through pipes, one line of JSON each way.
"""

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

SOURCE = Path(__file__).parents[2] / "src"
SECONDS = 60.0  # the time limit of a command; the slowest healthy one takes about two
MEMORY_BYTES = 3 << 30  # on top of the address space that the imports take
FILE_BYTES = 256 << 20
# What commands import when they run.
LATE = [
    "pandas", "tokenizers", "safetensors.torch", "huggingface_hub.hf_api", "plotly.graph_objects", "plotly.io",
    "plotly.offline", "gguf", "pyarrow.parquet", "jinja2", "joblib", "lightning_fabric", "torch.optim", "torch._dynamo",
    "torch.profiler", "sqlite3", "orjson", "transformers.models.llama.modeling_llama", "transformers.initialization",
]  # fmt: skip
# Events of Python's audit hooks whose arguments are paths.
PATHS = {
    "open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.listdir": 1,
    "os.scandir": 1, "os.truncate": 1, "os.chmod": 1, "os.utime": 1, "shutil.rmtree": 1, "shutil.copyfile": 2,
    "shutil.move": 2, "sqlite3.connect": 1, "pathlib.Path.glob": 1,
}  # fmt: skip
_FAILURES = re.compile(r"Traceback \(most recent call last\)|panicked at|Fatal Python error|core dumped")


class Result(NamedTuple):
    """code: the exit code, negative for a signal, None when the time was up. paths: what was opened, if that was asked for."""

    code: int | None
    output: str
    seconds: float
    peak_bytes: int
    paths: list[str]

    @property
    def fault(self) -> str | None:
        """What no command may do, whatever it reads: a traceback, a signal, no end, a failure without a message."""
        if self.code is None:
            return f"no end within {self.seconds:.0f} s"
        if found := _FAILURES.search(self.output):
            lines = [line for line in self.output.splitlines() if re.match(r"\w[\w.]*(:|$)", line)]
            return f"{found[0]}: {lines[-1][:300] if lines else self.output[-300:]}"
        if self.code < 0:
            return f"killed by signal {-self.code}: {self.output[-300:]}"
        if self.code and not self.output.strip():
            return f"exit code {self.code} without a message"
        return None

    @property
    def place(self) -> str:
        """The innermost line of this package in the traceback."""
        found = re.findall(r'/picolm/(\S+\.py)", line (\d+)', self.output)
        return ":".join(found[-1]) if found else "?"


class Sandbox:
    """The process that forks, and the client of it. `environment` holds for all commands."""

    def __init__(self, environment: dict[str, str]):
        own = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300", "TOKENIZERS_PARALLELISM": "false", **environment}
        own["PYTHONPATH"] = str(SOURCE)
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own
        )
        self.cases = 0

    def run(self, arguments: list[str], folder: Path, *, seconds: float = SECONDS, watch: bool = False) -> Result:
        """Run `pico arguments` in `folder`. watch: also return the paths that it opens."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.cases += 1
        case = {"arguments": arguments, "folder": str(folder), "seconds": seconds, "watch": watch}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that forks is gone, exit code {self._process.wait()}: before it ran {case}"
        return Result(**json.loads(answer))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _preload() -> None:
    """Import the whole package, and what its commands import when they run."""
    import picolm

    for module in pkgutil.walk_packages(picolm.__path__, "picolm."):
        if not module.name.endswith("__main__"):
            with contextlib.suppress(ImportError):
                importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    gc.freeze()  # a collection in a child would touch, and so copy, every page


def _serve(requests: IO[str], answers: IO[str]) -> None:
    for line in requests:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(case: dict[str, Any]) -> dict[str, Any]:
    output, paths = os.memfd_create("output"), os.memfd_create("paths")
    opened = Opened(Path(case["folder"])) if case["watch"] else None
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(case, output, paths)
    process = os.pidfd_open(pid)
    in_time = bool(select.select([process], [], [], case["seconds"])[0])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        os.killpg(pid, signal.SIGKILL)  # whatever it started, too
    _, status, usage = os.wait4(pid, 0)
    found = {
        "code": os.waitstatus_to_exitcode(status) if in_time else None,
        "output": _content(output),
        "seconds": time.monotonic() - start,
        "peak_bytes": usage.ru_maxrss << 10,
        "paths": sorted({*_content(paths).split("\0"), *(opened.paths() if opened else ())} - {""}),
    }
    os.close(process)
    return found


class Opened:
    """The paths in the folders of `root` that any code opens or makes from now on, native code included (inotify)."""

    EVENTS = 0x2 | 0x20 | 0x40 | 0x80 | 0x100 | 0x200  # modified, opened, moved from and to, created, deleted

    def __init__(self, root: Path):
        self._library = ctypes.CDLL(None, use_errno=True)
        self._queue = self._library.inotify_init1(os.O_NONBLOCK)
        folders = [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]
        self._folders = {
            self._library.inotify_add_watch(self._queue, os.fsencode(folder), self.EVENTS): folder for folder in folders
        }

    def paths(self) -> set[str]:
        """Those since the start; ends the watch."""
        found: set[str] = set()
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._queue, 1 << 20):
                at = 0
                while at < len(data):
                    number, _, _, length = struct.unpack_from("iIII", data, at)
                    name = data[at + 16 : at + 16 + length].rstrip(b"\0")
                    if number in self._folders:
                        found.add(str(self._folders[number] / os.fsdecode(name)))
                    at += 16 + length
        os.close(self._queue)
        return found


def _content(descriptor: int, most: int = 4 << 20) -> str:
    text = os.pread(descriptor, most, 0).decode("utf-8", "backslashreplace")
    os.close(descriptor)
    return text


def _child(case: dict[str, Any], output: int, paths: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(case["folder"])
        _limit(case["seconds"])
        _patch(Path(case["folder"]))
        if case["watch"]:
            _watch(paths)
        sys.argv = ["pico", *case["arguments"]]
        code = _main()
    finally:
        os._exit(code)


def _limit(seconds: float) -> None:
    faulthandler.enable()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError, as on a full disk


def _patch(folder: Path) -> None:
    """Caches in the working folder, and no waiting between attempts."""
    from huggingface_hub import constants

    sleep = time.sleep
    constants.HF_HUB_CACHE = str(folder / ".hub_cache")
    os.environ["PICO_CACHE"] = str(folder / ".pico_cache")
    os.environ["SIEGE_MARKERS"] = str(folder / ".markers")
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))  # type: ignore[assignment]


def _watch(paths: int) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        for argument in arguments[: PATHS.get(event, 0)]:
            if isinstance(argument, str | bytes | os.PathLike):
                os.write(paths, os.path.abspath(os.fsencode(argument)) + b"\0")

    sys.addaudithook(hook)


def _main() -> int:
    from picolm.cli import main

    try:
        main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.path[:] = [folder for folder in sys.path if folder != str(Path(__file__).parent)]
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _preload()
    _serve(sys.stdin, channel)
