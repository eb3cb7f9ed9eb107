"""Headers as ggml's package writes them, and headers that nobody should write."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.errors import ModelUnreadable
from penstock.gguf import is_gguf
from penstock.gguf.reader import GGUFFile, read_gguf

HEADER = struct.pack("<IIQQ", 0x46554747, 3, 0, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint32("a.uint32", 7)
    writer.add_int64("an.int64", -(2**40))
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße")
    writer.add_array("strings", ["", "ä", "b"])
    writer.add_array("floats", [1.0, 2.5])
    writer.add_array("bools", [True, False])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("y", np.arange(64, dtype=np.float16).reshape(1, 2, 32))
    writer.add_tensor("z", np.zeros((3, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def test_values_and_tensors(file: Path) -> None:
    found = GGUFFile(file)
    assert found.metadata == {
        "general.architecture": "llama",
        "a.uint32": 7,
        "an.int64": -(2**40),
        "a.float": 0.5,
        "a.bool": True,
        "a.string": "Grüße",
        "strings": ["", "ä", "b"],
        "floats": [1.0, 2.5],
        "bools": [True, False],
    }
    assert {name: info.shape for name, info in found.tensors.items()} == {"x": (2, 3), "y": (1, 2, 32), "z": (3, 32)}
    assert np.array_equal(found.tensor("x"), np.arange(6).reshape(2, 3))
    assert np.array_equal(found.tensor("x", 1), [3, 4, 5])
    assert np.array_equal(found.tensor("y"), np.arange(64).reshape(1, 2, 32))
    assert not found.tensor("z").any()


def test_a_file_is_read_once_until_it_changes(file: Path) -> None:
    assert read_gguf(file) is read_gguf(file)
    before = read_gguf(file)
    file.write_bytes(file.read_bytes() + b"\0")
    assert read_gguf(file) is not before
    assert is_gguf(file)
    assert not is_gguf(file.parent)


def header(*, num_tensors: int = 0, num_values: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<IIQQ", 0x46554747, version, num_tensors, num_values) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor(name: str, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GGU", "ends at byte 3"),
        (b"PK\3\4" + HEADER[4:], "does not begin with GGUF"),
        (header(version=1), "version 1; Penstock reads 2 and 3"),
        (struct.pack(">II", 0x46554747, 3)[::-1][4:] + struct.pack(">I", 3) + HEADER[8:], "version 50331648"),
        (header(num_values=2**63), "9223372036854775808 values follow"),
        (header(num_tensors=2**40), "values follow"),
        (header(num_values=1, body=struct.pack("<Q", 2**62) + b"abcdefghi"), "values follow at byte 32"),
        (header(num_values=1, body=text("a") + struct.pack("<I", 99)), "unknown kind 99"),
        (header(num_values=1, body=text("a") + struct.pack("<IIQ", 9, 4, 2**61)), "values follow"),
        (header(num_values=1, body=text("a") + struct.pack("<IIQ", 9, 8, 2**32)), "values follow"),
        (header(num_values=1, body=text("a") + struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1)), "unknown kind 9"),
        (header(num_values=2, body=(text("a") + struct.pack("<IB", 0, 1)) * 2 + b"\0" * 20), "has 'a' twice"),
        (header(num_values=1, body=struct.pack("<Q", 2) + b"\xff\xff" + struct.pack("<IB", 0, 1)), "cannot be read"),
        (
            header(num_values=1, body=text("general.alignment") + struct.pack("<II", 4, 24)),
            "the alignment 24, which is not a power of two",
        ),
        (header(num_tensors=1, body=tensor("t", [4, 4, 1, 1, 1])), "has 5 dimensions"),
        (header(num_tensors=1, body=tensor("t", [2**32, 2**32])), "'t' takes 73786976294838206464 bytes"),
        (header(num_tensors=1, body=tensor("t", [4], offset=2**63)), "takes 16 bytes from 92"),
        (header(num_tensors=1, body=tensor("t", [1], offset=3) + b"\0" * 99), "takes 4 bytes from 67 on"),
        (header(num_tensors=1, body=tensor("t", [33], kind=2) + b"\0" * 99), "in Q4_0 has rows of 33"),
        (header(num_tensors=1, body=tensor("t", [32], kind=16) + b"\0" * 99), "of ggml's format 16"),
        (header(num_tensors=2, body=tensor("t", [0]) * 2 + b"\0" * 99), "has the tensor 't' twice"),
    ],
)
def test_broken_headers(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelUnreadable, match=message) as caught:
        GGUFFile(path)
    assert "broken.gguf" in str(caught.value)


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ModelUnreadable, match=r"gone\.gguf cannot be read"):
        read_gguf(tmp_path / "gone.gguf")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 1200), flips=st.lists(st.tuples(st.integers(0, 700), st.integers(1, 255)), max_size=4))
@example(cut=1200, flips=[])
def test_damage_is_read_or_refused(file: Path, cut: int, flips: list[tuple[int, int]]) -> None:
    data = bytearray(file.read_bytes()[:cut])
    for place, change in flips:
        if place < len(data):
            data[place] ^= change
    path = file.parent / "damaged.gguf"
    path.write_bytes(data)
    try:
        found = GGUFFile(path)
    except ModelUnreadable:
        return
    for name, info in found.tensors.items():
        assert found.tensor(name).shape == info.shape
