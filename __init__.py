"""Quantize LFM2 checkpoints and write GGUF, MLX, ONNX and compressed-tensors builds.

Every function here does what the command of its name does; docs/python.md has an example.
Each is imported when it is first used, so that ``import lfmq`` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfmq.api.calibrate import CalibrationReport, calibrate
    from lfmq.api.checkpoint import open_checkpoint
    from lfmq.api.compare import compare
    from lfmq.api.convert import ConversionReport, convert
    from lfmq.api.plan import PlanReport, plan
    from lfmq.api.target import load_recipe
    from lfmq.api.validate import validate
    from lfmq.api.verify import verify
    from lfmq.converter.checkpoint.checkpoint import Checkpoint
    from lfmq.converter.jobs.execution import Amount, Execution, Step
    from lfmq.converter.plan.recipe import Recipe
    from lfmq.quant.errors import (
        CheckpointError,
        ClusterError,
        LfmqError,
        PlanError,
        RecipeError,
        UnsupportedError,
        UsageError,
        ValidationError,
    )

    __version__: str

__all__ = [
    "Amount",
    "CalibrationReport",
    "Checkpoint",
    "CheckpointError",
    "ClusterError",
    "ConversionReport",
    "Execution",
    "LfmqError",
    "PlanError",
    "PlanReport",
    "Recipe",
    "RecipeError",
    "Step",
    "UnsupportedError",
    "UsageError",
    "ValidationError",
    "__version__",
    "calibrate",
    "compare",
    "convert",
    "load_recipe",
    "open_checkpoint",
    "plan",
    "validate",
    "verify",
]

# Where each name is defined.
_MODULES = {
    "api.calibrate": ("CalibrationReport", "calibrate"),
    "api.checkpoint": ("open_checkpoint",),
    "api.compare": ("compare",),
    "api.convert": ("ConversionReport", "convert"),
    "api.plan": ("PlanReport", "plan"),
    "api.target": ("load_recipe",),
    "api.validate": ("validate",),
    "api.verify": ("verify",),
    "converter.checkpoint.checkpoint": ("Checkpoint",),
    "converter.jobs.execution": ("Amount", "Execution", "Step"),
    "converter.plan.recipe": ("Recipe",),
    "quant.errors": tuple(n for n in __all__ if n.endswith("Error")),
}
_HOMES = {name: f"lfmq.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a name when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("lfmq")
    elif name in _HOMES:
        found = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'lfmq' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
