"""The page with its answers in one file: it opens anywhere, without a server and without a request.

The modules of the page become one script: each is a function that returns what it exports. The content security policy of the
file allows this script and these styles, by their digests, and nothing else.
"""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from picolm.view.pages import page_files
from picolm.view.refusal import Refused
from picolm.view.session import Question, Session, line_of, text_of
from picolm.view.training import training

MOST_BYTES = 256 * 2**20  # of a saved page
Panel = Literal["text", "heads", "layers", "training"]
KINDS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "heads": ("heads", "head-scores"),
    "layers": ("layers",),
    "training": (),
}
_NEEDS = {"text": ("text",), "heads": ("patterns", "mixing"), "layers": ("lens",)}
_IMPORT = re.compile(r'^import \{ ([\w, ]+) \} from "\./(\w+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(r"^export ((?:async )?(?:const|function|class) (\w+))", re.MULTILINE)
_STYLE = re.compile(r'^<link rel="stylesheet" href="page/([\w.]+)">$', re.MULTILINE)
_SCRIPT = re.compile(r'^<script type="module" src="page/(\w+)\.js"></script>$', re.MULTILINE)


class Save(Question):
    """What to save: which panels of a text, at which steps. state: what the page shows at first, as in its address."""

    panels: tuple[Panel, ...] = ("text", "heads", "layers", "training")
    state: Annotated[str, Field(max_length=100_000)] = ""


Found = Mapping[tuple[str, int], bytes]


def wanted(session: Session, save: Save) -> list[tuple[str, int]]:
    """Return the answers that a page needs, as kinds and steps; those that the model can give. Raises Refused for no steps."""
    from picolm.view.answers import why_not

    steps, can = session.steps(save), why_not(session.run(save.run).subject)
    if not steps:
        raise Refused("there are no steps to save")
    panels = [panel for panel in save.panels if panel == "training" or any(can[need] is True for need in _NEEDS[panel])]
    return [(kind, step) for step in steps for panel in panels for kind in KINDS[panel]]


def page(session: Session, save: Save, found: Found) -> str:
    """Return the page with these answers as HTML. Raises Refused for one that is too large."""
    viewed, asked = session.read(save)
    about: dict[str, Any] = {"run": save.run} | (
        {"text": save.text} if save.row is None else {"row": save.row.model_dump()}
    )
    table: dict[str, Any] = {"session {}": _session(session, save)}
    for (kind, step), answer in found.items():
        told: Any = {"packed": base64.b64encode(gzip.compress(answer, mtime=0)).decode()} if kind == "heads" else None
        if kind == "text":
            told = text_of(asked, viewed, step, answer)
            table.setdefault(_key("history", about), []).append(line_of("text", step, answer))
        if kind == "head-scores":
            table.setdefault(_key(kind, about), []).append(line_of(kind, step, answer))
        else:
            table[_key(kind, {**about, "step": step})] = told or json.loads(answer)
    if "training" in save.panels:
        table[_key("training", {"run": save.run})] = training(viewed.run, session.analyses)
    html = inlined({"state": save.state, "answers": table})
    if len(html) > MOST_BYTES:
        raise Refused(f"the page would have {len(html) / 1e6:.0f} MB; save fewer steps or panels", 413)
    return html


def _session(session: Session, save: Save) -> dict[str, Any]:
    """Return what the page is told at its start: the one run, with the steps that are saved."""
    whole, steps = session.describe(), set(session.steps(save))
    run = next(run for run in whole["runs"] if run["id"] == save.run)
    run |= {"live": False, "steps": [step for step in run["steps"] if step["step"] in steps]}
    for name in ("batch", "replay"):
        run["can"][name] = "it is not in a saved page"
    return {**whole, "saved": True, "runs": [run]}


def _key(endpoint: str, body: Mapping[str, Any]) -> str:
    """Return the name of a question in the table, the same as the page makes of it."""
    return f"{endpoint} {json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(',', ':'))}"


def inlined(data: Mapping[str, Any]) -> str:
    """Return the page as one file with a table of answers in it."""
    html, styles = page_files()["index.html"].decode(), list[str]()

    def style(found: re.Match[str]) -> str:
        styles.append(page_files()[found[1]].decode())
        return f"<style>{styles[-1]}</style>"

    html = _STYLE.sub(style, html)
    entry = _SCRIPT.search(html)
    if entry is None:
        raise ValueError("index.html names no module")
    code = one_script(entry[1])
    table = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    allowed = f"script-src {_digests([code])}; style-src {_digests(styles)}"
    policy = f"default-src 'none'; {allowed}; img-src data: blob:; base-uri 'none'; form-action 'none'"
    parts = f'<script type="application/json" id="data">{table}</script>\n<script type="module">{code}</script>'
    html = html[: entry.start()] + parts + html[entry.end() :]
    meta = '<meta charset="utf-8">'
    return html.replace(meta, f'{meta}\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)


def _digests(texts: Sequence[str]) -> str:
    """Return texts as the sources of a content security policy."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def one_script(entry: str) -> str:
    """Return a module and all that it imports as one script, in the order in which they run."""
    return "\n" + "\n".join(_modules(entry, set())) + "\n"


def _modules(name: str, done: set[str]) -> Iterator[str]:
    done.add(name)
    text = page_files()[f"{name}.js"].decode()
    for found in _IMPORT.finditer(text):
        if found[2] not in done:
            yield from _modules(found[2], done)
    exported = [found[2] for found in _EXPORT.finditer(text)]
    body = _EXPORT.sub(r"\1", _IMPORT.sub(r"const { \1 } = $\2;", text))
    if re.search(r"^(?:import|export)\b", body, re.MULTILINE) or "</script" in body:
        raise ValueError(
            f'{name}.js: imports and exports should be plain: import {{ a, b }} from "./x.js"; export const a'
        )
    yield f"const ${name} = (() => {{\n{body}\nreturn {{ {', '.join(exported)} }};\n}})();"
