"""The tokens that a build's own runtime ends generation at, from what the build states."""

import json
from dataclasses import replace
from pathlib import Path

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.formats.gguf.scan import scan_gguf
from lfmq.formats.gguf.special_vocabulary import LLAMA_CPP_ENDS
from lfmq.formats.huggingface.end_tokens import end_tokens, token_ids, tokenizer_end

_FILES = ("generation_config.json", "tokenizer_config.json", "tokenizer.json")


def stop_tokens(path: Path, format: str, checkpoint: Checkpoint) -> tuple[set[int], set[int]]:
    """What a build states, and what its runtime ends at whatever the build states.

    llama.cpp knows some tokens by their text; mlx-lm adds the tokenizer's own end token.

    Args:
        path: the build.
        format: its container.
        checkpoint: what it is to be a build of.

    Raises:
        LfmqError: a file of the build is not a JSON object, or not a GGUF file.
        OSError: a file cannot be read.
        ValueError: a file is not JSON.
        LookupError: a file lacks a key.
    """
    assets, config = checkpoint.assets, checkpoint.config
    if format == "gguf":
        header = scan_gguf(path)
        keys = (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom"))
        stated = {int(header.value(key)) for key in keys if key in header.fields}
        known = {token_ids(assets).get(text, -1) for text in LLAMA_CPP_ENDS}
        return stated, known
    if format == "onnx" and (path / "genai_config.json").is_file():
        model = json.loads((path / "genai_config.json").read_bytes())["model"]
        value = model.get("eos_token_id", [])
        return set(value if isinstance(value, list) else [value]), set()
    files = {n: (path / n).read_bytes() for n in _FILES if (path / n).is_file()}
    document = json.loads((path / "config.json").read_bytes())
    own = replace(assets, files=files, config_json=document, folder=path)
    besides = tokenizer_end(own) if format == "mlx" else None
    return set(end_tokens(own, config).ids), set() if besides is None else {besides}
