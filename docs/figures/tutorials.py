"""Draw the figures of the tutorials, by running the pages as they stand.

python docs/figures/tutorials.py    (needs matplotlib; some minutes for each page)

A page whose code has not changed since its figure was drawn is left alone: tutorials.json beside this file says which code that
was. runs/demo is used where it is there.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
NOTES = HERE / "tutorials.json"
STYLE = {"svg.hashsalt": "pico", "svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False}

sys.path.insert(0, str(HERE.parent))
from pages import blocks, given, run  # noqa: E402


def figures(text: str) -> list[str]:
    """The files that the code of a page saves and that the page shows."""
    return [name for name in re.findall(r'savefig\("([\w.-]+)"\)', text) if f"../figures/{name})" in text]


def digest(text: str) -> str:
    return hashlib.sha256("".join(block.code for block in blocks(text) if block.runs).encode()).hexdigest()


def pico(arguments: list[str]) -> None:
    print("pico", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "picolm", *arguments], check=True, stdout=subprocess.DEVNULL)


def draw(text: str) -> None:
    """Run a page in a folder that looks like a clone, and take its figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("configs", "examples"):
            (folder / part).symlink_to(ROOT / part)
        if (ROOT / "runs/demo/run.json").exists():
            shutil.copytree(ROOT / "runs/demo", folder / "runs/demo", symlinks=True)
        before = Path.cwd()
        os.chdir(folder)
        try:
            run(text, folder, pico, lambda block: [])
        finally:
            os.chdir(before)
        for figure in figures(text):
            shutil.copy(folder / figure, HERE / figure)


def main() -> None:
    matplotlib.use("svg")
    matplotlib.rcParams |= STYLE
    os.environ |= {"SOURCE_DATE_EPOCH": "0", "PYTHONPATH": str(ROOT / "src")}
    notes = json.loads(NOTES.read_text()) if NOTES.exists() else {}
    for page in sorted((HERE.parent / "tutorials").glob("*.md")):
        text = page.read_text()
        wanted = figures(text)
        there = all((HERE / name).exists() for name in wanted)
        if not wanted or "hub" in given(text) or (there and notes.get(page.stem) == digest(text)):
            continue
        print(f"{page.stem}: {', '.join(wanted)}", flush=True)
        draw(text)
        notes[page.stem] = digest(text)
        NOTES.write_text(json.dumps(notes, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
