"""Canaries by configuration: a run resumes, replays and forks with them to the same bytes, and refuses others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picolm.errors import DataError, PicoError
from picolm.observe.training import SeenRows
from picolm.schema import ConfigError
from picolm.store import Run
from picolm.train.build import open_batches
from picolm.train.fork import fork
from picolm.train.history import recorded_digests
from picolm.train.inspection import batch_at
from picolm.train.job import Due
from picolm.train.replay import replay

Train = Callable[..., Run]
RANDOM = "data.canaries=[{name: twice, rows: random, count: 2, start: 1, every: 3, times: 2, apart: 1}]"


@pytest.fixture
def planted_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "canary.npy", np.arange(2 * 17).reshape(2, 17) % 64)
    return tmp_path / "canary.npy"


def digests(run: Run) -> dict[int, str]:
    return recorded_digests(run)


@pytest.mark.parametrize(
    ("canaries", "message"),
    [
        ("[{rows: random}]", r"data.canaries.0.rows: random rows need `count`"),
        ("[{rows: a.npy, count: 3}]", r"data.canaries.0.count: is for `rows: random`"),
        ("[{rows: a.npy, alphabet: 3}]", r"data.canaries.0.alphabet: is for `rows: random`"),
        ("[{rows: random, count: 1, alphabet: [3, 64]}]", r"names token id 64, outside of the vocabulary of 64"),
        ("[{rows: random, count: 1, alphabet: 65}]", r"names token id 64, outside of the vocabulary of 64"),
        ("[{rows: random, count: 1, steps: [3], every: 2}]", r"canaries.0.every: give `steps`, or start, every, times"),
        ("[{rows: a.npy}, {rows: a.npy, steps: [3, 3]}]", r"data.canaries.1.steps: names a step twice"),
        ("[{rows: a.npy, steps: []}]", r"data.canaries.0.steps"),
        ("[{rows: a.npy, steps: [-1]}]", r"data.canaries.0.steps"),
        ("[{rows: a.npy, step: 3}]", r"data.canaries.0.step: unknown key"),
        ("[{count: 3}]", r"data.canaries.0.rows: is missing"),
        ("{rows: a.npy}", r"data.canaries"),
    ],
)
def test_what_is_wrong_with_canaries_is_told_with_its_key(
    make_config: Callable[..., Any], canaries: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(f"data.canaries={canaries}")


@pytest.mark.parametrize(
    ("canaries", "message"),
    [
        ("{rows: none.npy}", r"none.npy: cannot be read"),
        ("{rows: FILE, steps: [2]}, {rows: random, count: 7, steps: [2]}", r"step 2 shows 9 canaries, and its batch has 8"),
        ("{rows: LONG}", r"row 0 of .* has 18 tokens, and a row of training has 17"),
        ("{rows: LARGE}", r"canary 0, token 16: id 64 is outside of the vocabulary of 64"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(
    make_config: Callable[..., Any], tmp_path: Path, planted_file: Path, canaries: str, message: str
) -> None:
    np.save(tmp_path / "long.npy", np.zeros((1, 18), dtype=int))
    np.save(tmp_path / "large.npy", np.arange(48, 65)[None])
    places = {"FILE": planted_file, "LONG": tmp_path / "long.npy", "LARGE": tmp_path / "large.npy"}
    for word, place in places.items():
        canaries = canaries.replace(word, str(place))
    with pytest.raises(DataError, match=message):
        open_batches(make_config(f"data.canaries=[{canaries}]"))


def test_groups_of_one_seed_have_other_rows_and_the_alphabet_is_that_of_the_tokenizer(
    make_config: Callable[..., Any],
) -> None:
    two = "{rows: random, count: 40}, {rows: random, count: 2, alphabet: [5, 9]}, {rows: random, count: 1, alphabet: 2}"
    schedule = two.replace("}", ", times: 1, apart: 1}")
    batches = open_batches(make_config(f"data.canaries=[{schedule}]", "data.tokenizer.vocab_size=30"))
    assert batches.canaries is not None
    first, second, third = (group.tokens_CS for group in batches.canaries.groups)
    assert set(first.flatten().tolist()) == set(range(30))
    assert set(second.flatten().tolist()) == {5, 9}
    assert set(third.flatten().tolist()) == {0, 1}
    same = open_batches(make_config("data.canaries=[{rows: random, count: 2, alphabet: [5, 9]}]")).canaries
    assert same is not None
    assert same.tokens_CS.tolist() != second.tolist()


@pytest.mark.slow
def test_a_run_with_canaries_resumes_and_replays_to_the_same_bytes(train: Train) -> None:
    def named(name: str, *more: str) -> Run:
        return train(f"checkpointing.run_name={name}", RANDOM, "monitoring.logging.digest_every_n_steps=1", *more)

    whole, none = named("whole"), train("checkpointing.run_name=none", "monitoring.logging.digest_every_n_steps=1")
    named("parts", "training.max_steps=3")
    parts = named("parts")
    accumulated = named("accumulated", "training.optimization.gradient_accumulation_steps=4")
    assert digests(parts) == digests(whole)
    same = [step for step in range(7) if digests(whole)[step] == digests(none)[step]]
    assert same == [0, 1]  # batch 1 is the first with a canary: the weights of step 2 are the first that know it
    verdict = replay(whole, [3, 5], kinds=Due(), verify=True)
    assert verdict.identical
    for step in range(6):
        assert torch.equal(batch_at(whole, step).rows.tokens_RS, batch_at(accumulated, step).rows.tokens_RS)
    fork(whole, 2, "again", [])
    assert (
        digests(train("checkpointing.run_name=again", RANDOM, "monitoring.logging.digest_every_n_steps=1"))[6]
        == (digests(whole)[6])
    )


@pytest.mark.slow
def test_what_a_step_saw_and_captured_has_its_canaries(train: Train) -> None:
    run = train(RANDOM)
    batch, canaries = batch_at(run, 4), SeenRows(run).canaries
    place = batch.where.index("canary 0")
    assert batch.rows.tokens_RS[place].tolist() == canaries[0].tokens.tolist()
    assert batch.rows.labels is not None
    assert [label == "canary" for label in batch.rows.labels] == [number == place for number in range(8)]
    table = run[4].rows("train")
    assert table["row"][place].as_py() == 120
    assert table["input_ids"][place].as_py() == canaries[0].tokens.tolist()


@pytest.mark.slow
def test_other_canaries_are_another_experiment(train: Train, planted_file: Path, tmp_path: Path) -> None:
    given = f"data.canaries=[{{rows: {planted_file}, steps: [2]}}]"
    run = train(given, "training.max_steps=4")
    for other in ("data.canaries=[]", RANDOM, given.replace("[2]", "[3]")):
        with pytest.raises(PicoError, match=r"another experiment.*\n  data.canaries: "):
            train(other)
    moved = planted_file.rename(tmp_path / "moved.npy")
    with pytest.raises(DataError, match=r"canary.npy: cannot be read"):
        batch_at(run, 2)
    elsewhere = f"data.canaries=[{{rows: {moved}, steps: [2]}}]"
    assert replay(run, [3], kinds=Due(), overrides=[elsewhere], verify=True).identical
    for wrong in ("data.canaries=[]", elsewhere.replace("[2]", "[1]")):
        with pytest.raises(PicoError, match="was trained on other data than"):
            batch_at(run, 2, [wrong])
    np.save(planted_file, np.load(moved)[::-1])
    with pytest.raises(PicoError, match=r"was trained on other data: .* and data.canaries to the same rows"):
        train(given, "training.max_steps=6")


@pytest.mark.slow
def test_a_run_of_a_version_without_canaries_goes_on_and_may_not_begin_to_have_them(train: Train) -> None:
    import yaml

    run = train("training.max_steps=2")
    file = run.path / "training_config.yaml"
    stored = yaml.safe_load(file.read_text())
    assert stored["data"].pop("canaries") == []
    file.write_text(yaml.safe_dump(stored))
    assert train("training.max_steps=4").latest().step == 4
    with pytest.raises(PicoError, match="another experiment"):
        train(RANDOM)


@pytest.mark.slow
def test_the_steps_of_canaries_and_of_the_rows_in_whose_places_they_are(train: Train) -> None:
    seen, plain = SeenRows(train(RANDOM)), SeenRows(train("checkpointing.run_name=plain"))
    assert [(canary.steps, canary.group) for canary in seen.canaries] == [([1, 4], "twice"), ([2, 5], "twice")]
    assert plain.canaries == []
    assert len(seen) == len(plain) == 120
    for step in range(6):
        lost = set(plain.of_step(step)) - set(seen.of_step(step))
        assert len(seen.of_step(step)) == 8 - len(lost)
        assert len(lost) == (0 if step in (0, 3) else 1)
        for number in lost:
            assert plain.seen_at([number], 6) == [[step]]
            assert seen.seen_at([number], 6) == [[]]
    assert len(seen.before(6)) == 44
    assert seen.identity != plain.identity


@pytest.mark.slow
def test_a_fork_has_seen_what_its_parent_saw(train: Train, tmp_path: Path) -> None:
    parent = train(RANDOM)
    config = fork(parent, 3, "forked", ["data.canaries=[{rows: random, count: 1, steps: [2, 3]}]"])
    made = Run.open(Path(config.checkpointing.runs_dir) / "forked")
    train("checkpointing.run_name=forked", "data.canaries=[{rows: random, count: 1, steps: [2, 3]}]")
    forked, of_parent = SeenRows(Run.open(made.path)), SeenRows(parent)
    assert [forked.of_step(step).tolist() for step in range(3)] == [of_parent.of_step(s).tolist() for s in range(3)]
    # The same row was shown at steps 1 and 4 by the parent, and is at 2 and 3 by the fork, which began with step 3.
    assert torch.equal(forked.canaries[0].tokens, of_parent.canaries[0].tokens)
    assert [canary.steps for canary in forked.canaries] == [[1, 3]]
    assert [len(forked.of_step(step)) for step in range(6)] == [8, 7, 7, 7, 8, 8]
    parent.path.rename(tmp_path / "gone")
    with pytest.raises(PicoError, match=r"is a fork of .* with other data.canaries, and that run is not there"):
        SeenRows(made)
