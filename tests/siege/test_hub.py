"""A Hub that lies: about files, lists of files and commits, titles and addresses. It gets the token of nobody else."""

import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Frozen, StopTest
from tests.planted import TOKEN
from tests.siege import planting
from tests.siege.conftest import CASES, EACH, Attack
from tests.siege.forging_hub import ForgingHub
from tests.siege.mutations import HUGE, changed_trees, damaged
from tests.siege.planting import RAW

MANY = settings(
    max_examples=CASES or 3, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
RUN, ROWS = ("models/lab/toy", "toy"), ("datasets/lab/rows", "main")
READERS = {RUN: ["hub list", "hub generate", "hub analyze", "pull"], ROWS: ["hub train"]}
FILES = {
    RUN: ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors",
          "tokenizer.json", "tokenizer_config.json",
          "trainer_state.json", "training_config.yaml", "environment.json", "metrics.jsonl",
          "run.json", "eval_results/step_2.json",
          "learning_dynamics/val_activations.safetensors", "learning_dynamics/val_data.parquet"],
    ROWS: ["manifest.json", "tokenizer.json", "train-00000-of-00001.parquet",
           "val-00000-of-00001.parquet"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def honest(hub: ForgingHub) -> Iterator[None]:
    """Each test leaves an honest Hub."""
    yield
    hub.be_honest()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("place", "name"), [(place, name) for place, names in FILES.items() for name in names])
def test_a_mutated_file_of_the_hub_is_read_or_refused_in_words(
    place: tuple[str, str], name: str, attack: Attack, hub: ForgingHub
) -> None:
    files = hub.files(*place)
    originals = {each: files[each] for each in FILES[place]}
    number = 0

    @MANY
    @given(
        damaged(name, originals[name], list(originals.values())).filter(lambda data: data != HUGE), st.integers(0, 3)
    )
    def case(data: bytes, seal: int) -> None:
        nonlocal number
        number += 1
        for command in attack.turn(READERS[place], number):
            hub.be_honest()
            hub.change(*place, name, data, seal=seal > 0)
            attack.run(command, attack.fresh(".pico_cache"), f"{name} {data[:100]!r}")

    case()
    attack.judge()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("place", [RUN, ROWS])
def test_a_name_of_code_in_a_file_of_the_hub_is_not_imported(
    place: tuple[str, str], attack: Attack, hub: ForgingHub
) -> None:
    for name in FILES[place]:
        if name.rpartition(".")[2] not in ("json", "yaml", "jsonl"):
            continue
        path = attack.copy() / "forged" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(hub.files(*place)[name])
        tree = planting.read(path)
        forgeries = planting.forgeries(name, tree, {"model": {"model_type": "x"}})
        for number, (where, forged) in attack.some(forgeries, 4):
            for command in attack.turn(READERS[place], number):
                folder = attack.fresh(".pico_cache")
                planting.plant_modules(folder)
                hub.be_honest()
                hub.change(*place, name, planting.write(name, forged), seal=True)
                attack.run(command, folder, f"{name} {where}")
                attack.note(planting.markers(folder) or None, "imported", command, f"{name} {where}")
    attack.judge()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", ["/commits/", "/tree/", "/revision/", "/refs"])
def test_a_mutated_list_of_the_hub_is_read_or_refused_in_words(part: str, attack: Attack, hub: ForgingHub) -> None:
    commands = [*READERS[RUN], *READERS[ROWS], "push", "data push"]

    @MANY
    @given(st.data())
    def case(data: st.DataObject) -> None:
        def forge(path: str, content: Any, headers: dict[str, str]) -> tuple[Any, dict[str, str]]:
            try:
                return (data.draw(changed_trees(content)) if part in path else content), headers
            except (StopTest, Frozen):  # Hypothesis has no choices left for this case; this is a thread of the Hub
                return content, headers

        # Hypothesis draws the command, and each case finds the same Hub: the same choices forge the same answers.
        for command in commands if EACH else [data.draw(st.sampled_from(commands))]:
            hub.forget("models/lab/sent", "datasets/lab/sent_rows")
            hub.forge = forge
            attack.run(command, attack.fresh(".pico_cache"), part)
            hub.be_honest()

    case()
    attack.judge()


TITLES = [
    "Saving HF Model -- Step " + "9" * 5000, "Saving HF Model -- Step -1", "Saving HF Model -- Step ٣", planting.TEXT,
    f"Saving {planting.TEXT} -- Step 7", "Saving Training Config -- Step 0", "", "x" * 100_000, "Saving ../../x -- Step 5",
]  # fmt: skip
NAMES = ["../outside", "/etc/outside", "a/../../outside", "learning_dynamics/../../../outside",
         "a\\b", "\x1b[2J", "x" * 300, "", ".",
         "eval_results/step_../x.json", "run.json/x", "nul\x00name", ".git/config", "planted.py"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("command", [*READERS[RUN], *READERS[ROWS]])
def test_titles_and_names_of_the_hub_lead_nowhere(command: str, attack: Attack, hub: ForgingHub) -> None:
    for _, odd in attack.some([*TITLES, *NAMES], 6):

        def forge(path: str, content: Any, headers: dict[str, str], odd: str = odd) -> tuple[Any, dict[str, str]]:
            if "/commits/" in path and odd in TITLES:
                content = [content[0] | {"title": odd, "id": "f" * 40}, *content]
            if "/tree/" in path and odd in NAMES:
                content = [*content, content[-1] | {"path": odd}]
            return content, headers

        hub.forge = forge
        folder = attack.fresh(".pico_cache")
        result = attack.run(command, folder, odd[:40])
        raw = RAW.search(result.output)
        attack.note(f"raw {raw[0]!r}" if raw else None, "terminal", command, odd[:40])
        outside = [path for path in folder.parent.iterdir() if path.name == "outside"]
        attack.note(outside or None, "outside", command, odd[:40])
    attack.judge()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_the_token_goes_to_no_other_host_and_pages_end(attack: Attack, hub: ForgingHub) -> None:
    """`Link: next` may lead to another host, or always to one more page."""
    told: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.append(self.headers.get("Authorization", ""))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for following in (f"http://127.0.0.1:{server.server_port}/api/next", f"{hub.url}@127.0.0.1:{server.server_port}/",
                          f"//127.0.0.1:{server.server_port}/x", "file:///etc/passwd",
                          "gopher://x", "\x1b", "", "?p=1"):  # fmt: skip
            for command in [*READERS[RUN], *READERS[ROWS], "push", "data push"]:

                def forge(
                    path: str, content: Any, headers: dict[str, str], following: str = following
                ) -> tuple[Any, dict[str, str]]:
                    lists = isinstance(content, list)
                    return content, (headers | {"Link": f'<{following}>; rel="next"'} if lists else headers)

                hub.forge = forge
                attack.run(command, attack.fresh(".pico_cache"), following)
        server.shutdown()
    assert not any(TOKEN in each for each in told)
    attack.judge()
