"""Converts a checkpoint with two recipes, measures both builds and compares them.

python examples/convert_and_validate.py sample builds

Every function does what the command of its name does; docs/python.md has the others.
"""

import argparse
import sys
from pathlib import Path

import lfmq


def main() -> int:
    """Print the figures of both builds; 1 when one is farther from the original than allowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="sample, a folder or a Hub id")
    parser.add_argument("output", type=Path, help="folder for the builds")
    parser.add_argument("--tokens", type=int, default=32768, help="tokens of text")
    parser.add_argument("--sequence", type=int, default=512, help="tokens in a window")
    parser.add_argument("--uncalibrated", action="store_true", help="round to nearest")
    arguments = parser.parse_args()
    tokens, sequence = arguments.tokens, arguments.sequence

    checkpoint = lfmq.open_checkpoint(arguments.checkpoint)
    execution = lfmq.Execution(notice=lambda line: print(line, file=sys.stderr))
    builds: list[Path] = []
    for recipe in ("int8", "int4"):
        made = lfmq.convert(
            checkpoint,
            arguments.output,
            recipe=recipe,
            to="gguf",
            tokens=tokens,
            sequence=sequence,
            uncalibrated=arguments.uncalibrated,
            force=True,
            execution=execution,
        )
        builds += [build.path for build in made.builds]

    report = lfmq.validate(
        checkpoint, builds, tokens=tokens, sequence=sequence, execution=execution, max_kld=0.1
    )
    for build in report.to_json()["builds"]:
        print(
            f"{build['path']}: {build['bits_per_weight']:.2f} bits/weight, "
            f"mean KLD {build['kld']['mean']:.5f} nats, "
            f"top-1 agreement {build['top1_agreement']:.3f}"
        )
    for failure in report.failures:
        print(f"missed: {failure}")

    paired = lfmq.compare(checkpoint, *builds, tokens=tokens, sequence=sequence)
    for figure in paired.to_json()["figures"]:
        print(f"{figure['figure']}: {figure['difference']:+.5f}, better: {figure['better']}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
