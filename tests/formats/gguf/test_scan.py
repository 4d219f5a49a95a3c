"""A GGUF header is believed only where the bytes are there; what it must have is llama.cpp's."""

import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lfmq.formats.gguf.scan import FieldType, read_run, scan_gguf
from lfmq.quant.errors import ValidationError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.gguf"
    writer = GGUFWriter(path, "test")
    writer.add_uint32("number", 7)
    writer.add_float32("real", 0.5)
    writer.add_bool("flag", True)
    writer.add_string("text", "grüße")
    writer.add_array("texts", ["a", "b"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_tensor("first", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("other", np.arange(64, dtype=np.float16).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_gguf_py_writes_is_read(file: Path) -> None:
    header = scan_gguf(file)
    values = {key: field.value for key, field in header.fields.items()}
    assert values == {
        "general.architecture": "test",
        "number": 7,
        "real": 0.5,
        "flag": True,
        "text": "grüße",
        "texts": ["a", "b"],
        "numbers": [1, -2, 3],
    }
    assert header.fields["numbers"].type is FieldType.INT32
    for theirs in GGUFReader(file).tensors:
        ours = header.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
        content = read_run(file, ours.offset, ours.nbytes)
        np.testing.assert_array_equal(content, theirs.data.view(np.uint8).reshape(-1))


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert content.count(old) == 1
        return content.replace(old, new)

    return change


def put(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda content: (
        content[:at] + struct.pack(form, value) + content[at + struct.calcsize(form) :]
    )


def after(word: bytes, skip: int, form: str, value: int) -> Callable[[bytes], bytes]:
    """A number that stands some bytes behind a name."""

    def change(content: bytes) -> bytes:
        assert content.count(word) == 1
        return put(content.index(word) + len(word) + skip, form, value)(content)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, "<I", 1), "starts with"),
        (put(4, "<I", 1), "version is 1, expected 2 or 3"),
        (put(4, ">I", 3), "little-endian"),
        (put(8, "<Q", 2**32), "counts 4,294,967,296 tensors"),
        (put(16, "<Q", 2**63), "keys, the file has"),
        (after(b"real", 0, "<I", 99), "has type 99"),
        (after(b"numbers", 4, "<I", 9), "list of lists"),
        (after(b"numbers", 8, "<Q", 2**31), "2,147,483,648 items of 'numbers'"),
        (after(b"text\x08\0\0\0", 0, "<Q", 2**40), "length of 1,099,511,627,776 bytes"),
        (after(b"flag", 4, "<B", 2), "neither 0 nor 1"),
        (replaced("grüße".encode(), b"gr\xff\xff\xffe!"), "not UTF-8"),
        (replaced(b"real", b"flag"), "the key 'flag' twice"),
        (replaced(b"other", b"first"), "the tensor 'first' twice"),
        (after(b"first", 0, "<I", 0), "has 0 dimensions"),
        (after(b"first", 0, "<I", 5), "has 5 dimensions"),
        (after(b"first", 4, "<Q", 0), r"has shape \(2, 0\)"),
        (after(b"first", 4, "<Q", 2**50), "has shape"),
        (after(b"first", 20, "<I", 200), "has type 200"),
        (after(b"first", 20, "<I", 2), "blocks of 32"),
        (after(b"first", 24, "<Q", 32), "is at 32, expected 0"),
        (after(b"other", 24, "<Q", 0), "is at 0, expected 32"),
        (after(b"other", 12, "<Q", 2**30), "ends at .* cut off"),
    ],
)
def test_what_cannot_be_is_one_line_at_once(
    file: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    file.write_bytes(change(file.read_bytes()))
    began = time.monotonic()
    with pytest.raises(ValidationError, match=message) as caught:
        scan_gguf(file)
    assert time.monotonic() - began < 1
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 20, 60, 200, -100])
def test_a_file_that_was_cut_off(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValidationError, match=r"a\.gguf: not a readable"):
        scan_gguf(file)


def test_a_file_that_shrinks(file: Path) -> None:
    with pytest.raises(ValidationError, match=r"a\.gguf: became shorter"):
        read_run(file, 0, 10**6)


def test_a_sparse_file_with_a_huge_list(file: Path) -> None:
    """The bytes are there, but no tokenizer has so many items."""
    content = after(b"numbers", 8, "<Q", 2**31)(file.read_bytes())
    file.write_bytes(content)
    with file.open("r+b") as opened:
        opened.truncate(2**36)
    with pytest.raises(ValidationError, match="2,147,483,648 items"):
        scan_gguf(file)
