"""The model card of a run: a README.md that says what the run is, how it went, and how to read its steps.

Its template is `card.md`. Licence and language of a run cannot be known, so they are left out: add them to the front
matter on the Hub, and later cards keep them.
"""

import json
import math
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from picolm.console import BLOCKS
from picolm.document import ConfigError, parse_yaml, write_yaml
from picolm.errors import PicoError, StoreError
from picolm.markdown import block, code, plain
from picolm.store.listing import logged_losses
from picolm.store.roworder import lookup
from picolm.store.run import Run
from picolm.trusted import parse_json

FILE = "README.md"
_WIDTH = 60  # bars of the curve
_POINTS = 8  # rows of the table of losses
_STEPS = 40  # rows of the table of commits
_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PROGRAM = """from huggingface_hub import list_repo_commits
from transformers import {auto}

step = {step}
title = f"Saving HF Model -- Step {{step}}"
commits = list_repo_commits({repository}, revision={branch})
revision = next(commit.commit_id for commit in commits if commit.title == title)
model = {auto}.from_pretrained({repository}, revision=revision, trust_remote_code=True)
"""
_COMMANDS = """pico analyze ANALYSIS.yaml --repo_id {repository} --branch {branch}   # fetches only the files that it needs
pico pull {place}                                  # or have the run here, verified"""


def model_card(
    run: Run, repository: str, branch: str, commits: Mapping[int, str], differences: Mapping[str, Any]
) -> str:
    """Return the model card of a run.

    commits: the commit of each step on the Hub. differences: the keys of its configuration that differ from their
    defaults.
    """
    from jinja2 import Environment, StrictUndefined

    try:
        environment = run.environment
    except StoreError:
        environment = {}
    data = environment.get("data") or {}
    name = str(data.get("name") or lookup(run.config, "data.dataset.name", "not recorded"))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["pico", "learning-dynamics", "custom_code"]}
    if "name" in data and _HUB_NAME.fullmatch(name):
        front["datasets"] = [name]
    model, steps = lookup(run.config, "model", {}), sorted(commits)
    made = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    made.filters |= {"plain": plain, "code": code, "block": block}
    return made.from_string((files("picolm.exchange") / "card.md").read_text(encoding="utf-8")).render(
        front=yaml.safe_dump(front, sort_keys=False),
        mark=_mark(f"hub:{repository}@{branch}"),
        name=branch if branch != "main" else repository.split("/")[1],
        kind=code(model["model_type"])
        if "model_type" in model
        else "model of a type that its configuration leaves out",
        shape=", ".join(f"{plain(name)} {_number(value)}" for name, value in (environment.get("model") or {}).items()),
        held=f"{len(steps)} checkpoints, from step {steps[0]} to step {steps[-1]}" if steps else "no checkpoint yet",
        branch=branch,
        data=data,
        data_name=name,
        batch_size=lookup(run.config, "data.dataloader.batch_size", None),
        seeds=environment.get("seeds") or {},
        packages=environment.get("packages") or {},
        configuration=_yaml(differences) or "{}",
        losses=_losses(run),
        program=_PROGRAM.format(
            auto=_auto_class(run),
            step=steps[-1] if steps else 0,
            repository=json.dumps(repository),
            branch=json.dumps(branch),
        ),
        commits=[(step, commits[step]) for step in _spread(steps, _STEPS)],
        commands=_COMMANDS.format(
            repository=repository, branch=shlex.quote(branch), place=shlex.quote(f"{repository}@{branch}")
        ),
    )


def _auto_class(run: Run) -> str:
    """Return the class of transformers that loads the model, as the config.json of its newest step says."""
    try:
        newest = run.latest()
        found = parse_json(newest.read("config.json"), "config.json", dict[str, Any]) if newest is not None else {}
    except (PicoError, OSError):
        found = {}
    named = found.get("auto_map")
    classes = [name for name in named if re.fullmatch(r"AutoModelFor\w+", str(name))] if isinstance(named, dict) else []
    return classes[0] if classes else "AutoModelForCausalLM"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else plain(value)


def kept_by_hand(text: str, place: str) -> bool:
    """Return whether a card was written by hand or for another place, and so must not be replaced."""
    return bool(text.strip()) and _mark(place) not in text and _FRONT.sub("", text).strip() != ""


def with_front_matter(text: str, before: str) -> str:
    """Return a card with what others added to the front matter of the card before it (license, language, …)."""
    kept, own = _front(before), _front(text)
    body = _FRONT.sub("", text, count=1)
    return f"---\n{yaml.safe_dump({**kept, **own}, sort_keys=False, allow_unicode=True)}---\n{body}"


def _mark(place: str) -> str:
    named = place.replace(">", "%3E").replace("\n", "%0A")  # nothing that would end the comment
    return f"<!-- written by pico for {named}; without this line it is left as it is -->"


def _front(text: str) -> dict[str, Any]:
    match = _FRONT.match(text)
    try:
        found = parse_yaml(match[1], FILE) if match else None
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(differences: Mapping[str, Any]) -> str:
    options: dict[str, Any] = {"default_flow_style": None, "width": 1000, "allow_unicode": True}
    return "".join(write_yaml({key: value}, **options) for key, value in differences.items())


def _losses(run: Run) -> dict[str, Any] | None:
    """Return what the logged losses are, their range, a curve of bars, and some points; None where none is logged."""
    logged, name = logged_losses(run)
    points = [(step, loss) for step, loss in logged.items() if isinstance(loss, int | float) and math.isfinite(loss)]
    if not points:
        return None
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BLOCKS[round((loss - low) * scale)] for loss in _spread(losses, _WIDTH))
    return {"name": name, "low": low, "high": high, "bars": bars, "points": _spread(points, _POINTS)}


def _spread(values: list[Any], count: int) -> list[Any]:
    """Return at most `count` of the values, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
