"""The tokenizer of a GGUF build in llama.cpp, loaded without the weights.

Tokens become text as llama-cli and llama-server write them, piece by piece
(``llama_token_to_piece``). ``llama_detokenize`` also takes blanks away before ``?!.,`` and is not
what they use. The C interface renders no template (``llama_chat_apply_template`` recognizes some
by their words); ``lfmq.validation.engines.llama_server`` asks the server for that.
"""

import ctypes
import os
from collections.abc import Iterable
from contextlib import closing

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.llama_cpp import NAME as NAME
from lfmq.validation.engines.llama_cpp import version as version
from lfmq.validation.engines.llama_cpp_abi import EXTRA as EXTRA
from lfmq.validation.engines.llama_cpp_abi import (
    LOG_LEVEL_ERROR,
    LogCallback,
    Pointer,
    default_model_params,
    load_library,
    unlike,
)
from lfmq.validation.engines.protocol import TokenizerRequest, TokenizerRun


def tokenize(request: TokenizerRequest) -> TokenizerRun:
    """Answer the request from the GGUF's own metadata.

    Raises:
        ImportError: the wheel is not installed.
        ValidationError: it is not the pinned one, or cannot read the build's tokenizer.
    """
    with closing(Vocabulary(os.fsencode(request.path))) as vocabulary:
        return TokenizerRun(
            ids=[vocabulary.encode(text, framed=False) for text in request.texts],
            framed=[vocabulary.encode(text, framed=True) for text in request.texts],
            kept=[vocabulary.decode(ids, keep=True) for ids in request.sequences],
            skipped=[vocabulary.decode(ids, keep=False) for ids in request.sequences],
        )


class Vocabulary:
    """A GGUF opened for its tokenizer alone."""

    def __init__(self, path: bytes) -> None:
        self._library = library = load_library()
        self._errors: list[str] = []
        self._log = LogCallback(self._note)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        params = default_model_params(library)
        no_device = Pointer()
        params.devices = ctypes.addressof(no_device)
        params.vocab_only = True
        self._model = library.llama_model_load_from_file(path, params)
        if not self._model:
            reason = self._errors[0] if self._errors else "no reason given"
            raise ValidationError(
                f"{os.fsdecode(path)}: llama.cpp does not load its tokenizer: {reason}; write "
                "the build again"
            )
        self._vocab = library.llama_model_get_vocab(self._model)

    def encode(self, text: str, *, framed: bool) -> list[int]:
        """Token ids; ``framed`` with the tokens that a text begins and ends with."""
        content = text.encode()
        room = len(content) + 2
        ids = (ctypes.c_int32 * room)()
        count = self._library.llama_tokenize(
            self._vocab, content, len(content), ctypes.addressof(ids), room, framed, True
        )
        if count < 0:
            raise unlike("llama_tokenize")
        return list(ids[:count])

    def decode(self, ids: Iterable[int], *, keep: bool) -> str:
        """The pieces as one text; ``keep`` with control tokens."""
        return b"".join(self._piece(i, keep=keep) for i in ids).decode("utf-8", "replace")

    def _piece(self, token: int, *, keep: bool) -> bytes:
        room = 64
        while True:
            piece = ctypes.create_string_buffer(room)
            at = ctypes.addressof(piece)
            length = self._library.llama_token_to_piece(self._vocab, token, at, room, 0, keep)
            if length >= 0:
                return piece.raw[:length]
            room = -length

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._library.llama_model_free(self._model)
        self._library.llama_log_set(LogCallback(), None)

    def _note(self, level: int, text: bytes, _: int) -> None:
        if level == LOG_LEVEL_ERROR:
            self._errors.append(text.decode(errors="replace").strip())
