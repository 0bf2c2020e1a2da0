"""The exception for bad input, and exit statuses of the command line."""

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses of the command line


class InputError(ValueError):
    """A file, folder or option that cannot be used. The message says why, and what to do instead.

    The command line prints the message as one line and exits with status 2.
    """
