"""Limits of a release gate: which there are, and the TOML file that states them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lfmq.converter.plan.toml_text import parse_toml
from lfmq.quant.errors import ValidationError
from lfmq.validation.measure.figures import (
    FIGURES,
    GENERATION_FIGURES,
    KLD,
    ROUTING,
    figures_of,
    limits_of,
)

Document = Mapping[str, Any]
_Sense = Literal["max", "min"]

# The figure of each limit.
LIMITS = limits_of(FIGURES)
DOMAIN_LIMITS = limits_of(figures_of("domain"))
GENERATION_LIMITS = limits_of(GENERATION_FIGURES)
# Limits that depend on another figure of the same report.
RELATIVE = {
    "max_kld_over_floor": KLD,
    "max_routing_below_floor": ROUTING,
    "max_routing_below_read": ROUTING,
}
_ALL = LIMITS | RELATIVE
_BEYOND = 1e300  # larger than any limit
_TOLERANCE = 2.0


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What every build must reach.

    Attributes:
        limits: keys of ``LIMITS`` and ``RELATIVE``.
        domains: by domain, keys of ``DOMAIN_LIMITS``.
        generation: keys of ``GENERATION_LIMITS``.
        baseline: the document of ``lfmq validate --json`` that no figure may be worse than.
        baseline_path: where it was read from.
        tolerance: standard errors a figure may be worse than the baseline's.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    domains: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    generation: Mapping[str, float] = field(default_factory=dict)
    baseline: Document | None = None
    baseline_path: Path | None = None
    tolerance: float = _TOLERANCE

    def with_limits(self, **given: float | None) -> "Thresholds":
        """The same with some limits replaced; None leaves one as it was."""
        unknown = given.keys() - set(_ALL)
        if unknown:
            raise TypeError(f"no such limits: {sorted(unknown)}")
        stated = {key: value for key, value in given.items() if value is not None}
        return replace(self, limits={**self.limits, **stated})

    def check_experts(self, experts: bool) -> None:
        """Refuse limits on routing for a model without experts.

        Args:
            experts: whether the model has any.

        Raises:
            ValidationError: there is such a limit.
        """
        stated = [("", self.limits), *((f"[domains.{d}] ", t) for d, t in self.domains.items())]
        for where, limits in stated:
            for key in limits:
                if not experts and _ALL[key].routing:
                    raise ValidationError(
                        f"{where}{key} limits the {_ALL[key].title}, and the model has no "
                        "experts to route to; leave the limit out for a dense model"
                    )

    def check_text(self, text_sha256: str, tokens: int, sequence: int) -> None:
        """Refuse a baseline of other tokens before anything is run.

        Raises:
            ValidationError: its figures cannot be compared.
        """
        if self.baseline is None:
            return
        found = self.baseline.get("conditions")
        found = found if isinstance(found, dict) else {}
        wanted = {"text_sha256": text_sha256, "tokens": tokens, "sequence": sequence}
        for key, value in wanted.items():
            if found.get(key) != value:
                raise ValidationError(
                    f"{self.baseline_path}: its {key} is {found.get(key)}, this run's {value}; "
                    "a baseline must be of the same text, --tokens and --sequence"
                )


def sense_of(limit: str) -> _Sense:
    """Whether a limit is the highest or the lowest allowed, by its name."""
    return "max" if limit.startswith("max_") else "min"


def load_thresholds(path: Path) -> Thresholds:
    """Read a TOML file of limits; every key must be one that exists.

    Raises:
        ValidationError: what cannot be read, is unknown or is no number.
    """
    document = _read_toml(path)
    known = ("limits", "domains", "generation", "baseline", "tolerance_stderr")
    _refuse_unknown(path, "", document, known)
    domains = _table(path, "domains", document.get("domains", {}))
    tolerance = document.get("tolerance_stderr", _TOLERANCE)
    if not _is_number(tolerance) or tolerance < 0:
        raise ValidationError(
            f"{path}: tolerance_stderr is {tolerance!r}, expected a number of standard errors"
        )
    where = _baseline_path(path, document.get("baseline"))
    return Thresholds(
        _numbers(path, "limits", document.get("limits", {}), _ALL),
        {d: _numbers(path, f"domains.{d}", t, DOMAIN_LIMITS) for d, t in domains.items()},
        _numbers(path, "generation", document.get("generation", {}), GENERATION_LIMITS),
        None if where is None else _read_baseline(where),
        where,
        float(tolerance),
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(path.read_text("utf-8"))
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValidationError(f"{path}: not TOML ({error!s:.150})") from error


def _baseline_path(path: Path, name: Any) -> Path | None:
    """Relative to the file that names it."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValidationError(f"{path}: baseline is {name!r}, expected a file's name")
    return path.parent / name


def _read_baseline(path: Path) -> Document:
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValidationError(f"{path}: not JSON ({error})") from error
    builds = document.get("builds") if isinstance(document, dict) else None
    if not isinstance(builds, list) or not all(isinstance(b, dict) for b in builds):
        raise ValidationError(f"{path}: not a report; save one with lfmq validate --json")
    found: Document = document
    return found


def _refuse_unknown(
    path: Path, where: str, table: Mapping[str, Any], known: tuple[str, ...] | Mapping[str, Any]
) -> None:
    for key in table:
        if key not in known:
            place = f"[{where}]: " if where else ""
            raise ValidationError(
                f"{path}: {place}unknown key {key!r}; there are {', '.join(known)}"
            )


def _table(path: Path, where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValidationError(f"{path}: {where} is {value!r}, expected a table [{where}]")
    return value


def _numbers(
    path: Path, where: str, value: Any, known: tuple[str, ...] | Mapping[str, Any]
) -> dict[str, float]:
    table = _table(path, where, value)
    _refuse_unknown(path, where, table, known)
    for key, limit in table.items():
        if not _is_number(limit):
            raise ValidationError(f"{path}: [{where}] {key} is {limit!r}, expected a number")
    return {key: float(limit) for key, limit in table.items()}


def _is_number(value: Any) -> bool:
    # compared, not converted: an integer of TOML can be beyond any float
    return type(value) in (int, float) and -_BEYOND < value < _BEYOND
