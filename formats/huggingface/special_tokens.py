"""The named special tokens of a tokenizer (``bos_token`` and so on), as transformers has them."""

from typing import Any

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.side_files import TOKENIZER_CONFIG, json_object

_MAP = "special_tokens_map.json"
_KNOWN = frozenset(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def special_tokens(assets: Assets) -> dict[str, str]:
    """The texts of special tokens by name, which templates are given.

    As ``PreTrainedTokenizerBase.special_tokens_map`` (transformers 5.23): those of
    ``tokenizer_config.json``, a model's own ``*_token`` and the names of ``extra_special_tokens``
    among them. ``special_tokens_map.json`` of older releases wins where the config does not list
    ``added_tokens_decoder``.

    Raises:
        CheckpointError: a file is not a JSON object.
    """
    config = json_object(assets, TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config = config | json_object(assets, _MAP)
    named = {k: v for k, v in config.items() if k in _KNOWN or _is_own(k, v)}
    extra = config.get("extra_special_tokens")
    named |= extra if isinstance(extra, dict) else {}
    texts = {key: _text(value) for key, value in named.items()}
    return {key: text for key, text in texts.items() if text is not None}


def _is_own(key: str, value: Any) -> bool:
    """A token of this model's own; an object is taken for the known names alone."""
    return key.endswith("_token") and isinstance(value, str)


def _text(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None
