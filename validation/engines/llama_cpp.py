"""GGUF builds in llama.cpp, on CPU.

llama.cpp shows its tensors to an evaluation callback: the router's choice is ``ffn_moe_topk-N``,
and what layer N's router and experts read is the normed hidden state before ``ffn_moe_logits-N``.
Everything else is as llama.cpp does it by default: activations in blocks of 8 bits where weights
are quantized, a cache of float16, 512 tokens at a time.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.llama_cpp_abi import EXTRA as EXTRA
from lfmq.validation.engines.llama_cpp_abi import (
    LOG_LEVEL_ERROR,
    RELEASE,
    Batch,
    EvalCallback,
    LogCallback,
    Pointer,
    Tensor,
    default_context_params,
    default_model_params,
    load_library,
    unlike,
)
from lfmq.validation.engines.protocol import EngineRequest, WindowRun

NAME = "llama.cpp"

# Tokens decoded together, llama.cpp's default for a graph; bounds the logits that it holds.
_TOKENS_AT_ONCE = 512
# Names in the graph. The normed hidden state gets its second name after the feed-forward is built
# (src/models/lfm2moe.cpp); that it is what the router reads is checked.
_NORMED = "model.layers.{}.ffn_out"
_ROUTER = "ffn_moe_logits"
_TOPK = "ffn_moe_topk"
_OF_EXPERTS = "ffn_moe_"

_Selected = dict[int, NDArray[np.int64]]


def version() -> str:
    """llama.cpp's and the wheel's.

    Raises:
        ImportError: the wheel is not installed.
        ValidationError: it is not the pinned one.
    """
    return f"llama.cpp {load_library().llama_version().decode()} (xllamacpp {RELEASE})"


def run_windows(request: EngineRequest) -> Iterator[WindowRun]:
    """Decode each window of the request from an empty memory.

    Raises:
        ImportError: the wheel is not installed.
        ValidationError: it is not the pinned one, or cannot run the build.
    """
    inputs = request.router_inputs or {}
    length = request.ids.shape[1]
    wanted = () if inputs else range(length)[request.scored]
    with closing(_Decoder(request.path, length, request.threads)) as decoder:
        for index, ids in enumerate(request.ids):
            decoder.clear()
            logits = np.empty((len(wanted), decoder.vocab_size), np.float32)
            parts = []
            for start in range(0, length, _TOKENS_AT_ONCE):
                rows = slice(start, start + _TOKENS_AT_ONCE)
                given = {layer: states[index, rows] for layer, states in inputs.items()}
                parts.append(decoder.decode(ids[rows], given))
                for i, position in enumerate(wanted):
                    if rows.start <= position < rows.stop:
                        logits[i] = decoder.logits(position - start)
            selected = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
            yield WindowRun(None if inputs else logits, selected)


class _Decoder:
    """A build opened in llama.cpp, for windows of one length."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        self._path = path
        self._library = library = load_library()
        self._watch = _Watch(library)
        self._errors: list[str] = []
        self._log = LogCallback(self._note)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        params = default_model_params(library)
        no_device = Pointer()
        params.devices = ctypes.addressof(no_device)  # the empty list: CPU alone
        self._model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise self._failure("does not load it", "write the build again")
        self.vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))
        self._context = self._open_context(length)
        library.llama_set_n_threads(self._context, threads, threads)

    def _open_context(self, length: int) -> int:
        library, step = self._library, min(length, _TOKENS_AT_ONCE)
        params = default_context_params(library)
        params.n_ctx, params.n_batch, params.n_ubatch = length, step, step
        params.cb_eval = self._watch.callback
        context: int | None = library.llama_init_from_model(self._model, params)
        if not context:
            raise self._failure(f"makes no context of {length} tokens", "free memory")
        sizes = library.llama_n_batch(context), library.llama_n_ubatch(context)
        if library.llama_n_ctx(context) < length or sizes != (step, step):
            raise unlike("llama_context_params")
        return context

    def clear(self) -> None:
        """Forget the tokens before: cache and states of convolutions."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def decode(
        self, ids: NDArray[np.int64], inputs: Mapping[int, NDArray[np.float32]]
    ) -> _Selected:
        """Go on with these tokens; the experts each layer chose for them.

        Every position is an output, because the last layer computes no others.
        """
        tokens = ids.astype(np.int32)
        outputs = np.ones(len(tokens), np.int8)
        self._watch.expect(len(tokens), inputs)
        batch = Batch(len(tokens), tokens.ctypes.data, logits=outputs.ctypes.data)
        code = self._library.llama_decode(self._context, batch)
        if code:
            what = f"does not decode the tokens (llama_decode gives {code})"
            raise self._failure(what, "are they another tokenizer's?")
        return self._watch.seen()

    def logits(self, row: int) -> NDArray[np.float32]:
        """Of a position of the last tokens, [V]; valid until the next ones."""
        found = self._library.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(found, (self.vocab_size,))

    def close(self) -> None:
        """Free what llama.cpp holds."""
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
        self._library.llama_log_set(LogCallback(), None)

    def _note(self, level: int, text: bytes, _: int) -> None:
        if level == LOG_LEVEL_ERROR:
            self._errors.append(text.decode(errors="replace").strip())

    def _failure(self, what: str, advice: str) -> ValidationError:
        reason = self._errors[0] if self._errors else "no reason given"
        return ValidationError(f"{self._path}: llama.cpp {what}: {reason}; {advice}")


class _Watch:
    """Sees every tensor as it is computed: reads the router's choices, puts inputs in place.

    A callback cannot raise: what went wrong is kept for the end.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.callback = EvalCallback(self._guarded)
        self.expect(0, {})

    def expect(self, rows: int, inputs: Mapping[int, NDArray[np.float32]]) -> None:
        """Begin a batch of so many tokens; ``inputs`` [rows, H] replace what routers read."""
        self._rows = rows
        self._inputs = inputs
        self._selected: _Selected = {}
        self._replaced: dict[int, int] = {}
        self._has_routers = False
        self._error: Exception | None = None

    def seen(self) -> _Selected:
        """The experts each layer chose, [rows, k].

        Raises:
            ValidationError: the graph is not the pinned release's.
        """
        if self._error is not None:
            raise self._error
        unseen = self._has_routers and not self._selected
        if unseen or not self._inputs.keys() <= self._replaced.keys():
            raise unlike("graph")
        return self._selected

    def _guarded(self, tensor: int, ask: bool, _: int) -> bool:
        try:
            return self._look(tensor, ask)
        except Exception as error:
            self._error = self._error or error
            return False

    def _look(self, tensor: int, ask: bool) -> bool:
        """When asked, whether the tensor's values are wanted; then, once they are computed."""
        kind, _, number = self._library.ggml_get_name(tensor).decode().rpartition("-")
        self._has_routers |= kind.startswith(_OF_EXPERTS)
        if kind == _TOPK:
            if not ask:
                self._selected[int(number)] = self._chosen(tensor)
            return True
        if kind == _NORMED and int(number) in self._inputs:
            if not ask:
                self._replace(tensor, int(number))
            return True
        if kind == _ROUTER and int(number) in self._inputs:
            read = Tensor.from_address(tensor).src[1]
            if read != self._replaced.get(int(number)):
                raise unlike("router input")
        return False

    def _chosen(self, tensor: int) -> NDArray[np.int64]:
        """Read a view of the first k columns of all experts in order."""
        shape, strides = self._layout(tensor, b"i32")
        nbytes = self._library.ggml_nbytes(tensor)
        content = np.empty(nbytes // 4, np.int32)
        self._library.ggml_backend_tensor_get(tensor, content.ctypes.data, 0, nbytes)
        return np.lib.stride_tricks.as_strided(content, shape, strides).astype(np.int64)

    def _replace(self, tensor: int, layer: int) -> None:
        values = np.ascontiguousarray(self._inputs[layer], np.float32)
        if self._layout(tensor, b"f32") != (values.shape, values.strides):
            raise unlike("hidden state")
        self._library.ggml_backend_tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
        self._replaced[layer] = tensor

    def _layout(self, tensor: int, dtype: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape and strides (bytes) of a matrix of 4-byte values, a row for each token."""
        t = Tensor.from_address(tensor)
        columns, rows, *more = t.ne
        nbytes = 4 + sum((n - 1) * stride for n, stride in zip(t.ne, t.nb, strict=True))
        if (
            self._library.ggml_type_name(t.type) != dtype
            or (rows, *more) != (self._rows, 1, 1)
            or columns * rows != self._library.ggml_nelements(tensor)
            or nbytes != self._library.ggml_nbytes(tensor)
        ):
            raise unlike("ggml_tensor")
        return (rows, columns), (t.nb[1], t.nb[0])
