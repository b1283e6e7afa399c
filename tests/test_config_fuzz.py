"""2,000 configurations that somebody, or something, has damaged: each loads, or says in words what is wrong and where."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.analyze.config import AnalysisConfig
from picolm.schema import ConfigError, dump, load
from picolm.train.config import TrainConfig, schema_for

CONFIGS = Path(__file__).parents[1] / "configs"
RICH = """
analysis_name: rich
runs: [runs/a, hub:lab/name@branch]
steps: {start: 0, end: 100, step: 10}
metrics:
- metric_name: cka
  data_split: val
  target: {checkpoint: last, run: b, layer: all}
  components:
  - {component_name: simple, data_type: activations, layer_suffixes: [swiglu.w_2], layers: [0, 1], heads: false}
  - {component_name: ov_circuit, layer_suffixes: {output_layer: attention.o_proj, value_layer: attention.v_proj}}
- {metric_name: per, target_checkpoint: null, components: [{component_name: mlp, data_type: gradients}]}
monitoring: {output_dir: out, save_to_wandb: false, wandb: {project: p, entity: e}, pico_report: {auto_commit: true}}
"""
KINDS: dict[str, tuple[list[str], Any]] = {
    "train": ([dump(TrainConfig()), *(file.read_text() for file in CONFIGS.glob("*.yaml"))], schema_for),
    "analyze": ([RICH, *(file.read_text() for file in CONFIGS.glob("analyses/*.yaml"))], AnalysisConfig),
}
MANY = settings(
    max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
TEXTS = [
    "\t", "\x00", "\ufeff", "\u2028", "é", "日本", "🦙", "\ud7ff", "&a ", "*a", "*b", "<<: *a", "<<: 3", "? ", "- ", ": ", "::",
    "{", "}", "[", "]", "|", ">", "%YAML 9.9\n", "---\n", "...\n", "!!int x", "!!python/object/apply:os.getcwd []", "!!set {a}",
    "!!binary aGk=", "!!timestamp 2001-01-01", "!x y", "#", "'", '"', "\\", "\r\n", "~", "@", "`", ".nan", "-.inf", "1e999", "0x",
    "0o17", "1_000", "2026-01-01", "12:30:45", "=", "<<", "null", "yes", "9" * 400, "-1", "0", "1.5", "no_such:thing", ":x", "x:",
    "..a:b", "os:no", "os.path:join", "a b:c", "a:b:c", "1:2", "../..", "/", "a/b", "\n", "\n\n", "  ", "    x: 1\n",
]  # fmt: skip
ODD = ["", "=", "a=", "=b", "model=3", "model.d_model.x=1", "model..x=1", ".=1", "data.dataset=[1]"]
VALUES = [
    None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 10**400, 2**63, 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", "x", "all", "last 3", "random:0", "random:99999999999999999999", "é🦙", "\x00", "a" * 10_000,
    "no_such:thing", "os:sep", ":",
    "..:x", "os.path:join", "{}", [], {}, [[]], [{}], [None], [[["x"]]], {"": ""}, {"x": {"y": {}}}, {1: 2},
    {None: 1}, [1, "x", 2.5],
    ["x", "x"], b"\xff", {"checkpoint": "all"}, [[0] * 50] * 50,
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


def paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All that there is in a tree, its root excepted."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in entries for found in [(*path, key), *paths(value, (*path, key))]]


@st.composite
def damaged_texts(draw: st.DrawFn, texts: list[str]) -> bytes:
    """Lines lost, doubled, swapped and indented; pieces cut out; words of YAML and bytes that are none put in anywhere."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        place = draw(st.integers(0, len(text)))
        match draw(st.sampled_from(["insert", "value", "key", "lose", "double", "swap", "indent", "cut"])):
            case "insert":
                text = text[:place] + draw(st.sampled_from(TEXTS)) + text[place:]
            case "cut":
                text = text[:place] + text[place + draw(st.integers(1, 30)) :]
            case kind:
                if kind in ("value", "key"):
                    key, colon, value = lines[at].partition(":")
                    word = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=8)))
                    lines[at] = f"{key}{colon} {word}" if kind == "value" else f"{key}{word}{colon}{value}"
                elif kind == "lose":
                    del lines[at]
                elif kind == "double":
                    lines.insert(other, lines[at])
                elif kind == "swap":
                    lines[at], lines[other] = lines[other], lines[at]
                else:
                    lines[at] = draw(st.sampled_from([" ", "  ", "\t", "   "])) + lines[at]
                text = "\n".join(lines)
    data = text.encode("utf-8", "surrogatepass")
    return data + draw(st.sampled_from([b""] * 19 + [b"\xff\xfe"]))


@st.composite
def damaged_trees(draw: st.DrawFn, texts: list[str]) -> bytes:
    """Values of other types and sizes, keys renamed and moved, sections that are none."""
    tree = yaml.safe_load(draw(st.sampled_from(texts)))
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(paths(tree) or [("x",)]))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        value = copy.deepcopy(
            draw(st.one_of(st.sampled_from(VALUES), st.integers(1, 300).map(nested), st.text(max_size=8)))
        )
        match draw(st.sampled_from(["value", "value", "key", "lose", "nest", "add"])):
            case "key" if isinstance(parent, dict):
                parent[draw(st.one_of(st.text(max_size=8), st.integers(), st.none()))] = parent.pop(path[-1], None)
            case "lose":
                parent.pop(path[-1]) if isinstance(parent, list) else parent.pop(path[-1], None)
            case "nest":
                parent[path[-1]] = {str(path[-1]): parent[path[-1]]} if path[-1:] and path != ("x",) else {}
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = value
            case _:
                parent[path[-1]] = value
    return yaml.safe_dump(
        tree, allow_unicode=draw(st.booleans()), sort_keys=False, default_flow_style=draw(st.booleans())
    ).encode()


def check(file: Path, content: bytes, schema: Any, overrides: tuple[str, ...] = ()) -> None:
    file.write_bytes(content)
    try:
        config = load(file, schema, overrides)
    except ConfigError as error:
        found = error.problems
        assert found
        for problem in found:
            assert re.fullmatch(rf"{re.escape(str(file))}(:\d+)?|command line", problem.place), problem
            assert problem.message.strip(), problem
            whole = problem.message.startswith(
                ("is not valid YAML", "should be a mapping", "cannot be read", "the key ")
            )
            assert problem.path or whole, problem
            assert len(str(problem)) < 3000, str(problem)
    else:
        file.write_text(dump(config), encoding="utf-8")
        assert dump(load(file, schema)) == dump(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", [damaged_texts, damaged_trees])
def test_no_file_makes_loading_fail_otherwise_than_in_words(
    kind: str, strategy: Callable[..., st.SearchStrategy[bytes]], tmp_path: Path
) -> None:
    texts, schema = KINDS[kind]

    @MANY
    @given(strategy(texts))
    def test(content: bytes) -> None:
        check(tmp_path / "c.yaml", content, schema)

    test()


@pytest.mark.slow
@settings(MANY, max_examples=200)
@given(st.lists(st.one_of(st.text(max_size=12), st.sampled_from(TEXTS).map("model.n_layers={}".format)), max_size=3),
       st.lists(st.sampled_from(ODD)))  # fmt: skip
def test_no_override_does_either(tmp_path_factory: pytest.TempPathFactory, words: list[str], odd: list[str]) -> None:
    check(tmp_path_factory.getbasetemp() / "c.yaml", (CONFIGS / "demo.yaml").read_bytes(), schema_for, (*words, *odd))
