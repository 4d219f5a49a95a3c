"""A build's bytes against its manifest."""

from pathlib import Path

import click

from lfmq.commands.console import example, print_json
from lfmq.converter.run.manifest import verify_build


@click.command(epilog=example("lfmq verify builds/lfm2moe-tiny-int4.gguf"))
@click.argument("builds", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object and no tables.")
def verify(builds: tuple[Path, ...], as_json: bool) -> None:
    """Check that builds hold the bytes their manifest says."""
    found = [{"path": str(b), "manifest": str(verify_build(b)), "intact": True} for b in builds]
    if as_json:
        print_json({"builds": found})
        return
    for build in found:
        click.echo(f"{build['path']}: intact, as {build['manifest']} says")
