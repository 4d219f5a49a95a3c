"""What onnxruntime-genai is told of the graph, and the check of it.

The keys are those that onnxruntime-genai 0.18 reads (src/config.cpp there).
"""

import json
from pathlib import Path
from typing import Any

from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import ValidationError, quoted

MODEL_FILE = "model.onnx"
GENAI_FILE = "genai_config.json"
# How a session runs, not what it computes; a library of operators is not among them.
_SESSION = frozenset(
    {
        "log_id",
        "log_severity_level",
        "provider_options",
        "intra_op_num_threads",
        "inter_op_num_threads",
        "enable_cpu_mem_arena",
        "enable_mem_pattern",
        "enable_profiling",
    }
)


def genai_decoder(g: ModelConfig) -> dict[str, Any]:
    """The ``decoder`` of ``genai_config.json``, which says how the graph is called."""
    return {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": g.head_dim,
        "hidden_size": g.hidden_size,
        "num_attention_heads": g.num_attention_heads,
        "num_key_value_heads": g.num_key_value_heads,
        "num_hidden_layers": g.num_hidden_layers,
        "layer_types": list(g.layer_types),
        "conv_cache_size": g.conv_L_cache,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
            "past_conv_names": "past_conv.%d",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
            "present_conv_names": "present_conv.%d",
        },
    }


def check_genai(folder: Path, config: ModelConfig) -> None:
    """The file, where a build has one, calls the graph as the graph is.

    Raises:
        ValidationError: it cannot be read, names another file, or states the model otherwise.
    """
    path = folder / GENAI_FILE
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{path}: not valid JSON ({error!s:.100})") from error
    model = document.get("model") if isinstance(document, dict) else None
    model = model if isinstance(model, dict) else {}
    stated = {key: model.get(key) for key in ("type", "vocab_size", "context_length")}
    wanted: dict[str, Any] = {
        "type": config.model_type,
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
    }
    decoder = model.get("decoder")
    for key, value in (decoder if isinstance(decoder, dict) else {}).items():
        stated[f"decoder.{key}"] = value
    wanted |= {f"decoder.{key}": value for key, value in genai_decoder(config).items()}
    options = stated.get("decoder.session_options")
    if isinstance(options, dict) and options.keys() <= _SESSION:
        stated["decoder.session_options"] = wanted["decoder.session_options"]
    for key in {**wanted, **stated}:
        if stated.get(key) != wanted.get(key) or type(stated.get(key)) is not type(
            wanted.get(key)
        ):
            raise ValidationError(
                f"{path}: model.{key} is {quoted(stated.get(key))}, expected "
                f"{quoted(wanted.get(key))}; write the build again"
            )
