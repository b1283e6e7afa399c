from tests.fox import fox, make_run, prompt, state_space_run  # noqa: F401
