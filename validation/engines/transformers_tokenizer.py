"""The tokenizer and template of a folder build in transformers."""

from importlib.metadata import version as installed
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

    try:
        tokenizer = AutoTokenizer.from_pretrained(request.path, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # of any kind, from several libraries
        raise ValidationError(
            f"{request.path}: transformers does not load its tokenizer ({error!r})"
        ) from error
    return answer(tokenizer, request)


def answer(tokenizer: Any, request: TokenizerRequest) -> TokenizerRun:
    """What a tokenizer of transformers' interface answers."""
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
