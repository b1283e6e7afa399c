"""The command `pico`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import signal
import sys
from types import FrameType

if sys.argv[:1] == ["-c"] and sys.path[:1] == [""]:
    del sys.path[0]  # as in `__main__`: modules of the working folder would hide installed packages

# isort: off
from picolm.cli import training, again, analysis, reporting, viewing, suites, runs, corpora, exchange, tools  # noqa: F401  # in the order that `pico --help` shows

# isort: on
from picolm.cli.app import app
from picolm.console import say, tolerate
from picolm.errors import PicoError
from picolm.registry import CodePolicy, set_code_policy


def main() -> None:
    """Run the command line. A PicoError is shown as a message, without a traceback, and sets the exit code."""
    # Read when torch loads OpenMP: waiting threads spin for microseconds, not milliseconds. By default a second busy
    # process on the same cores makes each small operation up to 70 times slower; alone on the machine it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ["PYTHONSAFEPATH"] = "1"  # child processes do not import modules from the working folder either
    set_code_policy(CodePolicy())
    tolerate()
    before = signal.signal(signal.SIGINT, _leave)
    try:
        app()
    except PicoError as error:
        say(error, error=True)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        say("The home folder is not known; set HOME, or PICO_CACHE to a folder for what is fetched.", error=True)
        sys.exit(1)
    except KeyboardInterrupt:  # raised by training when it is interrupted
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    """On Ctrl-C while no training handles it: exit at once, without an exception.

    An exception in the middle of an import (and imports take seconds at the start) shows a traceback, or leaves an
    import lock taken, so that the process hangs on exit. All that is written survives SIGKILL, so it also survives
    this.
    """
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + number)
