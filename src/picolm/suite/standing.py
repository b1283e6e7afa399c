"""The progress of a suite, read from its runs and stored nowhere else: it can be interrupted, moved and extended."""

from typing import Literal, NamedTuple

from picolm.errors import PicoError, StoreError
from picolm.schema import plain
from picolm.store import Run
from picolm.suite.config import FREE, Member
from picolm.train.history import last_step
from picolm.train.job import Plan
from picolm.train.state import changes, changes_of_experiment

State = Literal["new", "interrupted", "running", "finished"]

# Keys of `training` that do not change the results: they say where to run.
ELSEWHERE = (
    "training.fabric.accelerator", "training.fabric.num_", "training.fabric.strategy", "training.deterministic",
    "training.compile", "training.max_skipped_steps", *FREE,
)  # fmt: skip


class Standing(NamedTuple):
    """The progress of a member.

    step: the last step that was logged or saved. saved_otherwise: keys of `checkpointing` that a finished run was made
    with and that differ now.
    """

    member: Member
    state: State
    step: int = 0
    saved_otherwise: tuple[str, ...] = ()


def standings(members: list[Member]) -> list[Standing]:
    """Return the progress of each member. Raises PicoError that lists every folder with another experiment."""
    found, clashes = [], []
    for member in members:
        try:
            found.append(standing(member))
        except PicoError as error:
            clashes.append(str(error))
    if clashes:
        raise PicoError("\n".join(clashes))
    return found


def standing(member: Member) -> Standing:
    """Return the progress of a member.

    Raises PicoError when its folder holds a run with other settings, or a damaged one.
    """
    if not (member.path / "run.json").exists():
        return Standing(member, "new")
    run = Run.open(member.path)
    changed = changes(run.config, plain(member.config))
    _require_same(member, changed)
    step, saved = last_step(run), Plan(member.config).saved_steps()
    if step >= member.config.training.max_steps and (not saved or saved[-1] in run.steps):
        if problems := [problem for last in saved[-1:] for problem in run.problems(last)]:
            advice = "Delete the damaged step to train from the one before it, or copy it back"
            raise PicoError(f"{run.path} is finished but damaged: {'; '.join(problems)}\n  {advice}")
        otherwise = tuple(key for key in changed if key.startswith("checkpointing.") and key.split(".")[1] != "keep")
        return Standing(member, "finished", step, otherwise)
    return Standing(member, "running" if _is_written(run) else "interrupted", step)


def _require_same(member: Member, changed: dict[str, tuple[object, object]]) -> None:
    """Raise PicoError when a changed key makes this another experiment.

    A change of precision does not count when the member leaves it open (`auto`).
    """
    decisive = changes_of_experiment(changed)
    is_open = {"training.fabric.precision"} if member.config.training.fabric.precision == "auto" else set()
    lines = [
        f"  {key}: {old!r} in the run, {new!r} in the suite"
        for key, (old, new) in changed.items()
        if key in decisive or (key.startswith("training.") and not key.startswith(ELSEWHERE) and key not in is_open)
    ]
    if lines:
        advice = (
            "Put them back, or choose another suite_name (or overrides.checkpointing.runs_dir), or delete the folder"
        )
        text = f"{member.path} was trained with other settings than this suite's:"
        raise PicoError("\n".join([text, *lines, f"  {advice}"]))


def _is_written(run: Run) -> bool:
    """Return whether another process is writing the run at this moment."""
    try:
        with run.lock():
            return False
    except StoreError:
        return True
