"""The files of the page: plain modules that one file can hold, and text that never becomes markup."""

import re
from importlib.resources import files

import pytest

PAGE = files("picolm.view") / "page"
MODULES = {item.name: item.read_text(encoding="utf-8") for item in PAGE.iterdir() if item.name.endswith(".js")}
IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+\.js)";$')
EXPORT = re.compile(r"^export (?:async )?(?:const|function\*?|class) (\w+)")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_a_module_imports_is_exported_and_used(name: str) -> None:
    text = MODULES[name]
    for line in text.splitlines():
        if not line.startswith("import "):
            continue
        match = IMPORT.match(line)
        assert match, line
        exported = {found[1] for each in MODULES[match[2]].splitlines() if (found := EXPORT.match(each))}
        for wanted in match[1].split(", "):
            assert wanted in exported, f"{name}: {match[2]} has no {wanted}"
            assert len(re.findall(rf"\b{wanted}\b", text)) > 1, f"{name}: {wanted} is not used"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_text_becomes_markup_or_code(name: str) -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setAttribute\(.style|https?://(?!www\.w3\.org)"
    assert not re.search(forbidden, MODULES[name])


def test_no_module_is_left_over_and_none_is_imported_in_a_circle() -> None:
    def below(name: str, above: tuple[str, ...] = ()) -> set[str]:
        assert name not in above, f"{name} is imported in a circle: {above}"
        lines = map(IMPORT.match, MODULES[name].splitlines())
        return {name}.union(*(below(found[2], (*above, name)) for found in lines if found))

    assert below("main.js") == set(MODULES)


def test_the_page_itself_has_no_script_and_no_style() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html) == [""]
