"""Where a long pass over the layers is saved, so that a killed one goes on at a layer."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lfmq.formats.writing.temporary import make_way
from lfmq.quant.errors import PlanError


@dataclass(frozen=True, slots=True)
class StateFile:
    """One file that holds the state after the last finished layer.

    Attributes:
        path: of the file; beside the pass's output.
        key: what the state depends on; a state saved under another key is not taken up.
    """

    path: Path
    key: str

    def load(self) -> tuple[int, dict[str, Any], dict[str, torch.Tensor]] | None:
        """The layer to go on with, facts and tensors; None without a whole state of this key."""
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["state"])
                if header["key"] != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None  # none, or one cut off: it is replaced
        return header["layer"], header["facts"], tensors

    def save(self, layer: int, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Replace the state by that before ``layer``.

        Raises:
            PlanError: it cannot be written.
        """
        header = {"key": self.key, "layer": layer, "facts": facts}
        part = self.path.with_name(self.path.name + ".part")
        try:
            make_way(part)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: t.contiguous().numpy() for name, t in tensors.items()},
                part,
                {"state": json.dumps(header)},
            )
            part.replace(self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            raise PlanError(f"{self.path}: cannot be written ({error})") from error

    def remove(self) -> None:
        """Drop the state of a pass that ended."""
        with suppress(OSError):
            self.path.unlink()
