from tests.fox import fox, make_run  # noqa: F401
