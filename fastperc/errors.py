"""What is raised when the fault is in what was given, not in the program."""


class InputError(ValueError):
    """A file, folder or option that cannot be used; the message says why and what would work.

    The command line prints it as one line and exits with status 2.
    """
