"""What each part of calibration is worth on the sample, alone and together, and on other text.

Prints two tables: recipes with parts of the method switched on one after another, and calibration
on one kind of text with evaluation on another.
"""

import argparse
import time
from dataclasses import replace

import torch
from quality import Weights, ours
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.forward import Model
from lfmq.converter.model.text import Windows, load_windows
from lfmq.converter.plan.recipe import Recipe, load_recipe
from lfmq.converter.quantize.settings import Settings
from lfmq.validation.measure.figures import KLD, ROUTING
from lfmq.validation.measure.runs import Comparison, Reference, compare_model, run_reference
from lfmq.validation.measure.summaries import measure_figures

SEQUENCE = 256
PROSE = ("ar", "de", "en", "es", "fr", "it", "ja", "pt", "zh")
PLAIN = Settings(
    sweeps=0,
    damping=0.01,
    affinity=False,
    ridge=None,
    residual_ridge=None,
    expert_ridge=None,
    refit_router=False,
)
METHODS: dict[str, Settings | None] = {
    "nearest": None,
    "GPTQ": PLAIN,
    "+ damping 0.1": replace(PLAIN, damping=0.1),
    "+ affinity": replace(PLAIN, damping=0.1, affinity=True),
    "+ 3 sweeps": replace(PLAIN, damping=0.1, affinity=True, sweeps=3),
    "+ step of shared weights": replace(Settings(), expert_ridge=None, refit_router=False),
    "+ step of experts": replace(Settings(), refit_router=False),
    "+ routers: all": Settings(),
    "all but damping": replace(Settings(), damping=0.01),
    "all but affinity": replace(Settings(), affinity=False),
    "all but sweeps": replace(Settings(), sweeps=0),
    "all but steps": replace(Settings(), ridge=None, residual_ridge=None, expert_ridge=None),
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--evaluate", type=int, default=98304, help="tokens of evaluation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    model = Model(sample.config, sample.read)
    calibration = load(sample, "calibration.jsonl", options.tokens)
    everything = load(sample, "evaluation.jsonl", options.evaluate)
    reference = run_reference(model, everything)
    table = Table(title=f"{everything.tokens:,} tokens of evaluation")
    for column in ("recipe", "method", "mean KLD", "routing agreement", "seconds"):
        table.add_column(column, justify="left" if column in ("recipe", "method") else "right")
    table.add_row("int8", "nearest", *judge(sample, reference, load_recipe("int8"), None, None))
    for recipe in ("int4", "int4-all"):
        for name, settings in METHODS.items():
            figures = judge(sample, reference, load_recipe(recipe), calibration, settings)
            table.add_row(recipe, name, *figures)
            print(recipe, name, *figures, flush=True)
    Console(width=110).print(table)
    Console(width=110).print(transfer(sample, options.tokens))


def load(
    sample: Checkpoint, name: str, tokens: int, domains: tuple[str, ...] | None = None
) -> Windows:
    """Windows of a text of the sample, of some domains only when given."""
    wanted = tokens if domains is None else 2**40
    found = load_windows(
        [sample_file(name)], sample.assets, sample.config, tokens=wanted, sequence=SEQUENCE
    )
    if domains is None:
        return found
    rows = [i for i, d in enumerate(found.domains) if d in domains][: tokens // SEQUENCE]
    return replace(found, ids=found.ids[rows], domains=tuple(found.domains[i] for i in rows))


def judge(
    sample: Checkpoint,
    reference: Reference,
    recipe: Recipe,
    windows: Windows | None,
    settings: Settings | None,
) -> tuple[str, str, str]:
    """Mean KLD, routing and seconds of a recipe; without settings rounded to nearest."""
    started = time.monotonic()
    weights = ours(sample, recipe, None if settings is None else windows, settings)
    seconds = time.monotonic() - started
    return *figures_of(compare(sample, reference, weights)), f"{seconds:.0f}"


def compare(sample: Checkpoint, reference: Reference, weights: Weights) -> Comparison:
    """A build's weights on the reference's tokens."""
    return compare_model(reference, Model(sample.config, weights.__getitem__))


def figures_of(run: Comparison) -> tuple[str, str]:
    """Mean KLD and routing."""
    found = measure_figures(run)
    return f"{found[KLD].value:.6f}", f"{found[ROUTING].value:.4f}"


def transfer(sample: Checkpoint, tokens: int) -> Table:
    """Calibration on prose judged on code and chat, and the reverse."""
    kinds = {"prose": PROSE, "code and chat": ("py", "chat")}
    table = Table(title="int4, calibrated on one kind of text and judged on another")
    for column in ("calibrated on", "damping", "judged on", "mean KLD", "routing agreement"):
        table.add_column(column, justify="left" if "on" in column.split() else "right")
    model = Model(sample.config, sample.read)
    texts = {
        kind: load(sample, "calibration.jsonl", tokens, domains) for kind, domains in kinds.items()
    }
    for judged, domains in kinds.items():
        reference = run_reference(model, load(sample, "evaluation.jsonl", tokens, domains))
        figures = judge(sample, reference, load_recipe("int4"), None, None)
        table.add_row("nothing (nearest)", "", judged, *figures[:2])
        for kind, windows in texts.items():
            for damping in (0.01, Settings().damping):
                settings = replace(Settings(), damping=damping)
                figures = judge(sample, reference, load_recipe("int4"), windows, settings)
                table.add_row(kind, str(damping), judged, *figures[:2])
    return table


if __name__ == "__main__":
    main()
