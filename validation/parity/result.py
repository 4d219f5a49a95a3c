"""What runtimes' tokenizers were found to do, and its JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GroupParity:
    """A runtime's tokenizer on one group of the probe text.

    Attributes:
        path: the build.
        runtime: its name.
        group: of texts.
        equal: all ids are the checkpoint's, and all ids become the checkpoint's text.
        first_difference: in words; None where all is equal.
    """

    path: str
    runtime: str
    group: str
    equal: bool
    first_difference: str | None = None


@dataclass(frozen=True, slots=True)
class TemplateParity:
    """A runtime's rendering of the probe's chats by the build's template.

    Attributes:
        path: the build.
        runtime: its name.
        equal: all texts are the checkpoint's.
        first_difference: in words; None where all is equal.
    """

    path: str
    runtime: str
    equal: bool
    first_difference: str | None = None


@dataclass(frozen=True, slots=True)
class NotMeasured:
    """A runtime that was not asked, and why."""

    path: str
    runtime: str
    why: str


@dataclass(frozen=True, slots=True)
class RuntimeParity:
    """All of one runtime and build, for a row of a table.

    Attributes:
        path: the build.
        runtime: its name.
        groups: how many groups there are.
        different: those that are not equal.
        template: of the chats; None where the runtime renders none.
    """

    path: str
    runtime: str
    groups: int
    different: tuple[GroupParity, ...]
    template: TemplateParity | None

    @property
    def tokenizer(self) -> str:
        """Whether tokens are equal, in a word or two."""
        if not self.different:
            return f"equal in {self.groups} groups"
        return f"differs in {', '.join(found.group for found in self.different)}"

    @property
    def chats(self) -> str:
        """Whether rendered chats are equal, in a word or two."""
        if self.template is None:
            return "not rendered"
        return "equal" if self.template.equal else "differ"

    @property
    def first_difference(self) -> str:
        """Of tokens, else of chats; empty where all is equal."""
        found = [*(d.first_difference for d in self.different)]
        if self.template is not None:
            found.append(self.template.first_difference)
        return next(filter(None, found), "")


@dataclass(frozen=True, slots=True)
class Parity:
    """The tokenizers and templates of a report's builds in their runtimes."""

    tokenizer: tuple[GroupParity, ...] = ()
    template: tuple[TemplateParity, ...] = ()
    not_measured: tuple[NotMeasured, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The object ``parity``."""
        return asdict(self)

    def by_runtime(self) -> Iterator[RuntimeParity]:
        """A row for each build and runtime, in order."""
        for path, runtime in dict.fromkeys((g.path, g.runtime) for g in self.tokenizer):
            groups = [g for g in self.tokenizer if (g.path, g.runtime) == (path, runtime)]
            rendered = [t for t in self.template if (t.path, t.runtime) == (path, runtime)]
            yield RuntimeParity(
                path,
                runtime,
                len(groups),
                tuple(g for g in groups if not g.equal),
                rendered[0] if rendered else None,
            )


NOT_COMPARED = Parity()
