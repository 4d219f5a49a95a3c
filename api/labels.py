"""What a user calls a model: the name of its builds, and key-values for their metadata."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.formats.gguf.user_metadata import checked
from lfmq.quant.errors import UsageError

_LONGEST = 150  # bytes: suffixes follow, and file systems take 255


@dataclass(frozen=True, slots=True)
class Labels:
    """A name and metadata in place of the checkpoint's own.

    Attributes:
        name: of the builds; None for the checkpoint's.
        metadata: key-values for GGUF.
    """

    name: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def checked(self, formats: Iterable[str]) -> "Labels":
        """These, after checking that they can be written.

        Raises:
            UsageError: the name is none for a file, or a key or a value none for a GGUF.
        """
        if self.name is not None:
            _check_name(self.name)
        if self.metadata and "gguf" not in formats:
            raise UsageError("--metadata is for GGUF, which --to leaves out; add --to gguf")
        return replace(self, metadata=checked(self.metadata))

    def applied(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint under this name and with this metadata."""
        assets = replace(
            checkpoint.assets,
            name=checkpoint.assets.name if self.name is None else self.name,
            metadata=self.metadata,
        )
        return replace(checkpoint, assets=assets)


def _check_name(name: str) -> None:
    bad = (
        not name.isprintable()
        or name != name.strip()
        or name.startswith((".", "-"))
        or any(c in name for c in "/\\:")
        or not 0 < len(name.encode("utf-8", "replace")) <= _LONGEST
    )
    if bad:
        shown = repr(name) if len(name) <= 60 else f"{name[:57]!r}..."
        raise UsageError(
            f"--name {shown}: expected a name for files of at most {_LONGEST} bytes, without "
            "slashes, backslashes and colons, a dot or a dash in front, or blanks around it"
        )
