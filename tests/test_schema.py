"""Reading configurations: what is right comes out typed, what is wrong is told all at once, with its place."""

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import PositiveInt

from picolm.schema import ConfigError, Section, dump, flatten, load


class Inner(Section):
    n_layers: PositiveInt = 3
    """Number of blocks. There are many."""
    rate: float = 0.1
    mode: Literal["fast", "slow"] | int = "fast"
    sizes: tuple[int, ...] = ()


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
