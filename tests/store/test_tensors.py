"""Our safetensors files are safetensors files: the library reads what we write, and we read what it writes."""

import hashlib
import json
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from picolm.errors import StoreError
from picolm.store.files import digest_file
from picolm.store.tensors import DTYPES, read_header, read_tensor, write_tensors

base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
TENSORS = {
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 7),
    "bfloat16": base.bfloat16(),
    "transposed": base.T,
    "every second": base[:, ::2],
    "expanded": torch.tensor([1.0]).expand(3, 5),
    "shared": base,
    "shared again": base.view(-1)[3:9],
    "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    "trained": torch.nn.Parameter(torch.ones(2)),
    "schichten.2.größe": torch.tensor([True, False]),
    "int8": torch.tensor([-1], dtype=torch.int8),
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal element types, shapes and bits (NaN, -0.0)."""
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[key], TENSORS[key]) for key in TENSORS)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    separate = {key: tensor.detach().clone().contiguous() for key, tensor in TENSORS.items()}
    safetensors.torch.save_file(separate, tmp_path / "x.safetensors")
    places = read_header(tmp_path / "x.safetensors")
    assert all(same(read_tensor(tmp_path / "x.safetensors", places[key]), separate[key]) for key in separate)


@pytest.mark.parametrize("name", DTYPES)
def test_every_element_type_makes_the_round_trip(tmp_path: Path, name: str) -> None:
    tensor = torch.randint(0, 2, (3, 8 * DTYPES[name][1]), dtype=torch.uint8).view(getattr(torch, name))
    write_tensors(tmp_path / "x.safetensors", {"x": tensor})
    assert same(read_tensor(tmp_path / "x.safetensors", read_header(tmp_path / "x.safetensors")["x"]), tensor)
    assert same(safetensors.torch.load_file(tmp_path / "x.safetensors")["x"], tensor)


def test_digests_made_while_writing_are_those_of_the_bytes_on_disk(tmp_path: Path) -> None:
    record, digests = write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert record == digest_file(tmp_path / "x.safetensors")
    assert digests["shared"] == hashlib.sha256(base.numpy().tobytes()).hexdigest()
    assert digests["every second"] == hashlib.sha256(np.ascontiguousarray(base.numpy()[:, ::2]).tobytes()).hexdigest()


def test_the_order_of_a_mapping_changes_no_byte(tmp_path: Path) -> None:
    one, _ = write_tensors(tmp_path / "one.safetensors", TENSORS)
    other, _ = write_tensors(tmp_path / "other.safetensors", dict(reversed(TENSORS.items())))
    assert one == other


def test_every_tensor_is_aligned_to_its_elements(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    assert all(place.start % DTYPES[place.dtype][1] == 0 for place in read_header(tmp_path / "x.safetensors").values())


def test_a_tensor_that_is_asked_for_is_all_that_is_read(tmp_path: Path) -> None:
    """The file is made 64 GB large by a hole between the header and the end: only a lazy reader can serve from it."""
    write_tensors(tmp_path / "x.safetensors", {"small": torch.ones(3)})
    whole = (tmp_path / "x.safetensors").read_bytes()
    header = {"big": {"dtype": "U8", "shape": [2**36], "data_offsets": [0, 2**36]}}
    header["small"] = {"dtype": "F32", "shape": [3], "data_offsets": [2**36, 2**36 + 12]}
    text = json.dumps(header).encode()
    with open(tmp_path / "sparse.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(2**36, 1)
        file.write(whole[-12:])
    places = read_header(tmp_path / "sparse.safetensors")
    assert torch.equal(read_tensor(tmp_path / "sparse.safetensors", places["small"]), torch.ones(3))


@pytest.mark.parametrize("keep", [0, 7, 8, 40, -1])
def test_a_cut_file_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(StoreError, match=r"x\.safetensors: damaged, or not a safetensors file"):
        read_header(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), declared=st.integers(0, 300))
def test_no_bytes_make_the_reader_of_headers_fail_otherwise(tmp_path: Path, data: bytes, declared: int) -> None:
    path = tmp_path / "x.safetensors"
    for content in (data, struct.pack("<Q", declared) + b'{"x":' + data + b"}", struct.pack("<Q", len(data)) + data):
        path.write_bytes(content)
        with suppress(StoreError):
            read_header(path)


@pytest.mark.slow
def test_a_file_larger_than_the_memory_that_may_be_mapped_is_a_message(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as sparse:
        sparse.truncate(6 << 30)
    script = f"""
import resource
from pathlib import Path
import numpy, safetensors
from picolm.errors import StoreError
from picolm.store.tensors import read_header
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
try:
    read_header(Path({str(file)!r}))
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "model.safetensors: damaged, or not a safetensors file (" in done.stdout, done.stderr
