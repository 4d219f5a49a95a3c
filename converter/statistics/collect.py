"""The pass that gathers statistics: the reference's hidden states, layer by layer.

Beside the reference a second set of streams runs over the first windows, each with one part of
the model rounded to 4 bits (``part_of`` in :mod:`.statistics`), and two with all shared
weights, at 8 and at 4 bits. What each does to the predictions says how much an error of its part
costs (docs/statistics.md). A layer's state is saved before the next begins, so a killed pass goes
on there.

W windows, S tokens a window, T = W * S, H hidden size, C windows of the streams.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.batches import batches, steady_torch
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import release_freed
from lfmq.converter.jobs.statefile import StateFile
from lfmq.converter.jobs.workers import Workers, open_workers
from lfmq.converter.model.blocks import Block, Router, model_blocks
from lfmq.converter.model.forward import Model, embed, normed, route, run_block
from lfmq.converter.model.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    expected_tensors,
    head_of,
)
from lfmq.converter.model.text import Windows
from lfmq.converter.quantize.experts import FinishedExpert, LayerInputs, quantize_expert
from lfmq.converter.quantize.settings import ExpertCoverage, Settings
from lfmq.converter.statistics.input_stats import (
    InputsSeen,
    StatsByName,
    add_moments,
    importance_of,
    moments_of,
)
from lfmq.converter.statistics.sensitivity import (
    MeasuredExpert,
    grid_errors,
    mean_divergences,
    measure_expert,
    overridden,
    round_narrow,
)
from lfmq.converter.statistics.statistics import (
    MEASURED,
    WHOLE,
    Sensitivity,
    Statistics,
    identity_of,
    part_of,
)
from lfmq.formats.plan import SHARED_ROLES
from lfmq.quant import gptq, rtn
from lfmq.quant.types import (
    InputStats,
    Scheme,
    Weight,
    dequantize,
)

# Tokens the streams run over; all but this share of each window, its beginning, is scored.
STREAM_TOKENS = 4096
_UNSCORED = 1 / 8
# Losses are of weights as GPTQ rounds them, with nothing that needs the other stream.
_SETTINGS = Settings(expert_ridge=None)

Advance = Callable[[int, int], None]
_STREAM = "stream "  # before a stream's name in the saved state


def collect(
    checkpoint: Checkpoint,
    windows: Windows,
    *,
    state: StateFile | None = None,
    execution: Execution = Execution(),
) -> tuple[Statistics, list[ExpertCoverage]]:
    """Statistics of every weight, and what was seen of every expert.

    The result depends neither on the number of threads nor on whether the pass was resumed.

    Args:
        checkpoint: whose weights are read.
        windows: the calibration text.
        state: where the pass is saved after each layer, and resumed from.
        execution: threads or cluster, device, and whom to tell of each layer.

    Raises:
        CheckpointError: a tensor cannot be read.
        ValidationError: a hidden state is not finite, or a token is outside the vocabulary.
    """
    with steady_torch(), open_workers(execution.threads, execution.cluster) as workers:
        started = _Pass(checkpoint, windows, workers, state, execution.device)
        return started.run(execution.counter("gathering statistics"))


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
        self._config = checkpoint.config
        self._tensors = {t.name: t for t in expected_tensors(self._config)}
        self._shared_names = {n for n, t in self._tensors.items() if t.role in SHARED_ROLES}
        self._model = Model(self._config, checkpoint.read, device=device)
        self._rounded = {
            name: Model(self._config, partial(self._read_rounded, scheme), device=device)
            for name, scheme in WHOLE.items()
        }
        self._count = min(len(windows.ids), max(1, STREAM_TOKENS // windows.ids.shape[1]))
        self._inputs: StatsByName = {}
        self._losses: dict[str, float] = {}
        self._grids: dict[str, tuple[float, ...]] = {}
        self._errors: dict[str, float] = {}
        self._streams: dict[str, torch.Tensor] = {}
        self._coverage: list[ExpertCoverage] = []

    def __getstate__(self) -> dict[str, Any]:
        """For workers in other processes: all but what hands out work."""
        return self.__dict__ | {"_workers": None}

    def _read_rounded(self, scheme: Scheme, name: str) -> NDArray[np.float32]:
        values = self._checkpoint.read(name)
        if name not in self._shared_names:
            return values
        return dequantize(rtn.quantize(values, scheme))

    def run(self, advance: Advance) -> tuple[Statistics, list[ExpertCoverage]]:
        layers = model_blocks(self._config)
        first = self._resume()
        for layer, blocks in enumerate(layers):
            if layer >= first:
                for block in blocks:
                    self._block(block)
                self._save(layer + 1)
            advance(1, len(layers))
        for name in WHOLE:
            self._errors[name] = _error(self._streams[name], self._states[: self._count])
        statistics = Statistics(
            identity_of(self._config),
            (self._windows.text_sha256,),
            self._windows.tokens,
            self._inputs,
            self._losses,
            self._grids,
            {part: Sensitivity(self._errors[part], kld) for part, kld in self._score().items()},
        )
        return statistics, self._coverage

    # ---- state

    def _resume(self) -> int:
        """Take up a saved state or begin; returns the layer to go on with."""
        found = self._file.load() if self._file else None
        if found is None:
            ids = self._windows.ids
            self._states = embed(self._model, ids)
            self._begin(ids[: self._count])
            return 0
        layer, facts, tensors = found
        self._states = tensors.pop("states").to(self._model.device)
        self._streams = {
            name: tensors[_STREAM + name].to(self._model.device) for name in facts["streams"]
        }
        self._errors, self._losses = facts["errors"], facts["losses"]
        self._grids = {k: tuple(v) for k, v in facts["grids"].items()}
        self._coverage = [ExpertCoverage(**c) for c in facts["coverage"]]
        self._inputs = {
            name: InputStats(int(seen[0]), float(seen[1]), tensors[name].numpy())
            for name, seen in facts["seen"].items()
        }
        return layer

    def _begin(self, ids: NDArray[np.int64]) -> None:
        """The streams of all shared weights, and that of the embedding alone."""
        self._streams = {name: embed(model, ids) for name, model in self._rounded.items()}
        w = self._checkpoint.read(EMBEDDING)
        model = overridden(self._model, {EMBEDDING: dequantize(rtn.quantize(w, MEASURED))})
        self._streams["embedding"] = embed(model, ids)
        change = _error(self._streams["embedding"], self._states[: self._count])
        self._errors |= {"embedding": change, "head": change}
        self._losses[EMBEDDING] = change * self._windows.tokens
        self._grids[EMBEDDING] = grid_errors(w, None)
        if HEAD in self._tensors:
            self._begin_head(self._checkpoint.read(HEAD))

    def _begin_head(self, w: NDArray[np.float32]) -> None:
        """A head of its own: its rounding is the error of the part that it is."""
        off = dequantize(rtn.quantize(w, MEASURED)) - w
        error = float(np.square(off, out=off).sum(dtype=np.float64))
        self._errors["head"] = error
        self._losses[HEAD] = error * self._windows.tokens
        self._grids[HEAD] = grid_errors(w, None)

    def _save(self, layer: int) -> None:
        if self._file is None:
            return
        tensors = {name: torch.from_numpy(m.sums) for name, m in self._inputs.items()}
        tensors |= {_STREAM + name: stream.cpu() for name, stream in self._streams.items()}
        tensors["states"] = self._states.cpu()
        facts = {
            "errors": self._errors,
            "losses": self._losses,
            "grids": self._grids,
            "streams": list(self._streams),
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

    def _each(self, run: Callable[[Model, torch.Tensor], torch.Tensor]) -> None:
        """Move every stream on by ``run``, one after the other, so that few are held twice."""
        names = list(self._streams)
        parts = self._parts(self._count)

        def work() -> Iterator[tuple[Model, torch.Tensor]]:
            for name in names:
                for part in parts:
                    yield self._rounded.get(name, self._model), self._streams[name][part]

        done = self._workers.map(lambda w: run(*w), work())
        for name in names:
            self._streams[name] = _joined([next(done) for _ in parts])

    def _watched(
        self, run: Callable[[torch.Tensor, Callable[..., None]], torch.Tensor]
    ) -> torch.Tensor:
        """``run`` over the reference's hidden states, taking the moments of what it shows."""

        def one(part: slice) -> tuple[torch.Tensor, StatsByName]:
            seen: StatsByName = {}

            def observe(names: Iterable[str], x: torch.Tensor, _: torch.Tensor | None) -> None:
                for name in names:
                    add_moments(seen, name, moments_of(x))

            return run(self._states[part], observe), seen

        states = []
        for output, seen in self._workers.map(one, self._parts(len(self._states))):
            states.append(output)
            for name, found in seen.items():
                add_moments(self._inputs, name, found)
        return torch.cat(states)

    def _block(self, block: Block) -> None:
        """Move all hidden states on; the block's part of the model gets streams of its own."""
        if block.router is not None:
            begun = self._routed(block, block.router)
            self._each(lambda model, s: run_block(model, block, s)[0])
            self._streams |= begun
            return
        begin = self._states[: self._count]
        self._each(lambda model, s: run_block(model, block, s)[0])
        self._states = self._watched(lambda s, o: run_block(self._model, block, s, o)[0])
        self._shared_part(block, begin)

    def _shared_part(self, block: Block, begin: torch.Tensor) -> None:
        """Losses of the weights of a block that all tokens go through, and its stream."""
        seen = InputsSeen({})
        wanted, _ = run_block(self._model, block, begin, seen.observe)
        factors = seen.factorized(_SETTINGS.damping)
        names = [n for n in factors if n in self._shared_names]

        def narrow(name: str) -> tuple[NDArray[np.float32], tuple[float, ...]]:
            w = self._checkpoint.read(name)
            weight = round_narrow(self._checkpoint, name, w, factors[name])
            return dequantize(weight), grid_errors(w, importance_of(self._inputs[name]))

        found = dict(zip(names, self._workers.map(narrow, names), strict=True))
        weights = {name: values for name, (values, _) in found.items()}
        self._grids |= {name: errors for name, (_, errors) in found.items()}
        alone = [{name: values} for name, values in weights.items()]
        *each, together = self._workers.map(
            lambda w: run_block(overridden(self._model, w), block, begin)[0], [*alone, weights]
        )
        for name, changed in zip(names, each, strict=True):
            self._losses[name] = _error(changed, wanted) * self._windows.tokens
        part = part_of(self._tensors[names[0]])
        self._errors[part], self._streams[part] = _error(together, wanted), together

    def _routed(self, block: Block, router: Router) -> dict[str, torch.Tensor]:
        """The block's experts; returns the streams in which they are rounded."""
        parts = self._parts(len(self._states))
        x = torch.cat(
            list(
                self._workers.map(
                    lambda p: normed(self._model, block.norm, self._states[p]), parts
                )
            )
        )
        self._inputs[router.weight] = moments_of(x)
        routing = route(self._model, block, x)
        pooled = x.T @ x / len(x)
        inputs = LayerInputs(self._config, block, x, x, routing, routing, pooled, _SETTINGS)
        y, inner, down = (torch.zeros_like(x) for _ in range(3))

        def measure(expert: int) -> tuple[FinishedExpert, MeasuredExpert]:
            found = quantize_expert(inputs, expert, self._checkpoint.read, self._narrow)
            return found, measure_expert(self._model, inputs, expert, found)

        for found, measured in self._workers.map(measure, range(len(block.branches))):
            y.index_add_(0, found.token_wanted, found.y_wanted)
            inner.index_add_(0, found.token, measured.inner)
            down.index_add_(0, found.token, measured.down)
            self._coverage.append(found.coverage)
            self._inputs |= measured.moments
            self._losses |= measured.losses
            self._grids |= measured.grids
            release_freed()
        tokens = self._count * self._windows.ids.shape[1]
        self._states = y.view_as(self._states).add_(self._states)
        begun, end = {}, self._states[: self._count]
        for kind, change in (("inner", inner), ("down", down)):
            part = f"{block.layer}.{kind}"
            begun[part] = end + change[:tokens].view_as(end)
            self._errors[part] = _error(begun[part], end)
        return begun

    def _narrow(
        self, name: str, w: NDArray[np.float32], moments: gptq.FactorizedHessian
    ) -> Weight:
        return round_narrow(self._checkpoint, name, w, moments)

    def _score(self) -> dict[str, float]:
        """Mean KL divergence of every stream over what is scored of each window."""
        first = int(self._windows.ids.shape[1] * _UNSCORED)

        def hidden(states: torch.Tensor) -> torch.Tensor:
            return normed(self._model, FINAL_NORM, states[:, first:])

        wanted = hidden(self._states[: self._count])
        head = self._model.weight(head_of(self._config))
        order = [*self._streams, "head"]
        # whose head a stream ends in, where it is not the reference's; two at most are held
        ends = {name: name for name in WHOLE} | {"head": "shared at 4 bits"}
        found: dict[str, float] = {}
        for whole in (None, *WHOLE):
            names = [name for name in order if ends.get(name) == whole]
            states = {n: hidden(self._streams.pop(n)) for n in names if n != "head"}
            if "head" in names:
                states["head"] = wanted
            own = head if whole is None else self._rounded[whole].weight(head_of(self._config))
            found |= mean_divergences(self._workers, wanted, head, states, own)
        return {name: found[name] for name in order}


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _error(states: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean squared change of a token's hidden state, both [W, S, H]."""
    change = (states - wanted).double()
    return float(change.square().sum() / (change.shape[0] * change.shape[1]))
