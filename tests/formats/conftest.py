from tests.fox import fox, make_run, prompt  # noqa: F401
