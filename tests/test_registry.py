"""Parts by name, inside and outside of the package."""

from pathlib import Path

import pytest

from picolm.errors import PicoError
from picolm.registry import Registry


def test_a_part_is_found_by_its_name_and_added_once() -> None:
    parts: Registry[int] = Registry("part")
    assert parts.add("one")(1) == 1
    assert parts.get("one") == 1
    assert list(parts) == ["one"]
    assert "one" in parts
    with pytest.raises(ValueError, match="part 'one' is registered twice"):
        parts.add("one")


def test_an_unknown_name_is_told_with_what_there_is() -> None:
    parts: Registry[int] = Registry("optimizer")
    parts.add("adamw")(1)
    with pytest.raises(PicoError, match=r"unknown optimizer 'adam'; did you mean 'adamw'\? \(there are: adamw\)"):
        parts.get("adam")


def test_a_part_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lab_parts.py").write_text("def curvature(x): return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    parts: Registry = Registry("metric")
    assert parts.get("my_lab_parts:curvature")(2) == 4
    with pytest.raises(PicoError, match="metric 'my_lab_parts:nothing' cannot be imported"):
        parts.get("my_lab_parts:nothing")
