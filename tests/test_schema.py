"""Reading configurations: what is right comes out typed, what is wrong is told all at once, with its place."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import PositiveInt

from picolm.document import parse_yaml
from picolm.schema import ConfigError, Key, Place, Section, declared_keys, dump, flatten, load, on_resume, plain
from picolm.train.config import TrainConfig


class Inner(Section):
    n_layers: PositiveInt = 3
    """Number of blocks. There are many."""
    rate: float = 0.1
    mode: Literal["fast", "slow"] | int = "fast"
    sizes: tuple[int, ...] = ()
    folder: Place | None = None
    folders: tuple[Place, ...] = ()


class Outer(Section):
    inner: Inner = Inner()
    name: str | None = None
    flag: bool = False
    max_steps: int = 10

    def problems(self):
        if self.inner.n_layers > self.max_steps:
            yield ("inner.n_layers", "max_steps"), f"{self.inner.n_layers} is more than max_steps ({self.max_steps})"


def read(tmp_path: Path, text: str, *overrides: str) -> Outer:
    (tmp_path / "c.yaml").write_text(text)
    return load(tmp_path / "c.yaml", Outer, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_numbers_and_lists_are_what_they_look_like(tmp_path: Path) -> None:
    config = read(tmp_path, "inner: {rate: 3e-4, sizes: [1, 2], mode: 5}\nname: 2024-01-02\n")
    assert config.inner == Inner(rate=3e-4, sizes=(1, 2), mode=5)
    assert config.name == "2024-01-02"  # not a date


@pytest.mark.parametrize("text", ["1e-3", "1E5", "1.5e3", ".5", "-1e-8", "+2.", "12"])
def test_each_spelling_of_a_number(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"inner: {{rate: {text}}}").inner.rate == float(text)


CORE_SCHEMA = [  # the examples and the corners of https://yaml.org/spec/1.2.2/#103-core-schema
    (None, ["", "~", "null", "Null", "NULL"]),
    (True, ["true", "True", "TRUE"]),
    (False, ["false", "False", "FALSE"]),
    (0, ["0", "-0", "+0", "00", "0o0", "0x0"]),
    (10, ["10", "010", "+10", "0010", "0o12", "0xa", "0xA"]),
    (-19, ["-19", "-019"]),
    (0o17, ["0o17"]),
    (0x3A, ["0x3A"]),
    (90.5, ["90.5", "+90.5", "9.05e1", "9050e-2", "090.5", "905.E-1"]),
    (0.5, [".5", "+.5", "5e-1", "0.50"]),
    (12e3, ["12e03", "12e+3", "12E3"]),
    (float("inf"), [".inf", ".Inf", ".INF", "+.inf"]),
    (float("-inf"), ["-.inf", "-.INF"]),
]
TEXTS = [
    "yes", "no", "on", "off", "y", "n", "Yes", "OFF", "tRue", "nULL", "1:30", "12:30:45", "190:20:30.15", "1_000", "0b101",
    "0o8", "0xg", "-0o7", "+0x1", "1e", "e5", ".", "-.", "+", "1.2.3", "2001-12-14", "2001-12-14t21:59:43.10-05:00", "=",
    ".infinity", "nan", "inf", "NaN", "0x", "0o", "1__0", "1.5_0", "1 000", "\u0663",
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), [(value, text) for value, texts in CORE_SCHEMA for text in texts])
def test_plain_words_are_those_of_yaml_1_2(value: object, text: str) -> None:
    found = parse_yaml(f"key: {text}", "f")["key"]
    assert (found, type(found)) == (value, type(value))
    assert parse_yaml(f"key: '{text}'", "f")["key"] == text
    assert parse_yaml(f"[{text or '~'}]", "f") == [value]


def test_not_a_number_is_read() -> None:
    assert [value != value for value in parse_yaml("[.nan, .NaN, .NAN, 1.0]", "f")] == [True, True, True, False]


@pytest.mark.parametrize("text", TEXTS)
def test_what_yaml_1_2_does_not_resolve_is_text(text: str) -> None:
    assert parse_yaml(f"key: {text}", "f") == {"key": text}


@pytest.mark.parametrize("text", ["!!int 1_000", "!!int 0b1", "!!float x", "!!bool yes", "!!null x"])
def test_a_tag_does_not_bring_back_yaml_1_1(text: str) -> None:
    with pytest.raises(ConfigError, match=r"f:1: is not valid YAML: .* is no (int|float|bool|null)"):
        parse_yaml(f"key: {text}", "f")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text()
        | st.sampled_from(TEXTS)
        | st.sampled_from([text for _, texts in CORE_SCHEMA for text in texts]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_values_of_every_type_are_written_so_that_they_are_read_back(value: object) -> None:
    assert parse_yaml(dump({"key": value}), "f") == {"key": value}


def test_the_command_line_reads_the_same_numbers(tmp_path: Path) -> None:
    assert read(tmp_path, "", "max_steps=010").max_steps == 10
    assert read(tmp_path, "", "name=1:30").name == "1:30"
    assert problems(tmp_path, "flag: on\n", "max_steps=1:30", "inner.sizes=[1_000]", "inner.rate=1_0.5") == [
        'c.yaml:1: flag: "on": should be a valid boolean; write true',
        'command line: max_steps: "1:30": should be a valid integer',
        'command line: inner.sizes.0: "1_000": should be a valid integer; write 1000, without _',
        'command line: inner.rate: "1_0.5": should be a valid number; write 10.5, without _',
    ]


@pytest.mark.parametrize("word", ["yes", "No", "ON", "off", "y"])
def test_a_truth_value_of_yaml_1_1_is_told_how_to_be_written(tmp_path: Path, word: str) -> None:
    meant = "true" if word.lower() in ("yes", "on", "y") else "false"
    assert problems(tmp_path, f"flag: {word}") == [
        f'c.yaml:1: flag: "{word}": should be a valid boolean; write {meant}'
    ]


def test_infinity_is_a_number_that_a_field_may_refuse(tmp_path: Path) -> None:
    assert problems(tmp_path, "inner: {rate: .inf}") == ["c.yaml:1: inner.rate: Infinity: should be a finite number"]


def test_variables_and_home_in_paths_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    text = "inner: {folder: $SCRATCH/runs, folders: ['${SCRATCH}-2', ~/x, 'a$$b', 'c$', 'hub:a/b']}\nname: $SCRATCH\n"
    config = read(tmp_path, text)
    assert config.inner.folder == "/scratch/me/runs"
    assert config.inner.folders == ("/scratch/me-2", "/home/me/x", "a$b", "c$", "hub:a/b")
    assert config.name == "$SCRATCH"  # no path
    assert read(tmp_path, "", "inner.folder=~/y").inner.folder == "/home/me/y"


def test_a_variable_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATHC", raising=False)
    assert problems(tmp_path, "inner:\n  folder: $SCRATHC/runs\n") == [
        "c.yaml:2: inner.folder: '$SCRATHC/runs': the environment variable SCRATHC is not set; set it, or write $$ for a "
        "dollar sign"
    ]


def test_variables_in_the_files_of_a_run_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    (tmp_path / "c.yaml").write_text("inner: {folder: 'hub:$SECRET/x'}")
    assert load(tmp_path / "c.yaml", Outer, within=tmp_path).inner.folder == "hub:$SECRET/x"
    (tmp_path / "link.yaml").symlink_to(tmp_path / "c.yaml")
    assert load(tmp_path / "link.yaml", Outer) == load(tmp_path / "link.yaml", Outer)
    with pytest.raises(ConfigError, match=r"link.yaml: is a link"):
        load(tmp_path / "link.yaml", Outer, within=tmp_path)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == read(tmp_path, "# nothing\n") == Outer()


def test_every_problem_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    text = "inner:\n  n_layer: 4\n  rate: quick\n  sizes: [1, x]\nflag: 3\nmax_stepz: 4\ninner2: {}\n"
    assert problems(tmp_path, text, "inner.mode=often", "nonsense") == [
        "command line: nonsense: should have the form dotted.key=value",
        "c.yaml:2: inner.n_layer: unknown key; did you mean 'n_layers'?",
        'c.yaml:3: inner.rate: "quick": should be a valid number',
        'c.yaml:4: inner.sizes.1: "x": should be a valid integer',
        "c.yaml:5: flag: 3: should be a valid boolean",
        "c.yaml:6: max_stepz: unknown key; did you mean 'max_steps'?",
        "c.yaml:7: inner2: unknown key; did you mean 'inner'?",
        "command line: inner.mode: \"often\": should be 'fast' or 'slow', or should be a valid integer",
    ]


def test_the_help_of_a_field_is_part_of_its_error(tmp_path: Path) -> None:
    assert problems(tmp_path, "inner: {n_layers: 0}") == [
        "c.yaml:1: inner.n_layers: 0: should be greater than 0. Number of blocks."
    ]


def test_a_key_in_the_wrong_section_is_pointed_to_the_right_one(tmp_path: Path) -> None:
    assert problems(tmp_path, "inner:\n  max_steps: 4\n") == [
        "c.yaml:2: inner.max_steps: unknown key; did you mean 'max_steps'?"
    ]


def test_rules_between_fields_are_told_beside_other_problems(tmp_path: Path) -> None:
    assert problems(tmp_path, "inner: {n_layers: 11}\nflg: 1\n") == [
        "c.yaml:2: flg: unknown key; did you mean 'flag'?",
        "c.yaml:1: inner.n_layers: 11 is more than max_steps (10)",
    ]
    assert problems(tmp_path, "inner: {n_layers: 11}\nmax_steps: ten\n") == [
        'c.yaml:2: max_steps: "ten": should be a valid integer'  # the rule rests on a value that is not known
    ]


def test_a_key_given_twice_is_not_the_last_one_silently(tmp_path: Path) -> None:
    assert problems(tmp_path, "flag: true\nflag: false\n") == ["c.yaml:2: flag: given twice (first at c.yaml:1)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: [1", "c.yaml:1: is not valid YAML: expected ',' or ']'"),
        ("a: &x [*x]", "is not valid YAML"),
        ("- 1", "c.yaml:1: should be a mapping of sections"),
        ("1: 2", "c.yaml:1: the key 1 should be text"),
        ("name: !!binary aGk=", "name: a bytes is not a value"),
        ("name: !!python/object:os.system x", "is not valid YAML: could not determine a constructor"),
    ],
)
def test_what_is_not_a_configuration(tmp_path: Path, text: str, message: str) -> None:
    assert message in "\n".join(problems(tmp_path, text))


@pytest.mark.slow
def test_a_few_lines_of_aliases_do_not_fill_the_memory(tmp_path: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi")]
    assert problems(tmp_path, "\n".join(lines)) == ["c.yaml: is not valid YAML: more than 100000 values"]


def test_what_is_nested_too_deep_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "flag: true\nname: " + "[" * 60 + "]" * 60)[0] == (
        "c.yaml:2: name.0.0.0: holds more than 50 levels of values"
    )


def test_a_key_that_is_missing_is_named_with_what_it_is_for(tmp_path: Path) -> None:
    class Needy(Section):
        needed: int
        """What it is for."""

    (tmp_path / "n.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"n\.yaml: needed: is missing\. What it is for\.$"):
        load(tmp_path / "n.yaml", Needy)


@pytest.mark.parametrize("word", ["", "x", "=1", "a..b=1", ".=1"])
def test_a_word_that_is_no_override(tmp_path: Path, word: str) -> None:
    assert problems(tmp_path, "", word) == [
        f"command line: {word or chr(39) * 2}: should have the form dotted.key=value"
    ]


def test_a_section_that_an_override_invented_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    assert problems(tmp_path, "flag: true\n", "inn.n_layers=3") == [
        "command line: inn: unknown key; did you mean 'inner'?"
    ]


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"demmo.yaml: there is no such file; did you mean 'demo.yaml'"):
        load(tmp_path / "demmo.yaml", Outer)


def test_overrides_win_and_nest(tmp_path: Path) -> None:
    assert read(tmp_path, "inner: {n_layers: 2}", "inner.n_layers=4", "name=x=y", "inner.sizes=[3]").inner == Inner(
        n_layers=4, sizes=(3,)
    )


@example(Outer(name="a\x85b"))
@example(Outer(name="\u2028"))
@given(
    st.builds(
        Outer,
        name=st.none() | st.text(),
        inner=st.builds(Inner, rate=st.floats(-1e9, 1e9), sizes=st.lists(st.integers())),
    )
)
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, config: Outer) -> None:
    file = tmp_path_factory.mktemp("round") / "c.yaml"
    file.write_text(dump(config), encoding="utf-8")
    if not list(config.problems()):
        assert load(file, Outer) == config


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}


def test_of_each_key_is_said_what_another_value_does_on_resume() -> None:
    declared = declared_keys(TrainConfig)
    said = {key: on_resume(key, declared) for key in flatten(plain(TrainConfig()))}
    assert said["model.d_model"] == said["data.dataset.shuffle"] == said["training.seeds.noise"] == "refused"
    assert said["training.optimization.optimizer"] == "refused"
    assert said["data.dataset.name"] == said["data.tokenizer.name"] == said["training.max_steps"] == "noted"
    assert (
        said["model.batch_size"]
        == said["checkpointing.run_name"]
        == said["monitoring.pico_report.lab_hash"]
        == "ignored"
    )
    assert {key for key, word in said.items() if word == "kept"} == {
        "checkpointing.checkpoints_dir", "checkpointing.learning_dynamics_dir", "checkpointing.logs_dir",
        "checkpointing.evaluation.eval_results_dir",
    }  # fmt: skip


class Part(Section):
    plain: int = 0
    own: Annotated[int, Key(on_resume="noted")] = 0


class Whole(Section):
    inner: Annotated[Part, Key(on_resume="refused")] = Part()
    many: tuple[Part, ...] = ()


def test_a_key_that_declares_nothing_is_as_the_section_around_it() -> None:
    declared = declared_keys(Whole)
    asked = ("inner.plain", "inner.own", "many.plain", "many.own")
    assert [on_resume(key, declared) for key in asked] == ["refused", "noted", "noted", "noted"]
