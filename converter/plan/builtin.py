"""The recipes that come with the package; the command line names them without parsing any."""

from importlib.resources import files

DEFAULT_RECIPE = "int4"


def builtin_recipes() -> tuple[str, ...]:
    """Names of the recipes that come with the package."""
    folder = files("lfmq.converter.plan").joinpath("recipes")
    return tuple(sorted(p.name.removesuffix(".toml") for p in folder.iterdir()))


def builtin_text(name: str) -> str:
    """The TOML text of one of them."""
    return files("lfmq.converter.plan").joinpath("recipes", f"{name}.toml").read_text("utf-8")
