"""The command `pico`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import signal
import sys
from types import FrameType

if sys.argv[:1] == ["-c"] and sys.path[:1] == [""]:
    del sys.path[0]  # as in `__main__`: the working folder would come before installed packages

# isort: off
from picolm.cli import training, again, analysis, reporting, suites, runs, corpora, exchange, tools  # noqa: F401  # in the order that `pico --help` shows

# isort: on
from picolm.cli.app import app
from picolm.console import say, tolerate
from picolm.errors import PicoError
from picolm.registry import CodePolicy, set_code_policy


def main() -> None:
    """Run the command line; problems that the user can act on are shown as messages, without a traceback."""
    # Read when torch loads OpenMP: threads that wait spin for microseconds, not milliseconds. By default a second busy
    # process on the same cores makes each small operation up to 70 times slower; alone on the machine it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ["PYTHONSAFEPATH"] = (
        "1"  # processes that are started from here find no modules in the working folder either
    )
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
    except KeyboardInterrupt:  # from where the training listens
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, where no training listens to it: end now, without an exception.

    One in the middle of an import, and a start is seconds of imports, shows as a traceback, or leaves a lock of the import
    system taken, so that the process hangs when it exits. Whatever is written survives SIGKILL, and so it does this.
    """
    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # a progress bar hides the cursor
    os._exit(128 + number)
