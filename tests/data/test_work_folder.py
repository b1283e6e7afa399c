"""The folder of a job that is gone on with is one that a job made: no link leads out of it."""

from pathlib import Path

import pytest

from picolm.data import publish
from picolm.errors import DataError


@pytest.mark.parametrize("name", ["", "lock", "result", "result/manifest.json", "reports/finish/000000.json"])
def test_a_link_in_a_work_folder_is_refused_and_its_target_left_alone(name: str, tmp_path: Path) -> None:
    folder, target = tmp_path / ".out.0123456789ab", tmp_path / "target"
    target.write_text("mine")
    place = folder / name if name else folder
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(DataError, match=r"is no (folder|regular file) of a job; delete"):
        publish._require_plain(folder)
    assert target.read_text() == "mine"


def test_a_folder_that_a_job_left_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / ".out.0123456789ab" / "reports").mkdir(parents=True)
    publish._require_plain(tmp_path / ".out.0123456789ab")
    publish._require_plain(tmp_path / "not there")
