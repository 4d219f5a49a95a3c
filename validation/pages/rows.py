"""The JSON document of ``lfmq validate`` as the page and the Markdown table read it."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Located:
    """A value of the document and where it is, as a JSON pointer (RFC 6901)."""

    value: Any
    pointer: str = ""

    def __getitem__(self, key: str | int) -> "Located":
        step = str(key).replace("~", "~0").replace("/", "~1")
        return Located(self.value[key], f"{self.pointer}/{step}")

    def __iter__(self) -> Iterator["Located"]:
        return (self[i] for i in range(len(self.value)))

    def get(self, *keys: str) -> "Located | None":
        """What is under the keys; None when it is not there, null or empty."""
        found = self
        for key in keys:
            if not isinstance(found.value, dict) or key not in found.value:
                return None
            found = found[key]
        return None if found.value in (None, [], {}) else found

    def number(self, *keys: str) -> float | None:
        """The number under the keys, where there is one."""
        found = self.get(*keys)
        return None if found is None else float(found.value)


@dataclass(frozen=True, slots=True)
class Build:
    """A build in one engine.

    Attributes:
        label: short, and unlike any other's.
        name: of its file or folder.
        found: its object in the document.
        missed: the first failure of each figure of this build in this engine.
    """

    label: str
    name: str
    found: Located
    missed: Mapping[str, Located]

    @property
    def path(self) -> str:
        """Where it is, as given to ``lfmq validate``."""
        return str(self.found.value["path"])

    @property
    def engine(self) -> str:
        """What ran it."""
        return str(self.found.value["engine"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is known to be wrong, and what it says otherwise than the checkpoint."""
        facts = (
            f"{fact['name']} is {fact['found']}, the checkpoint's {fact['expected']}"
            for fact in self.found.value.get("facts") or ()
        )
        return (*map(str, self.found.value.get("warnings") or ()), *facts)

    @property
    def generation(self) -> Located | None:
        """What it wrote, by decoding; None when it was not asked to."""
        return self.found.get("generation")

    @property
    def local(self) -> Located | None:
        """Routing from the reference's inputs; None when not measured."""
        return self.found.get("routing", "local_exact_set")

    @property
    def format(self) -> str:
        """Its container."""
        return str(self.found.value["format"])


def open_document(document: Mapping[str, Any]) -> Located:
    """The document, with null for what JSON has no number for."""
    return Located(_without_infinities(document))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _without_infinities(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(v) for v in value]
    return value


def list_builds(at: Located) -> tuple[Build, ...]:
    """The builds of a document, those of one path after each other."""
    found = list(at["builds"])
    names = [_name_of(str(b.value["path"])) for b in found]
    labels = [f"{b.value['format']} · {b.value['engine']}" for b in found]
    builds = [
        Build(label if labels.count(label) == 1 else f"{name} · {b.value['engine']}", name, b, m)
        for label, name, b, m in zip(
            labels, names, found, (_missed(at, b) for b in found), strict=True
        )
    ]
    order = list(dict.fromkeys(b.path for b in builds))
    return tuple(sorted(builds, key=lambda b: order.index(b.path)))


def list_warnings(builds: Iterable[Build]) -> list[tuple[str, str]]:
    """Build and line, each once however many engines the build ran in."""
    return list(dict.fromkeys((b.name, line) for b in builds for line in b.warnings))


def _name_of(path: str) -> str:
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2] or path


def _missed(at: Located, build: Located) -> dict[str, Located]:
    """Failures of a build, the first of each figure; those that name no engine are of all."""
    found: dict[str, Located] = {}
    for failure in at["failures"]:
        engine = failure.value.get("engine")
        if failure.value["path"] == build.value["path"] and engine in (
            None,
            build.value["engine"],
        ):
            found.setdefault(str(failure.value["figure"]), failure)
    return found


def shown(text: Any) -> str:
    """Text with line ends, escapes and changes of direction written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
