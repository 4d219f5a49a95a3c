"""The errors a user can act on; the command line turns each into one line and exit status 1."""


class LfmqError(Exception):
    """Root of every error the library raises on purpose."""


class CheckpointError(LfmqError):
    """The checkpoint is missing, damaged, or not the model it claims to be."""


class RecipeError(LfmqError):
    """A recipe has an unknown key, an illegal value, or a rule that matches nothing."""


class PlanError(LfmqError):
    """The requested output cannot be produced where or how it was asked for."""


class UnsupportedError(LfmqError):
    """A container cannot hold what the plan asks for."""


class ValidationError(LfmqError):
    """A build or a text cannot be evaluated."""


class ClusterError(LfmqError):
    """The machines the work was to run on are not there, or lost it again and again."""


class UsageError(LfmqError):
    """Options exclude each other, or one needs another; the command line exits with status 2."""


def quoted(value: object, most: int = 80) -> str:
    """A value as a line of an error quotes it: its ``repr``, cut after ``most`` characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
