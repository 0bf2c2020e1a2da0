"""The exception for bad input, and the exit status that goes with it."""

BAD_INPUT = 2  # exit status of the command line


class InputError(ValueError):
    """A file, folder or option that cannot be used. The message says why, and what to do instead.

    The command line prints the message as one line and exits with status 2.
    """
