"""The pass that gathers statistics: the reference's hidden states, layer by layer.

Beside the reference a second set of streams runs over the first windows: for each MoE layer one
whose experts are rounded to 4 bits in that layer alone, and one with all shared weights at 8
bits. What each does to the predictions says how much an error in its layer costs (docs/
statistics.md). A layer's state is saved before the next begins, so a killed pass goes on there.

W windows, S tokens a window, T = W * S, H hidden size, C windows of the streams.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.calibration import ExpertCoverage, Settings
from lfmq.converter.checkpoint import Checkpoint
from lfmq.converter.experts import FinishedExpert, LayerInputs, gated, quantize_expert
from lfmq.converter.forward import (
    Model,
    Routing,
    embed,
    feed_forward,
    mix_tokens,
    normed,
    route,
)
from lfmq.converter.nearest import not_finite
from lfmq.converter.passes import batches, steady_torch
from lfmq.converter.statefile import StateFile
from lfmq.converter.statistics import LOSS_BITS, Sensitivity, Statistics, identity_of
from lfmq.converter.tensors import expected_tensors
from lfmq.converter.text import Windows
from lfmq.converter.workers import Workers, open_workers
from lfmq.quant import gptq, rtn
from lfmq.quant.types import SHARED_ROLES, InputMoments, Quantized, Scheme, Weight, dequantize

# Tokens the streams run over; their second half of each window is scored.
STREAM_TOKENS = 8192
_NARROW, _WIDE = (Scheme(bits) for bits in LOSS_BITS)
# Losses are of weights as GPTQ rounds them, with nothing that needs the other stream.
_SETTINGS = Settings(expert_ridge=None)
# Positions whose predictions are compared at once.
_HEAD_TOKENS = 512

Progress = Callable[[int, int], None]
Moments = dict[str, InputMoments]
_EMBEDDING, _FINAL_NORM = "model.embed_tokens.weight", "model.embedding_norm.weight"


def collect(
    checkpoint: Checkpoint,
    windows: Windows,
    *,
    threads: int = 2,
    device: str = "cpu",
    cluster: str | None = None,
    state: StateFile | None = None,
    progress: Progress | None = None,
) -> tuple[Statistics, list[ExpertCoverage]]:
    """Statistics of every weight, and what was seen of every expert.

    The result depends neither on ``threads`` nor on whether the pass was resumed.

    Args:
        checkpoint: whose weights are read.
        windows: the calibration text.
        threads: batches and experts at a time.
        device: where matrices are multiplied.
        cluster: address of a Ray cluster that does the work.
        state: where the pass is saved after each layer, and resumed from.
        progress: called with 1 and the number of layers after each layer.

    Raises:
        CheckpointError: a tensor cannot be read.
        ValidationError: a hidden state is not finite, or a token is outside the vocabulary.
    """
    with steady_torch(), open_workers(threads, cluster) as workers:
        return _Pass(checkpoint, windows, workers, state, device).run(progress)


class _Pass:
    """The hidden states and what was gathered so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Windows,
        workers: Workers,
        state: StateFile | None,
        device: str,
    ) -> None:
        self._checkpoint, self._windows, self._workers = checkpoint, windows, workers
        self._file = state
        self._geometry = checkpoint.geometry
        self._shared_names = {
            t.name for t in expected_tensors(self._geometry) if t.role in SHARED_ROLES
        }
        self._model = Model(self._geometry, checkpoint.read, device=device)
        self._rounded = Model(self._geometry, self._read_rounded, device=device)
        self._count = min(len(windows.ids), max(1, STREAM_TOKENS // windows.ids.shape[1]))
        self._inputs: Moments = {}
        self._losses: dict[str, tuple[float, ...]] = {}
        self._errors: dict[int, float] = {}
        self._coverage: list[ExpertCoverage] = []

    def __getstate__(self) -> dict[str, Any]:
        """For workers in other processes: all but what hands out work."""
        return self.__dict__ | {"_workers": None}

    def _read_rounded(self, name: str) -> NDArray[np.float32]:
        values = self._checkpoint.read(name)
        if name not in self._shared_names:
            return values
        return dequantize(rtn.quantize(values, _WIDE))

    def run(self, progress: Progress | None) -> tuple[Statistics, list[ExpertCoverage]]:
        layers = self._geometry.num_hidden_layers
        first = self._resume()
        for layer in range(layers):
            if layer >= first:
                self._mix(layer)
                self._feed(layer)
                self._save(layer + 1)
            if progress is not None:
                progress(1, layers)
        klds = self._score()
        statistics = Statistics(
            identity_of(self._geometry),
            (self._windows.text_sha256,),
            self._windows.tokens,
            self._inputs,
            self._losses,
            {
                layer: Sensitivity(self._errors[layer], kld)
                for layer, kld in zip(self._geometry.moe_layers, klds[1:], strict=True)
            },
            Sensitivity(self._shared_error(), klds[0]),
        )
        return statistics, self._coverage

    # ---- state

    def _resume(self) -> int:
        """Take up a saved state or begin; returns the layer to go on with."""
        found = self._file.load() if self._file else None
        if found is None:
            ids = self._windows.ids
            self._states = embed(self._model, ids)
            self._streams = [embed(self._rounded, ids[: self._count])]
            return 0
        layer, facts, tensors = found
        self._states = tensors.pop("states").to(self._model.device)
        self._streams = list(tensors.pop("streams").to(self._model.device))
        self._errors = {int(k): v for k, v in facts["errors"].items()}
        self._losses = {k: tuple(v) for k, v in facts["losses"].items()}
        self._coverage = [ExpertCoverage(**c) for c in facts["coverage"]]
        self._inputs = {
            name: InputMoments(int(seen[0]), float(seen[1]), tensors[name].numpy())
            for name, seen in facts["seen"].items()
        }
        return layer

    def _save(self, layer: int) -> None:
        if self._file is None:
            return
        tensors = {name: torch.from_numpy(m.sums) for name, m in self._inputs.items()}
        tensors |= {"states": self._states.cpu(), "streams": torch.stack(self._streams).cpu()}
        facts = {
            "errors": self._errors,
            "losses": self._losses,
            "coverage": [
                {f: getattr(c, f) for f in ExpertCoverage.__dataclass_fields__}
                for c in self._coverage
            ],
            "seen": {name: (m.tokens, m.mass) for name, m in self._inputs.items()},
        }
        self._file.save(layer, facts, tensors)

    # ---- layers

    def _parts(self, windows: int) -> list[slice]:
        return batches(windows, self._windows.ids.shape[1])

    def _each(self, run: Callable[[Model, torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        """``run`` over every stream; the first is that of rounded shared weights."""
        models = [self._rounded] + [self._model] * (len(self._streams) - 1)
        work = [
            (model, stream[part])
            for model, stream in zip(models, self._streams, strict=True)
            for part in self._parts(len(stream))
        ]
        done = list(self._workers.map(lambda w: run(*w), work))
        size = len(done) // len(self._streams)
        return [torch.cat(done[i : i + size]) for i in range(0, len(done), size)]

    def _watched(
        self, run: Callable[[torch.Tensor, Callable[..., None]], torch.Tensor]
    ) -> torch.Tensor:
        """``run`` over the reference's hidden states, taking the moments of what it shows."""

        def one(part: slice) -> tuple[torch.Tensor, Moments]:
            seen: Moments = {}

            def observe(names: Iterable[str], x: torch.Tensor, _: torch.Tensor | None) -> None:
                for name in names:
                    _add(seen, name, moments_of(x))

            return run(self._states[part], observe), seen

        states = []
        for output, seen in self._workers.map(one, self._parts(len(self._states))):
            states.append(output)
            for name, found in seen.items():
                _add(self._inputs, name, found)
        return torch.cat(states)

    def _mix(self, layer: int) -> None:
        self._streams = self._each(lambda model, s: mix_tokens(model, layer, s))
        self._states = self._watched(lambda s, o: mix_tokens(self._model, layer, s, o))

    def _feed(self, layer: int) -> None:
        begun: list[torch.Tensor] = []
        if layer < self._geometry.num_dense_layers:
            self._states = self._watched(lambda s, o: feed_forward(self._model, layer, s, o)[0])
        else:
            begun.append(self._routed(layer))
        self._streams = self._each(lambda model, s: feed_forward(model, layer, s)[0]) + begun

    def _routed(self, layer: int) -> torch.Tensor:
        """The layer's experts; returns the stream in which they are rounded."""
        prefix = f"model.layers.{layer}."
        norm = prefix + "ffn_norm.weight"
        x = torch.cat(
            list(
                self._workers.map(
                    lambda p: normed(self._model, norm, self._states[p]),
                    self._parts(len(self._states)),
                )
            )
        )
        self._inputs[prefix + "feed_forward.gate.weight"] = moments_of(x)
        routing = route(self._model, layer, x)
        inputs = LayerInputs(layer, x, x, routing, routing, x.T @ x / len(x), _SETTINGS)
        y, rounded = torch.zeros_like(x), torch.zeros_like(x)

        def measure(expert: int) -> "tuple[FinishedExpert, Moments, dict[str, tuple[float, ...]]]":
            found = quantize_expert(inputs, expert, self._checkpoint.read, self._narrow)
            return found, *self._expert(inputs, expert, found)

        for found, moments, losses in self._workers.map(
            measure, range(self._geometry.num_experts)
        ):
            y.index_add_(0, found.token_wanted, found.y_wanted)
            rounded.index_add_(0, found.token, found.y)
            self._coverage.append(found.coverage)
            self._inputs |= moments
            self._losses |= losses
        tokens = self._count * self._windows.ids.shape[1]
        change = (rounded - y)[:tokens].double()
        self._errors[layer] = float(change.square().sum() / tokens)
        begin = self._states[: self._count]
        stream = begin + rounded[:tokens].view_as(begin)
        self._states = self._states + y.view_as(self._states)
        return stream

    def _narrow(self, name: str, w: NDArray[np.float32], moments: gptq.Moments) -> Weight:
        try:
            return gptq.quantize(np.ascontiguousarray(w), moments, _NARROW)
        except ValueError as error:
            raise not_finite(self._checkpoint, name, "float16") from error

    def _expert(
        self, inputs: LayerInputs, expert: int, found: FinishedExpert
    ) -> tuple[Moments, dict[str, tuple[float, ...]]]:
        """Moments and losses of one expert's weights."""
        gate, up, down = found.weights
        w1, w3, w2 = (self._model.weight(n) for n in found.weights)
        x = inputs.x[found.token]
        affinity = affinity_of(inputs.routing, expert)
        inner = gated(x, w1, w3)
        seen = moments_of(x, affinity)
        moments = {gate: seen, up: seen, down: moments_of(inner, affinity)}
        losses: dict[str, list[float]] = {name: [] for name in found.weights}
        for scheme in (_NARROW, _WIDE):
            q1, q3, q2 = (
                _rounded(w, found.weights[name], moments[name], scheme)
                for name, w in ((gate, w1), (up, w3), (down, w2))
            )
            for name, change in (
                (gate, F.linear(gated(x, q1, w3) - inner, w2)),
                (up, F.linear(gated(x, w1, q3) - inner, w2)),
                (down, F.linear(inner, q2 - w2)),
            ):
                losses[name].append(float((change * affinity[:, None]).double().square().sum()))
        return moments, {name: tuple(loss) for name, loss in losses.items()}

    # ---- predictions

    def _shared_error(self) -> float:
        change = (self._streams[0] - self._states[: self._count]).double()
        return float(change.square().sum() / (change.shape[0] * change.shape[1]))

    def _score(self) -> list[float]:
        """Mean KL divergence of every stream over the second half of each window."""
        scored = self._windows.ids.shape[1] // 2
        head, head_rounded = (m.weight(_EMBEDDING) for m in (self._model, self._rounded))

        def hidden(states: torch.Tensor) -> torch.Tensor:
            return normed(self._model, _FINAL_NORM, states[:, scored:])

        wanted = hidden(self._states[: self._count])
        parts = [slice(i, i + _HEAD_TOKENS) for i in range(0, len(wanted), _HEAD_TOKENS)]

        def divergences(part: slice) -> list[float]:
            expected = F.log_softmax(F.linear(wanted[part], head), -1)
            sums = []
            for index, stream in enumerate(states):
                logits = F.linear(stream[part], head if index else head_rounded)
                found = F.log_softmax(logits, -1)
                sums.append(
                    float(F.kl_div(found, expected, log_target=True, reduction="sum").double())
                )
            return sums

        states = [hidden(stream) for stream in self._streams]
        total = np.sum(list(self._workers.map(divergences, parts)), axis=0)
        return [float(t) for t in total / len(wanted)]


def moments_of(x: torch.Tensor, affinity: torch.Tensor | None = None) -> InputMoments:
    """Moments of the inputs [n, K], each token counting with its affinity [n]."""
    squares = x.double().square()
    if affinity is None:
        return InputMoments(len(x), float(len(x)), squares.sum(0).cpu().numpy())
    mass = affinity.double()
    return InputMoments(len(x), float(mass.sum()), (mass @ squares).cpu().numpy())


def affinity_of(routing: Routing, expert: int) -> torch.Tensor:
    """What each token routed to the expert weighs it with, [n], tokens in order."""
    token, place = torch.where(routing.selected == expert)
    return routing.affinity[token, place]


def _add(into: Moments, name: str, found: InputMoments) -> None:
    into[name] = into[name] + found if name in into else found


def _rounded(w: torch.Tensor, narrow: Weight, seen: InputMoments, scheme: Scheme) -> torch.Tensor:
    weight = narrow
    if scheme is _WIDE:
        importance = seen.mean.astype(np.float32) if seen.sums.any() else None
        weight = rtn.quantize(w.cpu().numpy(), scheme, importance)
    assert isinstance(weight, Quantized)
    return torch.from_numpy(dequantize(weight)).to(w.device)
