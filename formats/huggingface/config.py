"""From a checkpoint's ``config.json`` to a :class:`Geometry`, strict about what it needs."""

import json
from pathlib import Path
from typing import Any

from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import CheckpointError

_POSITIVE = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "conv_L_cache",
)
_LARGEST = 2**31 - 1
# Far above any model (LFM2-24B-A2B has 2,432 experts); beyond it the lists of tensors fill memory.
_MOST_LAYERS, _MOST_EXPERTS = 10_000, 1_000_000


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a checkpoint folder.

    Raises:
        CheckpointError: missing, not JSON, or of another model type.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        json.dumps(config, ensure_ascii=False).encode()  # a lone surrogate cannot be written again
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: not found; {folder} is not a checkpoint folder") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    if config.get("model_type") != "lfm2_moe":
        raise CheckpointError(
            f"{path}: model_type is {config.get('model_type')!r}, expected 'lfm2_moe'; "
            "only LFM2 mixture-of-experts checkpoints are supported"
        )
    return config


def parse_config(raw: dict[str, Any], source: Path) -> ModelConfig:
    """The model's facts; ``source`` is named in errors.

    Raises:
        CheckpointError: a key is missing, of the wrong type, or contradicts another.
    """
    number = {key: _integer(raw, key, source, least=1) for key in _POSITIVE}
    dense = _integer(raw, "num_dense_layers", source, least=0)
    types = _layer_types(raw, number["num_hidden_layers"], source)
    derived = number["hidden_size"] // number["num_attention_heads"]
    given = raw if raw.get("head_dim") is not None else {"head_dim": derived}
    config = ModelConfig(
        **number,
        num_dense_layers=dense,
        head_dim=_integer(given, "head_dim", source, least=1),
        norm_eps=_real(raw.get("norm_eps"), "norm_eps", source),
        rope_theta=_rope_theta(raw, source),
        layer_types=types,
        norm_topk_prob=_flag(raw, "norm_topk_prob", source),
        use_expert_bias=_flag(raw, "use_expert_bias", source),
        routed_scaling_factor=_real(
            raw.get("routed_scaling_factor", 1.0), "routed_scaling_factor", source
        ),
        bos_token_id=_token(raw, "bos_token_id", source),
        eos_token_id=_token(raw, "eos_token_id", source),
        pad_token_id=_token(raw, "pad_token_id", source),
    )
    _check_consistent(raw, config, source)
    return config


def _check_consistent(config: dict[str, Any], g: ModelConfig, source: Path) -> None:
    tied = config.get("tie_word_embeddings", config.get("tie_embedding", True))
    problems = (
        (not tied, "tie_word_embeddings is false, lfm2_moe checkpoints tie the head"),
        (bool(config.get("conv_bias")), "conv_bias is true, which is not supported"),
        (
            g.num_experts_per_tok > g.num_experts,
            f"num_experts_per_tok {g.num_experts_per_tok} exceeds num_experts {g.num_experts}",
        ),
        (
            g.num_attention_heads % g.num_key_value_heads != 0,
            f"num_attention_heads {g.num_attention_heads} is no multiple of "
            f"num_key_value_heads {g.num_key_value_heads}",
        ),
        (g.num_dense_layers > g.num_hidden_layers, "num_dense_layers exceeds num_hidden_layers"),
        (g.head_dim % 2 != 0, f"head_dim {g.head_dim} is odd, rotary embedding needs pairs"),
        (
            g.num_hidden_layers * g.num_experts > _MOST_EXPERTS,
            f"num_experts {g.num_experts} in each of {g.num_hidden_layers} layers, expected at "
            f"most {_MOST_EXPERTS:,} in all",
        ),
    )
    for wrong, message in problems:
        if wrong:
            raise CheckpointError(f"{source}: {message}")


def _integer(config: dict[str, Any], key: str, source: Path, least: int) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise CheckpointError(
            f"{source}: {key} is {_short(value)}, expected an integer >= {least}"
        )
    return value


def _flag(config: dict[str, Any], key: str, source: Path) -> bool:
    value = config.get(key, True)
    if not isinstance(value, bool):
        raise CheckpointError(f"{source}: {key} is {_short(value)}, expected true or false")
    return value


def _real(value: Any, key: str, source: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
        raise CheckpointError(f"{source}: {key} is {_short(value)}, expected a positive number")
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _token(config: dict[str, Any], key: str, source: Path) -> int | None:
    value = config.get(key)
    if isinstance(value, list):  # some configs list several end tokens; the first ends a turn
        value = value[0] if value else None
    if value is None:
        return None
    last = config["vocab_size"] - 1
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= last:
        raise CheckpointError(
            f"{source}: {key} is {_short(value)}, expected a token from 0 to {last}"
        )
    return value


def _rope_theta(config: dict[str, Any], source: Path) -> float:
    """Flat ``rope_theta`` or nested ``rope_parameters``; never a default (see model facts)."""
    nested = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(nested, dict):
        raise CheckpointError(f"{source}: rope_parameters is {_short(nested)}, expected an object")
    kind = nested.get("rope_type", "default")
    if kind != "default":
        raise CheckpointError(
            f"{source}: rope_type is {_short(kind)}, only 'default' is supported"
        )
    value = nested.get("rope_theta", config.get("rope_theta"))
    return _real(value, "rope_theta", source)


def _layer_types(config: dict[str, Any], layers: int, source: Path) -> tuple[Any, ...]:
    types = config.get("layer_types")
    indices = config.get("full_attn_idxs")
    if types is None and isinstance(indices, list) and layers <= _MOST_LAYERS:
        types = ["full_attention" if i in indices else "conv" for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(f"{source}: layer_types must list one type for each of {layers}")
    for i, kind in enumerate(types):
        if kind not in ("conv", "full_attention"):
            raise CheckpointError(
                f"{source}: layer_types[{i}] is {_short(kind)}, not conv or attention"
            )
    return tuple(types)
