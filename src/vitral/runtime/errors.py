"""What a user can get wrong: each message says what came, what was expected and what to do."""


class VitralError(Exception):
    """The input cannot be used; the command line prints the message as one line and exits with 1."""


class ImageError(VitralError):
    """One image cannot be read; the rest of a batch, folder or run can go on without it."""


class ToldElsewhere(VitralError):
    """Another process of the same work has printed the line; this one ends with status 1 and says nothing."""
