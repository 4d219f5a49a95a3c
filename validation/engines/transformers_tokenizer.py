"""The tokenizer and template of a folder build in transformers."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun

NAME = "transformers"
EXTRA = "vllm-format"


def version() -> str:
    """The installed library's name and version; ImportError without it."""
    return f"transformers {installed('transformers')}"


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request with ``AutoTokenizer``.

    Raises:
        ImportError: transformers is not installed.
        ValidationError: it does not load the tokenizer.
    """
    from transformers import AutoTokenizer

    load = partial(AutoTokenizer.from_pretrained, local_files_only=True)
    return answer(NAME, load, request)


def answer(name: str, load: Callable[[Path], Any], request: TokenizerRequest) -> TokenizerRun:
    """What a tokenizer of transformers' interface answers.

    Args:
        name: of the runtime, for errors.
        load: makes the tokenizer of a folder.
        request: the build, and what is asked.

    Raises:
        ImportError: the runtime is not installed.
        ValidationError: it does not load the tokenizer.
    """
    try:
        tokenizer = load(request.path)
    except ImportError:
        raise
    except Exception as error:  # of any kind, from several libraries
        raise ValidationError(
            f"{request.path}: {name} does not load its tokenizer ({error!r})"
        ) from error
    return TokenizerRun(
        ids=[tokenizer.encode(text, add_special_tokens=False) for text in request.texts],
        framed=[tokenizer.encode(text) for text in request.texts],
        kept=[tokenizer.decode(ids) for ids in request.sequences],
        skipped=[tokenizer.decode(ids, skip_special_tokens=True) for ids in request.sequences],
        rendered=[
            tokenizer.apply_chat_template(
                chat["messages"],
                tools=chat["tools"],
                add_generation_prompt=chat["add_generation_prompt"],
                tokenize=False,
            )
            for chat in request.chats
        ],
    )
