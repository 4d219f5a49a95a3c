"""The tokenizer file of a folder build in the library that transformers and mlx-lm use.

It answers in a tenth of the time that they need to start, and shows a file that is not the
checkpoint's. What they make of ``tokenizer_config.json`` beside it, they alone show.
"""

from importlib.metadata import version as installed

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun

NAME = "tokenizers"
EXTRA = ""


def version() -> str:
    """The installed library's name and version."""
    return f"tokenizers {installed('tokenizers')}"


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request from the folder's ``tokenizer.json``.

    Raises:
        ValidationError: the file is missing, or the library does not load it.
    """
    from tokenizers import Tokenizer

    path = request.path / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValidationError(f"{path}: not a tokenizer ({error}); convert again") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = False
    texts = list(request.texts)
    return TokenizerRun(
        ids=[e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)],
        framed=[e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=True)],
        kept=[tokenizer.decode(s, skip_special_tokens=False) for s in request.sequences],
        skipped=[tokenizer.decode(s, skip_special_tokens=True) for s in request.sequences],
    )
