"""What the page is told of a run before anything is asked of it: its shape, its steps, its marks, and what can be asked."""

from collections.abc import Iterator
from typing import Any

from picolm.errors import PicoError, StoreError
from picolm.readers.series import Series
from picolm.store import Run
from picolm.view import answers
from picolm.view.viewed import SPLITS, Viewed

SAYS = {
    "exact": "The colour of a token is its loss: -ln p of it given the tokens before it, in nats.",
    "bound": (
        "The colour of a token is -ln p of it given the tokens before it, with it and all later ones hidden, in nats: the exact "
        "loss of this diffusion model from left to right after the first token, which is given. What it is trained on is a bound "
        "of the loss in any order."
    ),
    "none": "This model has no likelihood, so its tokens have no loss.",
}


def describe(viewed: Viewed) -> dict[str, Any]:
    """Return all that the page is told of a run. What is not known of a model is None, and `notes` say why."""
    run, notes = viewed.run, list[str]()
    logged, steps = tokens_of(run), viewed.steps()
    about: dict[str, Any] = {
        "kind": None,
        "likelihood": "none",
        "says": "",
        "layers": None,
        "heads": None,
        "kv_heads": None,
    }
    about |= {"context": None, "vocabulary": None, "parameters": None}
    can: dict[str, Any] = dict.fromkeys(("text", "patterns", "mixing", "lens"), "")
    try:
        shape, can = _of_model(viewed)
        about |= shape
    except PicoError as error:
        notes.append(str(error))
        can = dict.fromkeys(can, str(error))
    own = type(run) is Run and "recorded" not in (_quietly(lambda: run.config, notes) or {})
    why = True if own else "it was trained by other code than Pico's, so its batches are not known"
    return {
        "id": viewed.number, "name": run.name, "place": viewed.place, **about, "notes": notes,
        "can": {**can, "training": True, "batch": why, "replay": why},
        "live": run.is_live,
        "tokens_per_step": logged.per_step,
        "steps": steps_of(viewed, logged),
        "last_step": max([*steps, *logged.steps, 0]),
        "marks": list(_marks(viewed)),
        "rows": {split: _rows(viewed, split) for split in SPLITS},
    }  # fmt: skip


def steps_of(viewed: Viewed, logged: "Tokens") -> list[dict[str, Any]]:
    """Return what the page is told of each step with weights."""
    made, evaluated = viewed.made_again(), set(_quietly(viewed.run.evaluated_steps, []) or ())
    return [
        {
            "step": step, "tokens": logged.at(step), "saved": step not in made, "replayed": step in made,
            "evaluated": step in evaluated, "digest": each.digest[:12] if each.digest else None,
        }
        for step, each in viewed.steps().items()
    ]  # fmt: skip


def _of_model(viewed: Viewed) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the shape of a model, and what can be asked of it. Raises PicoError for a model that cannot be run."""
    subject = viewed.subject
    architecture, anatomy = subject.architecture, subject.anatomy
    model = (viewed.run.config.get("model") or {}).get("model_type")
    shape = {
        "kind": model or type(architecture.outline).__name__,
        "likelihood": subject.likelihood,
        "says": SAYS[subject.likelihood],
        "layers": anatomy.layers,
        "heads": anatomy.heads,
        "kv_heads": anatomy.kv_heads,
        "context": architecture.context,
        "vocabulary": viewed.words.size,
        "parameters": sum(parameter.numel() for parameter in architecture.outline.parameters()),
    }
    return shape, answers.why_not(subject)


class Tokens:
    """How many tokens were read up to each step, as far as it was logged; else the product, where a step always reads as many."""

    def __init__(self, logged: dict[int, int], per_step: int | None):
        self.steps, self.per_step = logged, per_step

    def at(self, step: int) -> int | None:
        """Return the tokens read up to a step, None where that is not known."""
        return self.steps.get(step, None if self.per_step is None else step * self.per_step)


def tokens_of(run: Run) -> Tokens:
    """Return the tokens that a run read by step."""
    per_step = run.said.tokens_per_step if isinstance(run, Series) else None
    logged = dict[int, int]()
    try:
        for entry in run.read_metrics(("tokens",)):
            if isinstance(entry.get("tokens"), int | float):
                logged[entry["step"]] = int(entry["tokens"])
    except (PicoError, OSError):
        pass  # a damaged log is told by the training panel
    if per_step is None:
        ratios = {tokens / step for step, tokens in logged.items() if step}
        per_step = int(ratios.pop()) if len(ratios) == 1 else None
    return Tokens(logged, per_step)


def _marks(viewed: Viewed) -> Iterator[dict[str, Any]]:
    """Yield what happened at steps: spikes and skipped updates, interruptions, changes of the configuration, damage."""
    run, before = viewed.run, {"loss_spikes": 0, "skipped_updates": 0}
    said = {
        "loss_spikes": "the loss jumped: {} times since the line before",
        "skipped_updates": "{} updates were skipped",
    }
    for entry in _quietly(lambda: list(run.read_metrics(tuple(before))), []) or ():
        for name, count in before.items():
            now = entry.get(name)
            if isinstance(now, int) and now > count:
                yield {"step": entry["step"], "kind": "spike", "note": said[name].format(now - count)}
            before[name] = now if isinstance(now, int) else count
    starts = (_quietly(lambda: run.environment, []) or {}).get("starts") or []
    for start in starts[1:]:
        changed = ", ".join(start.get("changed") or ())
        kind = "configuration" if changed else "interruption"
        yield {
            "step": start.get("step", 0),
            "kind": kind,
            "note": f"changed: {changed}" if changed else "continued from here",
        }
    for step in viewed.damaged():
        yield {"step": step, "kind": "damaged", "note": "this step is damaged: pico verify says more"}


def _rows(viewed: Viewed, split: str) -> dict[str, Any]:
    """Return at which steps rows of a split are kept, and how many at each: those of the first such step that can be read."""
    steps = [step for step, each in viewed.steps().items() if split in each.splits]
    for step in steps:
        count = _quietly(lambda step=step: len(viewed.run[step].rows(split)), [])
        if count is not None:
            return {"rows": count, "steps": steps}
    return {"rows": 0, "steps": []}


def _quietly(read: Any, notes: list[str]) -> Any:
    """Return what is read; None where it cannot be, and say so."""
    try:
        return read()
    except (StoreError, OSError) as error:
        notes.append(str(error))
        return None
