"""The tokenizer and template of an ONNX build in onnxruntime-genai, loaded without the model.

Ids become text token by token (``create_stream``), as genai's programs write it. ``encode`` puts
nothing around a text, unless the option ``add_special_tokens`` is set, which its programs do not.
"""

import json
from collections.abc import Mapping
from typing import Any

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun

NAME = "onnxruntime-genai"
EXTRA = "genai"


def version() -> str:
    """The installed runtime's name and version; ImportError without it."""
    import onnxruntime_genai

    return f"onnxruntime-genai {onnxruntime_genai.__version__}"


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request with the tokenizer that genai makes of the folder.

    Raises:
        ImportError: genai is not installed.
        ValidationError: it does not load the tokenizer.
    """
    import onnxruntime_genai as genai

    try:
        tokenizer = genai.Tokenizer(str(request.path))
    except Exception as error:  # genai raises RuntimeError and OrtException
        raise ValidationError(
            f"{request.path}: onnxruntime-genai does not load its tokenizer ({error})"
        ) from error
    return TokenizerRun(
        ids=[tokenizer.encode(text).tolist() for text in request.texts],
        framed=None,
        kept=_decoded(tokenizer, request, skip=False),
        skipped=_decoded(tokenizer, request, skip=True),
        rendered=[_rendered(tokenizer, chat) for chat in request.chats],
    )


def _decoded(tokenizer: Any, request: TokenizerRequest, *, skip: bool) -> list[str]:
    tokenizer.update_options(skip_special_tokens=str(skip).lower())
    texts = []
    for ids in request.sequences:
        stream = tokenizer.create_stream()
        texts.append("".join(stream.decode(i) for i in ids))
    return texts


def _rendered(tokenizer: Any, chat: Mapping[str, Any]) -> str:
    options = {"add_generation_prompt": chat["add_generation_prompt"]}
    if chat["tools"]:
        options["tools"] = json.dumps(chat["tools"], ensure_ascii=False)
    messages = json.dumps(chat["messages"], ensure_ascii=False)
    return str(tokenizer.apply_chat_template(messages, **options))
