"""What a page needs to know of a model to show its patches and its attention."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a server of an artifact has no torch
    from vitral.model.config import ViTConfig


def inside(config: "ViTConfig", img_size: tuple[int, int]) -> dict[str, Any]:
    """Give layers, heads, the grid of patches (rows, columns), and the names of the tokens before them.

    Args:
        config: of the model.
        img_size: (height, width) of the images that it is given.
    """
    height, width = img_size
    return {
        "layers": config.num_layers,
        "heads": config.num_heads,
        "grid": [height // config.patch_size, width // config.patch_size],
        "prefix_tokens": config.num_prefix_tokens,
        "prefix_names": config.prefix_names,
    }
