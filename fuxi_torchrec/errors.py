"""The exceptions that end a command with one line and no traceback."""

AGAINST_DIVERGENCE = "try a lower optimizer.learning_rate, optimizer.weight_decay or optimizer.clip_grad_norm"
"""What to do, in every message on a loss, a parameter or a score that is not finite."""


def one_line(error: object, most: int = 200) -> str:
    """Tells an error in one line of at most `most` characters; one without a text by its type."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class UserError(Exception):
    """Raised for wrong input at the edge: a file, row or key that does not hold what it must.

    The message is one line: where (file, row, key), what was wrong, what to do. The command line prints it without a
    traceback and exits with code 2. Anything else that escapes is a defect of this project and keeps its traceback.

    Attributes:
        reported: another process has printed it already.
        code: the command's exit code.
    """

    reported = False
    code = 2


class LostProcess(Exception):
    """Raised where another process of the run died or hangs; the exit code is 1. `reported` as in UserError."""

    reported = False


class FolderInUse(UserError):
    """Raised where another process writes to the same folder. Nothing was done, and the same command may work later."""

    code = 75  # EX_TEMPFAIL of sysexits.h
