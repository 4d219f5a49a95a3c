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

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lfmq.converter.checkpoint.checkpoint import Checkpoint
from lfmq.converter.jobs.batches import batches, steady_torch
from lfmq.converter.jobs.execution import Execution
from lfmq.converter.jobs.memory import release_freed
from lfmq.converter.jobs.statefile import StateFile
from lfmq.converter.jobs.workers import Workers, open_workers
from lfmq.converter.model.blocks import Block, Router, model_blocks
from lfmq.converter.model.forward import (
    Model,
    block_inner,
    embed,
    normed,
    route,
    run_block,
)
from lfmq.converter.model.tensors import EMBEDDING, FINAL_NORM, HEAD
from lfmq.converter.quantize.experts import (
    FinishedExpert,
    LayerInputs,
    check_moments,
    quantize_expert,
)
from lfmq.converter.quantize.rtn import Write, not_finite, quantize_entry
from lfmq.converter.quantize.settings import Calibrated, Calibration, ExpertCoverage, RouterStep
from lfmq.formats.plan import Plan, TensorPlan
from lfmq.quant import gptq
from lfmq.quant.linalg import ridge_factor, second_moments, step_toward
from lfmq.quant.types import (
    Quantized,
    Scheme,
    Weight,
    dequantize,
)

# Every eighth window is held out when a refitted router is judged.
_HOLD_OUT = 8


def calibrated_groups(
    checkpoint: Checkpoint,
    plan: Plan,
    calibration: Calibration,
    write: Write,
    *,
    state: StateFile | None = None,
    finished: frozenset[str] = frozenset(),
    execution: Execution = Execution(),
) -> Generator[tuple[TensorPlan, ...], None, Calibrated]:
    """Quantize and write the plan's units in the order of the model, yielding each when done.

    The generator returns what calibration found.

    Args:
        checkpoint: what is quantized.
        plan: the storage of every tensor.
        calibration: the tokens, and what is done with them.
        write: gets each unit.
        state: where the hidden states are saved after each layer, and taken up from when every
            unit before them is finished.
        finished: the first tensors of units written by an earlier run.
        execution: threads or cluster, and the device.

    Raises:
        CheckpointError: a tensor cannot be read, or holds NaN or Inf.
        ValidationError: a hidden state is not finite, or a token is outside the vocabulary.
    """
    with steady_torch(), open_workers(execution.threads, execution.cluster) as workers:
        run = _Run(checkpoint, plan, calibration, write, workers, execution.device)
        yield from run.units(state, finished)
    return run.found()


class _Run:
    """The streams and the finished weights of the layer at hand."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        calibration: Calibration,
        write: Write,
        workers: Workers,
        device: str,
    ) -> None:
        self._checkpoint = checkpoint
        self._entries = {e.name: e for e in plan.entries}
        self._units = {unit[0].name: unit for unit in plan.write_groups()}
        self._calibration = calibration
        self._experts: list[ExpertCoverage] = []
        self._routers: list[RouterStep] = []
        self._settings = calibration.settings
        self._write = write
        self._workers = workers
        self._done: dict[str, NDArray[np.float32]] = {}
        self._reference = Model(plan.config, checkpoint.read, device=device)
        self._model = Model(plan.config, self._read, device=device)
        ids = calibration.windows.ids
        self._windows = ids.shape
        self._parts = batches(*ids.shape)

    def __getstate__(self) -> dict[str, Any]:
        """For workers in other processes: all but what writes and what hands out work."""
        return self.__dict__ | {"_workers": None, "_write": None}

    def found(self) -> Calibrated:
        """What was found so far."""
        return Calibrated(tuple(self._experts), tuple(self._routers))

    def _read(self, name: str) -> NDArray[np.float32]:
        found = self._done.get(name)
        return self._checkpoint.read(name) if found is None else found

    def units(
        self, state: StateFile | None, finished: frozenset[str]
    ) -> Iterator[tuple[TensorPlan, ...]]:
        """All units, those of an earlier run first."""
        before = self._take_up(state, finished)
        if before is None:
            ids = self._calibration.windows.ids
            yield from self._plain(EMBEDDING)
            self._states, self._wanted = embed(self._model, ids), embed(self._reference, ids)
            first = 0
        else:
            first = before
            yield from self._groups_before(first)
        layers = model_blocks(self._model.config)
        for layer, blocks in list(enumerate(layers))[first:]:
            self._done.clear()
            for block in blocks:
                if block.router is None:
                    yield from self._shared(block)
                else:
                    yield from self._routed(block, block.router)
            if state is not None:
                tensors = {"states": self._states.cpu(), "wanted": self._wanted.cpu()}
                state.save(layer + 1, self.found().to_state(), tensors)
        yield from self._plain(FINAL_NORM)
        if HEAD in self._entries:
            yield from self._plain(HEAD)

    def _groups_before(self, layer: int) -> list[tuple[TensorPlan, ...]]:
        """Units that are written before a layer is begun."""
        return [
            unit
            for name, unit in self._units.items()
            if name == EMBEDDING or (unit[0].layer is not None and unit[0].layer < layer)
        ]

    def _take_up(self, state: StateFile | None, finished: frozenset[str]) -> int | None:
        """Begin at the layer of a saved state; None without one, or with units missing."""
        found = state.load() if state else None
        if found is None:
            return None
        layer, facts, tensors = found
        if not all(unit[0].name in finished for unit in self._groups_before(layer)):
            return None
        self._states, self._wanted = (
            tensors[name].to(self._model.device) for name in ("states", "wanted")
        )
        before = Calibrated.from_state(facts)
        self._experts, self._routers = list(before.experts), list(before.routers)
        return layer

    # ---- finishing weights

    def _plain(self, *names: str) -> Iterator[tuple[TensorPlan, ...]]:
        """Weights that calibration does not touch."""
        for name in names:
            weight = quantize_entry(self._checkpoint, self._entries[name])
            yield self._finish({name: weight})

    def _finish(
        self, weights: Mapping[str, Weight], *, keep: bool = True
    ) -> tuple[TensorPlan, ...]:
        """Write a unit; keep its values for the layer's forward pass, unless that was done."""
        self._write(weights)
        for name, weight in weights.items() if keep else ():
            values = dequantize(weight) if isinstance(weight, Quantized) else weight
            self._done[name] = values
        return self._units[next(iter(weights))]

    def _quantize(
        self, name: str, w: NDArray[np.float32], moments: gptq.FactorizedHessian
    ) -> Weight:
        entry = self._entries[name]
        if not isinstance(entry.storage, Scheme):
            return quantize_entry(self._checkpoint, entry)
        try:
            return gptq.quantize(
                np.ascontiguousarray(w), moments, entry.storage, sweeps=self._settings.sweeps
            )
        except ValueError as error:
            raise not_finite(self._checkpoint, name, "float16") from error

    # ---- weights every token reads

    def _shared(self, block: Block) -> Iterator[tuple[TensorPlan, ...]]:
        """A block whose one branch all tokens take."""
        yield from self._plain(block.norm, *block.parameters)
        yield from self._readers(list(block.branch.readers), block.norm)
        self._wanted = self._map(lambda p: run_block(self._reference, block, self._wanted[p])[0])
        inner = self._inner(block)
        yield from self._writer(block.branch.writer, lambda p: inner(p).flatten(0, 1))
        w = self._model.weight(block.branch.writer)
        self._states = self._map(lambda p: self._states[p] + F.linear(inner(p), w))

    def _inner(self, block: Block) -> Callable[[slice], torch.Tensor]:
        """Inputs [W, S, K] of the weight that writes, by batch.

        Those no wider than the hidden states are held; wider ones are computed at each use.
        """

        def compute(part: slice) -> torch.Tensor:
            return block_inner(self._model, block, self._states[part])

        if self._entries[block.branch.writer].shape[-1] > self._model.config.hidden_size:
            return compute
        held = self._map(compute)
        return lambda part: held[part]

    def _map(self, function: Callable[[slice], torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(self._workers.map(function, self._parts)))

    def _readers(self, names: list[str], norm: str) -> Iterator[tuple[TensorPlan, ...]]:
        """Weights that read a norm: they shall put out what the reference does from its own."""
        weights = {n: self._reference.weight(n) for n in names}

        def sums(part: slice) -> _Sums:
            x = normed(self._model, norm, self._states[part])
            drift = normed(self._reference, norm, self._wanted[part]).sub_(x)
            return second_moments(x), drift.T @ x

        moments, drift = self._add_up(sums, names[0])
        missing = {name: w @ drift for name, w in weights.items()}
        stepped = self._stepped(weights, moments, missing, self._settings.ridge)
        yield from self._round(stepped, moments)

    def _writer(
        self, name: str, inputs: Callable[[slice], torch.Tensor]
    ) -> Iterator[tuple[TensorPlan, ...]]:
        """A weight that writes to the residual stream, behind which the reference is already.

        It also makes up for what the stream lacks so far.
        """
        w = self._reference.weight(name)

        def sums(part: slice) -> _Sums:
            x = inputs(part)
            missing = (self._wanted[part] - self._states[part]).flatten(0, 1)
            return second_moments(x), missing.sub_(F.linear(x, w)).T @ x

        moments, missing = self._add_up(sums, name)
        ridge = self._settings.residual_ridge
        stepped = self._stepped({name: w}, moments, {name: missing}, ridge)
        yield from self._round(stepped, moments)

    def _add_up(self, sums: "Callable[[slice], _Sums]", name: str) -> "_Sums":
        """Moments and what is missing, from all batches in order."""
        found: _Sums | None = None
        for part in self._workers.map(sums, self._parts):
            found = part if found is None else (found[0].add_(part[0]), found[1].add_(part[1]))
        assert found is not None
        check_moments(found[0], f"the inputs of {name}")
        return found

    def _stepped(
        self,
        weights: Mapping[str, torch.Tensor],
        moments: torch.Tensor,
        missing: Mapping[str, torch.Tensor],
        ridge: float | None,
    ) -> dict[str, NDArray[np.float32]]:
        """Weights that share their inputs, each with the step toward what is missing."""
        factor = None if ridge is None else ridge_factor(moments, ridge)

        def step(name: str) -> NDArray[np.float32]:
            return step_toward(weights[name], factor, missing[name]).cpu().numpy()

        return dict(zip(weights, self._workers.map(step, list(weights)), strict=True))

    def _round(
        self, stepped: Mapping[str, NDArray[np.float32]], moments: torch.Tensor
    ) -> Iterator[tuple[TensorPlan, ...]]:
        """Quantize weights that share their inputs."""
        ready = gptq.factorize(moments, self._settings.damping)

        def finish(name: str) -> tuple[str, Weight]:
            return name, self._quantize(name, stepped[name], ready)

        for name, weight in self._workers.map(finish, list(stepped)):
            yield self._finish({name: weight})

    # ---- router and experts

    def _routed(self, block: Block, router: Router) -> Iterator[tuple[TensorPlan, ...]]:
        yield from self._plain(block.norm)
        x = self._map(lambda p: normed(self._model, block.norm, self._states[p]))
        wanted = self._map(lambda p: normed(self._reference, block.norm, self._wanted[p]))
        target = route(self._reference, block, wanted)
        if router.bias is not None:
            yield from self._plain(router.bias)
        yield self._finish({router.weight: self._router(block, router.weight, x, wanted)})
        routing = route(self._model, block, x)
        pooled = second_moments(x).div_(len(x))
        inputs = LayerInputs(
            self._model.config, block, x, wanted, routing, target, pooled, self._settings
        )
        y, y_wanted = torch.zeros_like(x), torch.zeros_like(x)

        def quantize(expert: int) -> FinishedExpert:
            return quantize_expert(inputs, expert, self._checkpoint.read, self._quantize)

        for found in self._workers.map(quantize, range(len(block.branches))):
            y.index_add_(0, found.token, found.y)
            y_wanted.index_add_(0, found.token_wanted, found.y_wanted)
            self._experts.append(found.coverage)
            yield self._finish(found.weights, keep=False)
            release_freed()
        self._states = y.view_as(self._states).add_(self._states)
        self._wanted = y_wanted.view_as(self._wanted).add_(self._wanted)

    def _router(
        self, block: Block, name: str, x: torch.Tensor, wanted: torch.Tensor
    ) -> NDArray[np.float32]:
        """The router, refitted where held-out tokens say that it helps."""
        original = quantize_entry(self._checkpoint, self._entries[name])
        assert not isinstance(original, Quantized)
        ridge = self._settings.ridge
        if not self._settings.refit_router or ridge is None or self._windows[0] < _HOLD_OUT:
            return original
        held = torch.arange(self._windows[0], device=x.device) % _HOLD_OUT == _HOLD_OUT - 1
        held = held.repeat_interleave(self._windows[1])
        w = torch.from_numpy(np.array(original)).to(x.device)
        seen = x[~held]
        missing = F.linear(wanted[~held] - seen, w).T @ seen
        factor = ridge_factor(second_moments(seen), ridge)
        refitted = step_toward(w, factor, missing).cpu().numpy()

        def agreement(gate: NDArray[np.float32]) -> float:
            model = replace(self._model, read=lambda n: gate if n == name else self._read(n))
            sets = route(model, block, x[held]).selected.sort(-1).values
            expected = route(self._reference, block, wanted[held]).selected.sort(-1).values
            return float((sets == expected).all(-1).double().mean())

        step = RouterStep(block.layer, agreement(original), agreement(refitted))
        self._routers.append(step)
        return refitted if step.kept else original


# Second moments of inputs [K, K], and what is missing times inputs.
_Sums = tuple[torch.Tensor, torch.Tensor]
