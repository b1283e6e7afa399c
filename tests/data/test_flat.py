"""Files of token ids that other tools wrote: Megatron and GPT-NeoX, OLMo, nanoGPT and llm.c."""

import itertools
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from picolm.data import open_source
from picolm.data.batches import Batches
from picolm.errors import DataError, FileError

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_megatron(path: Path, documents: list[Any], dtype: str = "uint16", **changed: Any) -> None:
    """Write a .bin and its .idx by the published layout: header, sizes, pointers, document indices."""
    ids = [np.asarray(document, dtype=dtype) for document in documents]
    sizes = np.array([len(document) for document in ids], dtype="<i4")
    begins = np.concatenate([[0], np.cumsum(sizes[:-1], dtype="<i8")]) * np.dtype(dtype).itemsize
    head = {
        "magic": b"MMIDIDX\0\0",
        "version": 1,
        "code": CODES.get(dtype, 6),
        "sizes": sizes,
        "begins": begins,
    } | changed
    path.with_suffix(".bin").write_bytes(b"".join(document.tobytes() for document in ids))
    path.with_suffix(".idx").write_bytes(
        head["magic"] + struct.pack("<QBQQ", head["version"], head["code"], len(sizes), len(sizes) + 1)
        + head["sizes"].astype("<i4").tobytes() + head["begins"].astype("<i8").tobytes()
        + np.arange(len(sizes) + 1, dtype="<i8").tobytes()
    )  # fmt: skip


def samples(documents: list[Any], length: int) -> Iterator[list[int]]:
    """Walk through the documents: a sample is length + 1 tokens, and the next one begins with its last token."""
    sample: list[int] = []
    for document in documents:
        for token in document:
            sample.append(int(token))
            if len(sample) == length + 1:
                yield sample
                sample = sample[-1:]


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_rows_of_megatron_are_cut_as_neox_cuts_them(tmp_path: Path, dtype: str) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 50_000, size) for size in (1, 30, 0, 7, 8, 9, 120, 8)]
    write_megatron(tmp_path / "pile_text_document", documents, dtype)
    expected = list(samples(documents, 8))
    source = open_source(f"megatron:{tmp_path}", row_length=9)
    assert len(source) == len(expected) == (sum(map(len, documents)) - 1) // 8
    assert source.rows(np.arange(len(source))).tolist() == expected
    assert source.rows(np.array([4, 2])).tolist() == [expected[4], expected[2]]
    assert source.locate(3) == f"{tmp_path}/pile_text_document.bin row 3"


@pytest.mark.slow
def test_files_of_megatron_itself_are_read_as_it_samples_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages for GPUs that it does not find
        written = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
        helpers = pytest.importorskip("megatron.core.datasets.helpers_cpp", reason="megatron-core is not compiled")
    name, random = tmp_path / "x_text_document", np.random.default_rng(1)
    builder = written.IndexedDatasetBuilder(f"{name}.bin", dtype=np.uint16)
    for size in random.integers(1, 90, 200):
        builder.add_item(torch.tensor(random.integers(0, 50_000, size)))
        builder.end_document()
    builder.finalize(f"{name}.idx")
    theirs = written.IndexedDataset(str(name))
    sizes = theirs.sequence_lengths.astype(np.int32)
    order = np.arange(len(sizes), dtype=np.int32)  # of documents that are not shuffled
    begins = helpers.build_sample_idx_int32(sizes, order, 16, 1, int(sizes.sum()), True, 1)
    expected = []
    for (first, start), (last, end) in itertools.pairwise(begins.tolist()):
        ids = np.concatenate([theirs.get(document) for document in range(first, last + 1)])
        expected.append(ids[start : len(ids) - int(sizes[last]) + end + 1].tolist())
    source = open_source(f"megatron:{tmp_path}", row_length=17)
    assert source.rows(np.arange(len(source))).tolist() == expected


def test_sequences_that_are_rows_already_stay_rows(tmp_path: Path) -> None:
    rows = np.arange(9 * 5).reshape(5, 9)
    write_megatron(tmp_path / "document", list(rows))
    assert open_source(f"megatron:{tmp_path}/document.bin", row_length=9).rows(np.arange(5)).tolist() == rows.tolist()
    shorter = open_source(f"megatron:{tmp_path}/document.bin", row_length=5)
    assert shorter.rows(np.arange(len(shorter))).tolist() == list(samples([rows.reshape(-1)], 4))


def test_each_file_is_of_the_split_in_its_name(tmp_path: Path) -> None:
    write_megatron(tmp_path / "train_text_document", [range(30)])
    write_megatron(tmp_path / "valid_text_document", [range(100, 130)])
    assert open_source(f"megatron:{tmp_path}", split="val", row_length=9).rows(np.array([1]))[0, 0] == 108
    for name, first in (("train", 0), ("val", 500)):
        (tmp_path / "nano").mkdir(exist_ok=True)
        np.arange(first, first + 30, dtype=np.uint16).tofile(tmp_path / "nano" / f"{name}.bin")
        np.arange(first, first + 30, dtype=np.uint16).tofile(tmp_path / "nano" / f"{name}.npy")
    for family in ("olmo:uint16", "nanogpt"):
        place = f"{family}:{tmp_path}/nano"
        assert open_source(place, row_length=9).rows(np.array([1])).tolist() == [list(range(9, 18))]
        assert open_source(place, split="validation", row_length=9).rows(np.array([0]))[0, 0] == 500


def test_an_index_is_not_trusted(tmp_path: Path) -> None:
    def opened(**options: Any) -> Any:
        write_megatron(tmp_path / "x", [range(20), range(9)], **options)
        return open_source(f"megatron:{tmp_path}", row_length=9)

    for options, message in (
        ({"magic": b"TNTIDX\0\0\0"}, r"x.idx: is no index of Megatron"),
        ({"version": 2}, r"x.idx: is of version 2 with ids of type 8"),
        ({"dtype": "float32"}, r"x.idx: is of version 1 with ids of type 6"),
        ({"sizes": np.array([20])}, r"x.idx: has \d+ bytes, which its 2 sequences do not fill"),
        ({"sizes": np.array([20, 8])}, r"x.bin: has 58 bytes, and x.idx tells of 56"),
        ({"sizes": np.array([30, -1])}, r"x.idx: its sequences do not lie one behind the other"),
        ({"begins": np.array([0, 38])}, r"x.idx: its sequences do not lie one behind the other"),
    ):
        with pytest.raises(DataError, match=message):
            opened(**options)
    opened()
    (tmp_path / "x.idx").rename(tmp_path / "other.idx")
    with pytest.raises(DataError, match=r"x.bin: there is no x.idx beside it.*have to be put together"):
        open_source(f"megatron:{tmp_path}", row_length=9)
    (tmp_path / "x.idx").symlink_to(tmp_path / "other.idx")
    with pytest.raises(FileError, match=r"x.idx: is a link"):
        open_source(f"megatron:{tmp_path}", row_length=9)


def test_ids_of_olmo_lie_bare_or_behind_the_header_of_numpy(tmp_path: Path) -> None:
    def rows(place: str) -> list[list[int]]:
        source = open_source(place, row_length=5)
        return source.rows(np.arange(len(source))).tolist()  # type: ignore[no-any-return]

    ids = np.arange(70_000, 70_013, dtype=np.uint32)
    ids.tofile(tmp_path / "part-0.npy")
    assert rows(f"olmo:uint32:{tmp_path}") == ids[:10].reshape(2, 5).tolist()
    with pytest.raises(DataError, match=r"part-0.npy: has no header .* olmo:uint16:PATH .* or olmo:uint32:PATH"):
        rows(f"olmo:{tmp_path}")
    for dtype in ("<u4", ">i8", "<i4"):
        np.save(tmp_path / "part-0.npy", ids.astype(dtype))
        assert rows(f"olmo:{tmp_path}") == ids[:10].reshape(2, 5).tolist()
    np.save(tmp_path / "part-0.npy", ids[:10].reshape(2, 5))
    assert rows(f"olmo:{tmp_path}") == ids[:10].reshape(2, 5).tolist()


def test_what_is_wrong_with_an_npy_file_is_said(tmp_path: Path) -> None:
    def refused(message: str, place: str = "olmo:") -> None:
        with pytest.raises(DataError, match=message):
            open_source(f"{place}{tmp_path}", row_length=5).rows(np.array([0]))

    file = tmp_path / "a.npy"
    np.save(file, np.arange(20).reshape(4, 5).T)
    refused(r"a.npy: is of shape \(5, 4\); one line of ids, or lines of 5 ids are needed")
    np.save(file, np.arange(20.0))
    refused(r"a.npy: holds float64; integers are needed")
    np.save(file, np.arange(20, dtype=np.uint16))
    refused(r"a.npy: holds uint16; uint32 are needed", "olmo:uint32:")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(r"a.npy: cannot be read as an array of numpy")
    file.write_bytes(whole + b"more")
    refused(r"a.npy: holds more than the array of shape \(20,\)")
    file.write_bytes(whole.replace(b"20", b"9" * 2).replace(b"(99,)", b"(((((("))
    refused(r"a.npy: cannot be read as an array of numpy")
    np.save(file, np.array([{"a": 1}] * 20, dtype=object), allow_pickle=True)
    refused(r"a.npy: cannot be read as an array of numpy")
    np.save(file, np.full(20, -(2**40)))
    refused(r"a.npy row 0: is cut off, or holds ids beyond 32 bits")
    file.write_bytes(b"\0" * 21)
    refused(r"a.npy: has 21 bytes, which are no whole tokens of 2 bytes", "olmo:uint16:")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(r"a.npy: is a pointer of Git LFS", "olmo:uint16:")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(r"a.npy: is a link")


def test_ids_of_nanogpt_lie_bare_or_behind_the_header_of_llm_c(tmp_path: Path) -> None:
    ids = np.arange(50_000, 50_012, dtype=np.uint16)

    def rows() -> list[list[int]]:
        source = open_source(f"nanogpt:{tmp_path}/train.bin", row_length=4)
        return source.rows(np.arange(len(source))).tolist()  # type: ignore[no-any-return]

    def with_header(magic: int, version: int, count: int, dtype: str) -> None:
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, version, count
        (tmp_path / "train.bin").write_bytes(header.tobytes() + ids.astype(dtype).tobytes())

    ids.tofile(tmp_path / "train.bin")
    assert rows() == ids.reshape(3, 4).tolist()
    with_header(20240520, 1, 12, "<u2")
    assert rows() == ids.reshape(3, 4).tolist()
    with_header(20240801, 7, 12, "<u4")
    assert rows() == ids.reshape(3, 4).tolist()
    with_header(20240520, 1, 13, "<u2")
    with pytest.raises(DataError, match=r"train.bin: its header tells of 13 tokens, and 24 bytes follow"):
        rows()
    with_header(20240520, 3, 12, "<u2")
    with pytest.raises(DataError, match=r"train.bin: has the header of llm.c in version 3"):
        rows()
    write_megatron(tmp_path / "train", [range(20)])
    with pytest.raises(DataError, match=r"train.bin: has an index beside it.* megatron:PATH"):
        rows()


def test_an_id_beyond_the_vocabulary_is_found_in_its_row(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", [range(90, 130)])
    source = open_source(f"megatron:{tmp_path}", row_length=9)
    batches = Batches(source, rows_per_step=1, seed=0, shuffle=False, length=8, vocab_size=100)
    assert batches(0)[0].shape == (1, 9)
    with pytest.raises(DataError, match=r"a.bin row 1, token 2: token id 100 is outside of the vocabulary of 100"):
        batches(1)
