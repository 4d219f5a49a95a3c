"""compressed-tensors builds read by the library itself, by transformers, and as engines do."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lfmq.formats.build import Assets
from lfmq.formats.compressed_tensors import container as ct
from lfmq.formats.plan import (
    ModelConfig,
    Plan,
    Role,
    TensorPlan,
)
from lfmq.formats.registry import detect_format
from lfmq.formats.writing.writer import BuildWriter
from lfmq.quant.errors import UnsupportedError
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Storage,
    Weight,
    dequantize,
)

convert = pytest.importorskip("compressed_tensors.entrypoints.convert")
quantization = pytest.importorskip("compressed_tensors.quantization")
transformers = pytest.importorskip("transformers")
RandomWeight = Callable[[TensorPlan], Weight]
MakePlan = Callable[..., Plan]

LAYERS = "model.layers."
EMBEDDING = "model.embed_tokens.weight"


def write(path: Path, plan: Plan, assets: Assets, weight: RandomWeight, **options: int) -> Path:
    ct.check(plan, assets)
    with BuildWriter(path, ct.sharded_layout(plan, assets, **options)) as writer:
        for unit in plan.write_groups():
            writer.write({e.name: weight(e) for e in unit})
        writer.commit()
    return path


def floats(entry: TensorPlan, weight: RandomWeight) -> Any:
    """What the file holds: values asked for as float16 are rounded to it."""
    values = weight(entry)
    if isinstance(values, Quantized):
        return dequantize(values)
    return values.astype(np.float16).astype(np.float32) if entry.storage == "float16" else values


def block_of(plan: Plan, assets: Assets) -> dict[str, Any]:
    (file,) = (f for f in ct.layout(plan, assets).files if f.path == "config.json")
    block: dict[str, Any] = json.loads(file.constants[0][1])["quantization_config"]
    return block


# ---- plans


def uniform(make: MakePlan, g: ModelConfig) -> Plan:
    """One scheme for everything."""
    return make(g, Scheme(4), Scheme(4))


def int4(make: MakePlan, g: ModelConfig) -> Plan:
    """The recipe of that name: experts int4, shared int8."""
    return make(g)


def int8(make: MakePlan, g: ModelConfig) -> Plan:
    """Groups of 64."""
    return make(g, Scheme(8, 64), Scheme(8, 64))


def layers(make: MakePlan, g: ModelConfig) -> Plan:
    """Schemes by layer that engines load: uniform within whatever they fuse."""
    rules: dict[str, Storage] = {
        "layers.3.feed_forward.experts": Scheme(8, 64),
        "layers.0.feed_forward": Scheme(4),
        "layers.1.feed_forward.w2": Scheme(4, 64),
        "layers.1.self_attn": Scheme(4, 128),
        "layers.3.self_attn.out_proj": Scheme(4),
        "layers.2.conv.in_proj": Scheme(4, 128),
    }
    return make(g, overrides=overrides(g, make, rules))


def with_floats(make: MakePlan, g: ModelConfig) -> Plan:
    """Whole fused modules as floats."""
    rules: dict[str, Storage] = {
        "embed_tokens": "bfloat16",
        "layers.1.self_attn": "bfloat16",
        "layers.0.conv.out_proj": "float32",
        "layers.2.feed_forward.experts": "float16",
        "layers.0.feed_forward.w1": "bfloat16",
        "layers.0.feed_forward.w3": "bfloat16",
    }
    return make(g, overrides=overrides(g, make, rules))


def experts(make: MakePlan, g: ModelConfig) -> Plan:
    """Widths of single experts and projections, which the file holds and engines do not."""
    rules: dict[str, Storage] = {
        "layers.2.feed_forward.experts.1.": Scheme(8),
        "layers.2.feed_forward.experts.5.": Scheme(8),
        "layers.3.feed_forward.experts.0.w2": Scheme(8, 64),
        "layers.3.feed_forward.experts.2.w2": "bfloat16",
        "layers.1.self_attn.q_proj": Scheme(4),
        "layers.1.feed_forward.w3": Scheme(4),
    }
    return make(g, overrides=overrides(g, make, rules))


def overrides(g: ModelConfig, make: MakePlan, rules: dict[str, Storage]) -> dict[str, Storage]:
    """The storage of every weight whose name begins with a rule's words; the gate has none."""
    found = {}
    for entry in make(g).entries:
        if entry.role not in (Role.ROUTER, Role.EXPERT_BIAS, Role.NORM, Role.CONV_KERNEL):
            for prefix, storage in rules.items():
                if entry.name.startswith(f"model.{prefix}"):
                    found[entry.name] = storage
    return found


def random_plan(seed: int, make: MakePlan, g: ModelConfig) -> Plan:
    """Any storage for any weight."""
    rng = np.random.default_rng(seed)
    choices: list[Storage] = [Scheme(b, k) for b in (4, 8) for k in (32, 64)]
    choices += ["float32", "float16", "bfloat16"]
    plan = make(g)
    some = {e.name: choices[rng.integers(len(choices))] for e in plan.entries if e.scheme}
    keep = rng.random(len(some)) < rng.random()
    return make(g, overrides={n: s for (n, s), k in zip(some.items(), keep, strict=True) if not k})


LOADABLE = [uniform, int4, int8, layers, with_floats]
by_plan = pytest.mark.parametrize("make_one", [*LOADABLE, experts], ids=lambda f: f.__name__)
loadable = pytest.mark.parametrize("make_one", LOADABLE, ids=lambda f: f.__name__)
MakeOne = Callable[[MakePlan, ModelConfig], Plan]


# ---- what the library reads


def widened(folder: Path) -> Path:
    """A copy with float32 scales, in which a product with a code is exact."""
    wide = folder.with_name(f"{folder.name}-wide")
    wide.mkdir()
    tensors = load_file(folder / "model.safetensors")
    scales = {n: t.float() for n, t in tensors.items() if n.endswith(".weight_scale")}
    save_file(tensors | scales, wide / "model.safetensors", metadata={"format": "pt"})
    (wide / "config.json").write_bytes((folder / "config.json").read_bytes())
    return wide


def assert_the_library_reads(folder: Path, plan: Plan, weight: RandomWeight) -> None:
    """Its dequantizer, which multiplies in the scale's dtype, in float16 and in float32."""
    for source, rounded in ((folder, np.float16), (widened(folder), np.float32)):
        out = source.with_name(f"{source.name}-dense")
        dequantizer = convert.CompressedTensorsDequantizer(source, dtype=torch.float32)
        convert.convert_checkpoint(source, out, dequantizer, max_workers=1, device="cpu")
        dense = {n: t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}
        assert set(dense) == {e.name for e in plan.entries}
        for entry in plan.entries:
            expected = floats(entry, weight)
            if entry.scheme is not None and entry.name != EMBEDDING:
                expected = expected.astype(rounded).astype(np.float32)
            found = dense[entry.name].float().numpy()
            np.testing.assert_array_equal(found, expected, err_msg=entry.name)


@by_plan
def test_the_library_dequantizes_exactly(
    make_one: MakeOne,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    plan = make_one(make_plan, tiny_config)
    quantization.QuantizationConfig.model_validate(block_of(plan, tiny_assets))
    folder = write(tmp_path / "a", plan, tiny_assets, random_weight)
    assert_the_library_reads(folder, plan, random_weight)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(
    seed: int,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    plan = random_plan(seed, make_plan, tiny_config)
    folder = write(tmp_path / "a", plan, tiny_assets, random_weight)
    assert_the_library_reads(folder, plan, random_weight)
    assert detect_format(folder) == ct.NAME
    reader = ct.open_reader(folder)
    assert reader.config == tiny_config
    for entry in plan.entries:
        expected = floats(entry, random_weight)
        np.testing.assert_array_equal(reader.read(entry.name), expected, err_msg=entry.name)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_the_librarys(bits: int, group: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (3, 256), dtype=np.uint8)
    scheme = Scheme(bits, group)
    entry = TensorPlan("model.some.weight", codes.shape, Role.ATTENTION, 0, None, scheme)
    q = Quantized(codes, np.ones((3, 256 // group), np.float16), scheme)
    signed = torch.from_numpy(codes.astype(np.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits).numpy()
    assert ct._pack_codes(entry, q).tobytes() == theirs.tobytes()


def test_golden_bytes_of_a_row() -> None:
    entry = TensorPlan("model.some.weight", (1, 32), Role.ATTENTION, 0, None, Scheme(4))
    codes = np.arange(32, dtype=np.uint8)[None] % 16
    q = Quantized(codes, np.array([[0.5]], np.float16), Scheme(4))
    assert ct._pack_codes(entry, q).tobytes().hex() == "1032547698badcfe" * 2
    assert ct._pack_scale(entry, q).tobytes().hex() == "0038"  # 0.5
    assert ct._pack_shape(entry, q).tobytes().hex() == "0100000000000000" + "2000000000000000"
    q = Quantized(np.arange(32, dtype=np.uint8)[None], q.scale, Scheme(8))
    assert ct._pack_codes(entry, q).tobytes() == bytes(range(32))


@pytest.mark.parametrize("make_one", [uniform, int4, int8], ids=lambda f: f.__name__)
def test_transformers_computes_with_the_same_weights(
    make_one: MakeOne,
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
    transformers_model: Callable[..., Any],
) -> None:
    """A dense model with the weights read back gives the same logits, bit for bit.

    transformers makes the experts in the dtype of their scales, float16 in the file; they are cast
    to compute in float32 throughout. With the scales as float32 nothing is rounded.
    """
    plan = make_one(make_plan, tiny_config)
    folder = write(tmp_path / "a", plan, tiny_assets, random_weight)
    read = ct.open_reader(folder).read
    rounded = {e.name for e in plan.entries if e.expert is not None}

    def read_rounded(name: str) -> NDArray[np.float32]:
        values = read(name)
        return values.astype(np.float16).astype(np.float32) if name in rounded else values

    ids = torch.from_numpy(np.random.default_rng(2).integers(0, 320, (2, 24)))
    for source, expected in ((folder, read_rounded), (widened(folder), read)):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.data = parameter.data.float()
        dense = transformers_model(tiny_assets.config_json, expected)
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, dense(ids).logits)


# ---- what engines resolve, by their rules


def test_one_scheme_is_one_group(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    block = block_of(uniform(make_plan, tiny_config), tiny_assets)
    (group,) = block["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 32
    assert block["ignore"] == ["lm_head", r"re:.*feed_forward\.gate$"]


def test_patterns_of_the_plans(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    def targets(make_one: MakeOne) -> list[list[str]]:
        block = block_of(make_one(make_plan, tiny_config), tiny_assets)
        return [g["targets"] for g in block["config_groups"].values()]

    assert targets(int4) == [
        [
            r"re:.*conv\.(in_proj|out_proj)$",
            r"re:.*layers\.(0|1)\.feed_forward\..*",
            r"re:.*self_attn\.(k_proj|out_proj|q_proj|v_proj|qkv_proj)$",
        ],
        ["Linear"],
    ]
    single = targets(experts)
    assert r"re:.*layers\.2\.feed_forward\.experts\.(1|5)\..*" in single[0]
    assert [r"re:.*layers\.3\.feed_forward\.experts\.0\.(w2|down_proj)$"] in single
    assert single[-1] == ["Linear"]


def modules(g: ModelConfig, engine: str) -> Iterator[tuple[str, str, list[str]]]:
    """Path and class of what an engine asks a scheme for, and the checkpoint's modules in it."""
    vllm = engine.startswith("vllm")
    w13, w2 = ("w13", "w2") if vllm else ("gate_up_proj", "down_proj")
    probes = ("w1", "w2", "w3") if engine == "vllm" else ("gate_proj", "down_proj", "up_proj")
    for i, kind in enumerate(g.layer_types):
        layer = f"{LAYERS}{i}."
        if kind == "conv":
            conv = "short_conv" if vllm else "conv"
            for part in ("in_proj", "out_proj"):
                yield f"{layer}{conv}.{part}", "MergedColumnParallelLinear", [f"conv.{part}"]
        else:
            fused = [f"self_attn.{x}_proj" for x in "qkv"]
            yield f"{layer}self_attn.qkv_proj", "QKVParallelLinear", fused
            yield f"{layer}self_attn.out_proj", "RowParallelLinear", ["self_attn.out_proj"]
        ff = f"{layer}feed_forward."
        if i < g.num_dense_layers:
            both = ["feed_forward.w1", "feed_forward.w3"]
            yield f"{ff}{w13}", "MergedColumnParallelLinear", both
            yield f"{ff}{w2}", "RowParallelLinear", ["feed_forward.w2"]
            continue
        yield f"{ff}gate", "ReplicatedLinear", []
        everything = [
            f"feed_forward.experts.{e}.w{n}" for e in range(g.num_experts) for n in (1, 2, 3)
        ]
        for probe in probes:  # the class Linear stands for that of fused experts
            yield f"{ff}experts.0.{probe}", "Linear", everything
    yield "lm_head", "ParallelLMHead", []


def matches(name: str, targets: Iterable[str]) -> str | None:
    for target in targets:
        if re.match(target[3:], name) if target.startswith("re:") else target == name:
            return target
    return None


def scheme_in(
    engine: str, block: dict[str, Any], path: str, kind: str, shards: list[str]
) -> dict[str, Any] | None:
    """An engine's rule: ignored, else by name, else by class."""

    def renamed(targets: list[str]) -> list[str]:
        vllm = engine.startswith("vllm")
        return [t.replace(".conv.", ".short_conv.") if vllm else t for t in targets]

    ignore = renamed(block["ignore"])
    # vLLM asks for the parts of a fused module and demands that they agree; SGLang asks for it
    paths = {path}
    if engine.startswith("vllm") and path.endswith(("qkv_proj", "w13")):
        paths = {f"{path.rpartition('.')[0]}.{s.rpartition('.')[2]}" for s in shards}
    ignored = {matches(p, ignore) is not None for p in paths}
    assert len(ignored) == 1, path
    if ignored.pop():
        return None
    groups = {t: g for g in block["config_groups"].values() for t in renamed(g["targets"])}
    found = matches(path, groups) or next(t for t in groups if t.lower() in kind.lower())
    weights: dict[str, Any] = groups[found]["weights"]
    return weights


@pytest.mark.parametrize("engine", ["vllm", "vllm-old", "sglang"])
@loadable
def test_engines_find_the_plans_scheme(
    make_one: MakeOne,
    engine: str,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    plan = make_one(make_plan, tiny_config)
    assert not [w for w in ct.engine_warnings(plan) if "vLLM" in w]
    storage = {e.name: e.storage for e in plan.entries}
    block = block_of(plan, tiny_assets)
    for path, kind, shards in modules(tiny_config, engine):
        layer = ".".join(path.split(".")[:3])
        (expected,) = {storage[f"{layer}.{s}.weight"] for s in shards} or {"float32"}
        found = scheme_in(engine, block, path, kind, shards)
        if isinstance(expected, Scheme):
            assert found is not None, path
            assert Scheme(found["num_bits"], found["group_size"]) == expected, path
        else:
            assert found is None, path


def test_the_engine_check_sees_a_wrong_pattern(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    block = block_of(int4(make_plan, tiny_config), tiny_assets)
    block["config_groups"]["group_0"]["targets"][0] = r"re:.*\.conv\.(in|out)_proj$"
    path, shards = "model.layers.0.short_conv.in_proj", ["conv.in_proj"]
    found = scheme_in("vllm", block, path, "MergedColumnParallelLinear", shards)
    assert found is not None
    assert found["num_bits"] == 4


def test_warnings(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    assert ct.engine_warnings(int4(make_plan, tiny_config)) == ()
    (line,) = ct.engine_warnings(layers(make_plan, tiny_config))
    assert "int4 g32, int8 g64" in line
    assert "transformers" in line
    plan = experts(make_plan, tiny_config)
    found = ct.engine_warnings(plan)
    assert [w.partition(" are stored")[0] for w in found] == [
        "layer 2: the experts",
        "layer 3: the experts",
        "layer 1: q_proj, k_proj and v_proj",
        "layer 1: the dense w1 and w3",
        "experts",
    ]
    card = card_of(plan, tiny_assets)
    assert all(f"- {line}\n" in card for line in found)
    (line,) = ct.engine_warnings(make_plan(tiny_config, experts="float32"))
    assert "all experts are stored as float32; transformers (to 5.23)" in line


# ---- the folder


def card_of(plan: Plan, assets: Assets) -> str:
    (file,) = (f for f in ct.layout(plan, assets).files if f.path == "README.md")
    return file.constants[0][1].decode()


def test_card(tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan) -> None:
    card = card_of(make_plan(tiny_config), tiny_assets)
    assert "| embedding | float32, on the grid of int8 g32 | 1 | 40,960 | 32.00 |" in card
    # 4 bits, a float16 scale for each 32, and 16 bytes of shape for each 8192 weights
    assert "| expert_down | int4 g32 | 12 | 98,304 | 4.52 |" in card
    assert "vllm serve FOLDER" in card
    assert card.endswith("No weight of this build is stored in a way that an engine refuses.\n")


def test_the_safetensors_library_reads_names_shapes_and_dtypes(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    folder = write(tmp_path / "a", make_plan(tiny_config), tiny_assets, random_weight)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {
            k: (file.get_slice(k).get_dtype(), file.get_slice(k).get_shape())
            for k in file.offset_keys()
        }
        shape = file.get_tensor(f"{LAYERS}2.feed_forward.experts.5.w2.weight_shape")
    assert shape.tolist() == [128, 64]
    expert = f"{LAYERS}2.feed_forward.experts.5.w2.weight"
    assert found[f"{expert}_packed"] == ("I32", [128, 8])
    assert found[f"{expert}_scale"] == ("F16", [128, 2])
    assert found[f"{expert}_shape"] == ("I64", [2])
    assert found[f"{LAYERS}0.conv.in_proj.weight_packed"] == ("I32", [384, 32])
    assert found[f"{LAYERS}0.conv.conv.weight"] == ("F32", [128, 1, 3])
    assert found[f"{LAYERS}2.feed_forward.gate.weight"] == ("F32", [6, 128])
    assert found[f"{LAYERS}2.feed_forward.expert_bias"] == ("F32", [6])
    assert found["model.embedding_norm.weight"] == ("F32", [128])
    assert found[EMBEDDING] == ("F32", [320, 128])
    assert not any(f"{name}.weight" in found for name in (f"{LAYERS}0.conv.in_proj", "lm_head"))


def test_shards_hold_the_same_model(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    plan = layers(make_plan, tiny_config)
    folder = write(tmp_path / "a", plan, tiny_assets, random_weight, shard_nbytes=50_000)
    files = sorted(p.name for p in folder.glob("model*.safetensors"))
    assert len(files) > 3
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        with safe_open(folder / file, "np") as shard:
            assert all(weight_map[key] == file for key in shard.offset_keys())
    reader = ct.open_reader(folder)
    for entry in plan.entries:
        np.testing.assert_array_equal(reader.read(entry.name), floats(entry, random_weight))


def test_the_same_plan_gives_the_same_bytes(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
    random_weight: RandomWeight,
) -> None:
    one, two = (
        write(tmp_path / name, layers(make_plan, tiny_config), tiny_assets, random_weight)
        for name in "ab"
    )
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in two.iterdir())
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names)
    assert {"README.md", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {
        *names
    }


def test_another_quantization_of_the_checkpoint_is_left_out(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    other = {"quantization": {"bits": 4}, "quantization_config": {"quant_method": "gptq"}}
    assets = replace(tiny_assets, config_json=tiny_assets.config_json | other)
    files = {f.path: f for f in ct.layout(make_plan(tiny_config), assets).files}
    config = json.loads(files["config.json"].constants[0][1])
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == tiny_assets.config_json


# ---- refused


@pytest.mark.parametrize(
    ("name", "storage", "message"),
    [
        (f"{LAYERS}2.feed_forward.gate.weight", Scheme(8), "keeps it as floats"),
        (f"{LAYERS}0.conv.in_proj.weight", Scheme(3), "4 or 8 bits"),
        (f"{LAYERS}0.conv.in_proj.weight", Scheme(4, 16), "groups of 16"),
        (f"{LAYERS}2.feed_forward.experts.0.w2.weight", Scheme(4, 128), "rows of 64"),
        (f"{LAYERS}0.conv.in_proj.weight", Scheme(4, 32, "affine_bias"), "the grid symmetric"),
    ],
)
def test_what_engines_have_no_kernel_for_is_refused(
    name: str,
    storage: Storage,
    message: str,
    tiny_config: ModelConfig,
    tiny_assets: Assets,
    make_plan: MakePlan,
) -> None:
    plan = make_plan(tiny_config, overrides={name: storage})
    with pytest.raises(UnsupportedError, match=rf"^{name}: .*{message}"):
        ct.check(plan, tiny_assets)


def test_a_plan_of_floats_is_refused(
    tiny_config: ModelConfig, tiny_assets: Assets, make_plan: MakePlan
) -> None:
    plan = make_plan(tiny_config, "bfloat16", "bfloat16", {EMBEDDING: Scheme(8)})
    with pytest.raises(UnsupportedError, match="keeps every weight"):
        ct.check(plan, tiny_assets)


def test_a_value_beyond_float16_is_refused() -> None:
    entry = TensorPlan("model.some.weight", (2,), Role.ATTENTION, 0, None, "float16")
    values: NDArray[np.float32] = np.array([1, -70000], np.float32)
    with pytest.raises(UnsupportedError, match=r"model\.some\.weight: holds 70000"):
        ct._pack_float(entry, values)
