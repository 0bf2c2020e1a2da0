"""What is raised when the fault is in what was given, not in the program."""

BAD_INPUT = 2  # the exit status that tells of it


class InputError(ValueError):
    """A file, folder or option that cannot be used; the message says why and what would work.

    The command line prints it as one line and exits with status 2.
    """
