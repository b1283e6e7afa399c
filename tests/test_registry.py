"""Parts by name, inside and outside of the package."""

import pickle
import random
import sys
from pathlib import Path

import pytest

from picolm.errors import PicoError
from picolm.registry import CodePolicy, Registry, Untrusted, UntrustedCode, find_code_in, set_code_policy


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


def test_a_module_beside_the_file_of_the_user_is_found_after_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: Registry = Registry("metric")
    for folder in ("here", "beside"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my_lab_twice.py").write_text(f"def where(): return {folder!r}\n")
    (tmp_path / "beside" / "my_lab_once.py").write_text("def where(): return 'beside'\n")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(PicoError, match="No module named 'my_lab_once'"):
        parts.get("my_lab_once:where")
    find_code_in(tmp_path / "beside")
    try:
        assert parts.get("my_lab_once:where")() == "beside"
        assert parts.get("my_lab_twice:where")() == "here"
    finally:
        set_code_policy(CodePolicy())


def test_no_file_of_the_working_folder_takes_the_place_of_an_installed_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does another module than the one that was named, and its neighbours, find anything there."""
    for name in ("random", "colorsys", "my_lab_optional"):
        (tmp_path / f"{name}.py").write_text("class Random: pass\ndef rgb_to_hls(): pass\n")
    installed = tmp_path / "site"
    installed.mkdir()
    (installed / "installed_lab.py").write_text(
        "try:\n    import my_lab_optional as found\nexcept ImportError:\n    found = None\ndef part(): return found\n"
    )
    (tmp_path / "my_lab_parts2.py").write_text(
        "import installed_lab\ndef late():\n    import my_lab_optional\n    return my_lab_optional, installed_lab.found\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(installed)
    parts: Registry = Registry("part")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert parts.get("random:Random") is random.Random
    assert parts.get("colorsys:rgb_to_hls").__code__.co_argcount == 3
    late = parts.get("my_lab_parts2:late")
    assert parts.get("installed_lab:part")() is None
    assert late()[0].__file__ == str(tmp_path / "my_lab_optional.py")
    with pytest.raises(ImportError):
        __import__("my_lab_parts3")
    assert str(tmp_path) not in sys.path


def test_a_name_that_was_read_from_elsewhere_is_imported_only_where_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_lab_theirs.py").write_text("def part(): return 1\n")
    monkeypatch.chdir(tmp_path)
    parts: Registry = Registry("part")
    parts.add("ours")(1)
    name = pickle.loads(pickle.dumps(Untrusted("my_lab_theirs:part", "runs/x", "data.name")))
    assert (name, name.where, name.key) == ("my_lab_theirs:part", "runs/x", "data.name")
    assert parts.get(Untrusted("ours", "runs/x", "data.name")) == 1
    with pytest.raises(UntrustedCode, match=r"runs/x names code of its own, data.name: my_lab_theirs:part; .*--trust"):
        parts.get(name)
    assert "my_lab_theirs" not in sys.modules
    set_code_policy(CodePolicy(trusted=True))
    try:
        assert parts.get(name)() == 1
    finally:
        set_code_policy(CodePolicy())
