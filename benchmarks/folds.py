"""Orders and scalings that leave the model's function alone: what int4 makes of them.

Prints a table: an order of an expert's inner units (rows of w1 and w3 with columns of w2), a
scaling between w3's rows and w2's columns, and one between a norm and all that reads it (AWQ,
Lin et al. 2023, arXiv 2306.00978), each by the root of the mean square a weight's column sees,
to some power. Scalings are exact in float32, which is what the quantizer gets.
"""

import argparse
from dataclasses import dataclass, field

import numpy as np
import torch
from ablation import compare, figures_of, load
from numpy.typing import NDArray
from quality import ours
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.forward import Model
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.quantize.settings import Settings
from lfmq.converter.statistics.collect import collect
from lfmq.formats.plan import ModelConfig
from lfmq.validation.measure.runs import run_reference

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Folded(Checkpoint):
    """A checkpoint whose weights are given."""

    weights: dict[str, Floats] = field(default_factory=dict)

    def read(self, name: str) -> Floats:
        """A tensor as float32."""
        return self.weights[name]


@dataclass(frozen=True, slots=True)
class Fold:
    """Which orders and scalings; powers of the columns' root mean square, 0 for none."""

    order: bool = False
    inner: float = 0.0
    norm: float = 0.0


FOLDS = {
    "none": Fold(),
    "order of inner units": Fold(order=True),
    "w3 against w2, power 0.25": Fold(inner=0.25),
    "w3 against w2, power 0.5": Fold(inner=0.5),
    "norms, power 0.25": Fold(norm=0.25),
    "norms, power 0.5": Fold(norm=0.5),
    "order, and w3 against w2, power 0.25": Fold(order=True, inner=0.25),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--evaluate", type=int, default=98304, help="tokens of evaluation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    windows = load(sample, "calibration.jsonl", options.tokens)
    everything = load(sample, "evaluation.jsonl", options.evaluate)
    reference = run_reference(Model(sample.config, sample.read), everything)
    statistics, _ = collect(sample, windows)
    squares = {n: np.sqrt(m.mean).astype(np.float32) for n, m in statistics.inputs.items()}
    table = Table(title=f"{everything.tokens:,} tokens of evaluation")
    for column in ("recipe", "fold", "nearest", "calibrated", "routing agreement, calibrated"):
        table.add_column(column, justify="left" if column in ("recipe", "fold") else "right")
    for recipe in ("int4", "int4-all"):
        for name, fold in FOLDS.items():
            source = folded(sample, squares, fold)
            figures = []
            for chosen in (None, windows):
                weights = ours(source, load_recipe(recipe), chosen, Settings())
                kld, routing = figures_of(compare(sample, reference, weights))
                figures.append(kld)
            figures.append(routing)
            table.add_row(recipe, name, *figures)
            print(recipe, name, *figures, flush=True)
    Console(width=110).print(table)


def folded(sample: Checkpoint, squares: dict[str, Floats], fold: Fold) -> Folded:
    """The checkpoint with a fold applied."""
    weights = {name: sample.read(name).copy() for name in sample.stored}
    for layer in range(sample.config.num_hidden_layers):
        for norm, readers in readers_of(sample.config, layer):
            scale = power(squares[readers[0]], fold.norm)
            weights[norm] /= scale
            for name in readers:
                weights[name] *= scale
        for gate, up, down in expert_weights(sample.config, layer):
            seen = squares[down]
            scale = power(seen, fold.inner)
            weights[up] /= scale[:, None]
            weights[down] *= scale
            if fold.order:
                order = np.argsort(-seen * np.linalg.norm(weights[down], axis=0), kind="stable")
                weights[gate], weights[up] = weights[gate][order], weights[up][order]
                weights[down] = weights[down][:, order]
    return Folded(sample.folder, sample.config, sample.assets, sample.stored, weights=weights)


def power(seen: Floats, exponent: float) -> Floats:
    """Scale of each column, geometric mean 1; one that saw nothing counts as the least."""
    positive = np.maximum(seen, seen[seen > 0].min(initial=1.0))
    scale = positive**exponent
    return np.asarray(scale / np.exp(np.log(scale).mean()), np.float32)


def readers_of(g: ModelConfig, layer: int) -> list[tuple[str, list[str]]]:
    """A layer's two norms, each with all the weights that read it."""
    prefix = f"model.layers.{layer}."
    if layer in g.attention_layers:
        operator = [f"self_attn.{p}_proj.weight" for p in "qkv"]
    else:
        operator = ["conv.in_proj.weight"]
    if layer < g.num_dense_layers:
        ffn = ["feed_forward.w1.weight", "feed_forward.w3.weight"]
    else:
        experts = range(g.num_experts)
        ffn = [f"feed_forward.experts.{e}.{w}.weight" for e in experts for w in ("w1", "w3")]
        ffn.insert(0, "feed_forward.gate.weight")
    return [
        (f"{prefix}operator_norm.weight", [prefix + name for name in operator]),
        (f"{prefix}ffn_norm.weight", [prefix + name for name in ffn]),
    ]


def expert_weights(g: ModelConfig, layer: int) -> list[tuple[str, str, str]]:
    """Names of w1, w3 and w2 of each expert; of the dense layer's."""
    prefix = f"model.layers.{layer}.feed_forward."
    if layer < g.num_dense_layers:
        folders = [prefix]
    else:
        folders = [f"{prefix}experts.{e}." for e in range(g.num_experts)]
    return [(f"{f}w1.weight", f"{f}w3.weight", f"{f}w2.weight") for f in folders]


if __name__ == "__main__":
    main()
