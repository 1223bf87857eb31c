"""The one exception for mistakes that are the user's to mend."""


class UserError(Exception):
    """Wrong input at the edge: a file, row or key that does not hold what it must.

    The message is one line: where (file, row, key), what was wrong, what to do. The command line prints it without a
    traceback and exits with code 2. Anything else that escapes is a defect of this project and keeps its traceback.
    """
