"""Asks the runtimes of builds and compares their answers with the checkpoint's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lfmq.formats.build import Assets
from lfmq.quant.errors import ValidationError
from lfmq.validation.engines.child_process import (
    UnavailableError,
    load_engine,
    run_tokenizer,
)
from lfmq.validation.engines.protocol import TokenizerRun
from lfmq.validation.parity.probes import ENDS, Probe, make_probe
from lfmq.validation.parity.result import GroupParity, NotMeasured, Parity, TemplateParity

_ENGINES = "lfmq.validation.engines."
# Modules of the runtimes of each format: those asked always, and those that take seconds to start
# and are asked in place of the library they use when a build also runs natively.
RUNTIMES = {
    "gguf": ("llama_cpp_tokenizer",),
    "onnx": ("genai_tokenizer", "tokenizers_library"),
    "mlx": ("tokenizers_library",),
    "compressed-tensors": ("tokenizers_library",),
}
SLOW = {
    "mlx": ("mlx_tokenizer",),
    "compressed-tensors": ("transformers_tokenizer",),
}
_LOADS = "loads"
_LONGEST = 160


def measure_parity(
    assets: Assets, builds: Mapping[Path, str], *, native: bool, threads: int = 1
) -> Parity:
    """Compare the tokenizers and templates of builds, in their runtimes, with the checkpoint's.

    Args:
        assets: the checkpoint's.
        builds: the format of each build.
        native: also start the runtimes that take seconds.
        threads: runtimes asked at the same time, each in a process of its own.

    Raises:
        ValidationError: the checkpoint's tokenizer cannot be read.
    """
    probe = make_probe(assets)
    asked = [
        (path, module)
        for path, format in builds.items()
        for module in ((native and SLOW.get(format)) or RUNTIMES[format])
    ]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        found = list(pool.map(lambda pair: _ask(probe, *pair), asked))
    return Parity(
        tuple(row for part in found for row in part.tokenizer),
        tuple(row for part in found for row in part.template),
        tuple(row for part in found for row in part.not_measured),
    )


def _ask(probe: Probe, path: Path, module: str) -> Parity:
    """One runtime on one build."""
    module = _ENGINES + module
    name = load_engine(module).NAME
    try:
        _, run = run_tokenizer(probe.request(path), module)
    except UnavailableError as error:
        return Parity(not_measured=(NotMeasured(str(path), name, str(error)),))
    except ValidationError as error:
        return Parity((GroupParity(str(path), name, _LOADS, False, str(error)),))
    groups = (
        GroupParity(str(path), name, group, difference is None, difference)
        for group, difference in _differences(probe, run)
    )
    return Parity(tuple(groups), tuple(_template(probe, run, path, name)))


def _template(probe: Probe, run: TokenizerRun, path: Path, name: str) -> Iterator[TemplateParity]:
    if run.rendered is None or not probe.chats:
        return
    found = next(
        (
            _unlike_text("a chat", text, wanted)
            for text, wanted in zip(run.rendered, probe.expected.rendered or (), strict=True)
            if text != wanted
        ),
        None,
    )
    yield TemplateParity(str(path), name, found is None, found)


def _differences(probe: Probe, run: TokenizerRun) -> Iterator[tuple[str, str | None]]:
    """Each group and the first difference in it."""
    for group, indices in probe.groups.items():
        yield group, next(_in_group(probe, run, group, indices), None)


def _in_group(
    probe: Probe, run: TokenizerRun, group: str, indices: Iterable[int]
) -> Iterator[str]:
    wanted = probe.expected
    for index in indices:
        alone = run.ids is not None and index < len(probe.texts)
        if group == ENDS or not alone:
            yield from _unlike_ids(probe, index, run.framed, wanted.framed)
        if alone:
            yield from _unlike_ids(probe, index, run.ids, wanted.ids)
        for texts, expected, how in (
            (run.kept, wanted.kept, "as text"),
            (run.skipped, wanted.skipped, "as text without special tokens"),
        ):
            if texts is None or expected is None or texts[index] == expected[index]:
                continue
            ids = _some(probe.sequences[index])
            yield _unlike_text(f"ids {ids} {how}", texts[index], expected[index])


def _unlike_ids(
    probe: Probe,
    index: int,
    found: Sequence[Sequence[int]] | None,
    wanted: Sequence[Sequence[int]] | None,
) -> Iterator[str]:
    """Where the ids of a text first differ, with the tokens from there on."""
    if found is None or wanted is None or index >= len(probe.texts):
        return
    ours, theirs = list(wanted[index]), list(found[index])
    if ours == theirs:
        return
    at = _first(ours, theirs)
    decode = probe.tokenizer.decode
    near = decode(ours[max(0, at - 3) : at + 4], skip_special_tokens=False)
    yield (
        f"{_cut(near)} has {_pieces(probe, theirs[at:])} where the checkpoint has "
        f"{_pieces(probe, ours[at:])}"
    )


def _pieces(probe: Probe, ids: Sequence[int]) -> str:
    if not ids:
        return "nothing"
    decode = probe.tokenizer.decode
    shown = (f"{decode([i], skip_special_tokens=False)!r} ({i})" for i in ids[:2])
    return ", ".join(shown)


def _unlike_text(what: str, found: str, wanted: str) -> str:
    at = _first(wanted, found)
    start = max(0, at - 10)
    return f"{what}: {_cut(found[start : at + 20])} where the checkpoint has " + _cut(
        wanted[start : at + 20]
    )


def _first(one: Sequence[object], other: Sequence[object]) -> int:
    """The first place where two sequences differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _some(ids: Sequence[int]) -> str:
    shown = " ".join(map(str, ids[:4]))
    return f"{shown} …" if len(ids) > 4 else shown


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
