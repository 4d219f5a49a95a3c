"""Quantization from what calibration tokens show, layer by layer, each expert from its own tokens.

Two streams of hidden states run through the layers: the reference's, and that of the quantized
model so far. Every weight is quantized (``lfmq.quant.gptq``) for the inputs it will see, those of
the quantized stream; one layer and two streams are in memory at a time. For W with inputs X:

- An expert's moments are those of the tokens routed to it, weighted by the router's weight
  (affinity, MoEQuant 2025). Below its quota of 2 K tokens (Olive's rule) they shrink toward the
  layer's pooled moments in proportion to what is missing; without a token these stand in.
- Before it is rounded, a weight of the shared layers takes a ridge-regression step toward what the
  reference puts out from its own hidden states (the asymmetry of GPTAQ 2025, in closed form); what
  writes to the residual stream also makes up for what the stream already lacks.
- The router is float everywhere. It takes the same step toward the reference's logits, and keeps
  it only if held-out tokens then agree more often with the reference's choice of experts.

Results do not depend on the number of threads: work is cut into fixed batches and experts, torch
runs single-threaded in each, and sums are taken in order.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.forward import Model, Routing, embed, mix_tokens, normed, route
from lfmq.converter.nearest import Write, not_finite, quantize_entry
from lfmq.converter.text import Windows
from lfmq.quant import gptq, rtn
from lfmq.quant.types import Entry, Plan, Quantized, Scheme, Weight, dequantize

# Tokens an expert needs for its moments alone to be trusted, in units of its inputs.
QUOTA = 2
# Ridge of the step toward the reference, in units of the mean second moment. The larger one for
# weights whose step also takes up what the residual stream lacks.
RIDGE = 0.1
RESIDUAL_RIDGE = 1.0
EXPERT_RIDGE = 1.0
# Every eighth window is held out when a refitted router is judged.
_HOLD_OUT = 8
# Tokens of a batch; batches are the unit of parallel work outside the experts.
_BATCH_TOKENS = 4096
# Every eighth token stands for the layer when moments are pooled through an expert.
_POOL_STRIDE = 8


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
    experts: list[ExpertCoverage] = field(default_factory=list)
    routers: list[RouterStep] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """For ``lfmq convert --json``."""
        return {
            "text_sha256": self.windows.text_sha256,
            "experts": [asdict(e) for e in self.experts],
            "routers": [asdict(r) | {"kept": r.kept} for r in self.routers],
        }


def calibrated_units(
    checkpoint: Checkpoint, plan: Plan, calibration: Calibration, write: Write, threads: int
) -> Iterator[tuple[Entry, ...]]:
    """Quantize and write the plan's units in the order of the model, yielding each when done.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
        ValidationError: a hidden state is not finite, or a token is outside the vocabulary.
    """
    with single_threaded_torch(), ThreadPoolExecutor(threads) as pool:
        run = _Run(checkpoint, plan, calibration, write, pool)
        try:
            yield from run.units()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One thread in each torch operation, so that its sums do not depend on a number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Run:
    """The streams and the finished weights of the layer at hand."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        calibration: Calibration,
        write: Write,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._checkpoint = checkpoint
        self._entries = {e.name: e for e in plan.entries}
        self._units = {unit[0].name: unit for unit in plan.units()}
        self._calibration = calibration
        self._write = write
        self._pool = pool
        self._done: dict[str, NDArray[np.float32]] = {}
        self._reference = Model(plan.geometry, checkpoint.read)
        self._model = Model(plan.geometry, self._read)
        ids = calibration.windows.ids
        self._windows = ids.shape
        step = max(1, _BATCH_TOKENS // ids.shape[1])
        self._parts = [slice(i, i + step) for i in range(0, ids.shape[0], step)]

    def _read(self, name: str) -> NDArray[np.float32]:
        found = self._done.get(name)
        return self._checkpoint.read(name) if found is None else found

    def units(self) -> Iterator[tuple[Entry, ...]]:
        ids = self._calibration.windows.ids
        yield from self._plain("model.embed_tokens.weight")
        self._states, self._wanted = embed(self._model, ids), embed(self._reference, ids)
        for layer in range(self._model.geometry.num_hidden_layers):
            self._done.clear()
            prefix = f"model.layers.{layer}."
            yield from self._mixer(layer, prefix)
            if layer < self._model.geometry.num_dense_layers:
                yield from self._dense(layer, prefix)
            else:
                yield from self._routed(layer, prefix)
        yield from self._plain("model.embedding_norm.weight")

    # ---- finishing weights

    def _plain(self, *names: str) -> Iterator[tuple[Entry, ...]]:
        """Weights that calibration does not touch."""
        for name in names:
            weight = quantize_entry(self._checkpoint, self._entries[name])
            yield self._finish({name: weight})

    def _finish(self, weights: Mapping[str, Weight]) -> tuple[Entry, ...]:
        self._write(weights)
        for name, weight in weights.items():
            values = dequantize(weight) if isinstance(weight, Quantized) else weight
            self._done[name] = values
        return self._units[next(iter(weights))]

    def _quantize(self, name: str, w: NDArray[np.float32], moments: gptq.Moments) -> Weight:
        entry = self._entries[name]
        if not isinstance(entry.storage, Scheme):
            return quantize_entry(self._checkpoint, entry)
        try:
            return gptq.quantize(np.ascontiguousarray(w), moments, entry.storage)
        except ValueError as error:
            raise not_finite(self._checkpoint, entry, "float16") from error

    # ---- attention and convolution

    def _mixer(self, layer: int, prefix: str) -> Iterator[tuple[Entry, ...]]:
        first, last = ["conv.in_proj"], "conv.out_proj"
        floats = ["conv.conv"]
        if self._model.geometry.layer_types[layer] != "conv":
            first, last = [f"self_attn.{p}_proj" for p in "qkv"], "self_attn.out_proj"
            floats = ["self_attn.q_layernorm", "self_attn.k_layernorm"]
        yield from self._plain(*(f"{prefix}{n}.weight" for n in ("operator_norm", *floats)))
        norm = prefix + "operator_norm.weight"
        batches = self._batches(
            lambda part: (
                normed(self._model, norm, self._states[part]),
                normed(self._reference, norm, self._wanted[part]),
                None,
            )
        )
        yield from self._shared([f"{prefix}{n}.weight" for n in first], batches, RIDGE)
        out = f"{prefix}{last}.weight"
        batches = self._batches(
            lambda part: (
                _input_of(self._model, layer, self._states[part], out),
                _input_of(self._reference, layer, self._wanted[part], out),
                (self._wanted[part] - self._states[part]).flatten(0, 1),
            )
        )
        yield from self._shared([out], batches, RESIDUAL_RIDGE)
        self._states = self._map(lambda p: mix_tokens(self._model, layer, self._states[p]))
        self._wanted = self._map(lambda p: mix_tokens(self._reference, layer, self._wanted[p]))

    def _map(self, function: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(self._pool.map(function, self._parts)))

    def _batches(self, function: "Callable[[slice], _Batch]") -> "Iterable[_Batch]":
        return self._pool.map(function, self._parts)

    # ---- weights every token reads

    def _shared(
        self, names: list[str], batches: "Iterable[_Batch]", ridge: float
    ) -> Iterator[tuple[Entry, ...]]:
        """Weights that share their inputs: moments and steps from all batches, then rounding."""
        weights = {n: torch.from_numpy(np.array(self._checkpoint.read(n))) for n in names}
        moments: torch.Tensor | None = None
        missing: dict[str, torch.Tensor] = {}
        for x, wanted, lacking in batches:
            part = x.T @ x
            moments = part if moments is None else moments + part
            for name, w in weights.items():
                gap = F.linear(wanted - x, w)
                gap = gap if lacking is None else gap + lacking
                missing[name] = missing.get(name, 0) + gap.T @ x
        assert moments is not None
        ready = gptq.factorize(moments)

        def finish(name: str) -> tuple[str, Weight]:
            w = step_toward(weights[name], moments, missing[name], ridge)
            return name, self._quantize(name, w, ready)

        for name, weight in self._pool.map(finish, names):
            yield self._finish({name: weight})

    def _dense(self, layer: int, prefix: str) -> Iterator[tuple[Entry, ...]]:
        norm = prefix + "ffn_norm.weight"
        yield from self._plain(norm)
        gate, up, down = (f"{prefix}feed_forward.{p}.weight" for p in ("w1", "w3", "w2"))

        def inputs(part: slice) -> "tuple[torch.Tensor, torch.Tensor]":
            x = normed(self._model, norm, self._states[part])
            return x, normed(self._reference, norm, self._wanted[part])

        yield from self._shared(
            [gate, up], self._batches(lambda part: (*inputs(part), None)), RIDGE
        )
        own, reference = self._pair(self._model, gate, up), self._pair(self._reference, gate, up)

        def inner(part: slice) -> "_Batch":
            x, wanted = inputs(part)
            lacking = (self._wanted[part] - self._states[part]).flatten(0, 1)
            return _gated(x, *own), _gated(wanted, *reference), lacking

        yield from self._shared([down], self._batches(inner), RESIDUAL_RIDGE)
        w2, w2_reference = self._model.weight(down), self._reference.weight(down)

        def add(part: slice) -> torch.Tensor:
            y = F.linear(_gated(inputs(part)[0], *own), w2)
            return self._states[part] + y.view_as(self._states[part])

        def add_reference(part: slice) -> torch.Tensor:
            y = F.linear(_gated(inputs(part)[1], *reference), w2_reference)
            return self._wanted[part] + y.view_as(self._wanted[part])

        states, wanted = self._map(add), self._map(add_reference)
        self._states, self._wanted = states, wanted

    def _pair(self, model: Model, gate: str, up: str) -> tuple[torch.Tensor, torch.Tensor]:
        return model.weight(gate), model.weight(up)

    # ---- router and experts

    def _routed(self, layer: int, prefix: str) -> Iterator[tuple[Entry, ...]]:
        norm = prefix + "ffn_norm.weight"
        yield from self._plain(norm)
        x = self._map(lambda p: normed(self._model, norm, self._states[p]))
        wanted = self._map(lambda p: normed(self._reference, norm, self._wanted[p]))
        target = route(self._reference, layer, wanted)
        if self._model.geometry.use_expert_bias:
            yield from self._plain(f"{prefix}feed_forward.expert_bias")
        yield self._finish({f"{prefix}feed_forward.gate.weight": self._router(layer, x, wanted)})
        layer_inputs = _LayerInputs(
            layer, x, wanted, route(self._model, layer, x), target, x.T @ x / len(x)
        )
        y, y_wanted = torch.zeros_like(x), torch.zeros_like(x)
        experts = range(self._model.geometry.num_experts)
        for found in self._pool.map(lambda e: self._expert(layer_inputs, e), experts):
            y.index_add_(0, found.token, found.y)
            y_wanted.index_add_(0, found.token_wanted, found.y_wanted)
            self._calibration.experts.append(found.coverage)
            yield self._finish(found.weights)
        self._states = self._states + y.view_as(self._states)
        self._wanted = self._wanted + y_wanted.view_as(self._wanted)

    def _router(self, layer: int, x: torch.Tensor, wanted: torch.Tensor) -> NDArray[np.float32]:
        """The router, refitted where held-out tokens say that it helps."""
        name = f"model.layers.{layer}.feed_forward.gate.weight"
        original = quantize_entry(self._checkpoint, self._entries[name])
        assert not isinstance(original, Quantized)
        held = torch.arange(self._windows[0]) % _HOLD_OUT == _HOLD_OUT - 1
        held = held.repeat_interleave(self._windows[1])
        w = torch.from_numpy(np.array(original))
        fit = ~held
        gap = F.linear(wanted[fit] - x[fit], w)
        refitted = step_toward(w, x[fit].T @ x[fit], gap.T @ x[fit], RIDGE)
        if not held.any():
            return original

        def agreement(gate: NDArray[np.float32]) -> float:
            model = Model(self._model.geometry, lambda n: gate if n == name else self._read(n))
            sets = route(model, layer, x[held]).selected.sort(-1).values
            expected = route(self._reference, layer, wanted[held]).selected.sort(-1).values
            return float((sets == expected).all(-1).double().mean())

        step = RouterStep(layer, agreement(original), agreement(refitted))
        self._calibration.routers.append(step)
        return refitted if step.kept else original

    def _expert(self, inputs: "_LayerInputs", expert: int) -> "_Expert":
        prefix = f"model.layers.{inputs.layer}.feed_forward.experts.{expert}."
        names = [f"{prefix}{part}.weight" for part in ("w1", "w3", "w2")]
        w1, w3, w2 = (torch.from_numpy(np.array(self._checkpoint.read(n))) for n in names)
        token, affinity = _routed_to(inputs.routing, expert)
        token_wanted, affinity_wanted = _routed_to(inputs.target, expert)
        x, quota = inputs.x[token], QUOTA * inputs.x.shape[1]
        mean_affinity = float(inputs.routing.affinity.mean())
        judge = _Judge(self._quantize)

        def moments(own: torch.Tensor, pooled: Callable[[], torch.Tensor]) -> torch.Tensor:
            lack = max(0.0, 1 - len(token) / quota)
            found = own.T @ (own * affinity[:, None])
            return found + (lack * quota * mean_affinity) * pooled() if lack else found

        def quantize(
            which: tuple[int, ...], w: list[torch.Tensor], seen: torch.Tensor, ideal: torch.Tensor,
            pooled: Callable[[], torch.Tensor],
        ) -> list[torch.Tensor]:  # fmt: skip
            h = moments(seen, pooled)
            ready = gptq.factorize(h)
            out = []
            for i, original in zip(which, w, strict=True):
                gap = F.linear(ideal - seen, original) * affinity[:, None]
                stepped = step_toward(original, h, gap.T @ seen, EXPERT_RIDGE)
                out.append(judge(names[i], original, stepped, h, ready))
            return out

        q1, q3 = quantize((0, 1), [w1, w3], x, inputs.wanted[token], lambda: inputs.pooled)
        inner = _gated(x, q1, q3)

        def pooled_inner() -> torch.Tensor:
            sample = _gated(inputs.x[::_POOL_STRIDE], q1, q3)
            return sample.T @ sample / len(sample)

        (q2,) = quantize((2,), [w2], inner, _gated(inputs.wanted[token], w1, w3), pooled_inner)
        ideal = F.linear(_gated(inputs.wanted[token_wanted], w1, w3), w2)
        tokens = len(token)
        rule = "own" if tokens >= quota else "shrunk" if tokens else "pooled"
        coverage = ExpertCoverage(inputs.layer, expert, tokens, quota, rule, *judge.errors())
        return _Expert(
            judge.weights,
            token,
            F.linear(inner, q2) * affinity[:, None],
            token_wanted,
            ideal * affinity_wanted[:, None],
            coverage,
        )


_Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class _LayerInputs:
    """What a layer's experts share: inputs [T, K] of both streams, routing, pooled moments."""

    layer: int
    x: torch.Tensor
    wanted: torch.Tensor
    routing: Routing
    target: Routing
    pooled: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Expert:
    """A quantized expert and its share of the layer's output in both streams."""

    weights: dict[str, Weight]
    token: torch.Tensor
    y: torch.Tensor
    token_wanted: torch.Tensor
    y_wanted: torch.Tensor
    coverage: ExpertCoverage


class _Judge:
    """Quantizes an expert's weights and sums their relative errors, ours and the nearest's."""

    def __init__(self, quantize: Callable[..., Weight]) -> None:
        self._quantize = quantize
        self._nearest: list[float] = []
        self._ours: list[float] = []
        self.weights: dict[str, Weight] = {}

    def __call__(
        self,
        name: str,
        original: torch.Tensor,
        stepped: NDArray[np.float32],
        h: torch.Tensor,
        ready: gptq.Moments,
    ) -> torch.Tensor:
        weight = self._quantize(name, stepped, ready)
        self.weights[name] = weight
        if not isinstance(weight, Quantized):
            return torch.from_numpy(weight)
        values = torch.from_numpy(dequantize(weight))
        plain = torch.from_numpy(dequantize(rtn.quantize(original.numpy(), weight.scheme)))
        total = _loss(original, h)
        if total > 0:
            self._ours.append(_loss(values - original, h) / total)
            self._nearest.append(_loss(plain - original, h) / total)
        return values

    def errors(self) -> tuple[float, float]:
        """Mean over the expert's weights: rounded to nearest, and as quantized."""
        if not self._ours:
            return 0.0, 0.0
        return float(np.mean(self._nearest)), float(np.mean(self._ours))


def step_toward(
    w: torch.Tensor, moments: torch.Tensor, missing: torch.Tensor, ridge: float
) -> NDArray[np.float32]:
    """W plus the ridge regression of what its outputs lack on its inputs.

    Args:
        w: [N, K].
        moments: of its inputs, [K, K].
        missing: sum over tokens of lacking output times input, [N, K].
        ridge: in units of the mean diagonal of ``moments``.
    """
    h = moments.double()
    mean = torch.diagonal(h).mean()
    if not mean > 0:
        return np.array(w.numpy())
    h = h + ridge * mean * torch.eye(len(h), dtype=h.dtype)
    factor = torch.linalg.cholesky(h)
    step = torch.cholesky_solve(missing.double().T, factor).T
    stepped: NDArray[np.float32] = (w.double() + step).float().contiguous().numpy()
    return stepped


def _loss(difference: torch.Tensor, h: torch.Tensor) -> float:
    return float(((difference @ h) * difference).sum())


def _gated(x: torch.Tensor, w1: torch.Tensor, w3: torch.Tensor) -> torch.Tensor:
    return F.silu(F.linear(x, w1)).mul_(F.linear(x, w3))


def _routed_to(routing: Routing, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    token, place = torch.where(routing.selected == expert)
    return token, routing.affinity[token, place]


def _input_of(model: Model, layer: int, states: torch.Tensor, name: str) -> torch.Tensor:
    """The inputs [T, K] of one weight of a layer's mixer."""
    seen: list[torch.Tensor] = []

    def observe(names: tuple[str, ...], x: torch.Tensor, _: torch.Tensor | None) -> None:
        if name in names:
            seen.append(x)

    mix_tokens(model, layer, states, observe)
    return torch.cat(seen)
