"""The importance matrix: gguf-py reads ours, we read one made as llama-imatrix makes it."""

from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from lfmq.formats.gguf.imatrix import Imatrix, read_imatrix, write_imatrix
from lfmq.quant.errors import PlanError, ValidationError
from lfmq.quant.types import InputStats

DENSE = "model.layers.0.conv.in_proj.weight"
ROUTER = "model.layers.1.feed_forward.gate.weight"
EXPERTS = [f"model.layers.1.feed_forward.experts.{i}.w2.weight" for i in range(3)]
COLUMNS = {DENSE: 4, ROUTER: 4, **dict.fromkeys(EXPERTS, 2)}


def matrix() -> Imatrix:
    moments = {
        DENSE: InputStats(10, 10.0, np.arange(4.0)),
        ROUTER: InputStats(10, 10.0, np.arange(4.0) + 1),
        EXPERTS[0]: InputStats(8, 2.0, np.array([1.0, 3.0])),
        EXPERTS[1]: InputStats(0, 0.0, np.zeros(2)),
        EXPERTS[2]: InputStats(2, 1.0, np.array([0.0, 5.0])),
    }
    return Imatrix(moments, ("a.txt", "b.txt"), 5, 512)


def as_llama_imatrix_writes(path, change=lambda kv, tensors: None):
    """What save_imatrix of llama.cpp's imatrix.cpp puts into the file."""
    kv: dict[str, Any] = {"general.type": "imatrix", "imatrix.datasets": ["wiki.txt"]}
    kv |= {"imatrix.chunk_count": 3, "imatrix.chunk_size": 512}
    tensors = {
        "blk.0.shortconv.in_proj.weight.in_sum2": np.array([[1, 2, 3, 4]]),
        "blk.0.shortconv.in_proj.weight.counts": np.array([[1536]]),
        "blk.1.ffn_gate_inp.weight.in_sum2": np.array([[1, 1, 1, 1]]),
        "blk.1.ffn_gate_inp.weight.counts": np.array([[1536]]),
        "blk.1.ffn_down_exps.weight.in_sum2": np.array([[1, 2], [3, 4], [0, 0]]),
        "blk.1.ffn_down_exps.weight.counts": np.array([[100], [200], [0]]),
    }
    tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
    change(kv, tensors)
    writer = GGUFWriter(path, "")
    writer.kv_data[0].clear()
    for key, value in kv.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_foreign_reader_finds_the_layout(tmp_path):
    write_imatrix(tmp_path / "m.gguf", matrix(), 2)
    file = GGUFReader(tmp_path / "m.gguf")
    assert file.get_field("general.architecture") is None
    found = {k: v.contents() for k, v in file.fields.items() if not k.startswith("GGUF.")}
    assert found == {
        "general.type": "imatrix", "imatrix.datasets": ["a.txt", "b.txt"],
        "imatrix.chunk_count": 5, "imatrix.chunk_size": 512,
    }  # fmt: skip
    tensors = {t.name: t for t in file.tensors}
    down = tensors["blk.1.ffn_down_exps.weight.in_sum2"]
    assert (down.shape.tolist(), down.tensor_type.name) == ([2, 3], "F32")
    # tokens times the weighted mean
    np.testing.assert_array_equal(down.data, [[4, 12], [0, 0], [0, 10]])
    counts = tensors["blk.1.ffn_down_exps.weight.counts"]
    assert counts.shape.tolist() == [1, 3]
    np.testing.assert_array_equal(counts.data.ravel(), [8, 0, 2])
    assert tensors["blk.0.shortconv.in_proj.weight.counts"].shape.tolist() == [1, 1]
    assert len(tensors) == 6


def test_round_trip_keeps_means_and_bytes(tmp_path):
    given = matrix()
    for name in ("a", "b"):
        write_imatrix(tmp_path / name, given, 2)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    found = read_imatrix(tmp_path / "a", COLUMNS, 2)
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt", "b.txt"), 5, 512)
    assert set(found.inputs) == set(given.inputs)
    for name, moments in given.inputs.items():
        assert found.inputs[name].tokens == moments.tokens == found.inputs[name].mass
        np.testing.assert_allclose(found.inputs[name].mean, moments.mean, rtol=1e-6)


def test_a_file_of_llama_imatrix(tmp_path):
    as_llama_imatrix_writes(tmp_path / "m")
    found = read_imatrix(tmp_path / "m", COLUMNS, 2).inputs
    np.testing.assert_array_equal(found[DENSE].sums, [1, 2, 3, 4])
    assert found[DENSE].tokens == 1536
    np.testing.assert_array_equal(found[EXPERTS[1]].sums, [3, 4])
    assert [found[name].tokens for name in EXPERTS] == [100, 200, 0]


def test_a_weight_that_may_be_missing(tmp_path):
    def drop(kv, tensors):
        for part in ("in_sum2", "counts"):
            del tensors[f"blk.1.ffn_gate_inp.weight.{part}"]

    as_llama_imatrix_writes(tmp_path / "m", drop)
    assert ROUTER not in read_imatrix(tmp_path / "m", COLUMNS, 2, optional=[ROUTER]).inputs
    with pytest.raises(ValidationError, match=r"ffn_gate_inp.weight.in_sum2 is missing"):
        read_imatrix(tmp_path / "m", COLUMNS, 2)


def changed(name, values):
    def change(kv, tensors):
        tensors[name] = np.array(values, np.float32)

    return change


def keyed(key, value):
    def change(kv, tensors):
        kv.pop(key)
        if value is not None:
            kv[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (keyed("general.type", "model"), r"general.type is 'model', expected 'imatrix'"),
        (keyed("general.type", None), r"general.type is None, expected 'imatrix'"),
        (keyed("imatrix.chunk_size", None), r"key 'imatrix.chunk_size' is missing"),
        (
            changed("blk.0.shortconv.in_proj.weight.in_sum2", [[1, 2, 3]]),
            r"in_proj.weight.in_sum2 is float32 \[1, 3\], expected float32 \[1, 4\]",
        ),
        (
            changed("blk.1.ffn_down_exps.weight.counts", [[1], [2]]),
            r"counts is float32 \[2, 1\], expected float32 \[3, 1\]; is it of another model",
        ),
        (
            changed("blk.1.ffn_down_exps.weight.in_sum2", [[1, 2], [np.nan, 1], [0, 0]]),
            "ffn_down_exps.weight.in_sum2 holds a negative or not finite value",
        ),
        (
            changed("blk.1.ffn_down_exps.weight.counts", [[1], [-2], [0]]),
            "counts holds a negative",
        ),
    ],
)
def test_bad_files(tmp_path, change, message):
    as_llama_imatrix_writes(tmp_path / "m", change)
    with pytest.raises(ValidationError, match=message):
        read_imatrix(tmp_path / "m", COLUMNS, 2)


@pytest.mark.parametrize("length", [0, 4, 30, 200, -40])
def test_truncated(tmp_path, length):
    as_llama_imatrix_writes(tmp_path / "m")
    (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:length])
    with pytest.raises(ValidationError, match="m: "):
        read_imatrix(tmp_path / "m", COLUMNS, 2)


def test_not_there_and_not_writable(tmp_path):
    with pytest.raises(ValidationError, match="cannot be read"):
        read_imatrix(tmp_path / "none", COLUMNS, 2)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PlanError, match="cannot be written"):
        write_imatrix(tmp_path / "file" / "m", matrix(), 2)
