"""The server as a process: every answer is what Python computes, for every kind of model; and answers are kept."""

import base64
import gzip
import io
import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from tests.view.page_driver import server
from tests.view.test_page import KINDS, TEXT, Truth, made, near, numbers

from picolm.observe.passes import Pass
from picolm.view.cached import Answers

pytestmark = pytest.mark.slow
__all__ = ["made"]


@pytest.fixture(scope="module")
def ask(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server that shows a run of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with server(*map(made, KINDS)) as address, httpx.Client(base_url=address, timeout=120) as client:
            client.address = address  # type: ignore[attr-defined]
            yield client


def question(kind: str, **other: Any) -> dict[str, Any]:
    return {"run": KINDS.index(kind), "text": TEXT, **other}


def lines(client: httpx.Client, endpoint: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(f"api/{endpoint}", json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line) for line in answer.text.splitlines()]


def matrices(content: bytes) -> tuple[dict[str, Any], np.ndarray]:
    (size,) = struct.unpack_from("<I", content)
    header = json.loads(content[4 : 4 + size])
    return header, np.frombuffer(content, "<f4", offset=4 + size).reshape(header["shape"])


def test_the_session_says_what_the_runs_are(ask: httpx.Client, made: Callable[[str], Path]) -> None:
    found = ask.get("api/session").json()
    assert found["read_only"] is True
    assert [run["id"] for run in found["runs"]] == [0, 1, 2, 3]
    for kind, run in zip(KINDS, found["runs"]):
        truth = Truth(made(kind))
        subject = truth.subject
        assert [step["step"] for step in run["steps"]] == truth.run.steps
        assert (run["layers"], run["heads"], run["context"]) == (
            subject.anatomy.layers, subject.anatomy.heads, subject.architecture.context,
        )  # fmt: skip
        assert run["parameters"] == sum(parameter.numel() for parameter in subject.model.parameters())
        assert run["likelihood"] == subject.likelihood
        assert run["can"]["text"] is True
        assert (run["can"]["mixing"] is True) == (kind == "statespace")
        assert (run["can"]["batch"] is True) == (kind != "gpt_neox")
        assert not run["live"]
    decoder = found["runs"][0]
    assert decoder["tokens_per_step"] == 4 * 48
    assert [step["tokens"] for step in decoder["steps"]] == [step["step"] * 192 for step in decoder["steps"]]
    assert {step["step"] for step in decoder["steps"] if step["evaluated"]} == {0, 4, 8}
    assert decoder["rows"]["val"]["rows"] == 4
    assert found["runs"][1]["rows"] == {"train": {"rows": 0, "steps": []}, "val": {"rows": 0, "steps": []}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_at_each_step(kind: str, ask: httpx.Client, made: Callable[[str], Path]) -> None:
    truth = Truth(made(kind))
    history = {line["step"]: line for line in lines(ask, "history", question(kind))}
    assert list(history) == truth.run.steps
    for step in truth.run.steps:
        found = ask.post("api/text", json=question(kind, step=step)).json()
        assert found["ids"] == truth.ids
        assert "".join(found["tokens"]) == TEXT
        assert numbers(found["nats"]) == near(numbers(truth.at(step).nats()))
        assert found["mean_nats"] == near(truth.mean())
        assert found["probability"][1:] == near([math.exp(-nats) for nats in found["nats"][1:]])
        assert {name: found[name] for name in ("nats", "rank", "probability", "mean_nats")} == {
            name: history[step][name] for name in ("nats", "rank", "probability", "mean_nats")
        }
        if not truth.bound:
            passed: Pass = truth.passed()
            p_TV = passed.log_probs_BPV[0].exp()
            assert found["rank"][1:] == [int((p_V > p_V[true]).sum()) for p_V, true in zip(p_TV, truth.ids[1:])]
            assert [p for _, p in found["top"][3]] == near(p_TV[2].topk(10).values.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_heads_at_each_step(kind: str, ask: httpx.Client, made: Callable[[str], Path]) -> None:
    truth = Truth(made(kind))
    scores = {line["step"]: line for line in lines(ask, "head-scores", question(kind))}
    for step in (truth.run.steps[0], truth.run.steps[-1]):
        header, found = matrices(ask.post("api/heads", json=question(kind, step=step)).content)
        size = len(truth.ids)
        assert header["kind"] == scores[step]["kind"] == ("mixing" if kind == "statespace" else "attention")
        assert "".join(header["tokens"]) == TEXT
        assert found.shape == (2, truth.subject.anatomy.heads, size, size)
        truth.at(step)
        for head in range(found.shape[1]):
            expected = truth.mixed(1, head)
            assert found[1, head] == pytest.approx(expected.numpy(), abs=1e-6)
            assert scores[step]["previous"][1][head] == near(float(expected.diagonal(-1).double().mean()))
            assert scores[step]["first"][1][head] == near(float(expected[1:, 0].double().mean()))
        one, of_layer = matrices(ask.post("api/heads", json=question(kind, step=step, layer=1)).content)
        assert one["first_layer"] == 1
        assert np.array_equal(of_layer[0], found[1])
    assert ask.post("api/heads", json=question(kind, step=step, layer=2)).status_code == 404


@pytest.mark.parametrize("kind", KINDS)
def test_layers_at_a_step(kind: str, ask: httpx.Client, made: Callable[[str], Path]) -> None:
    truth = Truth(made(kind))
    step = truth.run.steps[-1]
    answer = ask.post("api/layers", json=question(kind, step=step))
    if truth.bound:
        assert answer.status_code == 400
        assert "predicts hidden tokens from both sides" in answer.json()["error"]
        return
    found, passed = answer.json(), truth.at(step).passed("hidden")
    for k, hidden_BTH in enumerate(passed.hidden):
        with torch.no_grad():
            p_TV = truth.subject.readout(hidden_BTH)[0].softmax(-1)
        assert found["probability"][k] == near(p_TV.max(-1).values.tolist())
        assert found["norm"][k] == near(hidden_BTH[0].norm(dim=-1).tolist())
        assert found["nats"][k][-1] is None
        assert found["nats"][k][0] == near(-math.log(p_TV[0, truth.ids[1]]))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_row_that_a_step_keeps(split: str, ask: httpx.Client, made: Callable[[str], Path]) -> None:
    truth = Truth(made("decoder"))
    row = {"split": split, "step": 4, "index": 1}
    found = ask.post("api/text", json={"run": 0, "step": 8, "row": row}).json()
    table = truth.run[4].rows(split)
    assert found["ids"] == table.column("input_ids")[1].as_py()
    assert found["seen_at"] == (4 if split == "train" else None)
    truth.ids = found["ids"]
    truth.rows = type(truth.rows)([torch.tensor(truth.ids)], [[0]], split, True, "row")
    assert numbers(found["nats"]) == near(numbers(truth.at(8).nats()))
    for wrong in ({"index": 99}, {"step": 3}):
        assert ask.post("api/text", json={"run": 0, "step": 8, "row": row | wrong}).status_code == 404


def test_what_was_logged_evaluated_and_analyzed(
    ask: httpx.Client, made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Truth(made("decoder")).run
    found = ask.get("api/training?run=0").json()
    series = {each["name"]: dict(zip(each["steps"], each["values"])) for each in found["series"]}
    logged = {line["step"]: line["train/loss"] for line in run.metrics() if "train/loss" in line}
    assert logged
    assert series["train/loss"] == logged
    evaluated = {each["name"]: dict(zip(each["steps"], each["values"])) for each in found["evaluations"]}
    assert evaluated["paloma/nats_per_token"] == {
        step: run.evaluation(step)["paloma"]["nats_per_token"] if isinstance(run.evaluation(step)["paloma"], dict)  # type: ignore[index]
        else run.evaluation(step)["paloma/nats_per_token"]  # type: ignore[index]
        for step in (0, 4, 8)
    }  # fmt: skip


def test_the_batch_of_a_step(ask: httpx.Client, made: Callable[[str], Path]) -> None:
    from picolm.train.inspection import batch_at

    for kind in ("decoder", "statespace", "diffusion"):
        truth = Truth(made(kind))
        found = ask.post("api/batch", json={"run": KINDS.index(kind), "step": 2, "rows": 2}).json()
        assert found["after_step"] == 4
        seen = batch_at(truth.run, 2, rows=2)
        for place, row in enumerate(found["rows"]):
            truth.ids = seen.rows.tokens_RS[place].tolist()
            truth.rows = type(truth.rows)([torch.tensor(truth.ids)], [[0]], "text", True, "row")
            assert row["row"] == seen.rows.numbers[place]
            for name, step in (("before", 2), ("after", 4)):
                assert numbers(row[f"nats_{name}"]) == near(numbers(truth.at(step).nats()))
                assert row[name] == near(truth.mean())
    last = ask.post("api/batch", json={"run": 0, "step": 8}).json()
    assert len(last["rows"]) == 4
    assert last["after_step"] is None
    assert last["rows"][0]["after"] is None
    assert "not known" in ask.get("api/session").json()["runs"][1]["can"]["batch"]
    assert ask.post("api/batch", json={"run": 1, "step": 2}).status_code == 400


def test_a_long_text_is_cut_and_says_so(ask: httpx.Client) -> None:
    found = ask.post("api/text", json={"run": 0, "step": 8, "text": TEXT * 20}).json()
    assert found["truncated"]
    assert len(found["ids"]) == len(found["nats"]) == 48


def test_an_answer_is_kept_also_for_the_next_start(ask: httpx.Client, made: Callable[[str], Path]) -> None:
    body = question("decoder", step=8, text="kept")
    first = ask.post("api/text", json=body)
    with server(made("decoder")) as address:  # its model is never filled: the weights are away
        weights = made("decoder") / "checkpoints/step_8/model.safetensors"
        weights.rename(weights.with_name("away"))
        try:
            assert httpx.post(f"{address}api/text", json=body, timeout=60).content == first.content
            other = httpx.post(f"{address}api/text", json=body | {"text": "not kept"}, timeout=60)
            assert other.status_code in (404, 422)
        finally:
            weights.with_name("away").rename(weights)
        assert httpx.post(f"{address}api/text", json=body | {"text": "not kept"}, timeout=60).status_code == 200


def test_kept_answers_are_bounded_and_damaged_ones_are_not_told(tmp_path: Path) -> None:
    answers = Answers(tmp_path, most_bytes=10_000)
    for number in range(100):
        answers.put(str(number), bytes(1000))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_000 + 2 * 1250
    assert answers.get("99") == bytes(1000)
    assert answers.get("0") is None
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert answers.get("99") is None


@pytest.mark.timeout(600)
def test_a_step_is_made_again_outside_of_the_run(ask: httpx.Client, made: Callable[[str], Path]) -> None:
    import threading

    from picolm.train.history import recorded_digests

    run, events = Truth(made("decoder")).run, list[dict[str, Any]]()
    before = digest_of(run.path)

    def listen() -> None:
        with httpx.stream("GET", ask.address + "api/events", timeout=400) as answer:  # type: ignore[attr-defined]
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    events.append(json.loads(line[6:]))
                if events and events[-1]["type"] == "steps":
                    return

    listening = threading.Thread(target=listen)
    listening.start()
    planned = ask.get("api/replay?run=0&step=6").json()
    assert (planned["from"], planned["updates"]) == (4, 2)
    assert planned["seconds"] > 0
    assert ask.post("api/replay", json={"run": 0, "step": 6}).status_code == 202
    assert ask.post("api/replay", json={"run": 0, "step": 5}).status_code == 503  # one at a time
    listening.join(400)
    states = [event["state"] for event in events if event["type"] == "replay"]
    assert states[0] == "running"
    assert states[-1] == "done"
    new = events[-1]["steps"][0]
    assert (new["step"], new["saved"], new["replayed"]) == (6, False, True)
    assert recorded_digests(run)[6].startswith(new["digest"])  # the very weights of the training
    assert 6 in [step["step"] for step in ask.get("api/session").json()["runs"][0]["steps"]]
    assert len(ask.post("api/text", json=question("decoder", step=6)).json()["nats"]) > 2
    assert ask.get("api/replay?run=0&step=6").status_code == 400  # it is there
    assert ask.get("api/replay?run=0&step=99").status_code == 400  # it never was
    assert ask.get("api/replay?run=1&step=3").status_code == 400
    assert digest_of(run.path) == before


def digest_of(folder: Path) -> list[tuple[str, int, int, int]]:
    """Names, sizes and times of all that lies in a folder."""
    found = []
    for path in sorted([folder, *folder.rglob("*")]):
        state = path.lstat()
        found.append((str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return found


def test_a_saved_page_holds_the_answers_by_their_questions(ask: httpx.Client, made: Callable[[str], Path]) -> None:
    import re

    body = question("decoder", steps=[0, 8], panels=["text", "heads", "layers", "training"], state="run=0&step=8")
    answer = ask.post("api/save", json=body)
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "http://" not in re.sub(r"http://www\.w3\.org/\S+", "", answer.text)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', answer.text, re.S)[1])  # type: ignore[index]
    assert data["state"] == "run=0&step=8"
    table, text = data["answers"], json.dumps(TEXT)
    assert [step["step"] for step in table["session {}"]["runs"][0]["steps"]] == [0, 8]
    assert table["session {}"]["saved"] is True
    assert (
        table[f'text {{"run":0,"step":8,"text":{text}}}']
        == ask.post("api/text", json=question("decoder", step=8)).json()
    )
    assert (
        table[f'layers {{"run":0,"step":0,"text":{text}}}'] == ask.post("api/layers", json=question("decoder")).json()
    )
    for endpoint in ("history", "head-scores"):
        asked = question("decoder", steps=[0, 8])
        assert table[f'{endpoint} {{"run":0,"text":{text}}}'] == lines(ask, endpoint, asked)
    packed = gzip.decompress(base64.b64decode(table[f'heads {{"run":0,"step":8,"text":{text}}}']["packed"]))
    assert packed == ask.post("api/heads", json=question("decoder", step=8)).content
    assert table['training {"run":0}'] == ask.get("api/training?run=0").json()


def test_frames_become_a_moving_picture(ask: httpx.Client) -> None:
    from PIL import Image

    def frame(size: tuple[int, int], colour: str) -> str:
        out = io.BytesIO()
        Image.new("RGB", size, colour).save(out, "PNG")
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

    frames = [frame((40, 30), colour) for colour in ("red", "green", "blue")]
    for kind in ("webp", "gif"):
        answer = ask.post("api/animation", json={"frames": frames, "milliseconds": 300, "format": kind})
        assert answer.headers["content-type"] == f"image/{kind}"
        moving = Image.open(io.BytesIO(answer.content))
        assert (moving.n_frames, moving.size) == (3, (40, 30))  # type: ignore[attr-defined]
        moving.seek(1)
        assert moving.convert("RGB").getpixel((5, 5)) == (0, 128, 0)
    for wrong in (["data:image/png;base64,AAAA"], ["x"], [frames[0], frame((41, 30), "red")], []):
        assert ask.post("api/animation", json={"frames": wrong}).status_code == 400
