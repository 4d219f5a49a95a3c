"""Writes the API reference, build/api/, from the docstrings of ``import lfmq``."""

from pathlib import Path

import pdoc

import lfmq

TARGET = Path(__file__).resolve().parents[1] / "build" / "api"


def write(target: Path = TARGET) -> None:
    """Write the reference as HTML pages."""
    for name in lfmq.__all__:
        getattr(lfmq, name)  # imported when first used; pdoc sees what is there
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc("lfmq", output_directory=target)


if __name__ == "__main__":
    write()
