"""Which keys of a ``config.json`` there are: those that are handled, and those without effect.

transformers keeps every key it does not know, and any code of it may ask for one. A key in neither
list is therefore refused by its name, unless its value says that there is no such thing.
"""

from functools import partial
from pathlib import Path
from typing import Any

from lfmq.quant.errors import CheckpointError, quoted

_short = partial(quoted, most=40)

# Read or checked by :mod:`.config`, :mod:`.rope` and ``lfmq.converter.checkpoint``.
_HANDLED = """
    model_type architectures vocab_size hidden_size intermediate_size moe_intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads head_dim max_position_embeddings
    norm_eps conv_L_cache conv_bias layer_types full_attn_idxs num_dense_layers num_experts
    num_experts_per_tok norm_topk_prob use_expert_bias routed_scaling_factor tie_word_embeddings
    tie_embedding block_ff_dim block_multiple_of block_ffn_dim_multiplier block_auto_adjust_ff_dim
    rope_theta rope_parameters rope_scaling partial_rotary_factor bos_token_id eos_token_id
    pad_token_id transformers_weights quantization quantization_config compression_config
"""
HANDLED = frozenset(_HANDLED.split())

# By the reason why they may be ignored.
_WITHOUT_EFFECT = {
    "how the file was saved": """
        transformers_version dtype torch_dtype _name_or_path name_or_path _commit_hash model_name
        unsloth_version unsloth_fixed unsloth_optimized auto_map bos_token eos_token pad_token
        unk_token license base_model base_models description author name version tags language
        datasets library_name pipeline_tag source
    """,
    "how the model was trained or begun": """
        initializer_range initializer_factor block_mlp_init_scale block_out_init_scale
        block_use_xavier_init conv_use_xavier_init attention_dropout hidden_dropout resid_dropout
        embd_dropout router_aux_loss_coef aux_loss_coef z_loss_coef router_z_loss_coef
        router_jitter_noise moe_aux_loss_coef gradient_checkpointing
        original_max_position_embeddings
    """,
    "Liquid's own names, which transformers' classes for LFM2 do not read": """
        block_dim block_norm_eps block_use_swiglu conv_dim conv_dim_out num_heads use_pos_enc theta
    """,
    "what a call returns beside the logits": """
        use_cache output_attentions output_hidden_states output_router_logits return_dict
        use_return_dict return_dict_in_generate output_scores tie_last_hidden_states
    """,
    "how it is run": """
        attn_implementation _attn_implementation _attn_implementation_autoset
        _attn_implementation_internal experts_implementation _experts_implementation
        _experts_implementation_internal chunk_size_feed_forward torchscript use_bfloat16
        tf_legacy_loss pretraining_tp is_decoder tokenizer_class prefix task_specific_params
        cross_attention_hidden_size model_file quantize_activations transformers.js_config
    """,
    "heads for other tasks": """
        id2label label2id num_labels problem_type finetuning_task classifier_dropout
        classifier_activation
    """,
    "settings of generation, which transformers drops from a config": """
        max_length min_length do_sample early_stopping num_beams temperature top_k top_p min_p
        typical_p repetition_penalty length_penalty no_repeat_ngram_size max_new_tokens
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff
        eta_cutoff encoder_repetition_penalty num_assistant_tokens num_assistant_tokens_schedule
        assistant_confidence_threshold assistant_lookbehind target_lookbehind num_beam_groups
        diversity_penalty model_max_length
    """,
}
IGNORED = frozenset(key for keys in _WITHOUT_EFFECT.values() for key in keys.split())

# Of keys that may only say what LFM2 does anyway these values; the mask follows is_causal.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "is_causal": (True,),
    "sliding_window": (),
}
_CLASSES = ("forcausallm", "lfm2model", "lfm2moemodel")


def check_keys(config: dict[str, Any], source: Path) -> None:
    """Refuse a key that may change what the model computes, and a class that is no such model.

    Raises:
        CheckpointError: names the key.
    """
    for key, value in config.items():
        if key in HANDLED or key in IGNORED or key.endswith("_token_id"):
            continue
        if key in _ONLY:
            _check_only(key, value, source)
        elif value is not None and value not in (False, 0, "", [], {}):
            raise CheckpointError(
                f"{source}: {_short(key)} is {_short(value)}, which is not known and may change "
                "what the model computes; remove the key if it does not"
            )
    classes = config.get("architectures")
    for name in classes if isinstance(classes, list) else []:
        if not str(name).lower().endswith(_CLASSES):
            raise CheckpointError(
                f"{source}: architectures has {_short(name)}, expected Lfm2MoeForCausalLM or "
                "Lfm2ForCausalLM; only models that predict the next token are converted"
            )


def _check_only(key: str, value: Any, source: Path) -> None:
    expected = _ONLY[key]
    if value is not None and not (isinstance(value, str | bool) and value in expected):
        known = " or ".join(map(repr, expected)) or "null"
        raise CheckpointError(
            f"{source}: {key} is {_short(value)}, expected {known}: no more is supported for LFM2"
        )
