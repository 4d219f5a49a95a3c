"""One run of one build in its runtime, on CPU: seconds of a prompt and of tokens one at a time.

    python benchmarks/decode_engines.py BUILD --prompt 512 --tokens 64 --threads 2

Prints a line of JSON. ``decode.py`` starts this once for each run, so that a runtime's memory and
threads end with it. The tokens are made up and given, whatever the model says, so that all builds
of a model read the same ones; the prompt runs once before it is timed, which brings the weights
into memory. Only the last position of the prompt needs logits; a graph for ONNX Runtime has no
other choice than to compute all.
"""

import argparse
import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfmq.formats.registry import FORMATS, detect_format
from lfmq.validation.engines.llama_cpp_abi import (
    Batch,
    LogCallback,
    Pointer,
    default_context_params,
    load_library,
)

Ids = NDArray[np.int32]


class Engine(Protocol):
    """A build in its runtime, which remembers the tokens it was given."""

    def clear(self) -> None:
        """Forget the tokens before."""

    def give(self, ids: Ids) -> None:
        """Go on with some tokens and compute the logits of the last."""


class LlamaCpp:
    """llama.cpp, as validation/native_llama_cpp.py loads it, but with nothing that watches."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        self._library = library = load_library()
        self._log = LogCallback(lambda level, text, _: None)
        library.llama_log_set(self._log, None)
        library.llama_backend_init()
        params = library.llama_model_default_params()
        no_device = Pointer()
        params.devices = ctypes.addressof(no_device)  # the empty list: CPU alone
        self._model = library.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        context = default_context_params(library)
        context.n_ctx = length
        self._context = library.llama_init_from_model(self._model, context)
        library.llama_set_n_threads(self._context, threads, threads)

    def clear(self) -> None:
        """As :class:`Engine` says."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def give(self, ids: Ids) -> None:
        """As :class:`Engine` says; a batch without a choice of outputs has the last one."""
        batch = Batch(len(ids), ids.ctypes.data)
        if self._library.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp does not decode the tokens")
        self._library.llama_get_logits_ith(self._context, -1)


class OnnxRuntime:
    """ONNX Runtime's session; keys, values and convolution states stay its own arrays."""

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import onnxruntime

        self._array = onnxruntime.OrtValue.ortvalue_from_numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            str(path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._names = [o.name for o in self._session.get_outputs()]
        self.clear()

    def clear(self) -> None:
        """As :class:`Engine` says: no keys and values, zeros as convolution states."""
        self._seen, self._past = 0, {}
        for i in self._session.get_inputs():
            if i.name.startswith("past"):
                sizes = [d if isinstance(d, int) else int(a == 0) for a, d in enumerate(i.shape)]
                self._past[i.name] = self._array(np.zeros(sizes, np.float32))

    def give(self, ids: Ids) -> None:
        """As :class:`Engine` says."""
        self._seen += len(ids)
        mask = np.ones((1, self._seen), np.int64)
        feed = self._past | {
            "input_ids": self._array(ids[None].astype(np.int64)),
            "attention_mask": self._array(mask),
        }
        found = self._session.run_with_ort_values(self._names, feed)
        for name, value in zip(self._names, found, strict=True):
            past = name.replace("present.", "past_key_values.").replace("present_", "past_")
            if past in self._past:
                self._past[past] = value


class Mlx:
    """mlx-lm, in float32, as validation/native_mlx.py runs whole windows on a CPU.

    MLX's CPU kernels are many times slower in float16. Scales and biases are then float32 too:
    more bytes are read for a token than the file has for it.
    """

    def __init__(self, path: Path, length: int, threads: int) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache
        from mlx_lm.utils import load_model

        self._mx, self._make_cache = mx, make_prompt_cache
        mx.set_default_device(mx.cpu)
        self._model: Any = load_model(path)[0]
        self._model.set_dtype(mx.float32)
        self.clear()

    def clear(self) -> None:
        """As :class:`Engine` says."""
        self._cache = self._make_cache(self._model)

    def give(self, ids: Ids) -> None:
        """As :class:`Engine` says: logits that nobody asks for are not computed."""
        mx = self._mx
        if len(ids) > 1:
            self._model(mx.array(ids[None, :-1]), cache=self._cache)
            mx.eval([layer.state for layer in self._cache])
        mx.eval(self._model(mx.array(ids[None, -1:]), cache=self._cache))


ENGINES: dict[str, Callable[[Path, int, int], Engine]] = {
    "gguf": LlamaCpp,
    "onnx": OnnxRuntime,
    "mlx": Mlx,
}


def measure(engine: Engine, prompt: Ids, tokens: Ids) -> tuple[float, float]:
    """Seconds of the prompt, and of the tokens after it."""
    engine.give(prompt)
    engine.clear()
    started = time.perf_counter()
    engine.give(prompt)
    begun = time.perf_counter()
    for i in range(len(tokens)):
        engine.give(tokens[i : i + 1])
    return begun - started, time.perf_counter() - begun


def main() -> None:
    """Run a build and print its figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=Path)
    parser.add_argument("--prompt", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    format = detect_format(options.build)
    vocabulary = FORMATS[format].open_reader(options.build).config.vocab_size
    count = options.prompt + options.tokens
    ids = np.random.default_rng(0).integers(0, vocabulary, count).astype(np.int32)
    engine = ENGINES[format](options.build, count, options.threads)
    prefill, decode = measure(engine, ids[: options.prompt], ids[options.prompt :])
    found = {"prefill": options.prompt / prefill, "decode": options.tokens / decode}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
