"""What is done of a suite: read from the store, never remembered elsewhere, so it can be interrupted, moved and extended."""

from typing import Literal, NamedTuple

from picolm.errors import PicoError, StoreError
from picolm.schema import plain
from picolm.store import Run
from picolm.suite.config import FREE, Member
from picolm.train.history import last_step
from picolm.train.plan import Plan
from picolm.train.resume import FREE as MAY_MOVE
from picolm.train.resume import changes

State = Literal["new", "interrupted", "running", "finished"]

# What is computed; the rest says where, how often something is saved, and what is watched.
DECISIVE = ("model.", "data.", "training.")
ELSEWHERE = (
    "training.fabric.accelerator", "training.fabric.num_", "training.fabric.strategy", "training.deterministic",
    "training.compile", "training.max_skipped_steps", *FREE, *MAY_MOVE,
)  # fmt: skip


class Standing(NamedTuple):
    """How far a member is. step: the last one that was logged or saved."""

    member: Member
    state: State
    step: int = 0
    saved_otherwise: tuple[
        str, ...
    ] = ()  # keys of `checkpointing` with which a finished run was made, and that differ now


def standings(members: list[Member]) -> list[Standing]:
    """How far each member is. Raises PicoError that lists every folder which holds another experiment."""
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
    """How far a member is. Raises PicoError where its folder holds a run with other settings, or a damaged one."""
    if not (member.path / "run.json").exists():
        return Standing(member, "new")
    run = Run.open(member.path)
    changed = changes(run.config, plain(member.config))
    decisive = {key: pair for key, pair in changed.items() if _decides(key, member)}
    if decisive:
        lines = [f"  {key}: {old!r} in the run, {new!r} in the suite" for key, (old, new) in decisive.items()]
        raise PicoError(
            f"{member.path} was trained with other settings than this suite's:\n"
            + "\n".join(lines)
            + "\n  Put them back, "
            "or choose another suite_name (or overrides.checkpointing.runs_dir), or delete the folder"
        )
    step, saved = last_step(run), Plan(member.config).saved_steps()
    if step >= member.config.training.max_steps and (not saved or saved[-1] in run.steps):
        _check_whole(run, saved[-1:])
        otherwise = tuple(key for key in changed if key.startswith("checkpointing.") and key.split(".")[1] != "keep")
        return Standing(member, "finished", step, otherwise)
    return Standing(member, "running" if _is_written(run) else "interrupted", step)


def _decides(key: str, member: Member) -> bool:
    """Whether a run with another value of the key is another experiment; a precision that is left open is none."""
    if key == "training.fabric.precision":
        return member.config.training.fabric.precision != "auto"
    return key.startswith(DECISIVE) and not key.startswith(ELSEWHERE)


def _check_whole(run: Run, steps: list[int]) -> None:
    problems = [problem for step in steps for problem in run.problems(step)]
    if problems:
        raise PicoError(
            f"{run.path} is finished but damaged: {'; '.join(problems)}\n  Delete the damaged step to train from the one "
            "before it, or copy it back"
        )


def _is_written(run: Run) -> bool:
    """Whether another process writes the run at this moment."""
    try:
        with run.lock():
            return False
    except StoreError:
        return True
