"""`vitral verify`: does an artifact still answer as it did when it was exported?"""

from typing import Annotated

from vitral.cli import options
from vitral.cli.console import say
from vitral.runtime.streams import shown


def verify(
    artifact: Annotated[str, options.text("ARTIFACT", "A folder that export or optimize wrote.")],
    trust: options.Trust = False,
) -> None:
    """Check every form of ARTIFACT: files, preprocessing and answers to its golden picture.

    A form that answers otherwise than at export is named, with the part that differs.
    """
    from vitral.artifacts.open import verify_artifact

    manifest = verify_artifact(artifact, trusted=trust, tell=lambda form, found: say(f"{form}: {found}"))
    about = manifest.about
    height, width = about.preprocess.img_size
    labels = ", ".join(about.labels[:5]) + (", ..." if len(about.labels) > 5 else "")
    say(shown(f"{artifact}: {about.name}, {height}x{width} px, {len(about.labels):,} labels ({labels})"))
