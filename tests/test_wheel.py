"""Who installs the wheel has what a clone has: the command, its dependencies and the shipped configurations."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from picolm.cli.app import config_and_overrides
from picolm.errors import PicoError
from picolm.shipped import FOLDER, commands, shipped, summary

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", commands())
def test_a_shipped_configuration_is_found_by_name_unless_a_file_has_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, file = next(iter(shipped(command).items()))
    assert config_and_overrides(command, None, [name, "a=1"]) == (file, ["a=1"])
    assert config_and_overrides(command, Path(name), ["a=1"]) == (file, ["a=1"])
    (tmp_path / name).mkdir()  # a folder of that name is no configuration
    assert config_and_overrides(command, None, [name])[0] == file
    (tmp_path / name).rmdir()
    (tmp_path / name).write_text("model: {}\n")
    assert config_and_overrides(command, None, [name]) == (Path(name), [])
    with pytest.raises(PicoError, match=rf"demmo: there is no such file, .* for `pico {command}` are .*{name}"):
        config_and_overrides(command, None, ["demmo"])


def test_each_shipped_configuration_says_what_it_is() -> None:
    files = [file for command in commands() for file in shipped(command).values()]
    assert sorted(files) == sorted(FOLDER.rglob("*.yaml"))
    for file in files:
        assert file.read_text().startswith("# ")
        assert summary(file).endswith((".", "?"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wheel_in_a_clean_environment_trains_the_demo(tmp_path: Path) -> None:
    def call(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    source = tmp_path / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "dist", source)
    (wheel,) = (tmp_path / "dist").glob("picolm-*.whl")
    with zipfile.ZipFile(wheel) as files:
        held = {name.removeprefix("picolm/") for name in files.namelist()}
    assert {f"configs/{file.relative_to(FOLDER).as_posix()}" for file in FOLDER.rglob("*.yaml")} <= held

    call(sys.executable, "-m", "venv", tmp_path / "clean")
    bin_ = tmp_path / "clean" / "bin"
    call(bin_ / "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel)
    assert "pico train demo" in call(bin_ / "pico", "list", "configs")
    said = call(bin_ / "pico", "train", "demo", "training.max_steps=2")
    assert "Trained 2 steps" in said
    assert (tmp_path / "runs/demo/checkpoints/step_2/model.safetensors").exists()
    shutil.rmtree(tmp_path / "clean")  # large
