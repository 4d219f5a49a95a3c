"""What a build says about itself beside its weights: the model's facts and its tokenizer.

The tokens of a validation come from the checkpoint, so a build with another tokenizer or bos
token predicts them as well as any; a user's text would be cut into other tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.formats.gguf.metadata import tokenizer_vocabulary
from lfmq.formats.gguf.scan import scan_gguf
from lfmq.formats.gguf.special_vocabulary import merges
from lfmq.formats.huggingface.end_tokens import end_tokens
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import LfmqError
from lfmq.validation.measure.stop_tokens import stop_tokens

# Facts that formats state and runtimes compute with; a build without padding may say none.
_GEOMETRY = (
    "bos_token_id",
    "head_dim",
    "num_attention_heads",
    "num_key_value_heads",
    "layer_types",
    "conv_L_cache",
    "rope_theta",
    "norm_eps",
    "norm_topk_prob",
    "use_expert_bias",
    "routed_scaling_factor",
    "tie_word_embeddings",
)
# A GGUF has no keys for these: llama.cpp's lfm2moe has them fixed.
_NOT_IN_GGUF = ("norm_topk_prob", "use_expert_bias", "routed_scaling_factor")
# float32 of a GGUF's metadata against the config's decimal
_RELATIVE = 1e-6
_TOKENIZER = "tokenizer.json"
_GENAI = "genai_config.json"


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a build says otherwise than its checkpoint.

    Attributes:
        name: a key of the config, or a part of the tokenizer.
        found: what the build says.
        expected: what the checkpoint says.
    """

    name: str
    found: Any
    expected: Any


def differing_facts(
    path: Path, format: str, config: ModelConfig, checkpoint: Checkpoint
) -> tuple[Fact, ...]:
    """Every fact a build states otherwise than the checkpoint.

    Args:
        path: the build.
        format: its container.
        config: as the build's own metadata states it.
        checkpoint: what it is to be a build of.
    """
    expected = checkpoint.config
    facts = [
        Fact(name, _plain(getattr(config, name)), _plain(getattr(expected, name)))
        for name in _GEOMETRY
        if not (format == "gguf" and name in _NOT_IN_GGUF)
        and not _equal(getattr(config, name), getattr(expected, name))
    ]
    if _TOKENIZER in checkpoint.assets.files:
        compare = _gguf_tokenizer if format == "gguf" else _file_tokenizer
        facts += compare(path, checkpoint)
    facts += _end_tokens(path, format, checkpoint)
    if (path / _GENAI).is_file():
        facts += _genai_tokens(path / _GENAI, expected)
    return tuple(facts)


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return abs(found - expected) <= _RELATIVE * abs(expected)
    return bool(found == expected)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _file_tokenizer(path: Path, checkpoint: Checkpoint) -> list[Fact]:
    """A folder's tokenizer, compared as JSON: spaces and the order of keys say nothing."""
    wanted = json.loads(checkpoint.assets.files[_TOKENIZER])
    try:
        found = json.loads((path / _TOKENIZER).read_bytes())
    except (OSError, ValueError) as error:
        return [Fact(_TOKENIZER, f"unreadable ({error})", "its own")]
    if found == wanted:
        return []
    keys = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
    return [Fact(_TOKENIZER, f"another in {', '.join(keys) or 'more keys'}", "its own")]


def _gguf_tokenizer(path: Path, checkpoint: Checkpoint) -> list[Fact]:
    g, assets = checkpoint.config, checkpoint.assets
    tokens, _ = tokenizer_vocabulary(assets, g.vocab_size)
    header = scan_gguf(path)
    facts = []
    for name, wanted in (("tokens", tokens), ("merges", merges(assets))):
        found = header.value(f"tokenizer.ggml.{name}")
        found = found if isinstance(found, list) else []
        if found != wanted:
            same = sum(a == b for a, b in zip(found, wanted, strict=False))
            what = f"{len(found)}, {same} of them in the checkpoint's place"
            facts.append(Fact(f"tokenizer.ggml.{name}", what, f"{len(wanted)} of its own"))
    return facts


def _end_tokens(path: Path, format: str, checkpoint: Checkpoint) -> list[Fact]:
    """What generation stops at in the build's own runtime."""
    expected = set(end_tokens(checkpoint.assets, checkpoint.config).ids)
    try:
        found, besides = stop_tokens(path, format, checkpoint)
    except (LfmqError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return [Fact("end tokens", f"unreadable ({error})", sorted(expected))]
    if expected <= found | besides and found <= expected | besides:
        return []
    return [Fact("end tokens", sorted(found), sorted(expected))]


def _genai_tokens(path: Path, expected: ModelConfig) -> list[Fact]:
    """The start of text that onnxruntime-genai puts before a prompt."""
    try:
        found = json.loads(path.read_bytes())["model"].get("bos_token_id")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [Fact(_GENAI, f"unreadable ({error})", "a model's facts")]
    if found == expected.bos_token_id:
        return []
    return [Fact(f"{_GENAI}: bos_token_id", found, expected.bos_token_id)]
