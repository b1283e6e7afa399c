"""Run the command `pico` as `python -m picolm`, for example under torchrun and srun."""

import os
import sys

# With `-m`, Python searches the working folder first: a random.py or yaml.py there would hide the real module.
# `picolm.registry` finds code there that the user names, and nothing else is imported from there.
if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.curdir):
    del sys.path[0]

from picolm.cli import main

if __name__ == "__main__":
    main()
