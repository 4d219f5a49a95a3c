"""A build's bytes against its manifest."""

from pathlib import Path

import click

import lfmq
from lfmq.commands.console import example, print_json


@click.command(
    short_help="Check builds against their manifests.",
    epilog=example("lfmq verify builds/lfm2moe-tiny-int4.gguf"),
)
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def verify(builds: tuple[Path, ...], as_json: bool) -> None:
    """Check that each build holds exactly the bytes its manifest lists, and nothing unknown.

    Every file of a build must be in the manifest, and every tensor and key must be one that lfmq
    knows.
    """
    found = [{"path": str(b), "manifest": str(lfmq.verify(b)), "intact": True} for b in builds]
    if as_json:
        print_json({"builds": found})
        return
    for build in found:
        click.echo(f"{build['path']}: intact, as {build['manifest']} says")
