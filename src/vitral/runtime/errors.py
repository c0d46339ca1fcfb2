"""What a user can get wrong: each message says what came, what was expected and what to do."""

_MAX_LINE = 250  # characters


class VitralError(Exception):
    """The input cannot be used; the command line prints the message as one line and exits with 1."""


class ImageError(VitralError):
    """One image cannot be read; the rest of a batch, folder or run can go on without it."""


class ToldElsewhere(VitralError):
    """Another process of the same work has printed the line; this one ends with status 1 and says nothing."""


def one_line(reason: object) -> str:
    """Give the first line of a library's message, and no more than a terminal can show."""
    line = next(iter(str(reason).strip().splitlines()), "") or type(reason).__name__
    if "weights_only" in line or "Weights only" in line:
        # PyTorch tells here how to switch off what keeps a file from executing code.
        line = "it is in a form that PyTorch reads only by executing code"
    return without_control_characters(line[:_MAX_LINE])


def without_control_characters(text: str) -> str:
    """Show what a terminal would obey as question marks."""
    return "".join(c if c.isprintable() else "?" for c in text)
