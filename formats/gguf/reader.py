"""Reads a GGUF build back under checkpoint names, through gguf-py's reader and dequantizers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from lfmq.formats.gguf.names import ARCHITECTURES, HEAD, name_map, split_expert, tensor_name
from lfmq.formats.plan import ModelConfig, ModelType, without_experts
from lfmq.quant.errors import ValidationError

# llama.cpp's own value when the key is missing: the reader must see what the runtime will do
_DEFAULT_ROPE_THETA = 10_000.0


class GgufReader:
    """An opened GGUF file; tensors stay on disk until read."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = GGUFReader(path)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ValidationError(f"{path}: not a readable GGUF file ({error})") from error
        self._path = path
        self._tensors = {t.name: t for t in self._file.tensors}
        self.config = self._read_config()
        self._names = name_map(self.config)

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._file.get_field(key)
        if field is not None:
            return field.contents()
        if default is None:
            raise ValidationError(f"{self._path}: metadata key {key!r} is missing")
        return default

    def _read_config(self) -> ModelConfig:
        model_type = self._model_type()
        prefix = ARCHITECTURES[model_type].name

        def value(key: str, default: Any = None) -> Any:
            return self._value(f"{prefix}.{key}", default)

        kv_heads = value("attention.head_count_kv")
        hidden, heads = value("embedding_length"), value("attention.head_count")
        return ModelConfig(
            hidden_size=hidden,
            intermediate_size=value("feed_forward_length"),
            num_hidden_layers=value("block_count"),
            **_expert_facts(model_type, value),
            model_type=model_type,
            num_attention_heads=heads,
            num_key_value_heads=max(kv_heads),
            head_dim=hidden // heads,
            conv_L_cache=value("shortconv.l_cache"),
            vocab_size=self._tensor("token_embd.weight").shape[1].item(),
            max_position_embeddings=value("context_length"),
            norm_eps=value("attention.layer_norm_rms_epsilon"),
            rope_theta=value("rope.freq_base", _DEFAULT_ROPE_THETA),
            layer_types=tuple("full_attention" if n else "conv" for n in kv_heads),
            bos_token_id=self._value("tokenizer.ggml.bos_token_id", 11),
            eos_token_id=self._value("tokenizer.ggml.eos_token_id", 11),
            tie_word_embeddings=HEAD not in self._tensors,
        )

    def _model_type(self) -> ModelType:
        found = self._value("general.architecture")
        for model_type, architecture in ARCHITECTURES.items():
            if architecture.name == found:
                return model_type
        known = " or ".join(repr(a.name) for a in ARCHITECTURES.values())
        raise ValidationError(f"{self._path}: architecture {found!r}, expected {known}")

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ValidationError(f"{self._path}: tensor {name!r} is missing")
        return self._tensors[name]

    def read(self, name: str) -> NDArray[np.float32]:
        """The dequantized tensor, float32, in the checkpoint's shape."""
        key, expert = split_expert(name)
        tensor = self._tensor(tensor_name(key, self._names))
        data = tensor.data if expert is None else tensor.data[expert]
        values: NDArray[np.float32] = dequantize(data, tensor.tensor_type).astype(
            np.float32, copy=False
        )
        return values[:, None, :] if name.endswith(".conv.conv.weight") else values


def _expert_facts(model_type: ModelType, value: Callable[[str], Any]) -> dict[str, Any]:
    if model_type == "lfm2":
        return without_experts(value("block_count"))
    return {
        "moe_intermediate_size": value("expert_feed_forward_length"),
        "num_dense_layers": value("leading_dense_block_count"),
        "num_experts": value("expert_count"),
        "num_experts_per_tok": value("expert_used_count"),
    }


def open_reader(path: Path) -> GgufReader:
    """Open a finished GGUF build.

    Raises:
        ValidationError: not a GGUF file, truncated, or a required key or tensor is missing.
    """
    return GgufReader(path)
