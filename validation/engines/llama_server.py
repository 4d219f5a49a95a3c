"""The tokenizer of a GGUF build in llama.cpp, and its chats as llama-server renders them.

The server of the wheel is started with the build, on a port of this machine alone, and asked for
``/apply-template``. It is asked for the chats that its interface takes as they are: it passes no
reasoning to the template but under ``reasoning_content``, and goes on with an assistant's turn
that a chat ends with.
"""

import json
import os
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines import llama_cpp_tokenizer
from lfmq.validation.engines.llama_cpp_tokenizer import EXTRA as EXTRA
from lfmq.validation.engines.llama_cpp_tokenizer import NAME as NAME
from lfmq.validation.engines.llama_cpp_tokenizer import version as version
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun

_SECONDS = 60  # for an answer
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy in between
_CONTEXT = 512  # tokens; nothing is generated


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request; chats with the whole build loaded.

    Raises:
        ImportError: the wheel is not installed.
        ValidationError: it is not the pinned one, or cannot load the build.
    """
    run = llama_cpp_tokenizer.tokenize(request)
    if not request.chats:
        return run
    with closing(llama_cpp_tokenizer.Vocabulary(os.fsencode(request.path))) as vocabulary:
        first = vocabulary.decode(vocabulary.encode("", framed=True), keep=True)
    server = _start(request.path)
    address = str(server.listening_address)
    rendered = [_rendered(address, chat, first) for chat in request.chats]
    return replace(run, rendered=rendered)


def _start(path: Path) -> Any:
    """The server, which ends when nothing refers to it any more."""
    from xllamacpp import CommonParams, Server

    params = CommonParams()
    params.model.path = str(path)
    params.port, params.use_jinja, params.warmup = 0, True, False
    params.n_ctx, params.n_gpu_layers, params.n_parallel = _CONTEXT, 0, 1
    try:
        return Server(params)
    except Exception as error:  # RuntimeError of the wheel
        raise ValidationError(f"{path}: llama-server does not start with it ({error})") from error


def _rendered(address: str, chat: Mapping[str, Any], first: str) -> str | None:
    """A chat as text, with the bos token that the server puts before it; None if not asked."""
    messages = chat["messages"]
    if messages[-1]["role"] == "assistant" or any("thinking" in m for m in messages):
        return None
    asked = {key: value for key, value in chat.items() if value is not None}
    content, kind = json.dumps(asked).encode(), {"Content-Type": "application/json"}
    question = urllib.request.Request(f"{address}/apply-template", content, kind)
    try:
        with _OPENER.open(question, timeout=_SECONDS) as answer:
            text = str(json.loads(answer.read())["prompt"])
    except OSError as error:
        raise ValidationError(f"llama-server renders no chat ({error})") from error
    return text if text.startswith(first) else first + text
