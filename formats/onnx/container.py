"""ONNX for ONNX Runtime, onnxruntime-genai and transformers.js: a folder with graph and data file.

docs/onnx.md lists files, tensors and layouts.
"""

from collections.abc import Iterator
from typing import Any

from onnx import TensorProto, helper

from lfmq.formats.build import (
    Assets,
    BuildLayout,
    FileLayout,
    Segment,
    WidthScope,
    as_json,
    text_file,
)
from lfmq.formats.huggingface.card import Runtime, model_card
from lfmq.formats.huggingface.chat_template import build_files
from lfmq.formats.huggingface.end_tokens import as_value, end_tokens, stating_end_tokens
from lfmq.formats.huggingface.front_matter import (
    base_models,
    front_matter,
    hub_id,
    sampling_settings,
)
from lfmq.formats.huggingface.side_files import GENERATION_CONFIG, json_object
from lfmq.formats.onnx.genai import MODEL_FILE, genai_decoder
from lfmq.formats.onnx.graph import GraphBuilder
from lfmq.formats.onnx.placement import DATA_FILE, external, place_tensors
from lfmq.formats.onnx.reader import open_reader as open_reader
from lfmq.formats.onnx.tensors import DataTensor, float_dtype
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.formats.schemes import Held, check_scheme
from lfmq.quant.errors import UnsupportedError

NAME = "onnx"
SUFFIX = "-onnx"
WIDTHS: WidthScope = "expert"
_GROUPS = (32, 64, 128)
SCHEMES: Held = dict.fromkeys(("symmetric", "affine_zero_point"), dict.fromkeys((4, 8), _GROUPS))
_RUNTIME = Runtime(
    library="onnx",
    needs="onnxruntime 1.31 or later, onnxruntime-genai 0.18 or later",
    how_to_run="""\
pip install onnxruntime-genai
python -c "
import onnxruntime_genai as og
model = og.Model('FOLDER')
tokenizer = og.Tokenizer(model)
generator = og.Generator(model, og.GeneratorParams(model))
generator.append_tokens(tokenizer.encode('...'))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
"
""",
)
_SEARCH_KEYS = ("temperature", "top_k", "top_p", "repetition_penalty")


def check(plan: Plan, assets: Assets) -> None:
    """Refuse what ONNX Runtime's operators cannot hold.

    Raises:
        UnsupportedError: the setting or tensor, and what the operators have.
    """
    g = plan.config
    if assets.config_json.get("conv_bias"):
        raise UnsupportedError("config.json: conv_bias is true, the onnx graph has no such bias")
    if g.attention_layers and g.head_dim % 16:
        raise UnsupportedError(
            f"config.json: head_dim is {g.head_dim}, onnx's GroupQueryAttention takes multiples "
            "of 16"
        )
    for entry in plan.entries:
        check_scheme(entry, SCHEMES, NAME)
        if entry.scheme is None:
            float_dtype(entry)
    _check_experts(plan)


def _check_experts(plan: Plan) -> None:
    """An expert's projections go through one operator and share their storage."""
    first: dict[tuple[int | None, int], TensorPlan] = {}
    for entry in plan.entries:
        if entry.expert is None:
            continue
        other = first.setdefault((entry.layer, entry.expert), entry)
        if entry.storage != other.storage:
            raise UnsupportedError(
                f"{entry.name}: {entry.storage} beside {other.storage} of {other.name}; onnx's "
                "QMoE has one width an expert: give its w1, w2 and w3 the same"
            )


def layout(plan: Plan, assets: Assets) -> BuildLayout:
    """Graph, data file, the two configs and the tokenizer's files."""
    builder = GraphBuilder(plan)
    builder.build()
    offsets = place_tensors(builder.tensors)

    def place(tensor: DataTensor) -> TensorProto:
        return external(tensor, offsets[tensor.alias or tensor.name])

    proto = builder.model(place)
    helper.set_model_props(proto, _properties(plan, assets))
    model = proto.SerializeToString(deterministic=True)
    size = max(offsets[t.alias or t.name] + t.nbytes for t in builder.tensors)
    constants = tuple(
        (offsets[t.name], t.constant) for t in builder.tensors if t.constant is not None
    )
    segments = tuple(p for t in builder.tensors for p in _segments(t, offsets))
    files = [
        text_file(MODEL_FILE, model),
        FileLayout(DATA_FILE, size, constants, segments),
        text_file("genai_config.json", as_json(_genai_config(plan, assets))),
        text_file("config.json", as_json(_config(plan, assets))),
    ]
    files.append(
        text_file("README.md", model_card(plan, assets, files, NAME, _RUNTIME, _stored_as))
    )
    taken = {file.path for file in files}
    files += [text_file(n, c) for n, c in sorted(build_files(assets).items()) if n not in taken]
    return BuildLayout(NAME, tuple(files))


def _stored_as(entry: TensorPlan) -> str:
    """The entry's storage in the model card."""
    return str(entry.storage)


def _segments(tensor: DataTensor, offsets: dict[str, int]) -> Iterator[Segment]:
    for index, part in enumerate(tensor.parts):
        nbytes = tensor.nbytes // len(tensor.parts)
        offset = offsets[tensor.name] + index * nbytes
        yield Segment(offset, nbytes, part.sources, part.pack, part.by_rows)


def _properties(plan: Plan, assets: Assets) -> dict[str, str]:
    """What the graph says of its model, in ``metadata_props``; known keys have ONNX's own names.

    https://github.com/onnx/onnx/blob/main/docs/MetadataProps.md
    """
    card = front_matter(assets)
    known = {
        "name": assets.name,
        "recipe": plan.recipe,
        "model_author": hub_id(assets).partition("/")[0],
        "model_license": card.license_name or card.license,
        "license_link": card.license_link,
        "base_model": ", ".join(base_models(assets)),
        "language": ", ".join(card.language),
        "tags": ", ".join(card.tags),
        "pipeline_tag": card.pipeline_tag,
        "url": card.url,
    }
    return {key: value for key, value in known.items() if value}


def _config(plan: Plan, assets: Assets) -> dict[str, Any]:
    """The checkpoint's config for transformers.js.

    It must be told that there is one data file, and reads ``layer_types`` alone.
    """
    external = {"use_external_data_format": {MODEL_FILE: 1}}
    layers = {"layer_types": list(plan.config.layer_types)}
    config = stating_end_tokens(assets.config_json, assets, plan.config)
    return config | layers | {"transformers.js_config": external}


def _genai_config(plan: Plan, assets: Assets) -> dict[str, Any]:
    """What onnxruntime-genai 0.18 needs to run the graph."""
    g = plan.config
    generation = json_object(assets, GENERATION_CONFIG)
    ends = end_tokens(assets, g).ids
    tokens = {
        "bos_token_id": g.bos_token_id,
        "eos_token_id": as_value(ends) if ends else None,
        "pad_token_id": next(iter(ends), None) if g.pad_token_id is None else g.pad_token_id,
    }
    model = {
        "type": g.model_type,
        "vocab_size": g.vocab_size,
        "context_length": g.max_position_embeddings,
        **{key: value for key, value in tokens.items() if value is not None},
        "decoder": genai_decoder(plan.config),
    }
    search = {
        "max_length": g.max_position_embeddings,
        "past_present_share_buffer": False,
        "do_sample": bool(generation.get("do_sample", False)),
        **{k: v for k, v in sampling_settings(assets).items() if k in _SEARCH_KEYS},
    }
    return {"model": model, "search": search}
