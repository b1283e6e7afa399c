"""Archives of torch.save that others damaged, or made to look like something else."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from picolm.errors import StoreError
from picolm.store.foreign import PickledTensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tensors.pt"
    torch.save({"a": torch.arange(6.0)}, path)
    return path


def spanning_disks(data: bytes) -> bytes:
    end = data.rindex(b"PK\x06\x07")  # the place of the end in the 64-bit form, and how many disks there are
    return data[: end + 16] + (2).to_bytes(4, "little") + data[end + 20 :]


def with_field(value: int, central: int, local: int) -> Callable[[bytes], bytes]:
    """Change a field of two bytes in the first entry of the directory and in the header of its file. central, local: where."""

    def change(data: bytes) -> bytes:
        for mark, place in ((b"PK\x01\x02", central), (b"PK\x03\x04", local)):
            at = data.index(mark) + place
            data = data[:at] + value.to_bytes(2, "little") + data[at + 2 :]
        return data

    return change


def flagged(flag: int) -> Callable[[bytes], bytes]:
    return with_field(flag, 8, 6)


def compressed_by(method: int) -> Callable[[bytes], bytes]:
    return with_field(method, 10, 8)


@pytest.mark.parametrize(
    "change",
    [spanning_disks, flagged(1), flagged(0x20), flagged(0x40), *(compressed_by(method) for method in (8, 12, 14, 99))],
    ids=["disks", "encrypted", "patched", "strongly", "deflated", "bzip2", "lzma", "unknown"],
)
def test_an_archive_that_says_what_is_not_so_is_refused_in_words(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(StoreError, match=r"tensors.pt: (damaged|holds)"):
        PickledTensors(file)["a"]


def test_a_name_that_is_no_utf_8_is_refused_in_words(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        name = archive.namelist()[0].encode()
    data = flagged(0x800)(file.read_bytes()).replace(name, b"\xff" * len(name))
    file.write_bytes(data)
    with pytest.raises(StoreError, match=r"tensors.pt: (damaged|holds)"):
        PickledTensors(file)["a"]
