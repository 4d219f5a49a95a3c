"""Quality of the built-in recipes on the sample: the table of README.md.

Converts the sample to GGUF with each recipe and validates the files on its held-out text, in
windows as long as those it was trained on.
"""

import argparse
import tempfile
from pathlib import Path

from lfmq.commands.console import print_tables
from lfmq.commands.tables import report_table
from lfmq.converter.checkpoint.checkpoint import open_checkpoint
from lfmq.converter.checkpoint.locate import sample_file
from lfmq.converter.model.text import load_windows
from lfmq.converter.plan.plan import resolve_plan
from lfmq.converter.plan.recipe import load_recipe
from lfmq.converter.run.convert import convert
from lfmq.formats.registry import FORMATS
from lfmq.validation.measure.validate import validate


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", action="append", help="default: int8, int4, int4-all")
    parser.add_argument("--format", default="gguf", choices=sorted(FORMATS))
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--sequence", type=int, default=256)
    options = parser.parse_args()
    sample = open_checkpoint(sample_file())
    chosen = {options.format: FORMATS[options.format]}
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for name in options.recipe or ("int8", "int4", "int4-all"):
            recipe = load_recipe(name)
            plan = resolve_plan(sample.config, recipe)
            paths += [b.path for b in convert(sample, recipe, plan, chosen, Path(folder)).builds]
        windows = load_windows(
            [sample_file("evaluation.jsonl")],
            sample.assets,
            sample.config,
            tokens=options.tokens,
            sequence=options.sequence,
        )
        print_tables(report_table(validate(sample, paths, windows)), width=120)


if __name__ == "__main__":
    main()
