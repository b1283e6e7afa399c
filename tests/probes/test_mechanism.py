"""How probes run: passes are shared, what was found is kept, what cannot be found is a row with its reason."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value

import picolm.probes
from picolm.analyze.command import analyze_runs
from picolm.errors import PicoError
from picolm.observe.subject import Subject
from picolm.observe.training import rows_of_tokens
from picolm.probes import PROBES, Ask, Found, Quantity, Reading, Rows
from picolm.probes.calibration import calibration
from picolm.probes.probe import Probe, Running, run
from picolm.registry import find_code_in
from picolm.schema import ConfigError
from picolm.store import Run
from picolm.train.evaluate import EVALUATIONS

LLAMA = str(REFERENCE / "checkpoints" / "llama_s0")
OWN = '''
from picolm.observe.training import rows_of_tokens
from picolm.probes import PROBES, Ask, Reading


def nats(found):
    return {"nats": found.nats_BP}


def half(subject, rows, *, scale: float = 0.5):
    answer = yield Ask(rows, nats)
    for number, row in enumerate(answer["nats"][:3]):
        yield Reading("each", scale * row.mean(), bin=str(number))
    yield Reading("mean", scale * sum(row.mean() for row in answer["nats"]) / len(answer["nats"]))


def plain(subject):
    """How many parameters the model has."""
    yield Reading("parameters", sum(p.numel() for p in subject.model.parameters()))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of a user: one that asks a forward pass, and one that does not."""
    found = tmp_path_factory.mktemp("own")
    (found / "own_probes.py").write_text(OWN)
    return found


@pytest.fixture
def own(folder: Path) -> str:
    """The name of this module."""
    find_code_in(folder)
    return "own_probes"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of rows of each forward pass."""
    found: list[int] = []
    before = Subject.forward

    def counted(self: Subject, rows: Rows, batch: Any, needs: Any = ()) -> Any:
        found.append(len(batch))
        return before(self, rows, batch, needs)

    monkeypatch.setattr(Subject, "forward", counted)
    return found


def test_probes_of_the_same_rows_share_their_passes(
    measure: Measure, rows: dict[str, str], own: str, forwards: list[int]
) -> None:
    asked = {"rows": rows["val"], "batch_size": 16}
    measure({"probe_name": f"{own}:half"}, {"probe_name": "calibration"}, steps=[300], observe=asked)
    assert forwards == [16] * 4
    forwards.clear()
    measure(
        {"probe_name": "calibration", "rows": rows["train"]}, {"probe_name": "calibration"}, steps=[500], observe=asked
    )
    assert forwards == [16] * 8


def test_what_was_found_is_kept_by_all_that_it_depends_on(
    measure: Measure, rows: dict[str, str], own: str, forwards: list[int]
) -> None:
    asked: dict[str, Any] = {"observe": {"rows": rows["val"]}, "steps": [300]}
    first = measure({"probe_name": f"{own}:half"}, **asked)
    number = len(forwards)
    again = measure({"probe_name": f"{own}:half"}, **asked)
    assert len(forwards) == number
    pd.testing.assert_frame_equal(first, again)
    other = measure({"probe_name": f"{own}:half", "scale": 0.25}, **asked)
    assert len(forwards) == 2 * number
    assert value(other, "own_probes:half.mean") == pytest.approx(value(first, "own_probes:half.mean") / 2)
    measure({"probe_name": f"{own}:half"}, **{**asked, "steps": [500]})
    measure({"probe_name": f"{own}:half"}, **{**asked, "observe": {"rows": rows["train"]}})
    assert len(forwards) == 4 * number


def test_a_damaged_reading_is_computed_again(measure: Measure, rows: dict[str, str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"observe": {"rows": rows["val"]}, "steps": [300]}
    first = measure({"probe_name": "calibration"}, **asked)
    with sqlite3.connect(tmp_path / "analysis_results" / ".values.sqlite") as database:
        database.execute("UPDATE readings SET content = replace(content, '0.9', '0.8')")
    database.close()
    pd.testing.assert_frame_equal(first, measure({"probe_name": "calibration"}, **asked))


def test_a_row_says_what_it_is(measure: Measure, rows: dict[str, str]) -> None:
    found = measure({"probe_name": "calibration"}, steps=[300], observe={"rows": rows["val"]})
    row = found[found["metric"] == "calibration.entropy"].iloc[0]
    assert (row["kind"], row["component"], row["units"]) == ("behaviour", "model", "nats")
    assert row["definition"] == "mean entropy of the predicted distribution"
    assert len(row["rows"]) == 64
    assert row["standard_error"] > 0
    empty = found[(found["metric"] == "calibration.bin_accuracy") & found["value"].isna()]
    assert set(empty["reason"]) == {"no position has this confidence"}


def test_a_plain_function_of_a_user_is_a_probe(measure: Measure, own: str) -> None:
    found = measure({"probe_name": f"{own}:plain"}, steps=[0])
    assert value(found, f"{own}:plain.parameters") == 151_872
    assert set(found["definition"]) == {"How many parameters the model has."}


def test_what_cannot_be_found_is_a_row_with_its_reason_and_the_rest_goes_on(
    measure: Measure, own: str, tmp_path: Path
) -> None:
    found = measure({"probe_name": "calibration"}, {"probe_name": f"{own}:plain"}, steps=[0, 300])
    missing = found[found["metric"] == "calibration"]
    assert len(missing) == 2
    assert missing["value"].isna().all()
    assert "has no held-out rows of its own; say which with rows:" in missing["reason"].iloc[0]
    assert value(found, f"{own}:plain.parameters", 300) == 151_872
    with pytest.raises(PicoError, match=r"2 things that were asked for are missing \(--strict\)"):
        analyze_runs(tmp_path / "analysis.yaml", [], [LLAMA], strict=True)


@pytest.mark.slow
def test_several_processes_find_the_same(measure: Measure, rows: dict[str, str], tmp_path: Path) -> None:
    one = measure({"probe_name": "calibration"}, observe={"rows": rows["val"]})
    (tmp_path / "analysis_results" / ".values.sqlite").unlink()
    analyze_runs(tmp_path / "analysis.yaml", [], [LLAMA], workers=2)
    from picolm.analyze import load

    pd.testing.assert_frame_equal(one, load(tmp_path / "analysis_results" / "measured"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"probe_name": "calibrations"},
            "probes.0.probe_name: unknown probe 'calibrations'; did you mean 'calibration'?",
        ),
        ({"probe_name": "calibration", "bin": 3}, "probes.0.bin: unknown key; did you mean 'bins'?"),
        ({"probe_name": "calibration", "bins": 0}, "probes.0.bins: should be greater than or equal to 1, not 0"),
        (
            {"probe_name": "calibration", "target": {"checkpoint": "last"}},
            "calibration asks one model and compares with nothing",
        ),
    ],
)
def test_what_cannot_work_is_told_at_once(measure: Measure, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measure(entry)
    assert message in str(caught.value)


def readings(function: Callable[..., Iterator[Any]], **gives: Quantity) -> list[Reading]:
    return Probe(function, "mine", gives)(Subject(Run.open(LLAMA)))


def test_each_file_with_a_probe_is_imported() -> None:
    folder = Path(picolm.probes.__file__).parent
    there = {file.stem for file in folder.glob("*.py") if "\n@probe(" in file.read_text()}
    modules = {PROBES.get(name).function.__module__ for name in PROBES}  # other tests may have added probes of a user
    assert there == {name.rpartition(".")[2] for name in modules if name.startswith("picolm.probes.")}


@pytest.mark.parametrize("name", ["path", "barrier", "agreement"])
def test_probes_of_several_steps_are_no_evaluations_of_the_model_in_training(name: str) -> None:
    with pytest.raises(PicoError, match=f"unknown evaluation '{name}'"):
        EVALUATIONS.get(name)
    assert EVALUATIONS.get("calibration")


def test_a_number_that_is_none_has_a_reason() -> None:
    def mine(subject: Subject) -> Iterator[Reading]:
        yield Reading("a", float("nan"), standard_error=float("nan"), chance=1)
        yield Reading("b", torch.tensor(2.0), chance=float("nan"))

    assert readings(mine) == [Reading("a", None, chance=1.0, reason="it is not a number here"), Reading("b", 2.0)]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Reading("b", 1.0), r"probe mine: 'b' is none of what it gives \(a\)"),
        (1.0, "probe mine: yields float; expected a Reading or an Ask"),
    ],
)
def test_what_is_not_declared_is_an_error(item: Any, message: str) -> None:
    def mine(subject: Subject) -> Iterator[Any]:
        yield item

    with pytest.raises(PicoError, match=message):
        readings(mine, a=Quantity("", "the first letter"))


def test_a_probe_is_called_from_python(rows: dict[str, str]) -> None:
    subject, given = Subject(Run.open(LLAMA)), rows_of_tokens(torch.arange(512).view(8, 64))
    found = {reading.name: reading.value for reading in calibration(subject, given, bins=1) if not reading.bin}
    assert found["ece"] == pytest.approx(abs(found["accuracy"] - found["confidence"]))
    with pytest.raises(TypeError, match="calibration takes subject, rows; given 1"):
        calibration(subject)
    with pytest.raises(TypeError, match="calibration: bin: unknown option; did you mean 'bins'"):
        calibration(subject, given, bin=2)


def test_a_mistake_in_a_probe_names_the_probe() -> None:
    def mine(subject: Subject) -> Iterator[Reading]:
        raise KeyError("forgotten")
        yield

    with pytest.raises(PicoError, match="probe mine fails: KeyError: 'forgotten'"):
        readings(mine)


@pytest.mark.parametrize("bins", [("", ""), ("", "1"), ("1", "1")])
def test_two_values_of_one_place_and_means_over_two_kinds_are_errors(
    measure: Measure, tmp_path: Path, bins: tuple[str, str]
) -> None:
    name = f"twice_{len(list(tmp_path.parent.iterdir()))}_{'_'.join(bins)}"
    (tmp_path / f"{name}.py").write_text(
        "from picolm.probes import Reading\n\n\ndef twice(subject):\n"
        f"    yield Reading('a', 1.0, bin={bins[0]!r})\n    yield Reading('a', 2.0, bin={bins[1]!r})\n"
    )
    find_code_in(tmp_path)
    with pytest.raises(PicoError, match=f"probe {name}:twice: gives"):
        measure({"probe_name": f"{name}:twice"}, steps=[0])


def test_one_ask_that_fails_does_not_stop_the_others(rows: dict[str, str]) -> None:
    subject = Subject(Run.open(LLAMA))
    good = Rows([torch.arange(8)], [[6]], "observed", True, "good")
    bad = Rows([torch.full((8,), 600)], [[6]], "observed", True, "bad")

    def asks(which: Rows) -> Callable[[Subject], Found]:
        def mine(subject: Subject) -> Found:
            answer = yield Ask(which, lambda found: {"nats": found.nats_BP})
            yield Reading("a", answer["nats"][0].mean())

        return mine

    first, second = (Running(Probe(asks(which), "mine", {}), {"subject": subject}, {}) for which in (good, bad))
    run([first, second], subject)
    assert len(first.readings) == 1
    assert "token id 600" in str(second.failure)


def test_a_file_of_an_option_is_part_of_what_was_found(measure: Measure, rows: dict[str, str], tmp_path: Path) -> None:
    entry = {"probe_name": "ngram", "orders": [1], "training_rows": "mine.npy"}
    asked: dict[str, Any] = {"observe": {"rows": rows["val"], "max_rows": 4}, "steps": [300]}
    np.save(tmp_path / "mine.npy", np.load(rows["corpus_train"])[:8])
    first = value(measure(entry, **asked), "ngram.unigram_kl")
    np.save(tmp_path / "mine.npy", np.load(rows["corpus_train"])[8:16])
    assert value(measure(entry, **asked), "ngram.unigram_kl") != first


@pytest.mark.slow
def test_the_model_in_training_gives_what_its_checkpoint_gives(
    train: Callable[..., Run], measure: Measure, tmp_path: Path
) -> None:
    options = {
        "calibration": {"bins": 7},
        "induction": {"length": 4, "count": 4, "tokens": "all", "bos": "none"},
        "logit_lens": {},
    }
    names = ",".join(options)
    given = [f"evaluation.probes.{name}.{key}={value}" for name, own in options.items() for key, value in own.items()]
    trained = train(f"evaluation.metrics=[{names}]", *given)
    found = measure(*({"probe_name": name, **own} for name, own in options.items()), runs=(str(trained.path),))
    compared = 0
    for entry in trained.read_metrics():
        for key, logged in entry.items():
            name, _, where = key.removeprefix("val/").partition("/")
            if name.partition(".")[0] in options:
                layer, head = ([int(number) for number in where.split(".") if where] + [None, None])[:2]
                own = found[(found["metric"] == name) & (found["step"] == entry["step"])]
                own = own[own["layer"].isna() if layer is None else own["layer"] == layer]
                own = own[own["head"].isna() if head is None else own["head"] == head]
                assert logged == own["value"].item(), (key, entry["step"])
                compared += 1
    assert compared > 50
