"""The child process and its pipe, with engines made up for the test."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lfmq.quant.errors import ValidationError
from lfmq.validation.engines import child_process as native
from lfmq.validation.engines.protocol import EngineRequest, TokenizerRequest, TokenizerRun

IDS = np.arange(3 * 8).reshape(3, 8)
Install = Callable[[str], None]

ENGINE = """
import os, signal, sys
import numpy as np
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import WindowRun

NAME, EXTRA = "Toy", "toy"

def version():
    return "toy 1"

def run_windows(request):
    for i, window in enumerate(request.ids):
        print("noise on stdout")
        os.write(1, b"noise on the descriptor")
        {}
        selected = {{3: window[:, None] + np.arange(2), 5: -window[:, None]}}
        if request.router_inputs is not None:
            selected = {{k: x[i].astype(np.int64) for k, x in request.router_inputs.items()}}
            yield WindowRun(None, selected)
        else:
            logits = window[request.scored, None] + np.zeros((1, 5), np.float32)
            yield WindowRun(logits.astype(np.float32), selected)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Make an engine with a statement of its own in each window."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setitem(native.NATIVE, "toy", "toy_engine")

    def write(statement: str) -> None:
        (tmp_path / "toy_engine.py").write_text(ENGINE.format(statement))

    yield write
    sys.modules.pop("toy_engine", None)


def request(**options: object) -> EngineRequest:
    return EngineRequest(Path("some.build"), IDS, slice(4, 7), **options)  # type: ignore[arg-type]


def failure() -> str:
    with pytest.raises(ValidationError) as caught:
        list(native.run_native(request(), "toy"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_windows_come_back(install: Install) -> None:
    install("pass")
    steps: list[tuple[int, int]] = []
    runs = list(native.run_native(request(), "toy", progress=lambda *step: steps.append(step)))
    assert steps == [(1, 3)] * 3
    for run, window in zip(runs, IDS, strict=True):
        assert run.logits is not None
        assert run.logits.dtype == np.float32
        np.testing.assert_array_equal(run.logits, np.repeat(window[4:7, None], 5, 1))
        np.testing.assert_array_equal(run.selected[3], window[:, None] + np.arange(2))
        assert run.selected[5].dtype == np.int64
    assert native.native_version("toy") == "toy 1"


def test_router_inputs_are_handed_over(install: Install) -> None:
    install("pass")
    inputs = {2: np.random.default_rng(0).normal(0, 9, (3, 8, 4)).astype(np.float32)}
    runs = list(native.run_native(request(router_inputs=inputs), "toy"))
    assert [run.logits for run in runs] == [None] * 3
    found = np.stack([run.selected[2] for run in runs])
    np.testing.assert_array_equal(found, inputs[2].astype(np.int64))


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed (SIGSEGV; it printed nothing)"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed (SIGKILL (out of memory?); "),
        ("sys.stderr.write('GGML_ASSERT(x)\\n'); os.abort()", "failed (SIGABRT; GGML_ASSERT(x))"),
        ("raise ZeroDivisionError('no')", "failed (exit status 1; ZeroDivisionError: no)"),
        ("os._exit(0)", "failed (exit status 0; "),
        ("return", "failed (it ran 0 windows of 3)"),
        ("os.write(int(sys.argv[2]), b'x' * 99)", "failed (something else wrote to its pipe)"),
    ],
)
def test_a_child_that_fails(statement: str, expected: str, install: Install) -> None:
    install(statement)
    message = failure()
    assert message.startswith("some.build: Toy " + expected)
    assert "pip install 'lfmq[toy]'" in message


def test_a_missing_package(install: Install) -> None:
    install("import no_such_package")
    found = "No module named 'no_such_package'"
    assert failure() == f"Toy is not installed ({found}): pip install 'lfmq[toy]'"


def test_an_engines_own_refusal(install: Install) -> None:
    install("raise ValidationError(f'{request.path}: of another kind')")
    assert failure() == f"{Path('some.build').absolute()}: of another kind"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("window = window[:-1]", "experts of other than 8 positions"),
        (
            "request = type(request)(request.path, request.ids, slice(0, 1))",
            "logits of other than 3",
        ),
    ],
)
def test_another_number_of_positions(statement: str, expected: str, install: Install) -> None:
    install(statement)
    assert expected in failure()


def test_a_parent_that_stops_ends_the_child(install: Install, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    # once: the child runs ahead, and may be stopped while it begins the next window
    install(f"os.path.exists({str(pid)!r}) or open({str(pid)!r}, 'w').write(str(os.getpid()))")
    runs = native.run_native(request(), "toy")
    next(runs)
    runs.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


TOKENIZER = """
import os
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.protocol import TokenizerRun

NAME, EXTRA = "Toy", "toy"

def version():
    {0}
    return "toy 1"

def tokenize(request):
    print("noise on stdout")
    {1}
    ids = [[ord(c) for c in text] for text in request.texts]
    kept = ["".join(map(chr, s)) for s in request.sequences]
    rendered = [chat["messages"][0]["content"] for chat in request.chats]
    return TokenizerRun(ids, None, kept, kept, rendered)
"""


@pytest.fixture
def ask(tmp_path: Path, install: Install) -> Callable[..., TokenizerRun]:
    """Ask a tokenizer with statements of its own in ``version`` and ``tokenize``."""

    def run(version: str = "pass", tokenize: str = "pass") -> TokenizerRun:
        (tmp_path / "toy_engine.py").write_text(TOKENIZER.format(version, tokenize))
        chat = {"messages": [{"role": "user", "content": "é\ud800"}]}
        request = TokenizerRequest(Path("some.build"), ("a\0é", ""), ((0x1F600, 97),), (chat,))
        name, answer = native.run_tokenizer(request, "toy_engine")
        assert name == "toy 1"
        return answer

    return run


def test_a_tokenizer_answers_once(ask: Callable[..., TokenizerRun]) -> None:
    kept = ["\U0001f600a"]
    assert ask() == TokenizerRun([[97, 0, 233], []], None, kept, kept, ["é\ud800"])


@pytest.mark.parametrize(
    "version", ["import no_such_package", "raise ValidationError('another version')"]
)
def test_a_tokenizer_that_is_not_there(version: str, ask: Callable[..., TokenizerRun]) -> None:
    with pytest.raises(native.UnavailableError, match=r"not installed|another version"):
        ask(version)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("raise ValidationError('cannot be read')", "^cannot be read$"),
        (
            "os._exit(3)",
            r"some\.build: Toy's tokenizer failed \(exit status 3; it printed nothing",
        ),
        ("raise IndexError('x')", r"failed \(exit status 1; IndexError: x\); convert the"),
    ],
)
def test_a_tokenizer_that_fails(
    statement: str, expected: str, ask: Callable[..., TokenizerRun]
) -> None:
    with pytest.raises(ValidationError, match=expected) as caught:
        ask(tokenize=statement)
    assert not isinstance(caught.value, native.UnavailableError)
