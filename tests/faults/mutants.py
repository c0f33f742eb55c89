"""Hostile safetensors files, each with the one reason to refuse it."""

import json
import random
import struct
from collections.abc import Callable, Iterator

Mutant = tuple[str, bytes]


def build(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (JSON text, or an object) and data; `length` overrides the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def valid(seed: int = 0) -> tuple[dict, bytes]:
    """Header and data of a valid file: three tensors and metadata."""
    generator = random.Random(seed)
    header, offset = {"__metadata__": {"token": "anna", "captions": "a cat\na dog"}}, 0
    for index in range(3):
        rows, columns = generator.randint(2, 9), generator.randint(2, 9)
        header[f"block.{index}.weight"] = tensor("F32", [rows, columns], offset, offset + 4 * rows * columns)
        offset += 4 * rows * columns
    return header, generator.randbytes(offset)


def structural() -> Iterator[Mutant]:
    """One file for each kind of damage that a parser may miss."""
    one = tensor("F32", [1], 0, 4)
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    yield "empty file", b""
    yield "seven bytes", b"\x02\0\0\0\0\0\0"
    yield "header length only", struct.pack("<Q", 2)
    yield "header length 2^63", build(b"{}", length=1 << 63)
    yield "header length 2^64-1", build(b"{}", length=(1 << 64) - 1)
    yield "header length too large", build({"a": one}, b"", length=200)
    yield "header length zero", build(b"", b"1234")
    yield "header over the limit", build(b"{" + entry + b" " * (9 << 20) + b"}", b"1234")
    yield "header of a million keys", build(
        b'{"__metadata__":{' + b",".join(b'"%x":""' % n for n in range(500_000)) + b"}," + entry + b"}",
        b"1234",
    )
    yield "no tensors", build({})
    yield "metadata alone", build({"__metadata__": {"a": "b"}})
    yield "data without tensors", build({}, b"1234")
    yield "trailing byte", build({"a": one}, b"12345")
    yield "missing byte", build({"a": one}, b"123")
    yield "overlap", build({"a": one, "b": tensor("F32", [1], 2, 6)}, b"123456")
    yield "two tensors in one place", build({"a": one, "b": one}, b"1234")
    yield "hole", build({"a": one, "b": tensor("F32", [1], 8, 12)}, b"123456789abc")
    yield "offset past the end", build({"a": tensor("F32", [1], 4, 8)}, b"1234")
    yield "offsets reversed", build({"a": tensor("F32", [1], 4, 0)}, b"1234")
    yield "offset 2^64", build({"a": tensor("F32", [1], 0, 1 << 64)}, b"1234")
    yield "negative offset", build({"a": tensor("F32", [1], -4, 0)}, b"1234")
    yield "shape larger than the data", build({"a": tensor("F32", [1 << 20], 0, 4)}, b"1234")
    yield "shape that overflows", build({"a": tensor("F32", [1 << 33, 1 << 33], 0, 4)}, b"1234")
    yield "shape that overflows to zero", build({"a": tensor("F32", [1 << 32, 1 << 32, 0], 0, 0)})
    yield "negative shape", build({"a": tensor("F32", [-1], 0, 4)}, b"1234")
    yield "fractional shape", build({"a": tensor("F32", [1.5], 0, 4)}, b"1234")
    yield "shape of NaN", build(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234")
    yield "no elements", build({"a": tensor("F32", [0], 0, 0)})
    yield "rank of a million", build(
        b'{"a":{"dtype":"U8","shape":[' + b",".join([b"1"] * 1_000_000) + b'],"data_offsets":[0,1]}}', b"1"
    )
    yield "unknown dtype", build({"a": tensor("F99", [1], 0, 4)}, b"1234")
    yield "dtype that PyTorch lacks", build({"a": tensor("F6_E2M3", [4], 0, 3)}, b"123")
    yield "dtype of half bytes", build({"a": tensor("F4", [8], 0, 4)}, b"1234")
    yield "dtype that is a number", build({"a": {**one, "dtype": 3}}, b"1234")
    yield "key twice", build(b"{" + entry + b"," + entry + b"}", b"1234")
    yield "key twice, other dtype", build(b"{" + entry.replace(b"F32", b"I32") + b"," + entry + b"}", b"1234")
    escaped = entry.replace(b'"a"', rb'"\u0061"')
    yield "key twice, once escaped", build(b"{" + escaped + b"," + entry + b"}", b"1234")
    yield "metadata key twice", build(b'{"__metadata__":{"a":"1","a":"2"},' + entry + b"}", b"1234")
    yield "metadata twice", build(b'{"__metadata__":{},"__metadata__":{},' + entry + b"}", b"1234")
    yield "metadata with a number", build({"__metadata__": {"a": 3}, "a": one}, b"1234")
    yield "metadata that is a list", build({"__metadata__": [], "a": one}, b"1234")
    yield "extra field", build({"a": {**one, "extra": {}}}, b"1234")
    yield "missing field", build({"a": {"dtype": "F32", "shape": [1]}}, b"1234")
    yield "header that is a list", build(b"[" + b"]", b"")
    yield "header that is not JSON", build(b"pickle", b"1234")
    yield "text after the header", build(b"{" + entry + b"}x", b"1234")
    yield "invalid UTF-8", build(b"{" + entry.replace(b'"a"', b'"\xff"') + b"}", b"1234")
    yield "lone surrogate", build(b"{" + entry.replace(b'"a"', rb'"\ud800"') + b"}", b"1234")
    yield "nested a million deep", build(b'{"a":' + b"[" * 100_000)
    yield "boolean 7", build({"a": tensor("BOOL", [2], 0, 2)}, b"\x07\x01")
    yield "a pickle", b"\x80\x04cos\nsystem\n(S'true'\ntR."
    yield "a zip", b"PK\x03\x04" + bytes(100)


def _cut(generator: random.Random, header: dict, data: bytes) -> bytes:
    whole = build(header, data)
    return whole[: generator.randrange(len(whole))]


def _grow(generator: random.Random, header: dict, data: bytes) -> bytes:
    return build(header, data + generator.randbytes(generator.randint(1, 5000)))


def _resize(generator: random.Random, header: dict, data: bytes) -> bytes:
    length = len(json.dumps(header).encode())
    return build(header, data, length=generator.choice([n for n in range(length + 40) if n != length]))


def _shift(generator: random.Random, header: dict, data: bytes) -> bytes:
    entry = header[f"block.{generator.randrange(3)}.weight"]
    entry["data_offsets"][generator.randrange(2)] += generator.choice([-1000, -4, -1, 1, 4, 1 << 40])
    return build(header, data)


def _reshape(generator: random.Random, header: dict, data: bytes) -> bytes:
    entry = header[f"block.{generator.randrange(3)}.weight"]
    entry["shape"].append(generator.choice([0, 2, 1 << 31, 1 << 62]))
    return build(header, data)


def _retype(generator: random.Random, header: dict, data: bytes) -> bytes:
    entry = header[f"block.{generator.randrange(3)}.weight"]
    entry["dtype"] = generator.choice(["F64", "I8", "BF16", "C64", "f32"])
    return build(header, data)


def _spoil_text(generator: random.Random, header: dict, data: bytes) -> bytes:
    text = bytearray(json.dumps(header).encode())
    text[generator.randrange(len(text))] = generator.choice([0, 1, 0x80, 0xC0, 0xFF])
    return build(bytes(text), data)


RANDOM: tuple[Callable[[random.Random, dict, bytes], bytes], ...] = (
    _cut, _grow, _resize, _shift, _reshape, _retype, _spoil_text,
)


def seeded(count: int, seed: int = 2) -> Iterator[Mutant]:
    """`count` valid files with random damage, each of a kind that always makes the file invalid."""
    for index in range(count):
        generator = random.Random(f"{seed} {index}")
        damage = RANDOM[index % len(RANDOM)]
        yield f"{damage.__name__} {index}", damage(generator, *valid(index))
