"""Engines in a process of their own, and what they compute through a pipe.

A runtime's native code may crash, print or keep threads spinning: none of it may reach the
process that reports. The parent writes token ids and router inputs to a temporary folder; the
child maps them, runs the engine and writes a frame for each window to a pipe that is neither
stdout nor stderr, which libraries print to: the one goes nowhere, the other to a file, whose last
line explains a crash. What the child leaves in its folder for temporary files goes with ours.

A runtime's tokenizer is asked in the same way, once, with texts and ids in the order itself.

A frame is ``_HEAD`` (a magic word, the length of the text), the text (JSON) and the bytes of the
arrays that the text lists. The first frame of a child has the engine's version, the last says
that it is the last one.
"""

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from lfmq.quant.errors import LfmqError, ValidationError
from lfmq.validation.engines.protocol import (
    EngineRequest,
    NativeEngine,
    RouterInputs,
    TokenizerEngine,
    TokenizerRequest,
    TokenizerRun,
    WindowRun,
)

# The module of each format's own runtime.
NATIVE = {
    "gguf": "lfmq.validation.engines.llama_cpp",
    "mlx": "lfmq.validation.engines.mlx",
    "onnx": "lfmq.validation.engines.onnx",
    "compressed-tensors": "lfmq.validation.engines.transformers",
}

_HEAD = struct.Struct("<4sI")
_MAGIC = b"lfmq"
_ORDER = "order.json"

_Frame = tuple[dict[str, Any], dict[str, NDArray[Any]]]
_Request = EngineRequest | TokenizerRequest | None


class UnavailableError(ValidationError):
    """A runtime is not installed, or not in the version that lfmq knows."""


def run_native(
    request: EngineRequest, format: str, *, progress: Callable[[int, int], None] | None = None
) -> Iterator[WindowRun]:
    """Run a build in its format's own runtime, window by window.

    The child ends with the iterator, also when that is closed early.

    Args:
        request: the build and the tokens.
        format: the build's, a key of ``NATIVE``.
        progress: called with 1 and the number of windows after each window.

    Raises:
        ValidationError: the runtime is not installed, is another version than the one lfmq knows,
            cannot load the build, crashed, or answered something else than was asked.
    """
    with closing(_frames(NATIVE[format], request)) as frames:
        next(frames)
        for text, arrays in frames:
            yield _window(text, arrays, request)
            if progress is not None:
                progress(1, len(request.ids))


def native_version(format: str) -> str:
    """The name and version of a format's own runtime.

    Raises:
        ValidationError: it is not installed, or not the version lfmq knows.
    """
    with closing(_frames(NATIVE[format], None)) as frames:
        text, _ = next(frames)
        return str(text["version"])


def run_tokenizer(request: TokenizerRequest, module: str) -> tuple[str, TokenizerRun]:
    """Ask a runtime's tokenizer; its name and version, and what it answered.

    Args:
        request: the build, and what is asked.
        module: of the runtime's tokenizer, a :class:`TokenizerEngine`.

    Raises:
        UnavailableError: the runtime is not installed, or is another version than lfmq knows.
        ValidationError: it cannot load the build's tokenizer, or failed.
    """
    with closing(_frames(module, request)) as frames:
        version, _ = next(frames)
        ((text, _),) = frames
        return str(version["version"]), TokenizerRun(**text)


def load_engine(module: str) -> NativeEngine:
    """The engine a module is; none imports its runtime before it runs."""
    return cast(NativeEngine, importlib.import_module(module))


# ---- parent


def _frames(module: str, request: _Request) -> Generator[_Frame]:
    """The child's frames but the last, checked to be as many as were asked for."""
    engine = load_engine(module)
    with tempfile.TemporaryDirectory(prefix="lfmq-") as name:
        folder = Path(name)
        _write_order(folder, module, request)
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as stream, open(folder / "log", "wb") as log:
            command = [
                sys.executable,
                "-P",
                "-m",
                "lfmq.validation.engines.child_process",
                name,
                str(write_end),
            ]
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=os.environ | {"TMPDIR": name},
                    pass_fds=(write_end,),
                )
            finally:
                os.close(write_end)
            try:
                yield from _answers(stream, engine, _count(request))
            except _Broken as error:
                what = str(error) or _death(child, folder / "log")
                raise ValidationError(_advice(engine, request, what)) from None
            finally:
                child.kill()
                child.wait()


class _Broken(Exception):
    """The child's answer is not one, or ended early; then without a message."""


def _count(request: _Request) -> int:
    """How many frames answer it, beside the first and the last."""
    if isinstance(request, TokenizerRequest):
        return 1
    return 0 if request is None else len(request.ids)


def _answers(
    stream: BinaryIO, engine: NativeEngine | TokenizerEngine, windows: int
) -> Iterator[_Frame]:
    for count in range(windows + 2):
        text, arrays = _receive(stream)
        if "error" in text:
            kind = ValidationError if count else UnavailableError
            raise kind(" ".join(text["error"].split()))
        if "absent" in text:
            raise UnavailableError(
                f"{engine.NAME} is not installed ({text['absent']}): {_install(engine)}"
            )
        if ("end" in text) != (count == windows + 1):
            raise _Broken(f"it ran {text.get('end', 'too many')} windows of {windows}")
        if "end" not in text:
            yield text, arrays


def _death(child: subprocess.Popen[bytes], log: Path) -> str:
    """How the child ended and the last it said."""
    code = child.wait()
    lines = [line.strip() for line in log.read_text("utf-8", "replace").split("\n")]
    last = next(filter(None, reversed(lines)), "it printed nothing")
    how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"{how}{hint}; {last}"


def _advice(engine: NativeEngine | TokenizerEngine, request: _Request, what: str) -> str:
    where = engine.NAME if request is None else f"{request.path}: {engine.NAME}"
    if isinstance(request, TokenizerRequest):
        return f"{where}'s tokenizer failed ({what}); convert the checkpoint again"
    return (
        f"{where} failed ({what}); install the version that lfmq is tested with "
        f"({_install(engine)}), or validate with --engine read"
    )


def _install(engine: NativeEngine | TokenizerEngine) -> str:
    return f"pip install 'lfmq[{engine.EXTRA}]'" if engine.EXTRA else "pip install lfmq"


def _window(
    text: dict[str, Any], arrays: dict[str, NDArray[Any]], request: EngineRequest
) -> WindowRun:
    """A frame as a value, after checking that it is what was asked for."""
    length = request.ids.shape[1]
    logits = arrays.pop("logits", None)
    selected = {int(layer): chosen for layer, chosen in arrays.items()}
    if any(len(chosen) != length for chosen in selected.values()):
        raise ValidationError(
            f"{request.path}: experts of other than {length} positions came back"
        )
    if request.router_inputs is not None:
        return WindowRun(None, selected)
    scored = len(range(length)[request.scored])
    if logits is None or logits.ndim != 2 or len(logits) != scored:
        raise ValidationError(f"{request.path}: logits of other than {scored} positions came back")
    return WindowRun(logits, selected)


def _write_order(folder: Path, module: str, request: _Request) -> None:
    order: dict[str, Any] = {"module": module}
    if isinstance(request, TokenizerRequest):
        order["tokenizer"] = asdict(request) | {"path": str(request.path.absolute())}
    elif request is not None:
        order |= {
            "path": str(request.path.absolute()),
            "scored": [request.scored.start, request.scored.stop, request.scored.step],
            "threads": request.threads,
            "routers": None,
        }
        np.save(folder / "ids.npy", request.ids)
        if request.router_inputs is not None:
            order["routers"] = sorted(request.router_inputs)
            for layer, states in request.router_inputs.items():
                np.save(folder / f"router-{layer}.npy", states)
    (folder / _ORDER).write_text(json.dumps(order))


# ---- pipe


def _send(stream: BinaryIO, text: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    text |= {"arrays": [[name, a.dtype.str, a.shape] for name, a in arrays.items()]}
    encoded = json.dumps(text).encode()
    stream.write(_HEAD.pack(_MAGIC, len(encoded)) + encoded)
    for array in arrays.values():
        stream.write(_bytes(np.ascontiguousarray(array)))
    stream.flush()


def _receive(stream: BinaryIO) -> _Frame:
    magic, length = _HEAD.unpack(_read(stream, _HEAD.size))
    if magic != _MAGIC:
        raise _Broken("something else wrote to its pipe")
    text = json.loads(_read(stream, length))
    arrays = {}
    for name, dtype, shape in text.pop("arrays"):
        arrays[name] = np.empty(shape, dtype)
        _read_into(stream, _bytes(arrays[name]))
    return text, arrays


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read(stream: BinaryIO, length: int) -> bytearray:
    content = bytearray(length)
    _read_into(stream, memoryview(content))
    return content


def _read_into(stream: BinaryIO, target: memoryview) -> None:
    """Fill the target; a child that ends before has failed."""
    while len(target):
        count = stream.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise _Broken
        target = target[count:]


# ---- child


def main(folder: Path, pipe: int) -> None:
    """Run the order in ``folder`` and answer through the pipe, a file descriptor."""
    order = json.loads((folder / _ORDER).read_text())
    engine = load_engine(order["module"])
    with open(pipe, "wb") as stream:
        try:
            _send(stream, {"version": engine.version()}, {})
            if "tokenizer" in order:
                count = _tokenize(cast(TokenizerEngine, engine), order["tokenizer"], stream)
                _send(stream, {"end": count}, {})
            elif "path" in order:
                count = _run(engine, _read_order(folder, order), stream)
                _send(stream, {"end": count}, {})
        except LfmqError as error:
            _send(stream, {"error": str(error)}, {})
        except ImportError as error:
            _send(stream, {"absent": str(error)}, {})


def _run(engine: NativeEngine, request: EngineRequest, stream: BinaryIO) -> int:
    count = 0
    for run in engine.run_windows(request):
        arrays: dict[str, NDArray[Any]] = {str(k): chosen for k, chosen in run.selected.items()}
        if run.logits is not None:
            arrays |= {"logits": run.logits}
        _send(stream, {}, arrays)
        count += 1
    return count


def _tokenize(engine: TokenizerEngine, asked: dict[str, Any], stream: BinaryIO) -> int:
    request = TokenizerRequest(
        path=Path(asked["path"]),
        texts=tuple(asked["texts"]),
        sequences=tuple(map(tuple, asked["sequences"])),
        chats=tuple(asked["chats"]),
    )
    _send(stream, asdict(engine.tokenize(request)), {})
    return 1


def _read_order(folder: Path, order: dict[str, Any]) -> EngineRequest:
    inputs: RouterInputs | None = None
    if order["routers"] is not None:
        inputs = {
            layer: np.load(folder / f"router-{layer}.npy", mmap_mode="r")
            for layer in order["routers"]
        }
    return EngineRequest(
        path=Path(order["path"]),
        ids=np.load(folder / "ids.npy", mmap_mode="r"),
        scored=slice(*order["scored"]),
        router_inputs=inputs,
        threads=order["threads"],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
