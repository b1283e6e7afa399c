"""Mutated copies of files, by form: values of other types and sizes in a tree that parses, and bytes that do not."""

import copy
import gzip
import hashlib
import io
import json
import os
import sqlite3
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from picolm.analyze.values import _checksum

HUGE = b"a sparse file of 6 GiB"  # stands for it, see `put`
_HUGE_BYTES = 6 << 30
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij")
)
WHOLE = [
    b"", b" ", b"\n", b"null", b"[]", b"{}", b"0", b"-1", b'"x"', b"true", b"[null]", b"{}\n{}\n",
    b"[" * 100_000, b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000, b"- " * 50_000, b"9" * 5000, b"1e999", b"NaN",
    b"\xef\xbb\xbf{}", b"\x00" * 4096, b"\xff\xfe{\x00}\x00",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n", _BOMB.encode(),
    b"!!python/object/apply:os.getcwd []", b"%YAML 9.9\n---\n", b"&a [*a]",
    b"<!doctype html><title>502</title>", b"PK\x03\x04",
    b"\x80\x04\x95\x00", b"\x1f\x8b\x08\x00", b"PAR1PAR1", b"SQLite format 3\x00", b"\xff" * 8,
    b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", HUGE,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**9, 10**18, 10**30, -(10**30), 2**63, 0.5, -0.5, -0.0,
    1e308, 5e-324, float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "all", "é🦙", "\x00", "\ud800", "\n", "a" * 100_000, "..", "../..",
    "/", "/etc/passwd", ".", "~", "%s{}", "0",
    "1e999", "9" * 5000, "last 3", "random:99999999999999999999", "no_such:thing", "os:getcwd",
    "pico_decoder", [], {}, [[]], [{}], [None],
    [[["x"]]], {"": ""}, {"x": {"y": {}}}, [1, "x", 2.5], ["x", "x"], [0] * 1000, [[0] * 50] * 50,
]  # fmt: skip
_TYPES: list[Callable[[pa.Array], pa.Array]] = [
    lambda column: column.cast(pa.string()) if pa.types.is_primitive(column.type) else pa.array(["x"] * len(column)),
    lambda column: pa.array([None] * len(column), column.type),
    lambda column: pa.array([None] * len(column)),
    lambda column: pa.array([[-1]] * len(column), pa.list_(pa.int32())),
    lambda column: pa.array([[2**31 - 1] * 17] * len(column), pa.list_(pa.int64())),
    lambda column: pa.array([[2**62] * 17] * len(column), pa.list_(pa.int64())),
    lambda column: pa.array([[0.5] * 17] * len(column)),
    lambda column: pa.array([[]] * len(column), pa.list_(pa.int32())),
    lambda column: pa.array([[1] * (index % 20) for index in range(len(column))], pa.list_(pa.int32())),
    lambda column: pa.array([[None] * 17] * len(column), pa.list_(pa.int32())),
    lambda column: pa.array([[299] * 17] * len(column), pa.list_(pa.uint16())),
    lambda column: pa.array([{"x": 1}] * len(column)),
    lambda column: pa.array([b"\xff\xfe"] * len(column)),
    lambda column: pa.array([float("nan")] * len(column)),
    lambda column: pa.array([float("inf")] * len(column)),
    lambda column: pa.array([-1] * len(column)),
    lambda column: pa.array([2**62] * len(column)),
    lambda column: pa.array([True] * len(column)),
    lambda column: pa.array(["\x1b[2J=1+1"] * len(column)),
    lambda column: pa.array([0] * len(column), pa.timestamp("s")),
]
_SQL = [
    "UPDATE kept SET value = 'text'", "UPDATE kept SET value = x'ff'", "UPDATE kept SET value = NULL",
    "UPDATE kept SET value = 9e999", "UPDATE kept SET reason = 3, value = NULL", "UPDATE kept SET forced = 'x'",
    "UPDATE kept SET reason = x'ff', value = NULL", "UPDATE kept SET chance = 'x', chance_std = x'00'",
    "UPDATE kept SET checksum = NULL", "DROP TABLE kept", "ALTER TABLE kept RENAME COLUMN value TO other",
    "DELETE FROM kept", "DROP TABLE kept; CREATE VIEW kept AS SELECT 1 AS key, 2 AS value, 3 AS reason",
    "CREATE TRIGGER t AFTER INSERT ON kept BEGIN SELECT RAISE(ABORT, 'no'); END", "PRAGMA user_version = 99",
    "DROP TABLE kept; CREATE TABLE kept (key TEXT PRIMARY KEY, value REAL, reason TEXT CHECK (0))",
    "PRAGMA application_id = 7",
]  # fmt: skip


def damaged(name: str, data: bytes, others: list[bytes]) -> st.SearchStrategy[bytes]:
    """Mutations of the content of a file. others: contents of other files, put into its place."""
    anyhow = st.one_of(_damaged_bytes(data), st.sampled_from(WHOLE), st.sampled_from(others))
    suffix = Path(name).suffix
    if suffix in (".json", ".jsonl", ".yaml", ".lock"):
        structured = st.one_of(_trees(suffix, data), _texts(data))
    elif suffix == ".gz":
        lines = _trees(".jsonl", gzip.decompress(data))
        structured = st.one_of(lines.map(gzip.compress), st.just(_zip_bomb()))
    elif suffix == ".safetensors":
        structured = _headers(data)
    elif suffix == ".parquet":
        structured = _tables(data)
    elif suffix == ".sqlite":
        structured = st.builds(_executed, st.just(data), st.sampled_from(_SQL), st.booleans())
    else:
        structured = _texts(data)
    return st.one_of(structured, structured, anyhow)


def put(folder: Path, name: str, data: bytes, seal: bool) -> None:
    """Replace a file. seal: also what the manifest beside it says of it, as one would who forges it."""
    path = folder / name
    path.unlink()
    if data == HUGE:
        with path.open("wb") as file:
            file.truncate(_HUGE_BYTES)
        return
    path.write_bytes(data)
    if seal:
        for above in path.parents[: len(Path(name).parts) - 1]:
            if (above / "manifest.json").exists():
                _seal(above, path)


def _seal(folder: Path, path: Path) -> None:
    manifest, name = folder / "manifest.json", path.relative_to(folder).as_posix()
    manifest.write_bytes(sealed_with(manifest.read_bytes(), name, path.read_bytes()))


def sealed_with(manifest: bytes, name: str, data: bytes) -> bytes:
    """A manifest, of a step or of rows, that says of the file `name` what is true of `data`; unchanged where it cannot."""
    try:
        content = json.loads(manifest)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "splits" in content:
            for entry in [content["tokenizer"], *(shard for split in content["splits"].values() for shard in split)]:
                if entry["file"] == name:
                    entry |= record if "bytes" in entry else {"sha256": record["sha256"]}
            return json.dumps(content).encode()
        if name != "manifest.json":
            content["files"][name] = record
            _seal_tensors(content, name, data)
        return sealed(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error):
        return manifest


def sealed(content: dict[str, Any]) -> bytes:
    """The manifest of a step with its own digest."""
    content.pop("digest", None)
    content["digest"] = hashlib.sha256(_canonical(content)).hexdigest()
    return _canonical(content)


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _seal_tensors(content: dict[str, Any], name: str, data: bytes) -> None:
    if not name.endswith(".safetensors"):
        return
    header, body = _split(data)
    for record in content["tensors"].values():
        if record["file"] == name and record["key"] in header:
            entry = header[record["key"]]
            first, last = entry["data_offsets"]
            record |= {"shape": entry["shape"], "sha256": hashlib.sha256(body[first:last]).hexdigest()}


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


@st.composite
def _damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        near_an_end = draw(st.integers(0, 2))
        size = len(changed)
        low, high = ((0, size), (0, min(256, size)), (max(0, size - 256), size))[near_an_end]
        at = draw(st.integers(low, max(low, high - 1)))
        match draw(st.sampled_from(["flip", "byte", "cut", "lose", "insert", "double"])):
            case "flip" if at < size:
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if at < size:
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at:]
            case "lose":
                del changed[at : at + draw(st.integers(1, 64))]
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=16))
            case _:
                changed += changed[at:]
    return bytes(changed)


@st.composite
def _texts(draw: st.DrawFn, data: bytes) -> bytes:
    """Lines lost, doubled and swapped; words put in anywhere."""
    lines = data.split(b"\n")
    for _ in range(draw(st.integers(1, 3))):
        at, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        word = draw(st.one_of(st.binary(max_size=12), st.sampled_from(WHOLE[1:28])))
        match draw(st.sampled_from(["lose", "double", "swap", "insert", "value"])):
            case "lose" if len(lines) > 1:
                del lines[at]
            case "double":
                lines.insert(other, lines[at])
            case "swap":
                lines[at], lines[other] = lines[other], lines[at]
            case "value" if b":" in lines[at]:
                lines[at] = lines[at].partition(b":")[0] + b": " + word
            case _:
                place = draw(st.integers(0, len(lines[at])))
                lines[at] = lines[at][:place] + word + lines[at][place:]
    return b"\n".join(lines)


@st.composite
def _trees(draw: st.DrawFn, suffix: str, data: bytes) -> bytes:
    if suffix == ".yaml":
        tree = draw(changed_trees(yaml.safe_load(data)))
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    if suffix != ".jsonl":
        return json.dumps(draw(changed_trees(json.loads(data)))).encode()
    lines = data.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = json.dumps(draw(changed_trees(json.loads(lines[at])))).encode()
    return b"\n".join(lines) + b"\n"


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All that there is in a tree, its root excepted."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in entries for found in [(*path, key), *places(value, (*path, key))]]


@st.composite
def changed_trees(draw: st.DrawFn, tree: Any) -> Any:
    """Values of other types, keys renamed, lost and added, values nested and repeated."""
    tree = copy.deepcopy(tree)
    values = st.one_of(
        st.sampled_from(VALUES), st.integers(1, 300).map(_nested), st.text(max_size=8), st.integers(), st.floats()
    )
    for _ in range(draw(st.integers(1, 3))):
        paths = places(tree)
        if not paths:
            return draw(values)
        path = draw(st.sampled_from(paths))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        value = copy.deepcopy(draw(values))
        match draw(st.sampled_from(["value", "value", "value", "key", "lose", "nest", "add", "repeat", "swap"])):
            case "key" if isinstance(parent, dict):
                parent[draw(st.one_of(st.text(max_size=8), st.sampled_from(["..", "/", "", "0", "x" * 5000])))] = (
                    parent.pop(path[-1])
                )
            case "lose":
                del parent[path[-1]]
            case "nest":
                parent[path[-1]] = {str(path[-1]): parent[path[-1]]}
            case "add" if isinstance(parent, dict):
                parent[draw(st.text(max_size=8))] = value
            case "repeat" if isinstance(parent[path[-1]], list):
                parent[path[-1]] = parent[path[-1]] * 50
            case "swap":
                parent[path[-1]] = copy.deepcopy(_at(tree, draw(st.sampled_from(paths))))
            case _:
                parent[path[-1]] = value
    return tree


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def _nested(depth: int) -> Any:
    value: Any = "x"
    for level in range(depth):
        value = [value] if level % 2 else {"k": value}
    return value


@st.composite
def _headers(draw: st.DrawFn, data: bytes) -> bytes:
    """The JSON header of a safetensors file changed: shapes, types, offsets, names."""
    header, body = _split(data)
    text = json.dumps(draw(changed_trees(header))).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def _tables(draw: st.DrawFn, data: bytes) -> bytes:
    """Columns of other types, lost, renamed, doubled; rows lost or repeated; other layouts of the same rows."""
    table = pq.read_table(io.BytesIO(data))
    for _ in range(draw(st.integers(1, 2))):
        if not table.num_columns:
            break
        at = draw(st.integers(0, table.num_columns - 1))
        column = table.column(at).combine_chunks()
        match draw(st.sampled_from(["type", "type", "type", "lose", "rename", "double", "rows", "none", "more"])):
            case "type":
                make = draw(st.sampled_from(_TYPES))
                table = table.set_column(at, table.column_names[at], make(column))
            case "lose":
                table = table.remove_column(at)
            case "rename":
                names = table.column_names
                names[at] = draw(st.sampled_from(["", "x", "input_ids", "value", "é\x00"]))
                table = table.rename_columns(names)
            case "double":
                table = table.append_column(draw(st.sampled_from([table.column_names[at], "new"])), table.column(at))
            case "rows":
                table = table.slice(draw(st.integers(0, max(0, table.num_rows - 1))))
            case "none":
                table = table.slice(0, 0)
            case _:
                table = pa.concat_tables([table] * draw(st.integers(2, 30)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=draw(st.sampled_from([1, 7, 1 << 20])),
                   compression=draw(st.sampled_from(["none", "snappy", "zstd"])))  # fmt: skip
    return buffer.getvalue()


def _executed(data: bytes, statement: str, resealed: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x")
        Path(path).write_bytes(data)
        database = sqlite3.connect(path)
        database.executescript(statement)
        if resealed and statement.startswith("UPDATE") and "checksum" not in statement:
            for key, *value, _ in database.execute("SELECT * FROM kept").fetchall():
                database.execute("UPDATE kept SET checksum = ? WHERE key = ?", (_checksum(key, value), key))
            database.commit()
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        return Path(path).read_bytes()


@cache
def _zip_bomb() -> bytes:
    """Some 4 GiB in one line."""
    return gzip.compress(b"x" * (16 << 20)) * 256
