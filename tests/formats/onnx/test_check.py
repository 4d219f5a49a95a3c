"""A graph is the writer's, node by node; data lies in the folder's own file."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lfmq.converter.run.open_build import open_build
from lfmq.formats.build import Assets
from lfmq.formats.onnx import container as onnx_format
from lfmq.formats.onnx.reader import DATA_FILE, MODEL_FILE
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.quant.types import Scheme
from lfmq.tests.refusals import refusal_of

Edit = Callable[[onnx.ModelProto], Any]


@pytest.fixture
def build(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: Callable[..., Plan],
    write_random: Callable[..., Path],
) -> Path:
    storages: dict[int, Scheme | str] = {1: Scheme(8), 4: "float32"}
    experts = {
        f"model.layers.2.feed_forward.experts.{e}.{w}.weight": storage
        for e, storage in storages.items()
        for w in ("w1", "w2", "w3")
    }
    plan = make_plan(tiny_config, overrides=experts)
    return write_random(tmp_path / "a-onnx", plan, onnx_format.layout(plan, tiny_assets))


refusal = partial(refusal_of, open_build)


def change(build: Path, edit: Edit) -> None:
    model = onnx.load(build / MODEL_FILE, load_external_data=False)
    edit(model)
    (build / MODEL_FILE).write_bytes(model.SerializeToString())


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name.endswith(name))


def tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return next(t for t in model.graph.initializer if t.name.endswith(name))


def place(model: onnx.ModelProto, name: str, key: str, value: str) -> None:
    next(e for e in tensor(model, name).external_data if e.key == key).value = value


def attribute(model: onnx.ModelProto, name: str, key: str) -> onnx.AttributeProto:
    return next(a for a in node(model, name).attribute if a.name == key)


def test_a_sound_build_is_opened_and_read_by_rows(build: Path) -> None:
    format, reader = open_build(build)
    assert format == "onnx"
    for expert in range(6):
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.2.feed_forward.experts.{expert}.{part}.weight"
            np.testing.assert_array_equal(reader.read(name, 2, 5), reader.read(name)[2:5])
            assert reader.is_float(name) == (expert == 4)
    name = "model.layers.2.feed_forward.gate.weight"
    np.testing.assert_array_equal(reader.read(name, 2, 5), reader.read(name)[2:5])


def test_what_says_nothing_may_change(build: Path) -> None:
    def edit(model: onnx.ModelProto) -> None:
        model.doc_string = "mine"
        model.producer_version = "9"
        model.metadata_props.add(key="a", value="b")
        model.graph.node[3].doc_string = "mine"

    change(build, edit)
    open_build(build)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: setattr(node(m, "/router/sigmoid"), "op_type", "Softmax"), "op_type Softmax"),
        (lambda m: setattr(node(m, "/conv/gate"), "domain", "x"), "has domain x"),
        (lambda m: node(m, "/router/picked").input.__setitem__(0, "x"), "has input"),
        (lambda m: setattr(attribute(m, "layers.1.ffn_norm", "epsilon"), "f", 0.1), "epsilon"),
        (lambda m: setattr(attribute(m, "/layers.1/attention", "num_heads"), "i", 8), "num_heads"),
        (
            lambda m: node(m, "/layers.1/attention").attribute.append(
                helper.make_attribute("softcap", 5.0)
            ),
            "attribute softcap",
        ),
        (lambda m: node(m, "/layers.1/attention").attribute.pop(), "has attribute"),
        (lambda m: m.graph.node.pop(), "nodes, expected"),
        (lambda m: m.graph.node.append(m.graph.node[0]), "nodes, expected"),
        (lambda m: m.graph.node.insert(3, m.graph.node[0]), "node 3"),
        (lambda m: m.functions.add(name="Add"), "has functions"),
        (lambda m: m.training_info.add(), "has training_info"),
        (lambda m: m.graph.sparse_initializer.add(), "sparse_initializer"),
        (lambda m: setattr(m.opset_import[0], "version", 21), "operator sets"),
        (lambda m: m.opset_import.add(domain="x", version=1), "operator sets"),
        (lambda m: m.graph.output.pop(), "has the outputs"),
        (lambda m: m.graph.input[0].type.tensor_type.shape.dim.pop(), "another type or shape"),
        (lambda m: setattr(m, "producer_name", "pytorch"), "made by 'pytorch'"),
        (
            lambda m: m.graph.initializer.append(
                TensorProto(name="x", data_type=1, dims=[1], float_data=[1])
            ),
            "a tensor 'x' that the model does not have|a tensor x that the model does not have",
        ),
        (lambda m: m.graph.initializer.remove(tensor(m, "expert_bias")), "expert_bias"),
        (lambda m: tensor(m, "/int64/2").ClearField("raw_data"), "/int64/2"),
        (lambda m: tensor(m, "gate.weight.transposed").dims.reverse(), "expected type 1"),
    ],
)
def test_a_graph_that_is_not_the_writers(build: Path, edit: Edit, message: str) -> None:
    change(build, edit)
    found = refusal(build)
    assert any(part in found for part in message.split("|")), found


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("location", "../x", "lies in '../x'"),
        ("location", "/etc/passwd", "lies in '/etc/passwd'"),
        ("location", "config.json", "lies in 'config.json'"),
        ("location", "", "lies in ''"),
        ("offset", "-4096", "expected offset and length"),
        ("offset", "x", "expected offset and length"),
        ("offset", "9" * 40, "expected offset and length"),
        ("offset", "999999999999", "the file is truncated"),
        ("offset", "0", "expected type"),
        ("length", "4", "its shape takes"),
    ],
)
def test_data_that_lies_elsewhere(build: Path, key: str, value: str, message: str) -> None:
    (build.parent / "x").write_bytes(bytes(100))
    change(build, lambda m: place(m, "layers.2.feed_forward.gate.weight.transposed", key, value))
    assert message in refusal(build)


def test_data_that_is_a_link_out_of_the_folder(build: Path) -> None:
    (build / DATA_FILE).rename(build.parent / "x")
    (build / DATA_FILE).symlink_to(os.path.join("..", "x"))
    assert "a link to a file outside of the build" in refusal(build)


def test_rotary_tables_of_another_base(build: Path) -> None:
    path = build / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"]["rope_theta"] = 1e4
    path.write_text(json.dumps(config))
    assert "not those of the config's rope_theta" in refusal(build)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d["model"]["decoder"].update(filename="../x"), "decoder.filename is '../x'"),
        (lambda d: d["model"]["decoder"].update(head_size=16), "decoder.head_size is 16"),
        (lambda d: d["model"]["decoder"]["inputs"].pop("past_conv_names"), "decoder.inputs"),
        (
            lambda d: d["model"]["decoder"]["session_options"].update(custom_ops_library="x.so"),
            "session_options",
        ),
        (lambda d: d.update(model=[]), "model.type is None"),
    ],
)
def test_what_genai_is_told(build: Path, edit: Callable[[Any], Any], message: str) -> None:
    path = build / "genai_config.json"
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    assert message in refusal(build)


def test_a_graph_without_a_data_file_of_its_own(build: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(build, other)
    (other / MODEL_FILE).write_bytes(bytes(2**26 + 1))
    assert "expected a graph whose weights lie in model.onnx_data" in refusal(other)
