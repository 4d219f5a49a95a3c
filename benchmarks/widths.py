"""Widths chosen from calibration against rules of thumb at equal bytes, predicted and measured.

Every plan is converted with calibration on the sample and judged on held-out text. A rule gives 8
bits to a share of the expert weights; at the bytes of its build a budget chooses for itself, by
layers as engines read compressed-tensors, by stacks as GGUF and MLX hold them, and by experts as
ONNX does.
"""

import argparse

import torch
from ablation import compare, figures_of, load
from quality import ours
from rich.console import Console
from rich.table import Table

from lfmq.converter.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.mixed_precision.budget import choose_widths, predicted_kld
from lfmq.converter.mixed_precision.size_limits import Limits
from lfmq.converter.model.forward import Model
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import Recipe, load_recipe, parse_recipe
from lfmq.converter.statistics.collect import collect
from lfmq.converter.statistics.statistics import Statistics
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.compare import differences
from lfmq.validation.measure.figures import KLD
from lfmq.validation.measure.runs import Comparison, run_reference

# Of the experts' weights at 8 bits.
SHARES = {"1/3": 1 / 3, "1/2": 1 / 2, "2/3": 2 / 3}
_FINEST = "budget, by expert"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--evaluate", type=int, default=98304, help="tokens of evaluation")
    parser.add_argument("--share", action="append", choices=SHARES, help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sample = open_checkpoint(sample_file())
    calibration = load(sample, "calibration.jsonl", options.tokens)
    statistics, _ = collect(sample, calibration)
    evaluation = load(sample, "evaluation.jsonl", options.evaluate)
    reference = run_reference(Model(sample.config, sample.read), evaluation)
    table = Table(title=f"{evaluation.tokens:,} tokens of evaluation")
    for column in ("experts at 8 bits", "chosen by", "predicted", "measured", "routing agreement"):
        table.add_column(column, justify="left" if column == "chosen by" else "right")
    runs: dict[tuple[str, str], Comparison] = {}
    for share, name, recipe in plans(sample, statistics, options.share or list(SHARES)):
        predicted = predicted_kld(statistics, resolve_plan(sample.config, recipe))
        runs[share, name] = run = compare(sample, reference, ours(sample, recipe, calibration))
        row = (share, name, f"{predicted:.6f}", *figures_of(run))
        table.add_row(*row)
        print(*row, flush=True)
    console = Console(width=110)
    console.print(table)
    console.print(compared(runs))


def compared(runs: dict[tuple[str, str], Comparison]) -> Table:
    """The choice by experts less every other of its share."""
    table = Table(title=f"{_FINEST} less another, mean KLD")
    for column in ("experts at 8 bits", "less", "difference", "95 % of bootstraps"):
        table.add_column(column, justify="left" if column == "less" else "right")
    for (share, name), run in runs.items():
        finest = runs.get((share, _FINEST))
        if finest is not None and finest is not run:
            found = next(d for d in differences(run, finest) if d.figure is KLD)
            low, high = found.interval.low, found.interval.high
            table.add_row(share, name, f"{found.difference:+.6f}", f"{low:+.6f} to {high:+.6f}")
    return table


def plans(
    sample: Checkpoint, statistics: Statistics, shares: list[str]
) -> list[tuple[str, str, Recipe]]:
    """Share of the experts at 8 bits, who chose it, and the recipe."""
    layers, experts = sample.config.moe_layers, sample.config.num_experts
    rules = {
        "1/3": {
            "every down": 'roles = ["expert_down"]',
            "every gate": 'roles = ["expert_gate"]',
            "every up": 'roles = ["expert_up"]',
        },
        "1/2": {
            "first and last layer": f'roles = ["experts"]\nlayers = [{layers[0]}, {layers[-1]}]',
            "every second expert": f'roles = ["experts"]\nexperts = {list(range(0, experts, 2))}',
        },
        "2/3": {"every up and down": 'roles = ["expert_up", "expert_down"]'},
    }
    found = [("none", "int4", load_recipe("int4"))]
    for share in shares:
        for name, rule in rules[share].items():
            found.append((share, name, ruled(name, rule)))
        units = (("layer", "compressed-tensors"), ("stack", "gguf"), ("expert", "onnx"))
        for unit, container in units:
            module = FORMATS[container]
            least, most = (
                module.layout(resolve_plan(sample.config, load_recipe(r)), sample.assets).nbytes
                for r in ("int4", "int8")
            )
            # a page of header is what exceptions may take
            limit = least + SHARES[share] * (most - least) + 4096
            chosen = choose_widths(
                sample.config,
                sample.assets,
                load_recipe("int4"),
                statistics,
                Limits({container: limit}, {}),
                {container: module},
            )
            found.append((share, f"budget, by {unit}", chosen.recipe))
    return [*found, ("all", "int8", load_recipe("int8"))]


def ruled(name: str, rule: str) -> Recipe:
    """The int4 recipe with 8 bits for what a rule says."""
    return parse_recipe(f"{load_recipe('int4').text}\n[[rule]]\n{rule}\nbits = 8\n", name, name)


if __name__ == "__main__":
    main()
