"""`python -m picolm`: the command, where a launcher such as torchrun wants a module."""

from picolm.cli import main

if __name__ == "__main__":
    main()
