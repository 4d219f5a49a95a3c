"""A dry run: schemes and sizes."""

from pathlib import Path

import click

from lfmq.commands.console import checkpoint_argument, example, print_json, print_tables
from lfmq.commands.options import Common, Wanted, common_options, plan_options
from lfmq.commands.tables import planned_table, roles_table, tensors_table, widths_table
from lfmq.converter.mixed_precision.budget import save_recipe, settle_widths
from lfmq.converter.plan.plan import state_bytes
from lfmq.converter.run.planned import plan_builds


@click.command(epilog=example("lfmq plan sample --recipe int4 --to gguf"))
@checkpoint_argument
@plan_options
@click.option("--tensors", is_flag=True, help="Also list every tensor.")
@click.option(
    "--save", type=click.Path(path_type=Path), help="Write the widths of a budget as a recipe."
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    metavar="N",
    help="Tokens for which the size of the state is told.",
)
@common_options
def plan(
    checkpoint: str,
    wanted: Wanted,
    tensors: bool,
    save: Path | None,
    context: int,
    common: Common,
) -> None:
    """Dry run: the scheme of every tensor and the size of every build; reads no weight.

    With --statistics also the KL divergence they predict, and with a budget the widths they
    choose. Decoding reads the bytes a token of a build, and of the state as much as the context
    has filled.
    """
    opened = common.open(checkpoint)
    widths = settle_widths(opened, wanted.base, wanted.chosen, wanted.known(opened))
    state = state_bytes(opened.config, context)
    builds = plan_builds(opened, widths.plan, wanted.chosen)
    if save is not None:
        save_recipe(save, widths.recipe)
    if common.as_json:
        listed = [
            {"name": e.name, "shape": e.shape, "storage": str(e.storage)}
            for e in widths.plan.entries
        ]
        planned = [build.to_json() for build in builds]
        print_json(
            {
                "recipe": widths.plan.recipe,
                "builds": planned,
                "state": state.to_json(),
                **widths.to_json(),
                "tensors": listed,
            }
        )
        return
    print_tables(roles_table(widths.plan), planned_table(builds))
    if widths.units:
        print_tables(widths_table(widths))
    click.echo(str(state))
    if widths.kld is not None:
        click.echo(f"predicted mean KL divergence: {widths.kld:.6f} nats a token")
    for build in builds:
        if build.refused is not None:
            click.echo(f"{build.format}: {build.refused}")
    if tensors:
        print_tables(tensors_table(widths.plan))
