"""Weights & Biases adapter. An unreachable server never stops a run or an analysis."""

import logging
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from picolm.errors import PicoError
from picolm.trusted import open_to_append, read_text, refuse_links

log = logging.getLogger("picolm")


class Session:
    """A run on the server, or an offline run in `folder`, to upload later with `wandb sync`.

    Raises PicoError if the package wandb is not installed.
    """

    def __init__(self, project: str, entity: str, name: str, folder: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise PicoError("monitoring.save_to_wandb needs: pip install 'picolm[wandb]'") from error
        refuse_links(folder / "wandb", folder)
        arguments: dict[str, Any] = {
            "project": project or "pico",
            "entity": entity or None,
            "name": name,
            "id": _identity(folder / "wandb_id"),
            "resume": "allow",
            "dir": str(folder),
            "config": dict(config),
            "settings": wandb.Settings(init_timeout=20, finish_timeout=60, silent=True, console="off"),
        }
        try:
            self._run = wandb.init(**arguments)
        except Exception as error:  # no account, no network, an invalid key
            log.warning("Weights & Biases is out of reach (%s); writing an offline run instead.", error)
            # the other id may still be in use
            self._run = wandb.init(**arguments | {"mode": "offline", "resume": None, "id": secrets.token_hex(8)})

    def log(self, values: Mapping[str, Any], step: int) -> None:
        try:
            self._run.log(dict(values), step=step)
        except Exception as error:
            log.warning("Weights & Biases took nothing at step %d: %s", step, error)

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            log.warning("Weights & Biases did not close: %s", error)


def _identity(file: Path) -> str:
    """Return the id of the run on the server, stored in `file`, so a resumed run keeps it and a new one differs."""
    if not os.path.lexists(file):
        with os.fdopen(open_to_append(file), "w") as made:
            made.write(secrets.token_hex(8))
    found = read_text(file, most_bytes=1000).strip()
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,128}", found):
        raise PicoError(f"{file}: holds no id of a run of Weights & Biases; delete it to start a new one there")
    return found
