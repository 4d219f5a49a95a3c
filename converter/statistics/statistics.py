"""What calibration learned of a checkpoint, as a file: mergeable, reusable, bound to its model.

The file is a safetensors file with one metadata key, ``lfmq``, a JSON object; docs/statistics.md
lists its tensors. It holds second moments by column, not full ones: those are K times larger and
live only while their layer is quantized.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lfmq.converter.model.tensors import Tensor, expected_tensors
from lfmq.converter.quantize.settings import QUOTA
from lfmq.formats.plan import (
    FLOAT_ROLES,
    ModelConfig,
    Role,
    TensorPlan,
)
from lfmq.formats.writing.temporary import make_way
from lfmq.quant.errors import PlanError, ValidationError
from lfmq.quant.grids import ALIASES, GRIDS
from lfmq.quant.types import InputStats, Scheme

VERSION = 2
# Share of the mean importance that every column has at least.
_FLOOR = 0.01
# What losses are measured at, and what other grids' errors are relative to.
MEASURED = Scheme(4)
# Streams in which every shared weight is rounded to nearest.
WHOLE = {"shared": Scheme(8), "shared at 4 bits": MEASURED}
# Grids whose rounding error is measured for every weight, relative to that of ``MEASURED``.
SCHEMES: tuple[Scheme, ...] = tuple(
    Scheme(bits, group, name)
    for name in ("symmetric", "affine_bias", "affine_zero_point", "kquant")
    for bits, groups in GRIDS[name].groups.items()
    for group in groups
)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What rounding a part of the model did to its predictions.

    Attributes:
        error: mean squared change of a token's hidden state where the part ends.
        kld: mean KL divergence at the head, nats.
    """

    error: float
    kld: float


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of one checkpoint.

    Attributes:
        identity: :func:`identity_of` the checkpoint's config.
        texts: sha256 of every text it comes from, sorted.
        tokens: of all texts.
        inputs: by the name of the weight they go into.
        losses: by the name of a weight, the squared error of the layer's output, summed over
            tokens, when that weight alone is rounded to ``MEASURED``; of the embedding and a
            head, their own.
        grids: by the name of a weight, for each of ``SCHEMES``, the error of rounding to it over
            that of rounding to ``MEASURED``; infinite where its rows do not divide.
        parts: by :func:`part_of` weights, all of them at ``MEASURED``; ``head`` is the embedding
            as the output head, or a head of its own; ``shared`` and ``shared at 4 bits`` are every
            shared weight, rounded to nearest.
    """

    identity: str
    texts: tuple[str, ...]
    tokens: int
    inputs: Mapping[str, InputStats]
    losses: Mapping[str, float]
    grids: Mapping[str, tuple[float, ...]]
    parts: Mapping[str, Sensitivity]

    def merge(self, other: "Statistics") -> "Statistics":
        """Those of both texts.

        Raises:
            ValidationError: of different checkpoints, or a text that is in both.
        """
        if self.identity != other.identity:
            raise ValidationError("statistics of different checkpoints cannot be merged")
        if common := set(self.texts) & set(other.texts):
            raise ValidationError(
                f"both statistics hold the text with sha256 {min(common)[:16]}...; it would count "
                "twice"
            )
        share = self.tokens / (self.tokens + other.tokens)
        ours, theirs = self.inputs, other.inputs
        return replace(
            self,
            texts=tuple(sorted(self.texts + other.texts)),
            tokens=self.tokens + other.tokens,
            inputs={name: ours[name] + theirs[name] for name in ours if name in theirs},
            losses={
                name: loss + other.losses[name]
                for name, loss in self.losses.items()
                if name in other.losses
            },
            grids={
                name: tuple(share * a + (1 - share) * b for a, b in pairs)
                for name, found in self.grids.items()
                if name in other.grids
                for pairs in (zip(found, other.grids[name], strict=True),)
            },
            parts={
                part: _mixed(found, other.parts[part], share)
                for part, found in self.parts.items()
                if part in other.parts
            },
        )

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq calibrate --json``; the file has the moments and losses."""
        return {
            "identity": self.identity,
            "texts": self.texts,
            "parts": {part: asdict(found) for part, found in self.parts.items()},
        }

    def importance(self, tensor: TensorPlan) -> NDArray[np.float32] | None:
        """What an error in each column of a weight costs, float32 [K]; None where unknown.

        An expert below its quota shrinks toward its layer in proportion to what it lacks; the
        inner activations of experts have nothing in common, there a constant stands in.
        """
        found = self.inputs.get(tensor.name)
        if found is None:
            return None
        sums, mass = found.sums, found.mass
        quota = QUOTA * len(sums)
        if tensor.expert is not None and found.tokens < quota:
            each = mass / found.tokens if found.tokens else 1.0
            lacking = (quota - found.tokens) * each
            sums, mass = sums + lacking * self._pooled(tensor, found), mass + lacking
        if not sums.any():
            return np.ones(len(sums), np.float32)
        mean = sums / mass
        damped: NDArray[np.float32] = (mean + _FLOOR * mean.mean()).astype(np.float32)
        return damped

    def _pooled(self, tensor: TensorPlan, found: InputStats) -> NDArray[np.float64]:
        if tensor.role is Role.EXPERT_DOWN:
            mean = found.mean
            return np.full(len(mean), mean.mean() or 1.0)
        prefix, _, part = tensor.name.partition(f".experts.{tensor.expert}.")
        pool = None
        for name, moments in self.inputs.items():
            if name.startswith(f"{prefix}.experts.") and name.endswith(f".{part}"):
                pool = moments if pool is None else pool + moments
        assert pool is not None
        return pool.mean


def _mixed(a: Sensitivity, b: Sensitivity, share: float) -> Sensitivity:
    return Sensitivity(
        share * a.error + (1 - share) * b.error, share * a.kld + (1 - share) * b.kld
    )


def identity_of(config: ModelConfig) -> str:
    """sha256 of the model's facts and the names of its tensors."""
    told = ("model_type", "tie_word_embeddings")  # by the names of the tensors
    known = {key: value for key, value in asdict(config).items() if key not in told}
    facts = {"geometry": known, "tensors": [t.name for t in expected_tensors(config)]}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_identity(identity: str, config: ModelConfig, path: Path) -> None:
    """Refuse statistics of another checkpoint.

    Raises:
        ValidationError: the hash of config and tensor names differs.
    """
    expected = identity_of(config)
    if identity != expected:
        raise ValidationError(
            f"{path}: statistics of another checkpoint (config and tensor names hash to "
            f"{identity[:16]}..., this checkpoint's to {expected[:16]}...); calibrate this one"
        )


def save_statistics(path: Path, statistics: Statistics) -> None:
    """Write the file under a temporary name and rename it; equal statistics give equal bytes.

    Raises:
        PlanError: it cannot be written.
    """
    header = {
        "version": VERSION,
        "identity": statistics.identity,
        "texts": statistics.texts,
        "tokens": statistics.tokens,
        "schemes": [astuple(scheme) for scheme in SCHEMES],
        "parts": {part: asdict(s) for part, s in statistics.parts.items()},
    }
    tensors: dict[str, NDArray[Any]] = {}
    for name, found in statistics.inputs.items():
        tensors[f"{name}.sums"] = np.ascontiguousarray(found.sums)
        tensors[f"{name}.seen"] = np.array([found.tokens, found.mass])
    for name, loss in statistics.losses.items():
        tensors[f"{name}.loss"] = np.array([loss], np.float64)
    for name, errors in statistics.grids.items():
        tensors[f"{name}.grids"] = np.array(errors, np.float64)
    part = path.with_name(path.name + ".part")
    try:
        make_way(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, {"lfmq": json.dumps(header)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            part.unlink()
        raise PlanError(f"{path}: cannot be written ({error})") from error


def load_statistics(path: Path, config: ModelConfig) -> Statistics:
    """Read the file of a checkpoint with this config.

    Raises:
        ValidationError: not a statistics file, damaged, or of another checkpoint.
    """
    try:
        with safe_open(path, "numpy") as file:
            header = _header(path, file.metadata())
            check_identity(header["identity"], config, path)
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValidationError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise ValidationError(
            f"{path}: damaged or not a statistics file ({error}); calibrate again"
        ) from error
    inputs, losses, grids = {}, {}, {}
    for tensor in expected_tensors(config):
        name = tensor.name
        if f"{name}.sums" in stored:
            inputs[name] = _moments(path, tensor, stored)
        if f"{name}.loss" in stored:
            losses[name] = float(_sound(path, f"{name}.loss", stored, (1,))[0])
        if f"{name}.grids" in stored:
            grids[name] = tuple(
                _sound(path, f"{name}.grids", stored, (len(SCHEMES),), infinite=True).tolist()
            )
    parts = {part: Sensitivity(**s) for part, s in header["parts"].items()}
    return Statistics(
        header["identity"], tuple(header["texts"]), header["tokens"], inputs, losses, grids, parts
    )


def _header(path: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {})["lfmq"])
        if header["version"] != VERSION:
            raise ValidationError(
                f"{path}: statistics version {header['version']}, this lfmq reads {VERSION}"
            )
        for entry in header["parts"].values():
            if not all(_is_share(value) for value in astuple(Sensitivity(**entry))):
                raise TypeError(f"parts has {entry}")
        measured = [(b, g, ALIASES.get(grid, grid)) for b, g, grid in header["schemes"]]
        if measured != [astuple(scheme) for scheme in SCHEMES]:
            raise ValidationError(f"{path}: measured at other grids; calibrate again")
        if not isinstance(header["identity"], str):
            raise TypeError("identity")
        if type(header["tokens"]) is not int or not 0 < header["tokens"] < 2**63:
            raise TypeError(f"tokens is {header['tokens']}")
        if not all(isinstance(text, str) for text in header["texts"]):
            raise TypeError("texts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValidationError(
            f"{path}: not a statistics file of lfmq ({error!r:.150}); lfmq calibrate makes one"
        ) from error
    return dict(header)


def _is_share(value: Any) -> bool:
    """Whether it is a number that an error or a divergence can be."""
    return type(value) in (int, float) and 0 <= value < 1e300


def _moments(path: Path, tensor: Tensor, stored: Mapping[str, NDArray[Any]]) -> InputStats:
    sums = _sound(path, f"{tensor.name}.sums", stored, (tensor.shape[-1],))
    tokens, mass = _sound(path, f"{tensor.name}.seen", stored, (2,))
    return InputStats(int(tokens), float(mass), sums)


def _sound(
    path: Path,
    name: str,
    stored: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    *,
    infinite: bool = False,
) -> NDArray[np.float64]:
    found = stored.get(name)
    if found is None or found.shape != shape or found.dtype != np.float64:
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise ValidationError(f"{path}: {name} is {what}, expected float64 {list(shape)}")
    if not (found >= 0).all() or not (infinite or np.isfinite(found).all()):
        raise ValidationError(f"{path}: {name} holds a negative or not finite value")
    return found


def has_losses(statistics: Statistics, config: ModelConfig) -> bool:
    """Whether widths can be chosen from it; an imported imatrix has moments alone."""
    weights = [t for t in expected_tensors(config) if t.role not in FLOAT_ROLES]
    parts = {"head", *WHOLE, *(part_of(t) for t in weights)}
    return parts <= set(statistics.parts) and all(
        t.name in statistics.losses and t.name in statistics.grids for t in weights
    )


def part_of(tensor: Tensor | TensorPlan) -> str:
    """The weights whose errors cost the same at the head: ``embedding``, ``3.mixer``, ``0.dense``.

    Of an MoE layer ``3.inner`` are the gate and up projections, ``3.down`` the down projections.
    """
    kinds = {
        Role.EXPERT_GATE: "inner",
        Role.EXPERT_UP: "inner",
        Role.EXPERT_DOWN: "down",
        Role.DENSE: "dense",
    }
    if tensor.role in (Role.EMBEDDING, Role.HEAD):
        return tensor.role.value
    return f"{tensor.layer}.{kinds.get(tensor.role, 'mixer')}"
