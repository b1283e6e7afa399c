"""The card of a run: a README.md that says what it is, how it went, and how to read its steps.

What cannot be known of a run, its licence and language, is not made up: put it into the first lines on the Hub, and it stays.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from picolm.document import ConfigError, parse_yaml, write_yaml
from picolm.errors import StoreError
from picolm.markdown import block, code, plain
from picolm.store.layout import METRICS
from picolm.store.roworder import lookup
from picolm.store.run import Run

FILE = "README.md"
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 60
_POINTS = 8
_STEPS = 40
_SHAPE = {"n_layers": "layers", "d_model": "wide", "attention_n_heads": "heads", "vocab_size": "tokens of vocabulary"}
_FRONT = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def model_card(
    run: Run, repository: str, branch: str, commits: Mapping[int, str], differences: Mapping[str, Any]
) -> str:
    """commits: of the steps that are there. differences: keys of the configuration that are not as by default."""
    try:
        environment = run.environment
    except StoreError:
        environment = {}
    sections = [
        _what(run, repository, branch, commits),
        _data(run, environment),
        _configuration(differences),
        _curve(run),
        _loading(run, repository, branch, commits),
        _analysis(repository, branch),
    ]
    data = str(environment.get("data", {}).get("name", ""))
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["pico", "learning-dynamics", "custom_code"]}
    if _HUB_NAME.fullmatch(data):
        front["datasets"] = [data]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{_mark(f'hub:{repository}@{branch}')}\n" + "\n".join(
        sections
    )


def kept_by_hand(text: str, place: str) -> bool:
    """Whether a card was written by somebody, or for another place, and is not to be replaced."""
    return bool(text.strip()) and _mark(place) not in text and _FRONT.sub("", text).strip() != ""


def with_front_matter(text: str, before: str) -> str:
    """A card with what somebody added to the first lines of the one before (license, language, …)."""
    kept, own = _front(before), _front(text)
    body = _FRONT.sub("", text, count=1)
    return f"---\n{yaml.safe_dump({**kept, **own}, sort_keys=False, allow_unicode=True)}---\n{body}"


def _mark(place: str) -> str:
    named = place.replace(">", "%3E").replace("\n", "%0A")  # nothing that ends a comment
    return f"<!-- written by pico for {named}; without this line it is left as it is -->"


def _front(text: str) -> dict[str, Any]:
    match = _FRONT.match(text)
    try:
        found = parse_yaml(match[1], FILE) if match else None
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}


def _what(run: Run, repository: str, branch: str, commits: Mapping[int, str]) -> str:
    model = lookup(run.config, "model", {})
    shape = ", ".join(f"{plain(model[key])} {word}" for key, word in _SHAPE.items() if key in model)
    kind = code(model["model_type"]) if "model_type" in model else "model of a type that its configuration leaves out"
    steps = sorted(commits)
    held = f"{len(steps)} checkpoints, from step {steps[0]} to step {steps[-1]}" if steps else "no checkpoint yet"
    return (
        f"# {plain(branch if branch != 'main' else repository.split('/')[1])}\n\n"
        f"A training run of a {kind}{f' ({shape})' if shape else ''} with its learning dynamics: {held}, "
        "each with what the run kept of weights, optimizer state, and the gradients and activations of that very step. "
        f"The run is the branch {code(branch)}; a step is a commit on it.\n"
    )


def _data(run: Run, environment: Mapping[str, Any]) -> str:
    data, seeds = environment.get("data") or {}, environment.get("seeds") or {}
    rows = lookup(run.config, "data.dataloader.batch_size", None)
    lines = [f"- data: {code(data.get('name') or lookup(run.config, 'data.dataset.name', 'not recorded'))}"]
    if "fingerprint" in data:
        lines.append(
            f"- {data.get('rows', '?')} rows; fingerprint of their content and order {code(data['fingerprint'])}"
        )
    if rows:
        lines.append(
            f"- step s takes rows s x {plain(rows)} to (s + 1) x {plain(rows)} of the order that the data seed gives"
        )
    if seeds:
        lines.append("- seeds: " + ", ".join(f"{plain(name)} {seed}" for name, seed in seeds.items()))
    packages = environment.get("packages") or {}
    if packages:
        lines.append(
            "- made with " + ", ".join(f"{plain(name)} {plain(version)}" for name, version in packages.items())
        )
    return "## Data and order\n\n" + "\n".join(lines) + "\n"


def _configuration(differences: Mapping[str, Any]) -> str:
    shown = "".join(
        write_yaml({key: value}, default_flow_style=None, width=1000, allow_unicode=True)
        for key, value in differences.items()
    )
    return (
        "## Configuration\n\nWhat differs from the defaults; all of it is in `training_config.yaml`.\n\n"
        f"{block(shown or '{}', 'yaml')}"
    )


def _curve(run: Run) -> str:
    logged = run.read_metrics(("train/loss",))
    points = [(entry["step"], entry["train/loss"]) for entry in logged if _is_number(entry.get("train/loss"))]
    if not points:
        return "## Loss\n\nNothing was logged yet.\n"
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    chosen = _spread(losses, _WIDTH)
    bars = "".join(_BARS[round((loss - low) / (high - low) * 7) if high > low else 0] for loss in chosen)
    rows = "".join(f"| {step} | {loss:.4f} |\n" for step, loss in _spread(points, _POINTS))
    return (
        f"## Loss\n\nTraining loss in nats per token, {low:.3f} to {high:.3f}, over steps {points[0][0]} to {points[-1][0]} "
        f"(every logged value is in `{METRICS}`):\n\n```text\n{bars}\n```\n\n| step | loss |\n|---:|---:|\n{rows}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")


def _spread(values: list[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spread, the first and the last among them."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _loading(run: Run, repository: str, branch: str, commits: Mapping[int, str]) -> str:
    steps = sorted(commits)
    listed = "".join(f"| {step} | {plain(commits[step])} |\n" for step in _spread(steps, _STEPS))
    example = steps[-1] if steps else 0
    program = f"""from huggingface_hub import list_repo_commits
from transformers import AutoModelForCausalLM

step = {example}
title = f"Saving HF Model -- Step {{step}}"
commits = list_repo_commits({json.dumps(repository)}, revision={json.dumps(branch)})
revision = next(commit.commit_id for commit in commits if commit.title == title)
model = AutoModelForCausalLM.from_pretrained({json.dumps(repository)}, revision=revision, trust_remote_code=True)
"""
    return (
        "## Loading a step\n\n`revision` takes the commit of a step. The model brings its own code, which `trust_remote_code` "
        f"runs; read it first.\n\n{block(program, 'python')}\n| step | commit |\n|---:|---|\n{listed}"
    )


def _analysis(repository: str, branch: str) -> str:
    place, name = shlex.quote(f"{repository}@{branch}"), shlex.quote(branch)
    commands = (
        f"pico analyze ANALYSIS.yaml --repo_id {repository} --branch {name}   # fetches the files that it needs, and no more\n"
        f"pico pull {place}                                  # or have the run here, verified"
    )
    return f"## Analyzing it\n\n{block(commands, 'sh')}"
