"""`vitral push`: a model on the hub."""

from pathlib import Path
from typing import Annotated

import typer

from vitral.cli import options


def push(
    model: options.Model,
    reference: Annotated[str, options.text("hf://ORG/NAME", "The repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Only you can see it.")] = False,
) -> None:
    """Upload a model folder to the hub, with a model card."""
    from vitral.checkpoints.push import push as upload

    print(upload(Path(model), reference, private=private))
