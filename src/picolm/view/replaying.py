"""Steps that were not saved, made again from the checkpoint before them, in a process of its own and outside of the run.

They are kept in a temporary folder until the server ends. This module is also the program of that process:
`python -m picolm.view.replaying RUN STEP FOLDER`.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from picolm.errors import PicoError
from picolm.registry import code_policy
from picolm.store import Run
from picolm.view.refusal import Refused
from picolm.view.viewed import Viewed

MOST_KEPT = 64  # steps that are made again for one run


def plan(viewed: Viewed, step: int) -> dict[str, Any]:
    """Return the checkpoint to begin from, the number of updates, and the seconds that these took in the run (None: not logged).

    Raises PicoError for a run that cannot be replayed, and for a step that it never reached, or that is there.
    """
    from picolm.train.history import check_trained, origin, own_run

    if step in viewed.steps():
        raise Refused(f"step {step} is there")
    run = own_run(str(viewed.run.path))
    check_trained(run, step)
    begin = origin(run, step).step
    logged = list(run.read_metrics(("tokens_per_s", "tokens")))
    speeds = [entry["tokens_per_s"] for entry in logged if entry.get("tokens_per_s")]
    sizes = [entry["tokens"] / entry["step"] for entry in logged if entry["step"] and entry.get("tokens")]
    seconds = (step - begin) * sizes[-1] / statistics.median(speeds) if speeds and sizes else None
    return {"from": begin, "updates": step - begin, "seconds": seconds}


class Replays:
    """The steps that are made again, one at a time. tell: is called with each event."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]):
        self._tell = tell
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, viewed: Viewed, step: int, planned: dict[str, Any]) -> None:
        """Begin to make a step again. Raises Refused (503) while another one is made."""
        if self._task is not None and not self._task.done():
            raise Refused("another step is being made; wait for it", 503)
        if viewed.replayed is not None and len(viewed.replayed) >= MOST_KEPT:
            raise Refused(f"{MOST_KEPT} steps were made again for this run; start pico view anew to make others")
        self._task = asyncio.ensure_future(self._run(viewed, step, planned))

    async def _run(self, viewed: Viewed, step: int, planned: dict[str, Any]) -> None:
        about = {"type": "replay", "run": viewed.number, "step": step, "of": planned["updates"]}
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="pico-view-")
        out, done = Path(self._folder.name) / str(viewed.number), 0
        trusted = ["--trust-remote-code"] if code_policy().trusted else []
        words = [
            sys.executable,
            "-m",
            "picolm.view.replaying",
            str(viewed.run.path.resolve()),
            str(step),
            str(out),
            *trusted,
        ]
        pipe = asyncio.subprocess.PIPE
        self._tell({**about, "done": 0, "state": "running", "error": None})
        try:
            self._process = await asyncio.create_subprocess_exec(*words, stdout=pipe, stderr=pipe)
            assert self._process.stdout is not None
            assert self._process.stderr is not None
            said = asyncio.ensure_future(self._process.stderr.read())
            async for line in self._process.stdout:
                done = json.loads(line)
                self._tell({**about, "done": done, "state": "running", "error": None})
            error = (await said).decode(errors="replace").strip()
            if await self._process.wait():
                raise PicoError(error.splitlines()[-1] if error else "the replay was ended")
            viewed.replayed = await asyncio.to_thread(Run.open, out)
            self._tell({**about, "done": planned["updates"], "state": "done", "error": None})
        except (PicoError, OSError, ValueError) as error:
            self._tell({**about, "done": done, "state": "failed", "error": str(error)})

    def close(self) -> None:
        """End what is running, and delete what was made."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        if self._folder is not None:
            self._folder.cleanup()


def main(place: str, step: int, out: str) -> None:
    """Make a step again, its weights only; write how many updates are done, a number a line, to standard output."""
    from picolm.train.fork import collection
    from picolm.train.history import origin, own_run
    from picolm.train.job import Due
    from picolm.train.replay import replay

    run = own_run(place)
    first = origin(run, step).step

    def watch(job: Any, at: int) -> None:
        sys.stdout.write(f"{at - first}\n")  # for the server, which reads it
        sys.stdout.flush()

    verdict = replay(
        run, [step], kinds=Due(weights=True), destination=collection(run, Path(out), step, []), watchers=[watch]
    )
    if verdict.stopped is not None:
        raise PicoError("the replay was interrupted")


if __name__ == "__main__":
    from picolm.registry import CodePolicy, set_code_policy, trust_remote_code

    os.nice(10)
    set_code_policy(CodePolicy())
    trust_remote_code("--trust-remote-code" in sys.argv[4:])
    try:
        main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    except PicoError as error:
        sys.exit(str(error))
