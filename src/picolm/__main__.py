"""`python -m picolm` is `pico`: what torchrun and srun start."""

import os
import sys

# For `-m`, Python looks into the working folder before all others: a random.py or yaml.py there would hide the real one.
# Code that the user names is found there by `picolm.registry`, and nothing else is.
if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(os.curdir):
    del sys.path[0]

from picolm.cli import main

if __name__ == "__main__":
    main()
