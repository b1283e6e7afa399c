"""A siege of the server: whoever asks wrongly gets a sentence, the server goes on, and nothing is written into the run."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import yaml
from tests.view.page_driver import server
from tests.view.test_beside import Listener
from tests.view.test_page import ROOT, TEXT, made
from tests.view.test_server import digest_of

from picolm.store import Run

pytestmark = pytest.mark.slow
__all__ = ["made"]
ASKED = {"run": 0, "step": 8, "text": TEXT}


@pytest.fixture
def copy(made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run, for this test alone."""
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(made("decoder"), tmp_path / "runs" / "toy", symlinks=True))


@pytest.fixture(scope="module")
def besieged(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A run, and the address of a server that shows it, the same for all that attack it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PICO_CACHE", str(tmp_path_factory.mktemp("cache")))
        with server(made("decoder")) as found:
            yield made("decoder"), found


@pytest.fixture
def address(besieged: tuple[Path, str]) -> Iterator[str]:
    """The address of the server. After the attack it still answers, and the run is as it was."""
    run, found = besieged
    before = digest_of(run)
    yield found
    assert httpx.get(f"{found}api/session", timeout=60).status_code == 200
    assert digest_of(run) == before


@pytest.fixture
def own(copy: Path) -> Iterator[str]:
    """The address of a server of the copy, which the test may change."""
    with server(copy) as found:
        yield found
        assert httpx.get(f"{found}api/session", timeout=60).status_code == 200


def raw(address: str, request: bytes, wait_s: float = 20) -> bytes:
    """What the server answers to these bytes."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), wait_s) as connection:
        connection.sendall(request)
        connection.settimeout(wait_s)
        parts = []
        with suppress(ConnectionResetError):  # it hangs up on noise
            while part := connection.recv(65536):
                parts.append(part)
        return b"".join(parts)


def get(address: str, path: str, *headers: str) -> bytes:
    place = urlsplit(address)
    lines = [f"GET {path} HTTP/1.1", *(headers or (f"Host: {place.netloc}",)), "Connection: close"]
    return raw(address, "\r\n".join([*lines, "", ""]).encode("latin-1"))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def test_who_has_not_the_key_gets_nothing(address: str) -> None:
    place = urlsplit(address)
    token = place.path.strip("/")
    for path in ("/", "/api/session", f"/{token[:-1]}/", f"/{token}x/api/session", f"/{token.swapcase()}/", "/page/main.js",
                 f"//{token}/", "/%00/", f"/{token[:5]}/../{token}/", f"/?{token}"):  # fmt: skip
        answer = get(address, path)
        assert status(answer) == 404, path
        assert b"pico view printed" in answer
        assert token.encode() not in answer
    assert status(get(address, f"/{token}/")) == 200
    assert status(get(address, f"/{token}")) == 307


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1:1", "localhost", "", "10.0.0.1:{port}", "127.0.0.1:{port}.evil.example"],
)  # fmt: skip
def test_another_host_is_refused(address: str, host: str) -> None:
    """As with a name of somebody else that leads to this machine."""
    place = urlsplit(address)
    answer = get(address, place.path, f"Host: {host.format(port=place.port)}")
    assert status(answer) == 403
    assert status(get(address, place.path, "X: no host at all")) in (400, 403)
    assert status(get(address, place.path, f"Host: localhost:{place.port}")) == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1", "https://{host}", "http://{host}.evil.example"]
)
def test_another_page_is_refused(address: str, origin: str) -> None:
    place = urlsplit(address)
    headers = {"Origin": origin.format(host=place.netloc)}
    for answer in (httpx.get(address, headers=headers), httpx.post(f"{address}api/text", json=ASKED, headers=headers)):
        assert answer.status_code == 403
        assert "another page" in answer.text
        assert "access-control-allow-origin" not in answer.headers
    own = {"Origin": f"http://{place.netloc}"}
    assert httpx.post(f"{address}api/text", json=ASKED, headers=own, timeout=60).status_code == 200


def test_headers_keep_the_page_to_itself(address: str) -> None:
    answers = [httpx.get(address), httpx.get(f"{address}api/session", timeout=60), httpx.get(f"{address}nowhere"),
               httpx.get(address[: address.rindex("/", 0, -1) + 1])]  # fmt: skip
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "server" not in answer.headers
    assert answers[1].headers["cache-control"] == "no-store"


def test_no_path_leads_to_a_file(address: str) -> None:
    token = urlsplit(address).path
    for path in ("page/../../../../etc/passwd", "page/..%2f..%2fpyproject.toml", "page/%2e%2e/index.html", "../etc/passwd",
                 "page//etc/passwd",
                 "page/main.js/..", "page/.", "page/%00", "page/..\\x", "etc/passwd", "page/", "runs/toy/run.json",
                 "file:///etc/passwd", "page/__init__.py"):  # fmt: skip
        answer = get(address, token + path)
        assert status(answer) in (404, 405), path
        assert b"root:" not in answer
    assert status(get(address, f"{token}page/main.js")) == 200


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (b"", 400, "the request"),
        (b"{", 400, "the request"),
        (b"[" * 100_000, 400, "the request"),
        (b"\xff\xfe", 400, "the request"),
        (b"[]", 400, "the request"),
        (b'{"run":0}', 400, "a text, or of a row"),
        (b'{"run":0,"step":8,"text":"a","row":{"split":"val","step":8,"index":0}}', 400, "a text, or of a row"),
        (b'{"run":0,"step":8,"text":""}', 400, "no tokens"),
        (b'{"run":0,"step":8,"text":"\\ud800"}', 400, "the request"),
        (b'{"run":0,"step":8,"text":7}', 400, "text"),
        (b'{"run":7,"step":8,"text":"a"}', 404, "no run 7"),
        (b'{"run":-1,"step":8,"text":"a"}', 400, "run"),
        (b'{"run":0,"step":3,"text":"a"}', 404, "no step 3"),
        (b'{"run":0,"step":1e400,"text":"a"}', 400, "step"),
        (b'{"run":0,"step":99999999999999999999,"text":"a"}', 400, "step"),
        (b'{"run":"../..","step":8,"text":"a"}', 400, "run"),
        (b'{"run":0,"step":8,"text":"a","path":"/etc/passwd"}', 400, "path"),
        (b'{"run":0,"step":8,"row":{"split":"../val","step":8,"index":0}}', 400, "split"),
        (json.dumps(ASKED | {"text": "a" * 20_001}).encode(), 400, "text"),
        (json.dumps(ASKED | {"text": "a" * 2_000_000}).encode(), 413, "more than"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_question_is_told_so(address: str, body: bytes, code: int, told: str) -> None:
    for endpoint in ("text", "heads", "layers", "history"):
        if endpoint == "history" and b'"step":3' in body:
            continue  # its steps are others
        answer = httpx.post(f"{address}api/{endpoint}", content=body, timeout=60)
        assert (answer.status_code, set(answer.json())) == (code, {"error"}), answer.text
        assert told in answer.json()["error"]
        assert "Traceback" not in answer.text


def test_a_body_without_a_length_is_bounded_too(address: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(3000):
            yield b"a" * 1000

    with suppress(httpx.WriteError):  # it may hang up before all was sent
        assert httpx.post(f"{address}api/text", content=endless(), timeout=60).status_code == 413


def test_bodies_that_are_cut_short_end_with_their_connection(address: str) -> None:
    place = urlsplit(address)
    head = f"POST {place.path}api/text HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: 1000\r\n\r\n"
    for _ in range(20):
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + b'{"run":0,')
    assert httpx.post(f"{address}api/text", json=ASKED, timeout=60).status_code == 200


def test_other_methods_long_lines_and_noise(address: str) -> None:
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        assert httpx.request(method, f"{address}api/session").status_code == 405
    assert httpx.post(f"{address}api/session", json={}).status_code == 405
    assert httpx.get(f"{address}api/text").status_code == 405
    for noise in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"a" * 200_000,
        b"\r\n\r\n",
    ):
        assert b"200 OK" not in raw(address, noise + b"\r\n\r\n")
    for query in ("run=x", "run=-1", "run=99999999", "run=1"):
        assert httpx.get(f"{address}api/training?{query}").status_code in (400, 404)
    for query in ("", "step=x", "step=-1", "step=" + "9" * 400):
        assert httpx.get(f"{address}api/replay?run=0&{query}").status_code == 400


def test_a_hundred_connections_are_answered(address: str) -> None:
    place, codes = urlsplit(address), list[int]()
    idle = [socket.create_connection((place.hostname, place.port)) for _ in range(100)]

    def ask(number: int) -> None:
        body = ASKED | {"text": f"{TEXT} {number}"}
        codes.append(httpx.post(f"{address}api/text", json=body, timeout=120).status_code)

    asking = [threading.Thread(target=ask, args=[number]) for number in range(100)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    for connection in idle:
        connection.close()
    assert len(codes) == 100
    assert set(codes) <= {200, 503}
    assert codes.count(200) >= 60
    listening = list[httpx.Response]()
    with httpx.Client(timeout=30, limits=httpx.Limits(max_connections=None)) as client:
        for _ in range(40):
            listening.append(client.send(client.build_request("GET", f"{address}api/events"), stream=True))
        assert [answer.status_code for answer in listening].count(503) == 8
        for answer in listening:
            answer.close()


def test_a_question_that_nobody_waits_for_is_not_computed(address: str) -> None:
    place = urlsplit(address)
    for number in range(30):
        body = json.dumps(ASKED | {"text": f"{TEXT} nobody {number} " * 3, "steps": None}).encode()
        head = f"POST {place.path}api/history HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + body)
    started = time.monotonic()
    assert httpx.post(f"{address}api/text", json=ASKED, timeout=60).status_code == 200
    assert time.monotonic() - started < 20


def test_a_run_that_is_deleted_while_it_is_open(own: str, copy: Path, made: Callable[[str], Path]) -> None:
    assert httpx.post(f"{own}api/text", json=ASKED, timeout=60).status_code == 200
    shutil.rmtree(copy)
    for endpoint in ("text", "heads", "layers", "history", "head-scores", "save", "batch", "replay"):
        body = {"run": 0, "step": 8} if endpoint in ("batch", "replay") else ASKED
        answer = httpx.post(f"{own}api/{endpoint}", json=body, timeout=60)
        assert (answer.status_code, "is gone" in answer.text) == (410, True), endpoint
    assert httpx.get(f"{own}api/training?run=0").status_code == 410
    assert httpx.get(f"{own}api/session").json()["runs"] == []
    shutil.copytree(made("decoder"), copy)
    assert httpx.post(f"{own}api/text", json=ASKED, timeout=60).status_code == 200


def test_a_damaged_step(own: str, copy: Path) -> None:
    weights = copy / "checkpoints/step_8/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    answer = httpx.post(f"{own}api/text", json=ASKED, timeout=60)
    assert (answer.status_code, "pico verify" in answer.text) == (422, True)
    history = httpx.post(f"{own}api/history", json={"run": 0, "text": TEXT}, timeout=60).text.splitlines()
    assert [("error" in json.loads(line)) for line in history] == [False] * (len(history) - 1) + [True]
    (copy / "checkpoints/step_4/manifest.json").write_text("{")
    assert httpx.post(f"{own}api/text", json=ASKED | {"step": 4}, timeout=60).status_code == 422
    run = httpx.get(f"{own}api/session", timeout=60).json()["runs"][0]
    assert 4 not in [step["step"] for step in run["steps"]]
    assert {"step": 4, "kind": "damaged"}.items() <= next(
        mark for mark in run["marks"] if mark["kind"] == "damaged"
    ).items()
    (copy / "metrics.jsonl").write_text("{\n")
    assert httpx.get(f"{own}api/training?run=0", timeout=60).status_code == 422
    assert httpx.post(f"{own}api/text", json=ASKED | {"step": 2}, timeout=60).status_code == 200


def test_a_step_that_was_replaced_is_read_anew(own: str, copy: Path) -> None:
    """As when a run is killed, and continued from an earlier step."""
    first = httpx.post(f"{own}api/text", json=ASKED, timeout=60).json()
    shutil.rmtree(copy / "checkpoints/step_8")
    source = Run.open(copy)[4]
    tensors = {address: source[address] for address in source.select(kind="weights")}
    texts = {name: source.read(name) for name in source.files if name.endswith(".json") and "trainer" not in name}
    Run.open(copy).commit(8, tensors, meta={"step": 8}, texts=texts, weight_prefix="pico_decoder.")
    again = httpx.post(f"{own}api/text", json=ASKED, timeout=60).json()
    fourth = httpx.post(f"{own}api/text", json=ASKED | {"step": 4}, timeout=60).json()
    assert again["nats"] == fourth["nats"] != first["nats"]


def test_names_and_texts_stay_text(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PICO_CACHE", str(tmp_path / "cache"))
    evil = "<script>alert(1)<|script> & \"x\" '${1}' \x1b[2J"
    run = Path(shutil.copytree(made("decoder"), tmp_path / evil))
    asked = {"run": 0, "step": 8, "text": "</script><script>alert(1)</script><!--"}
    with server(run) as address:
        assert httpx.get(f"{address}api/session", timeout=60).json()["runs"][0]["name"].startswith("<script>")
        assert "".join(httpx.post(f"{address}api/text", json=asked, timeout=60).json()["tokens"]) == asked["text"]
        page = httpx.post(f"{address}api/save", json=asked | {"steps": [8]}, timeout=60).text
    assert page.count("</script>") == 2  # of the table and of the module
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page


def test_links_in_a_run_are_not_followed(own: str, copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text('{"step": 1, "secret": 1}\n')
    for name in ("metrics.jsonl", "eval_results/step_4.json", "checkpoints/step_8/model.safetensors",
                 "checkpoints/step_4/manifest.json", "checkpoints/step_2/learning_dynamics/val_data.parquet"):  # fmt: skip
        (copy / name).unlink()
        (copy / name).symlink_to(secret)
    row = {"split": "val", "step": 2, "index": 0}
    for answer, code in (
        (httpx.get(f"{own}api/session", timeout=60), 200),
        (httpx.get(f"{own}api/training?run=0", timeout=60), 422),
        (httpx.post(f"{own}api/text", json=ASKED, timeout=60), 422),
        (httpx.post(f"{own}api/text", json={"run": 0, "step": 1, "row": row}, timeout=60), 422),
        (httpx.post(f"{own}api/batch", json={"run": 0, "step": 1}, timeout=60), 422),
        (httpx.post(f"{own}api/text", json=ASKED | {"step": 4}, timeout=60), 422),
        (httpx.post(f"{own}api/text", json=ASKED | {"step": 1}, timeout=60), 200),
    ):
        assert answer.status_code == code, answer.text
        assert '"secret"' not in answer.text
    assert secret.read_text() == '{"step": 1, "secret": 1}\n'
    done = subprocess.run(
        [sys.executable, "-m", "picolm", "view", str(copy), "--no-browser"], capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, "is a link" in done.stderr) == (1, True)


@pytest.mark.parametrize("key", ["model.model_type", "training.optimization.optimizer", "data.dataset.name"])
def test_code_that_a_run_names_is_not_imported(
    copy: Path, tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil_lab.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\nPart = None\n")
    config = yaml.safe_load((copy / "training_config.yaml").read_text())
    *above, last = key.split(".")
    section = config
    for name in above:
        section = section[name]
    section[last] = "evil_lab:Part"
    (copy / "training_config.yaml").write_text(yaml.safe_dump(config))
    with server(copy) as place:
        listener = Listener(place)
        found = httpx.get(f"{place}api/session", timeout=60).json()["runs"][0]
        codes = {
            endpoint: httpx.post(f"{place}api/{endpoint}", json=body, timeout=60).status_code
            for endpoint, body in (("text", ASKED), ("batch", {"run": 0, "step": 1}), ("replay", {"run": 0, "step": 3}))
        }
        assert codes["batch"] == (200 if key == "training.optimization.optimizer" else 400)  # it needs no optimizer
        assert codes["text"] == (400 if key == "model.model_type" else 200)
        assert ("names code of its own" in str(found["can"]["text"])) == (key == "model.model_type")
        if codes["replay"] == 202:
            until = time.monotonic() + 200
            while not (states := [event for _, event in listener.events if event.get("state") == "failed"]):
                assert time.monotonic() < until
                time.sleep(0.1)
            assert "names code of its own" in states[0]["error"]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "no run here"),
        (["RUN", "--host", "0.0.0.0"], "--allow-remote"),
        (["RUN", "--host", "example.org"], "--allow-remote"),
        (["RUN", "--port", "99999"], "65535"),
        (["RUN", "--host", "127.0.0.1", "--port", "PORT"], "cannot be used"),
    ],
)
def test_a_start_that_cannot_be_is_a_message(copy: Path, words: list[str], told: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        given = [{"RUN": str(copy), "PORT": str(taken.getsockname()[1])}.get(word, word) for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "picolm", "view", "--no-browser", *given], capture_output=True, text=True, timeout=60
        )
    assert done.returncode in (1, 2)
    assert told in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_an_address_that_others_reach_says_what_it_means(copy: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "picolm", "view", str(copy), "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "not encrypted" in done.stderr.replace("\n", " ")


def test_without_its_packages_it_says_what_to_install(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys\nsys.modules['starlette'] = None\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'hidden'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "picolm", "view", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert "pip install 'picolm[view]'" in done.stderr
    assert done.returncode == 1


def test_memory_is_bounded_while_all_steps_are_visited_twice(copy: Path) -> None:
    """A thousand steps: one model is in memory, whatever was visited."""
    script = importlib.util.spec_from_file_location("benchmark_of_view", ROOT / "benchmarks" / "view.py")
    assert script is not None
    assert script.loader is not None
    benchmark = importlib.util.module_from_spec(script)
    script.loader.exec_module(benchmark)
    run = benchmark.with_steps(Run.open(copy), copy.with_name("many"), 1000)
    command = [sys.executable, "-m", "picolm", "view", str(run), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address, sizes = process.stdout.readline().split()[-1], list[int]()
            assert len(httpx.get(f"{address}api/session", timeout=120).json()["runs"][0]["steps"]) > 1000
            for turn in range(2):
                asked = {"run": 0, "text": f"{TEXT} {turn}"}
                lines = httpx.post(f"{address}api/history", json=asked, timeout=300).text.splitlines()
                assert len(lines) > 1000
                assert not any("error" in json.loads(line) for line in lines)
                sizes.append(benchmark.resident(process.pid))
        finally:
            process.terminate()
    assert sizes[1] - sizes[0] < 40e6, sizes
