"""The part of a GGUF file before the weights: key-value metadata, tokenizer and tensor table."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import (
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
)

from lfmq.formats.build import Assets
from lfmq.formats.gguf.chat_template import add_templates
from lfmq.formats.gguf.general import add_authorship, add_sampling
from lfmq.formats.gguf.keys import SIGMOID
from lfmq.formats.gguf.names import ARCHITECTURES
from lfmq.formats.gguf.pretokenizer import text_rules
from lfmq.formats.gguf.special_vocabulary import add_special_vocabulary
from lfmq.formats.gguf.user_metadata import add_metadata
from lfmq.formats.huggingface.chat_template import chat_templates
from lfmq.formats.huggingface.side_files import without_mark
from lfmq.formats.plan import ModelConfig, Plan
from lfmq.formats.versions import PROVEN
from lfmq.quant.errors import UnsupportedError

# Of a main type, where its name is not MOSTLY and the type's.
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
}


def _file_type(main_type: GGMLQuantizationType) -> LlamaFileType:
    if main_type in _FILE_TYPES:
        return _FILE_TYPES[main_type]
    return LlamaFileType[f"MOSTLY_{main_type.name}"]


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A row of the tensor table; ``type`` None means float32 zeros the loader insists on."""

    name: str
    byte_shape: tuple[int, ...]
    nbytes: int
    type: GGMLQuantizationType | None


def header_bytes(
    plan: Plan, assets: Assets, tensors: list[TensorHeader], main_type: GGMLQuantizationType
) -> bytes:
    """Everything of the file up to the first tensor's bytes, padded to the alignment."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, ARCHITECTURES[plan.config.model_type].name)
        _add_general(writer, plan, assets, main_type)
        _add_config(writer, plan.config)
        if plan.config.moe_layers:
            _add_experts(writer, plan.config)
        writer.add_shortconv_l_cache(plan.config.conv_L_cache)
        writer.add_vocab_size(plan.config.vocab_size)
        _add_tokenizer(writer, plan.config, assets)
        add_metadata(writer, assets.metadata)
        for t in tensors:
            kind = GGMLQuantizationType.F32 if t.type is None else t.type
            writer.add_tensor_info(
                t.name, t.byte_shape, np.dtype(np.uint8), t.nbytes, raw_dtype=kind
            )
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = path.read_bytes()
    return header + bytes(-len(header) % GGUF_DEFAULT_ALIGNMENT)


def _add_general(
    writer: GGUFWriter, plan: Plan, assets: Assets, main_type: GGMLQuantizationType
) -> None:
    writer.add_type("model")
    add_authorship(writer, assets)
    add_sampling(writer, assets)
    writer.add_size_label(_size_label(plan))
    writer.add_file_type(int(_file_type(main_type)))
    writer.add_quantization_version(2)
    writer.add_string("lfmq.recipe", plan.recipe)
    writer.add_array("lfmq.proven_with", PROVEN["gguf"])


def _size_label(plan: Plan) -> str:
    """``32x272M``: experts times weights of one expert over all layers; without experts ``7M``."""
    count = plan.config.num_experts
    one = sum(e.size for e in plan.entries if e.expert == 0 or not count)
    label = f"{max(1, round(one / 1e6))}M"
    return f"{count}x{label}" if count else label


def _add_config(writer: GGUFWriter, g: ModelConfig) -> None:
    writer.add_block_count(g.num_hidden_layers)
    writer.add_context_length(g.max_position_embeddings)
    writer.add_embedding_length(g.hidden_size)
    writer.add_feed_forward_length(g.intermediate_size)
    writer.add_head_count(g.num_attention_heads)
    # zero key-value heads tell the loader that a layer is a convolution
    writer.add_head_count_kv(
        [g.num_key_value_heads if t == "full_attention" else 0 for t in g.layer_types]
    )
    writer.add_layer_norm_rms_eps(g.norm_eps)
    writer.add_rope_freq_base(g.rope_theta)


def _add_experts(writer: GGUFWriter, g: ModelConfig) -> None:
    writer.add_expert_count(g.num_experts)
    writer.add_expert_used_count(g.num_experts_per_tok)
    writer.add_expert_feed_forward_length(g.moe_intermediate_size)
    writer.add_leading_dense_block_count(g.num_dense_layers)
    writer.add_uint32(f"{ARCHITECTURES[g.model_type].name}.expert_gating_func", SIGMOID)


def _add_tokenizer(writer: GGUFWriter, g: ModelConfig, assets: Assets) -> None:
    tokens, types = tokenizer_vocabulary(assets, g.vocab_size)
    writer.add_tokenizer_model("gpt2")
    rules = text_rules(assets, g.bos_token_id)
    writer.add_tokenizer_pre(rules.pre.name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    add_special_vocabulary(writer, g, assets)
    # said in any case: with its lfm2 pre-tokenizer llama.cpp begins a text with bos by default
    writer.add_add_bos_token(rules.add_bos)
    writer.add_add_eos_token(rules.add_eos)
    add_templates(writer, chat_templates(assets))


def tokenizer_vocabulary(assets: Assets, size: int) -> tuple[list[str], list[TokenType]]:
    """Token strings and types for ids 0 to size - 1; ids without a token become ``[PAD<id>]``.

    Raises:
        UnsupportedError: no tokenizer, not byte-level BPE, or an id at or beyond ``size``.
    """
    content = assets.files.get("tokenizer.json")
    if content is None:
        raise UnsupportedError(
            f"{assets.folder / 'tokenizer.json'}: not found; GGUF holds the tokenizer, copy it "
            "into the checkpoint folder or leave gguf out of --to"
        )
    tokenizer: dict[str, Any] = json.loads(without_mark(content))
    if tokenizer.get("model", {}).get("type") != "BPE":
        raise UnsupportedError(
            f"{assets.folder / 'tokenizer.json'}: model type "
            f"{tokenizer.get('model', {}).get('type')!r}; LFM2 models have byte-level BPE"
        )
    names = [f"[PAD{i}]" for i in range(size)]
    types = [TokenType.UNUSED] * size
    found = [(token, i, TokenType.NORMAL) for token, i in tokenizer["model"]["vocab"].items()]
    for added in tokenizer.get("added_tokens", ()):
        # as the checkpoint says: text without special tokens has the others in it
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found.append((added["content"], added["id"], kind))
    for token, i, kind in found:
        if not 0 <= i < size:
            raise UnsupportedError(
                f"{assets.folder / 'tokenizer.json'}: token {token!r} has id {i}, the model's "
                f"vocabulary has {size} rows; the tokenizer belongs to another checkpoint"
            )
        names[i], types[i] = token, kind
    return names, types
