"""The exceptions that are told in one line, and their exit codes."""

# Of an end that the user need not mend: the same command may go on at the next attempt, so a scheduler should try. That
# of an abort, as JAX ends those whose peer has died.
AGAIN = 134


class AegisError(ValueError):
    """Something in the user's input is wrong.

    The message is one line that names what was found, where, what was wanted and what to do.
    The command line prints it as it is and exits with `code`.
    """

    code = 2


class Unavailable(AegisError):
    """What has worked does not answer now, and may again."""

    code = AGAIN


class SourceGone(AegisError):
    """A file is not there, cannot be read, or is no longer what it was when it was looked at first."""


def is_full_device(error: BaseException | None) -> bool:
    """Whether XLA has raised `error` because a device's memory is full."""
    # It has no class of its own for that; a CPU's in the middle of a program begins with INTERNAL.
    said = "RESOURCE_EXHAUSTED", "Out of memory allocating"
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
