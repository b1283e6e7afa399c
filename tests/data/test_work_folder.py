"""A work folder that is continued holds only what `pico data prepare` makes: no link leads out of it."""

from pathlib import Path

import pytest

from picolm.data.recipe import require_plain
from picolm.errors import DataError


@pytest.mark.parametrize("name", ["", "lock", "result", "result/manifest.json", "reports/scan/000000"])
def test_a_link_in_a_work_folder_is_refused_and_its_target_left_alone(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / ".out.0123456789ab", tmp_path / "target"
    target.write_text("mine")
    place = folder / name if name else folder
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(DataError, match=r"is not a (folder|regular file) of unfinished work; delete"):
        require_plain(folder)
    assert target.read_text() == "mine"


def test_a_folder_that_was_left_is_continued(tmp_path: Path) -> None:
    report = tmp_path / ".out.0123456789ab" / "reports" / "000000"
    report.parent.mkdir(parents=True)
    report.write_text("done")
    require_plain(tmp_path / ".out.0123456789ab")
    require_plain(tmp_path / "not there")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [report]
    assert report.read_text() == "done"
