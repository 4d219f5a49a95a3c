"""The command line: the group of commands, and errors as one line on stderr."""

import io
import sys
from typing import Any

import click

from lfmq.commands.calibrate import calibrate
from lfmq.commands.compare import compare
from lfmq.commands.console import example
from lfmq.commands.convert import convert
from lfmq.commands.frontier import frontier
from lfmq.commands.inspect import inspect
from lfmq.commands.plan import plan
from lfmq.commands.validate import validate
from lfmq.commands.verify import verify
from lfmq.quant.errors import LfmqError, UsageError

_LONGEST_LINE = 400  # characters of an error


class Commands(click.Group):
    """The one place where library errors become a line on stderr and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; see the class."""
        for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise click.UsageError(_one_line(str(error))) from error
        except LfmqError as error:
            raise click.ClickException(_one_line(str(error))) from error
        except MemoryError as error:
            raise click.ClickException("out of memory; use fewer --threads") from error
        except OSError as error:
            reason = f"{error.filename or 'i/o'}: {error.strerror or error}"
            raise click.ClickException(_one_line(reason)) from error


def _one_line(text: str) -> str:
    """Names in a hostile file may hold line ends or escape sequences; they are shown escaped.

    What a line quotes may be of any length: a part in the middle is then left out.
    """
    if len(text) > 10 * _LONGEST_LINE:
        text = f"{text[: 5 * _LONGEST_LINE]}{text[-5 * _LONGEST_LINE :]}"
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(line) <= _LONGEST_LINE:
        return line
    half = _LONGEST_LINE // 2 - 3
    return f"{line[:half]} ... {line[-half:]}"


@click.group(
    cls=Commands,
    context_settings={"max_content_width": 100},
    epilog=example("lfmq convert sample --output builds"),
)
@click.version_option(package_name="lfmq")
def main() -> None:
    """Quantize LFM2 checkpoints into GGUF, MLX, ONNX and compressed-tensors builds.

    One quantization is written to all four formats, and each build can be measured against the
    checkpoint.

    CHECKPOINT is a folder with config.json and safetensors, the word 'sample' (a small mixture of
    experts) or 'sample-dense' (a small dense model), or a Hub id org/name[@revision].
    """


for command in (inspect, plan, calibrate, convert, frontier, verify, validate, compare):
    main.add_command(command)


if __name__ == "__main__":
    main()
