"""Ways to damage a file that know its structure; each takes bytes and gives bytes."""

import json
import random
import re
import struct
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import onnx

Mutation = Callable[[random.Random, bytes], bytes]

_INTEGERS = (0, 1, 2, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**32, 2**63, -(2**63), 10**30, 10**400, 0.0, -0.5,
    1e-30, 1e308, float("nan"), float("inf"), "", "x", "-1", "\ud800", "a\nb\x1b[31m", "../x",
    "/etc/passwd", "x" * 5000, [], {}, [[]], [None], [0] * 5000, {"": 1}, {"type": "yarn"},
)  # fmt: skip
_NUMBERS = (
    "1e999",
    "-1",
    "0",
    "nan",
    "inf",
    "9" * 400,
    "9" * 5000,
    "0x" + "f" * 6000,
    "1979-05-27",
    '"x"',
    "[]",
    "{}",
)


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat, or write a number that is at a limit."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            del data[at:]
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 3:
            del data[at : at + rng.randrange(1, 200)]
        elif kind == 4:
            data[at : at + 8] = struct.pack("<Q", rng.choice(_INTEGERS))
        else:
            start = rng.randrange(len(data) + 1)
            data[at:at] = data[start : start + rng.randrange(1, 300)]
    return bytes(data)


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """Put another value, key or order in a document; sometimes damage its bytes."""
    if rng.random() < 0.25:
        return damage_bytes(rng, content)
    document = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        document = _change(rng, document)
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.05:
        text = text.replace(":", ":" + "[" * 100_000, 1)
    return text.encode("utf-8", "surrogatepass")


def _change(rng: random.Random, document: Any) -> Any:
    """The document with one value or key changed somewhere."""
    if not isinstance(document, dict | list) or not document or rng.random() < 0.02:
        return deepcopy(rng.choice(_VALUES))
    place: Any = document
    while True:  # from the root: a vocabulary has more places than all else
        inner = list(place.values()) if isinstance(place, dict) else place
        deeper = [v for v in rng.sample(inner, min(8, len(inner))) if v and _is_container(v)]
        if not deeper or rng.random() < 0.3:
            break
        place = rng.choice(deeper)
    key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
    kind = rng.randrange(6)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice((f"{key}x", "", "\ud800", str(key).upper()))] = deepcopy(place[key])
    elif kind == 2 and isinstance(place[key], int | float):
        place[key] = place[key] * rng.choice((-1, 2, 1000, 10**9)) + rng.choice((0, 1, -1))
    else:
        place[key] = deepcopy(rng.choice(_VALUES))
    return document


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def damage_mlx_config(rng: random.Random, content: bytes) -> bytes:
    """A config whose two blocks of quantization mostly stay equal."""
    damaged = damage_json(rng, content)
    try:
        document = json.loads(damaged)
        if rng.random() < 0.7:
            document["quantization_config"] = document["quantization"]
        return json.dumps(document).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        return damaged


def damage_lines(rng: random.Random, content: bytes) -> bytes:
    """One line of JSONL: its document or its bytes."""
    lines = content.split(b"\n")
    at = rng.randrange(max(1, len(lines) - 1))
    lines[at] = rng.choice((damage_json, damage_bytes))(rng, lines[at] or b"{}")
    return b"\n".join(lines)


def damage_toml(rng: random.Random, content: bytes) -> bytes:
    """Another number, word or structure; sometimes damage the bytes."""
    text = content.decode()
    kind = rng.randrange(5)
    if kind == 0:
        return damage_bytes(rng, content)
    if kind == 1:
        words = list(re.finditer(r"\d+(?:\.\d+)?|\"[^\"]*\"|\[[^\[\]]*\]", text))
        word = rng.choice(words)
        text = text[: word.start()] + rng.choice(_NUMBERS) + text[word.end() :]
    elif kind == 2:
        keys = list(re.finditer(r"^\w+(?= =)", text, re.M))
        key = rng.choice(keys)
        text = text[: key.start()] + rng.choice(("x", "bits", "size", "names")) + text[key.end() :]
    elif kind == 3:
        text += rng.choice(
            ("\nx = " + "[" * 5000, "\n[[rule]]\n", "\nbits = 4\n", "\nx.y.z = 1\n")
        )
    else:
        lines = text.splitlines()
        rng.shuffle(lines)
        text = "\n".join(lines)
    return text.encode()


def damage_text(rng: random.Random, content: bytes) -> bytes:
    """Plain text, templates, Markdown."""
    if rng.random() < 0.5:
        return damage_bytes(rng, content)
    odd = (
        b"\xff\xfe",
        b"\x00",
        b"{{",
        b"{% for i in range(10**9) %}",
        b"{{ 'x' * 10**9 }}",
        b"---\n",
    )
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(odd) + content[at:]


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header as a document or as bytes; the data stays."""
    (length,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = rng.random()
    if kind < 0.15:
        return damage_bytes(rng, content[: 8 + length]) + data
    if kind < 0.5:
        header = json.dumps(_damage_tensors(rng, json.loads(header))).encode()
    else:
        header = damage_json(rng, header)
    if rng.random() < 0.8:
        return struct.pack("<Q", len(header)) + header + data
    return struct.pack("<Q", rng.choice(_INTEGERS)) + header + data


def _damage_tensors(rng: random.Random, header: dict[str, Any]) -> dict[str, Any]:
    """A header that is a sound one, of other tensors: exchanged, renamed, retyped, turned."""
    facts = header.get("__metadata__", {})
    names = [name for name in header if name != "__metadata__"]
    one = header[a := rng.choice(names)]
    alike = [n for n in names if header[n]["shape"] == one["shape"] and n != a]
    kind = rng.randrange(6)
    if kind <= 1 and alike:
        other = header[rng.choice(alike)]
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif kind == 2:
        header[f"{a}{rng.choice(('x', '.weight', '_shape'))}"] = header.pop(a)
    elif kind == 3:
        start = one["data_offsets"][1]
        header["lm_head.weight"] = {**one, "shape": [0], "data_offsets": [start, start]}
    elif kind == 4:
        same = {"F16": "BF16", "F32": "U32", "U32": "I32", "I32": "F32", "BF16": "F16"}
        one["dtype"] = same.get(one["dtype"], "U8")
    elif "lfmq" in facts:  # of statistics: a document in the document
        facts["lfmq"] = json.dumps(_change(rng, json.loads(facts["lfmq"])))
    else:
        one["shape"] = one["shape"][::-1]
    return header


# ---- GGUF

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def damage_gguf(rng: random.Random, content: bytes) -> bytes:
    """A count, type, length, dimension, offset or value of the header, or its bytes."""
    places, end = _gguf_places(content)
    if rng.random() < 0.2:
        return damage_bytes(rng, content[:end]) + content[end:]
    if rng.random() < 0.1:
        return _exchange(rng, content)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2))):
        at, width = rng.choice(places)
        kind = rng.randrange(4)
        if kind == 0 and width == 4:
            value = rng.randrange(45)  # another type
        elif kind == 1:
            value = int.from_bytes(data[at : at + width], "little") + rng.choice((-1, 1, 31, 256))
        else:
            value = rng.choice(_INTEGERS)
        data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(data)


def _exchange(rng: random.Random, content: bytes) -> bytes:
    """Two tensors by their names, which are of one length."""
    a, b = rng.choice(
        ((b"ffn_gate", b"attn_nor"), (b"ffn_up_e", b"ffn_gat_"), (b"blk.2.ffn", b"blk.3.ffn"),
         (b"blk.0.ffn_norm", b"blk.1.ffn_norm"), (b"attn_q.w", b"attn_k.w"),
         (b"attn_q_n", b"attn_k_n"), (b"output.w", b"outpux.w"), (b"exp_probs", b"exp_prob_"))
    )  # fmt: skip
    return content.replace(a, b"\0" * len(a)).replace(b, a).replace(b"\0" * len(a), b)


def _gguf_places(content: bytes) -> tuple[list[tuple[int, int]], int]:
    """Offsets and widths of the numbers of a sound header, and its end."""
    places = [(4, 4), (8, 8), (16, 8)]
    tensors, keys = struct.unpack_from("<QQ", content, 8)
    at = 24

    def text(at: int) -> int:
        (length,) = struct.unpack_from("<Q", content, at)
        if len(places) < 500 or at % 200 == 0:
            places.append((at, 8))
            places.append((at + 8, 1))
        return int(at + 8 + length)

    def value(at: int, kind: int) -> int:
        if kind == 8:
            return text(at)
        places.append((at, _WIDTHS[kind]))
        return at + _WIDTHS[kind]

    for _ in range(keys):
        at = text(at)
        (kind,) = struct.unpack_from("<I", content, at)
        places.append((at, 4))
        at += 4
        count = 1
        if kind == 9:
            kind, count = struct.unpack_from("<IQ", content, at)
            places += [(at, 4), (at + 4, 8)]
            at += 12
        for _ in range(count):
            at = value(at, kind)
    for _ in range(tensors):
        at = text(at)
        (count,) = struct.unpack_from("<I", content, at)
        places += [(at, 4), *((at + 4 + 8 * i, 8) for i in range(count))]
        at += 4 + 8 * count
        places += [(at, 4), (at + 4, 8)]
        at += 12
    return places, at


# ---- ONNX


def damage_graph(rng: random.Random, content: bytes) -> bytes:
    """A node, attribute, wire, tensor, input or the model around them; or the bytes."""
    if rng.random() < 0.2:
        return damage_bytes(rng, content)
    model = onnx.load_model_from_string(content)
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice((_damage_node, _damage_node, _damage_tensor, _damage_tensor, _damage_model))(
            rng, model
        )
    return bytes(model.SerializeToString())


def _damage_node(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = model.graph.node
    if not len(nodes):
        return
    node = rng.choice(nodes)
    kind = rng.randrange(9)
    if kind == 0:
        node.op_type = rng.choice(
            ("Softmax", "Sigmoid", "Tanh", "Add", "Sub", "Mul", "", "If", "x")
        )
    elif kind == 1:
        node.domain = rng.choice(("", "com.microsoft", "ai.onnx.ml", "x"))
    elif kind == 2 and len(node.input):
        node.input[rng.randrange(len(node.input))] = rng.choice((*node.input, "", "logits", "x"))
    elif kind == 3 and len(node.output):
        node.output[0] = rng.choice(("", "logits", "x"))
    elif kind == 4:
        nodes.remove(node)
    elif kind == 5:
        nodes.add().CopyFrom(node)
    elif kind == 6 and len(node.attribute):
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice((0, 1, -1, 2, 3, 8, 2**31, 2**62))
        attribute.f = rng.choice((0.0, 1.0, 1e-3, float("nan")))
        attribute.type = rng.choice((attribute.type, 1, 2, 3, 4, 5, 0))
    elif kind == 7 and len(node.attribute):
        del node.attribute[rng.randrange(len(node.attribute))]
    else:
        attribute = node.attribute.add()
        attribute.name, attribute.type = rng.choice((("body", 5), ("softcap", 1), ("k", 2)))
        attribute.i, attribute.f = 3, 2.0


def _damage_tensor(rng: random.Random, model: onnx.ModelProto) -> None:
    tensors = model.graph.initializer
    if not len(tensors):
        return
    tensor, kind = rng.choice(tensors), rng.randrange(8)
    numbers = ("-1", "0", "4096", "99999999999999999999", "x", "", "1e3", "\u0661")
    if kind <= 2 and len(tensor.external_data):
        entry = rng.choice(tensor.external_data)
        if entry.key == "location":
            entry.value = rng.choice(("../x", "/etc/passwd", "", "config.json", ".", "a\x00b"))
        else:
            entry.value = rng.choice((*numbers, str(int(entry.value or 0) + 4096)))
    elif kind == 3 and len(tensor.dims):
        tensor.dims[0] = rng.choice((0, -1, 1, 2**31, 2**62, tensor.dims[0] + 1))
    elif kind == 4:
        tensor.data_type = rng.choice((0, 1, 2, 7, 10, 16, 99))
    elif kind == 5:
        tensor.name = rng.choice((tensor.name + "x", "", rng.choice(tensors).name))
    elif kind == 6:
        tensors.remove(tensor)
    else:
        tensor.raw_data = rng.randbytes(rng.choice((0, 8, 4096)))


def _damage_model(rng: random.Random, model: onnx.ModelProto) -> None:
    kind = rng.randrange(8)
    if kind == 0 and len(model.opset_import):
        rng.choice(model.opset_import).version = rng.choice((0, 1, 13, 21, 24, 2**31))
    elif kind == 1:
        model.ir_version = rng.choice((0, 3, 10, 99))
    elif kind == 2:
        model.functions.add().name = "Add"
    elif kind == 3:
        model.training_info.add()
    elif kind == 4 and len(model.graph.input):
        value = rng.choice(model.graph.input)
        value.name = rng.choice(("x", "", model.graph.input[0].name))
    elif kind == 5 and len(model.graph.output):
        del model.graph.output[rng.randrange(len(model.graph.output))]
    elif kind == 6:
        model.graph.value_info.add().name = "x"
    else:
        model.producer_name = rng.choice(("", "pytorch", "lfmq"))
