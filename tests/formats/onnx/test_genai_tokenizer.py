"""What genai does not follow of a tokenizer, with genai as the judge."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lfmq.formats.build import Assets
from lfmq.formats.huggingface.pretokenizers import DIGIT, GPT2, ONE_DIGIT
from lfmq.formats.onnx.genai_tokenizer import unlike_genai
from lfmq.tests.formats.gguf.test_pretokenizer import (
    BYTE_LEVEL,
    DIGITS,
    Change,
    flag,
    keys,
    split,
    splitting,
)
from lfmq.validation.parity.run import measure_parity

GENAI = b'{"model": {"type": "lfm2", "context_length": 256, "decoder": {}}}'
UPPER = r"[^\r\n\p{L}\p{N}]?\p{Lu}*\p{Ll}+|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tokenizer: None, None),
        (splitting(split(ONE_DIGIT)), None),
        (splitting(split(DIGIT), split(GPT2)), None),
        (splitting(use_regex=True), None),
        (flag("rstrip"), None),
        (flag("lstrip"), "lstrip of the added token"),
        (flag("single_word"), "single_word of the added token"),
        (splitting(DIGITS, use_regex=True), "pre-tokenizer Digits"),
        (splitting(split(UPPER)), "not known to split text by"),
        (keys(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "puts a blank before"),
        (keys(normalizer={"type": "NFC"}), "does not normalize text"),
    ],
)
def test_genai_agrees(
    change: Change, reason: str | None, tiny_assets: Assets, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime_genai")
    tokenizer: dict[str, Any] = json.loads(tiny_assets.files["tokenizer.json"])
    change(tokenizer)
    files = tiny_assets.files | {"tokenizer.json": json.dumps(tokenizer).encode()}
    assets = replace(tiny_assets, files=files)
    found = unlike_genai(assets)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)
    for name, content in {**files, "genai_config.json": GENAI}.items():
        (tmp_path / name).write_bytes(content)
    parity = measure_parity(assets, {tmp_path: "onnx"}, native=False)
    equal = [g.equal for g in parity.tokenizer if g.runtime == "onnxruntime-genai"]
    assert equal
    assert all(equal) == (reason is None)
