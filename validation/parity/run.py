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
    "gguf": ("llama_server",),
    "mlx": ("mlx_tokenizer",),
    "compressed-tensors": ("transformers_tokenizer",),
}
_LOADS = "loads"


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
    pairs = zip(run.rendered, probe.expected.rendered or (), strict=True)
    asked = ((text, wanted) for text, wanted in pairs if text is not None and wanted is not None)
    differences = (d for pair in asked for d in _unlike_text("a chat", *pair))
    found = next(differences, None)
    yield TemplateParity(str(path), name, found is None, found)


def _differences(probe: Probe, run: TokenizerRun) -> Iterator[tuple[str, str | None]]:
    """Each group and the first difference in it."""
    for group, indices in probe.groups.items():
        if group == ENDS and run.framed is None:
            continue
        yield group, next(_in_group(probe, run, indices, framed=group == ENDS), None)


def _in_group(
    probe: Probe, run: TokenizerRun, indices: Iterable[int], *, framed: bool
) -> Iterator[str]:
    wanted = probe.expected
    for index in indices:
        if index < len(probe.texts):
            yield from _unlike_ids(probe, run.ids[index], wanted.ids[index])
            if framed:
                yield from _unlike_ids(probe, _at(run.framed, index), _at(wanted.framed, index))
        if probe.is_broken(index):
            continue
        ids = _some(probe.sequences[index])
        yield from _unlike_text(f"ids {ids} as text", run.kept[index], wanted.kept[index])
        what = f"ids {ids} as text without special tokens"
        yield from _unlike_text(what, run.skipped[index], wanted.skipped[index])


def _at(rows: list[list[int]] | None, index: int) -> list[int]:
    return [] if rows is None else rows[index]


def _unlike_ids(probe: Probe, found: list[int], wanted: list[int]) -> Iterator[str]:
    """Where the ids of a text first differ, with the tokens from there on."""
    if found == wanted:
        return
    at = _first(wanted, found)
    near = probe.tokenizer.decode(wanted[max(0, at - 3) : at + 4], skip_special_tokens=False)
    yield (
        f"{_cut(near)} has {_pieces(probe, found[at:])} where the checkpoint has "
        f"{_pieces(probe, wanted[at:])}"
    )


def _pieces(probe: Probe, ids: Sequence[int]) -> str:
    if not ids:
        return "nothing"
    decode = probe.tokenizer.decode
    shown = (f"{decode([i], skip_special_tokens=False)!r} ({i})" for i in ids[:2])
    return ", ".join(shown)


def _unlike_text(what: str, found: str, wanted: str) -> Iterator[str]:
    if found == wanted:
        return
    at = _first(wanted, found)
    near = slice(max(0, at - 10), at + 20)
    yield f"{what}: {_cut(found[near])} where the checkpoint has {_cut(wanted[near])}"


def _first(one: Sequence[object], other: Sequence[object]) -> int:
    """The first place where two sequences differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _some(ids: Sequence[int]) -> str:
    shown = " ".join(map(str, ids[:4]))
    return f"{shown} …" if len(ids) > 4 else shown


def _cut(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")
