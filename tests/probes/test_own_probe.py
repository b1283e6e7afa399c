"""A user's own probe: one function in a file outside of the package, named in the YAML as my_lab.module:function."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.probes.conftest import REFERENCE, Measure, value

from picolm.errors import PicoError
from picolm.registry import trust_remote_code

ROOT = Path(__file__).parents[2]
PLAIN = '''
from my_lab.arithmetic import share
from picolm.probes import Ask, Reading


def rank(subject, rows, *, most: int = 10):
    """Share of positions whose next token is among the likeliest ones.

    most: how many these are.
    """
    answer = yield Ask(rows, lambda found: {"rank": (found.log_probs_BPV > -found.nats_BP[..., None]).sum(-1)})
    yield Reading("share", share(answer["rank"], most))


def counted(subject, rows):
    """Number of rows."""
    return [Reading("rows", len(rows.tokens))]


def divides(subject, rows):
    """What a mistake looks like."""
    yield Reading("share", 1 / 0)


def prints(subject, rows):
    yield "0.5"


def asks_for_heads(subject, rows, heads):
    yield Reading("share", 0.5)
'''


@pytest.fixture(autouse=True)
def my_lab(tmp_path: Path) -> Iterator[None]:
    """A package of the user's own in the folder of the YAML file, which is forgotten afterwards."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").touch()
    (tmp_path / "my_lab" / "arithmetic.py").write_text(
        "import torch\n\n\ndef share(of_rows, most):\n    return (torch.cat(of_rows) < most).double().mean()\n"
    )
    (tmp_path / "my_lab" / "own.py").write_text(PLAIN)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.mark.parametrize("most", [1, 10, 512])
def test_a_plain_function_is_a_probe(measure: Measure, rows: dict[str, str], most: int) -> None:
    found = measure(
        {"probe_name": "my_lab.own:rank", "most": most},
        {"probe_name": "calibration"},
        {"probe_name": "my_lab.own:counted"},
        steps=[500],
        observe={"rows": rows["val"], "max_rows": 8},
    )
    share = value(found, "my_lab.own:rank.share")
    known = {1: value(found, "calibration.accuracy"), 512: 1.0}
    assert share == pytest.approx(known[most]) if most in known else known[1] < share < 1
    row = found[found["metric"] == "my_lab.own:rank.share"].iloc[0]
    assert (row["definition"], row["options"], row["kind"]) == (
        "Share of positions whose next token is among the likeliest ones.", f"most={most}", "behaviour"
    )  # fmt: skip
    assert value(found, "my_lab.own:counted.rows") == 8


@pytest.mark.parametrize("series", ["llama_s0", "neox_s0"])
def test_the_example_is_the_angle_between_hidden_states_of_transformers(
    measure: Measure, rows: dict[str, str], series: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(ROOT))
    entry = {"probe_name": "examples.block_influence:block_influence", "skip": 3}
    found = measure(entry, runs=(series,), steps=[500], observe={"rows": rows["val"], "max_rows": 8})
    model = AutoModelForCausalLM.from_pretrained(REFERENCE / "checkpoints" / series / "step_500", dtype=torch.float32)
    ids = torch.as_tensor(np.load(rows["val"])[:8, :-1])
    with torch.no_grad():
        before, after = model(ids, output_hidden_states=True).hidden_states[:2]
    turn = 1 - torch.nn.functional.cosine_similarity(before[:, 3:], after[:, 3:], dim=-1)
    assert value(found, "block_influence.turn", layer=0) == pytest.approx(turn.mean().item(), abs=1e-6)
    of_layer = found[found["layer"] == 0].iloc[0]
    assert of_layer["standard_error"] == pytest.approx(turn.mean(1).std().item() / 8**0.5, rel=1e-4)
    assert (of_layer["units"], of_layer["rows"] != "") == ("1 - cosine", True)
    assert set(found["layer"]) == {0, 1}


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (
            {"probe_name": "my_lab.own:rank", "least": 3},
            r"probes.0.least: unknown key \(options of my_lab.own:rank: most\)",
        ),
        ({"probe_name": "my_lab.own:rank", "most": "ten"}, r"should be a valid integer, not 'ten'"),
        ({"probe_name": "my_lab.own:nothing"}, r"probe 'my_lab.own:nothing' cannot be imported"),
        ({"probe_name": "my_lab.nowhere:rank"}, r"No module named 'my_lab.nowhere'"),
        ({"probe_name": "my_lab.own:PLAIN"}, r"cannot be imported: module 'my_lab.own' has no attribute 'PLAIN'"),
        ({"probe_name": "my_lab.own:divides"}, r"my_lab.own:divides fails: ZeroDivisionError: division by zero"),
        (
            {"probe_name": "my_lab.own:asks_for_heads"},
            r"its parameter heads is none of subject, other, earlier, rows, stated",
        ),
    ],
)
def test_a_mistake_is_told_with_the_name_of_the_probe(
    measure: Measure, rows: dict[str, str], entry: dict[str, object], told: str
) -> None:
    with pytest.raises(PicoError, match=told):
        measure(entry, steps=[500], observe={"rows": rows["val"]})


def test_a_probe_that_yields_something_else_leaves_the_others_alone(measure: Measure, rows: dict[str, str]) -> None:
    entries = [{"probe_name": f"my_lab.own:{name}"} for name in ("prints", "counted")]
    found = measure(*entries, steps=[500], observe={"rows": rows["val"]})
    reason = found[found["metric"].str.startswith("my_lab.own:prints")]["reason"].item()
    assert reason == "probe my_lab.own:prints: yields str; expected a Reading or an Ask"
    assert value(found, "my_lab.own:counted.rows") == 64


@pytest.mark.parametrize("beside", ["results.parquet", None])
def test_a_probe_is_imported_only_if_the_user_named_it(
    measure: Measure, rows: dict[str, str], beside: str | None
) -> None:
    """A YAML file beside the results of an analysis came with them, see docs/how-to/extend.md."""
    entry = {"probe_name": "my_lab.own:counted", "rows": rows["val"]}
    if beside is None:
        assert value(measure(entry, steps=[0]), "my_lab.own:counted.rows") == 64
        return
    Path(beside).touch()
    with pytest.raises(PicoError, match="only with --trust-remote-code"):
        measure(entry, steps=[0])
    assert "my_lab.own" not in sys.modules
    trust_remote_code(True)
    try:
        assert value(measure(entry, steps=[0]), "my_lab.own:counted.rows") == 64
    finally:
        trust_remote_code(False)


@pytest.mark.slow
def test_an_edited_probe_is_computed_again(tmp_path: Path, rows: dict[str, str]) -> None:
    (tmp_path / "mine.yaml").write_text(
        f"probes: [{{probe_name: 'my_lab.own:rank', rows: {rows['val']}, max_rows: 4}}]\nsteps: [500]\n"
    )
    computed = []
    for edit in ("", "", "# another formula\n"):
        with (tmp_path / "my_lab" / "own.py").open("a") as file:
            file.write(edit)
        place = REFERENCE / "checkpoints" / "llama_s0"
        words = [sys.executable, "-m", "picolm", "analyze", str(tmp_path / "mine.yaml"), "--run", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        computed.append(int(re.findall(r"1 values, (\d) of them computed now", done.stderr)[0]))
    assert computed == [1, 0, 1]
