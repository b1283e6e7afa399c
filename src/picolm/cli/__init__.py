"""The command `pico`. Each command imports what it needs when it runs, so that `--help` answers at once."""

import os
import sys

# isort: off
from picolm.cli import training, again, analysis, runs, corpora  # noqa: F401  # in the order that `pico --help` shows

# isort: on
from picolm.cli.app import app
from picolm.errors import PicoError


def main() -> None:
    """Run the command line; problems that the user can act on are shown as messages, without a traceback."""
    # Read when torch loads OpenMP: threads that wait spin for microseconds, not milliseconds. By default a second busy
    # process on the same cores makes each small operation up to 70 times slower; alone on the machine it costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app()
    except PicoError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
