"""Headers that lie: an error that names the file, never another exception or a large read."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lfmq.formats.huggingface.safetensors_file import (
    part_of,
    read_floats,
    read_header,
    read_tensor,
)
from lfmq.quant.errors import CheckpointError

JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ROW = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}


def refusal(path):
    try:
        read_header(path)
    except CheckpointError as error:
        return str(error)
    return None


def write(path, header, body=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("headers") / "model.safetensors"


@settings(max_examples=200)
@given(JUNK, st.sampled_from(["dtype", "shape", "data_offsets", None]))
def test_any_header_is_read_or_refused_by_name(path, junk, key):
    document = {"a": junk if key is None else ROW | {key: junk}}
    message = refusal(write(path, document))
    assert message is None or message.startswith(str(path))


@settings(max_examples=200)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_by_name(path, content):
    path.write_bytes(content)
    message = refusal(path)
    assert message is None or message.startswith(str(path))


@pytest.mark.parametrize(
    "row",
    [
        {"shape": [2.0, 1]},
        {"shape": [True, 2]},
        {"shape": ["2", "1"]},
        {"shape": "21"},
        {"shape": [1] * 9},
        {"shape": [2**62, 0]},
        {"shape": [-2, -1]},
        {"data_offsets": [0.0, 8]},
        {"data_offsets": [0, float("inf")]},
        {"data_offsets": [0]},
        {"data_offsets": [0, 8, 8]},
        {"data_offsets": [0, 10**30]},
        {"data_offsets": [8, 0]},
        {"dtype": None},
    ],
    ids=str,
)
def test_numbers_are_integers_and_few(tmp_path, row):
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_tensor(read_header(write(tmp_path / "model.safetensors", {"a": ROW | row}))["a"])


@pytest.mark.parametrize(
    ("second", "message"),
    [([8, 16], "truncated"), ([4, 12], "starts at"), ([12, 20], "starts at"), ([0, 8], "starts")],
)
def test_tensors_cover_the_file_once(tmp_path, second, message):
    header = {"a": ROW, "b": ROW | {"data_offsets": second}}
    with pytest.raises(CheckpointError, match=message):
        read_header(write(tmp_path / "model.safetensors", header, bytes(12)))


def test_what_safetensors_writes_is_read(tmp_path):
    rng = np.random.default_rng(4)
    tensors = {
        "half": rng.standard_normal((3, 5)).astype(np.float16),
        "brain": rng.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "single": rng.standard_normal(7).astype(np.float32),
        "codes": rng.integers(0, 2**32, (4, 2), np.uint32),
        "none": np.zeros((0, 3), np.float32),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(read_tensor(found[name]), values)
    np.testing.assert_array_equal(read_tensor(part_of(found["brain"], 1)), tensors["brain"][1])
    floats = read_floats(found["brain"])
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(floats, tensors["brain"].astype(np.float32))


def test_a_file_that_goes_away_is_an_error(tmp_path):
    path = write(tmp_path / "model.safetensors", {"a": ROW})
    tensor = read_header(path)["a"]
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensor(tensor)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(path)
