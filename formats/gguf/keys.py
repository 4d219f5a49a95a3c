"""The keys of a GGUF that llama.cpp computes with: read, compared, or refused.

From ``load_hparams`` of llama.cpp's src/llama-model.cpp and ``load_arch_hparams`` of its
src/models/lfm2.cpp and lfm2moe.cpp. llama.cpp looks keys up by name and by type, so a key it does
not know does nothing; but a key of the model's prefix that is not in this list may be one that a
release computes with, and is refused. Keys of ``general``, ``tokenizer``, ``split`` and of other
programs do not reach the forward.
"""

from collections.abc import Callable, Mapping
from typing import Any

from lfmq.formats.gguf.names import ARCHITECTURES
from lfmq.formats.gguf.scan import Field, FieldType, Header
from lfmq.formats.plan import ModelConfig, ModelType, without_experts
from lfmq.quant.errors import ValidationError, quoted

SIGMOID = 2  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
# llama.cpp's own value when the key is missing: the reader must see what the runtime will do
_DEFAULT_ROPE_THETA = 10_000.0
_MOST_LAYERS, _MOST_EXPERTS = 512, 512  # LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS
_LARGEST = 2**31 - 1

# Keys that become the config.
_READ = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "shortconv.l_cache",
        "expert_count",
        "expert_used_count",
        "expert_feed_forward_length",
        "leading_dense_block_count",
    }
)
_Accepts = Callable[[Any, ModelConfig], bool]
# Keys with one value, or some, that leave the forward as it is; what that value is, in words.
_NEUTRAL: dict[str, tuple[_Accepts, str]] = {
    "vocab_size": (lambda v, g: v == g.vocab_size, "the rows of token_embd.weight"),
    "expert_gating_func": (lambda v, g: v == SIGMOID or not g.num_experts, "2 (sigmoid)"),
    "expert_weights_norm": (lambda v, g: v is True, "true"),
    "expert_weights_scale": (lambda v, g: v in (0.0, 1.0), "1"),
    "expert_shared_count": (lambda v, g: v == 0, "0"),
    "expert_group_count": (lambda v, g: v in (0, 1), "0"),
    "expert_group_used_count": (lambda v, g: v in (0, 1), "0"),
    "nextn_predict_layers": (lambda v, g: v == 0, "0"),
    "rope.dimension_count": (lambda v, g: v == g.head_dim, "the width of a head"),
    "attention.key_length": (lambda v, g: v == g.head_dim, "the width of a head"),
    "attention.value_length": (lambda v, g: v == g.head_dim, "the width of a head"),
    "attention.causal": (lambda v, g: v is True, "true"),
    "attention.sliding_window": (lambda v, g: v == 0, "0"),
    "attention.scale": (lambda v, g: v == 0.0, "0"),
    "rope.scaling.type": (lambda v, g: v in ("none", "linear"), "none"),
    "rope.scaling.factor": (lambda v, g: v in (0.0, 1.0), "1"),
    "rope.scale_linear": (lambda v, g: v in (0.0, 1.0), "1"),
    "rope.scaling.attn_factor": (lambda v, g: v == 1.0, "1"),
    "rope.scaling.original_context_length": (lambda v, g: True, ""),
    "rope.scaling.finetuned": (lambda v, g: True, ""),
}


def read_keys(header: Header, vocabulary: int) -> ModelConfig:
    """The model's facts as llama.cpp takes them from the keys, all of them checked.

    Args:
        header: of the build's first file.
        vocabulary: rows of the embedding.

    Raises:
        ValidationError: a key is missing, of a type that llama.cpp refuses, of a value that no
            LFM2 model has, or one that this list does not have.
    """
    keys = _Keys(header)
    heads, hidden = keys.same("attention.head_count"), keys.integer("embedding_length")
    layers = keys.integer("block_count", most=_MOST_LAYERS)
    kv_heads = keys.kv_heads(layers, heads)
    config = ModelConfig(
        hidden_size=hidden,
        intermediate_size=keys.same("feed_forward_length"),
        num_hidden_layers=layers,
        **_expert_facts(keys, layers),
        model_type=keys.model_type,
        num_attention_heads=heads,
        num_key_value_heads=max(kv_heads) or heads,
        head_dim=max(1, hidden // heads),
        conv_L_cache=keys.integer("shortconv.l_cache"),
        vocab_size=vocabulary,
        max_position_embeddings=keys.integer("context_length"),
        norm_eps=keys.real("attention.layer_norm_rms_epsilon"),
        rope_theta=keys.real("rope.freq_base", _DEFAULT_ROPE_THETA),
        layer_types=tuple("full_attention" if n else "conv" for n in kv_heads),
        bos_token_id=keys.token("bos", vocabulary),
        eos_token_id=keys.token("eos", vocabulary),
    )
    keys.check_others(config)
    return config


def _expert_facts(keys: "_Keys", layers: int) -> dict[str, Any]:
    if keys.model_type == "lfm2":
        return without_experts(layers)
    return {
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "num_dense_layers": keys.integer("leading_dense_block_count", least=0, most=layers),
        "num_experts": (experts := keys.integer("expert_count", most=_MOST_EXPERTS)),
        "num_experts_per_tok": keys.integer("expert_used_count", most=experts),
    }


class _Keys:
    """The keys of a file, by their names without the architecture."""

    def __init__(self, header: Header) -> None:
        self._path, self._fields = header.path, header.fields
        self.model_type = self._model_type()
        self._prefix = f"{ARCHITECTURES[self.model_type].name}."

    def _model_type(self) -> ModelType:
        kind = self._fields.get("general.type")
        if kind is not None and kind.value != "model":
            raise ValidationError(
                f"{self._path}: general.type is {quoted(kind.value)}, expected 'model'"
            )
        field = self._fields.get("general.architecture")
        found = None if field is None else field.value
        for model_type, architecture in ARCHITECTURES.items():
            if architecture.name == found:
                return model_type
        known = " or ".join(repr(a.name) for a in ARCHITECTURES.values())
        raise ValidationError(f"{self._path}: architecture {quoted(found)}, expected {known}")

    def integer(self, key: str, *, least: int = 1, most: int = _LARGEST) -> int:
        """An integer of the model."""
        field = self._needed(key)
        value = field.value
        if field.type is not FieldType.UINT32 or isinstance(value, list):
            raise self._wrong(key, field, "an integer of type UINT32")
        if not least <= value <= most:
            raise self._wrong(key, field, f"{least} to {most}")
        return int(value)

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number of the model; a missing one has the runtime's default."""
        if default is not None and self._prefix + key not in self._fields:
            return default
        field = self._needed(key)
        if field.type is not FieldType.FLOAT32 or isinstance(field.value, list):
            raise self._wrong(key, field, "a number of type FLOAT32")
        if not 0 < field.value < 1e30:
            raise self._wrong(key, field, "a positive number")
        return float(field.value)

    def same(self, key: str) -> int:
        """A number that all layers share, given once or for each of them."""
        field = self._needed(key)
        values = field.value if isinstance(field.value, list) else [field.value]
        if field.type not in (FieldType.UINT32, FieldType.INT32) or not values:
            raise self._wrong(key, field, "an integer of type UINT32")
        if len(set(values)) != 1 or not 1 <= values[0] <= _LARGEST:
            raise self._wrong(key, field, "a positive integer, the same for all layers")
        return int(values[0])

    def kv_heads(self, layers: int, heads: int) -> list[int]:
        """Key-value heads of each layer; none makes it a convolution."""
        key = "attention.head_count_kv"
        field = self._needed(key)
        values = field.value if isinstance(field.value, list) else [field.value] * layers
        counts = {value for value in values if value}
        if field.type not in (FieldType.UINT32, FieldType.INT32) or len(values) != layers:
            raise self._wrong(key, field, f"an integer for each of {layers} layers")
        if len(counts) > 1 or not all(0 < n <= heads and heads % n == 0 for n in counts):
            raise self._wrong(key, field, f"0 or one divisor of the {heads} heads in every layer")
        return values

    def token(self, kind: str, vocabulary: int) -> int:
        """A special token's id; llama.cpp's default for its GPT-2 tokenizers is 11."""
        key = f"tokenizer.ggml.{kind}_token_id"
        field = self._fields.get(key)
        if field is None:
            return 11
        if field.type is not FieldType.UINT32 or isinstance(field.value, list):
            raise self._wrong(key, field, "an integer of type UINT32")
        if field.value >= vocabulary:
            raise self._wrong(key, field, f"a token below {vocabulary}")
        return int(field.value)

    def check_others(self, config: ModelConfig) -> None:
        """Every other key of the model's prefix has the value that changes nothing."""
        if config.num_experts:
            self._needed("expert_gating_func")
        for name, field in self._fields.items():
            key = name.removeprefix(self._prefix)
            if key == name or key in _READ:
                continue
            if key not in _NEUTRAL:
                raise ValidationError(
                    f"{self._path}: has the key {quoted(name)} ({quoted(field.value)}), which is "
                    "not known here and which llama.cpp may compute with; write the build again"
                )
            accepts, words = _NEUTRAL[key]
            if not accepts(field.value, config):
                raise self._wrong(key, field, words)
        check_tokenizer(self._path, self._fields, config)

    def _needed(self, key: str) -> Field:
        field = self._fields.get(self._prefix + key)
        if field is None:
            raise ValidationError(
                f"{self._path}: metadata key {self._prefix + key!r} is missing; write the build "
                "again"
            )
        return field

    def _wrong(self, key: str, field: Field, expected: str) -> ValidationError:
        name = key if key.startswith("tokenizer.") else self._prefix + key
        kind = f"a list of {field.type.name}" if isinstance(field.value, list) else field.type.name
        return ValidationError(
            f"{self._path}: {name} is {quoted(field.value)} ({kind}), expected {expected}; "
            "write the build again"
        )


def check_tokenizer(path: object, fields: Mapping[str, Field], config: ModelConfig) -> None:
    """The lists of the tokenizer have an item for each row of the embedding.

    Raises:
        ValidationError: one is missing or of another length or type.
    """
    lists = {
        "tokens": FieldType.STRING,
        "token_type": FieldType.INT32,
        "scores": FieldType.FLOAT32,
    }
    for part, kind in lists.items():
        key = f"tokenizer.ggml.{part}"
        field = fields.get(key)
        if field is None and part != "tokens":
            continue
        value = None if field is None else field.value
        if field is None or not isinstance(value, list) or field.type is not kind:
            raise ValidationError(
                f"{path}: {key} is {quoted(value)}, expected a list of {kind.name}; write the "
                "build again"
            )
        if len(value) != config.vocab_size:
            raise ValidationError(
                f"{path}: {key} has {len(value):,} items, the embedding has {config.vocab_size:,} "
                "rows; write the build again"
            )
