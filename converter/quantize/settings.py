"""The values of calibration: what it does, the tokens it reads, what it found."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lfmq.converter.model.text import Windows
from lfmq.quant import gptq

# Tokens an expert needs for its moments alone to be trusted, in units of its inputs.
QUOTA = 2


@dataclass(frozen=True, slots=True)
class Settings:
    """What calibration does; docs/quantization.md shows what each part is worth.

    A ridge is in units of the mean second moment; None leaves the step toward the reference out.

    Attributes:
        sweeps: of coordinate descent after GPTQ.
        damping: of second moments.
        affinity: weigh an expert's tokens by the router's weight.
        ridge: for weights that all tokens read.
        residual_ridge: for those that write to the residual stream, which also make up for what
            the stream lacks.
        expert_ridge: for experts.
        refit_router: try the step for routers, too.
    """

    sweeps: int = gptq.SWEEPS
    damping: float = gptq.DAMPING
    affinity: bool = True
    ridge: float | None = 0.1
    residual_ridge: float | None = 1.0
    expert_ridge: float | None = 1.0
    refit_router: bool = True


@dataclass(frozen=True, slots=True)
class ExpertCoverage:
    """What calibration saw of an expert and what came of it.

    Attributes:
        layer: of the model.
        expert: in the layer.
        tokens: routed to it.
        quota: tokens it needs to be judged by its own alone.
        rule: ``own``, ``shrunk`` (toward the layer) or ``pooled`` (no token).
        error_nearest: relative output error of its gate, up and down rounded to nearest.
        error: the same as quantized.
    """

    layer: int
    expert: int
    tokens: int
    quota: int
    rule: str
    error_nearest: float
    error: float


@dataclass(frozen=True, slots=True)
class RouterStep:
    """Held-out agreement with the reference's expert sets before and after a router's refit."""

    layer: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Whether the refit was kept."""
        return self.after > self.before


@dataclass(frozen=True, slots=True)
class Calibration:
    """The tokens to calibrate with, and what was found, filled in while the layers run."""

    windows: Windows
    settings: Settings = Settings()
    experts: list[ExpertCoverage] = field(default_factory=list)
    routers: list[RouterStep] = field(default_factory=list)

    def found(self) -> dict[str, Any]:
        """What was found so far, for a state file."""
        return {
            "experts": [asdict(e) for e in self.experts],
            "routers": [asdict(r) for r in self.routers],
        }

    def take_up(self, found: dict[str, Any]) -> None:
        """Go on from what :meth:`found` gave."""
        self.experts[:] = [ExpertCoverage(**e) for e in found["experts"]]
        self.routers[:] = [RouterStep(**r) for r in found["routers"]]

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq convert --json``; a model without experts has no such keys."""
        found: dict[str, Any] = {"text_sha256": self.windows.text_sha256}
        if self.experts:
            found["experts"] = [asdict(e) for e in self.experts]
            found["routers"] = [asdict(r) | {"kept": r.kept} for r in self.routers]
        return found
