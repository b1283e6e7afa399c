"""Models to be asked."""

from tests.fox import fox, make_run, state_space_run

__all__ = ["fox", "make_run", "state_space_run"]
