"""The part of a GGUF's tokenizer beside its tokens: merges and special tokens.

As gguf-py's ``SpecialVocab`` (0.19), from the checkpoint's parsed files instead of its folder,
and with the end tokens that generation stops at.
"""

import json
from typing import Any

from gguf import GGUFWriter

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.end_tokens import end_tokens, token_ids
from lfmq.formats.huggingface.side_files import without_mark
from lfmq.formats.huggingface.special_tokens import special_tokens
from lfmq.formats.plan import ModelConfig
from lfmq.quant.errors import UnsupportedError

_KINDS = ("bos", "eos", "unk", "sep", "pad", "mask")
# Keys for ids at which llama.cpp ends generation (llama-vocab.cpp, special_eog_ids).
_ENDS = ("eos", "eot", "eom")
# Tokens at which it ends generation by their text, whatever the keys say.
LLAMA_CPP_ENDS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
        "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]",
        "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
    )
)  # fmt: skip


def merges(assets: Assets) -> list[str]:
    """The merges of a byte-level BPE tokenizer as a GGUF lists them: two parts and a blank.

    Raises:
        UnsupportedError: they are neither texts nor pairs of texts.
    """
    model = json.loads(without_mark(assets.files["tokenizer.json"]))["model"]
    given = model.get("merges") or []
    if all(isinstance(merge, str) for merge in given):
        return list(given)
    pairs = [m for m in given if isinstance(m, list) and [type(p) for p in m] == [str, str]]
    if len(pairs) < len(given):
        raise UnsupportedError(
            f"{assets.folder / 'tokenizer.json'}: merges are neither texts nor pairs of texts; "
            "save the tokenizer once more with the tokenizers library"
        )
    # a blank inside a part is written as in byte-level BPE (llama.cpp issue 9692)
    return [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]


def end_keys(assets: Assets, config: ModelConfig) -> dict[str, int]:
    """The ids for llama.cpp's end of text, end of turn and end of message.

    With one end token that is also the end of turn; llama.cpp would look for one by its text.

    Raises:
        UnsupportedError: there are more end tokens than keys, and llama.cpp does not know the
            rest by their text.
    """
    ids = end_tokens(assets, config).ids
    known = {token_ids(assets).get(text) for text in LLAMA_CPP_ENDS}
    ids = ids[:1] + tuple(sorted(ids[1:], key=lambda i: i in known))
    beyond = [i for i in ids[len(_ENDS) :] if i not in known]
    if beyond:
        raise UnsupportedError(
            f"generation_config.json: {len(ids)} end tokens, of which a GGUF holds "
            f"{len(_ENDS)} beside those llama.cpp knows by their text, not {beyond[0]}; take some "
            "out of eos_token_id, or leave gguf out of --to"
        )
    if len(ids) == 1:
        ids *= 2
    return dict(zip(_ENDS, ids, strict=False))


def add_special_vocabulary(writer: GGUFWriter, config: ModelConfig, assets: Assets) -> None:
    """Merges and the ids of special tokens."""
    writer.add_token_merges(merges(assets))
    for kind, token in _special_ids(assets, config).items():
        getattr(writer, f"add_{kind}_token_id")(token)


def _special_ids(assets: Assets, config: ModelConfig) -> dict[str, int]:
    texts, ids = special_tokens(assets), token_ids(assets)
    found: dict[str, Any] = {}
    for kind in _KINDS:
        stated = assets.config_json.get(f"{kind}_token_id")
        found[kind] = ids.get(texts.get(f"{kind}_token", ""), stated)
    # of these the config decides: it is what the reference runs with
    decided = {"bos": config.bos_token_id, "pad": config.pad_token_id}
    found |= {kind: token for kind, token in decided.items() if token is not None}
    found.pop("eos")
    found |= end_keys(assets, config)
    return {
        kind: token
        for kind, token in found.items()
        if isinstance(token, int)
        and not isinstance(token, bool)
        and 0 <= token < config.vocab_size
    }
