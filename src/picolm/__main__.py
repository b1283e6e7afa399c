"""`python -m picolm` is `pico`: what torchrun and srun start."""

from picolm.cli import main

if __name__ == "__main__":
    main()
