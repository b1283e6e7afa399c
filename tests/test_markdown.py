"""Names that hold markup are text in a card: as they are, on one line, and nothing of them is rendered."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from picolm.markdown import block, code, plain

MARKUP = [
    "<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](https://tracker/a.png)", "**bold** _it_", "a`b``c", "` `",
    "a|b", "# head", "line\nbreak\n\n# head", "&lt;b&gt;", "<!-- x", "-->", "@somebody", "https://x.example/", "~~x~~", "\\",
    "\\`", "```\n<b>", "$x$", "",
]  # fmt: skip
RENDER = MarkdownIt("gfm-like", {"linkify": False, "html": True}).render


def shown(rendered: str) -> str:
    return html.unescape(
        re.sub(r"</?(p|code|h1|pre|td|th|tr|table|thead|tbody)( class=\"[a-z-]*\")?>|\n", "", rendered)
    )


@pytest.mark.parametrize("text", MARKUP)
@pytest.mark.parametrize("make", [plain, code])
def test_markup_in_a_name_is_shown_as_it_is(text: str, make: type) -> None:
    line = re.sub(r"\s*\n+\s*", " ", text)
    for around in ("{}", "# {}", "name {}, end"):
        rendered = RENDER(around.format(make(text)))
        assert shown(rendered).replace(" ", "") == around.removeprefix("# ").format(line).replace(" ", ""), rendered
    table = RENDER(f"| a | b |\n|---|---|\n| {make(text)} | 1 |\n")
    assert table.count("<td") == 2 or make is code
    assert "<script" not in table
    assert "<a " not in table
    assert "<img" not in table


@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_no_text_leaves_its_block(text: str) -> None:
    rendered = RENDER(f"{block(text, 'yaml')}\nafter\n")
    assert rendered.count("<pre>") == 1
    assert rendered.endswith("<p>after</p>\n")


@given(st.text(st.sampled_from("`| a"), max_size=12))
def test_inline_code_holds_any_backticks(text: str) -> None:
    rendered = RENDER(code("x" + text + "x"))
    assert html.unescape(rendered) == f"<p><code>x{text}x</code></p>\n"
