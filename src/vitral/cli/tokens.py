"""The file of tokens that `serve` asks for and `bench serve` sends."""

from pathlib import Path

from vitral.runtime.errors import VitralError


def read_tokens(file: Path, least: int = 1) -> tuple[str, ...]:
    """Give the tokens of a file, one a line.

    Args:
        file: of ASCII text.
        least: letters of each.

    Raises:
        VitralError: if it cannot be read, or holds none, or one that is shorter or has spaces in it.
    """
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise VitralError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise VitralError(f"{file} is no file of tokens: they are of ASCII letters") from error
    tokens = tuple(line.strip() for line in lines if line.strip())
    if not tokens or min(map(len, tokens)) < least or any(len(token.split()) > 1 for token in tokens):
        raise VitralError(
            f"{file}: give a token a line, each of {least} letters or more without spaces, such as "
            "`openssl rand -hex 32` prints"
        )
    return tokens
