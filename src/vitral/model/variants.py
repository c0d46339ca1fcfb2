"""Named sizes as rows of a table, and the parser for names such as "ViT-B/16" and "Conv+ViT-Pico/4@32"."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vitral.model.config import ViTConfig, patch_grid
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.settings import build, deep_merge


def _size(embed_dim: int, num_layers: int, num_heads: int, mlp_ratio: float = 4) -> dict[str, Any]:
    return {
        "embed_dim": embed_dim,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "mlp_ratio": mlp_ratio,
    }


SIZES = {
    # Ours, for small images, two CPU cores and half an hour (docs/log.md, 2026-11-26).
    "Pico": _size(128, 4, 4, 2),
    "Ti": _size(192, 12, 3),  # DeiT (arXiv:2012.12877), table 1
    "S": _size(384, 12, 6),  # DeiT, table 1
    "B": _size(768, 12, 12),  # the paper, table 1
    "L": _size(1024, 24, 16),  # the paper, table 1
    "H": _size(1280, 32, 16),  # the paper, table 1
    "g": _size(1408, 40, 16, 6144 / 1408),  # Scaling ViT (arXiv:2106.04560), table 2
}

# The patch sizes that the paper, DeiT and Scaling ViT trained; the parser takes any other too.
PUBLISHED = (
    "ViT-Ti/16", "ViT-S/16", "ViT-S/32", "ViT-B/8", "ViT-B/16", "ViT-B/32", "ViT-L/16", "ViT-L/32",
    "ViT-H/14", "ViT-g/14",
)  # fmt: skip

# What few images need beside the stem: heads that begin by looking at neighbours, and the patches' mean.
# The class token is one more to attend to, a register (docs/log.md, 2026-11-25).
_HYBRID = {
    "pooling": "mean",
    "embedding": {"class_token": True},
    "layer": {"attention": {"relative_bias": "layer", "relative_start": "local"}},
}

# Channels of the last stage, halved for each stage before it.
_STEM_CHANNELS = 128

_NAME = re.compile(r"(?P<stem>Conv\+)?ViT-(?P<size>\w+)/(?P<patch>\d+)(@(?P<img>\d+)(x(?P<w>\d+))?)?")


def parse(name: str) -> ViTConfig:
    """The config that a name stands for: ``[Conv+]ViT-SIZE/PATCH[@PIXELS | @HEIGHTxWIDTH]``.

    "Conv+" is the hybrid: convolutions that halve the image until one patch is one position of
    their feature map, as in the paper's §3.1, so PATCH is still the stride in image pixels. Its heads
    begin by looking at one neighbour each (ConViT, arXiv:2103.10697), and it pools the mean of the patches.

    Raises:
        ValueError: if the name cannot be read; it names the nearest one that can.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["size"] not in SIZES:
        raise ValueError(f"{_unknown(name)} Known: {', '.join(names())}")
    patch_size = int(match["patch"])
    options: dict[str, Any] = dict(SIZES[match["size"]], patch_size=patch_size)
    if match["img"]:
        options["img_size"] = (int(match["img"]), int(match["w"] or match["img"]))
    if match["stem"]:
        options |= _HYBRID | {"stem": _stem(patch_size)}
    return ViTConfig(**options)


def create(name: str, **overrides: Any) -> VisionTransformer:
    """A freshly initialized model: ``create("ViT-B/16", num_classes=10, img_size=384)``.

    Of a group given as a mapping, what it does not name stays as the variant has it.

    Raises:
        ValueError: if the name or an override cannot be used.
        TypeError: if an override is no field of `ViTConfig`.
    """
    return VisionTransformer(**deep_merge(asdict(parse(name)), overrides))


def configure(name: str, overrides: Mapping[str, Any]) -> ViTConfig:
    """The config of a name with fields of `ViTConfig` changed, groups as mappings.

    Raises:
        VitralError: if the name or an override cannot be used.
    """
    try:
        config = parse(name)
    except ValueError as error:
        raise VitralError(f"{name} is not a checkpoint, and {error}") from error
    try:
        wanted = build(ViTConfig, deep_merge(asdict(config), overrides))
        patch_grid(wanted.img_size, wanted.patch_size)
    except (ValueError, VitralError) as error:
        raise VitralError(f"{name}: {error}") from error
    return wanted


def names() -> tuple[str, ...]:
    """Gives the names worth listing; every size goes with every patch size."""
    return (*PUBLISHED, "Conv+ViT-Pico/4", "Conv+ViT-Ti/8")


# Names that begin so are networks of other kinds, or of ViT's kin that is not plain.
_OTHER_KINDS = re.compile(
    r"(wide_?|se_?|tf_|ecaresnet)?(resnet|resnext|resnetv2|efficientnet|convnext|mobilenet|mobilevit|vgg|densenet|"
    r"inception|xception|regnet|swin|pvt|mixer|mlp-?mixer|maxvit|coatnet|twins|cait|alexnet|squeezenet|nfnet|yolo|"
    r"shufflenet|mnasnet|ghostnet|hrnet|dpn|focalnet|poolformer|levit|crossvit|tnt|nest|unet|bit|googlenet|"
    r"fastvit|efficientvit|edgenext|hiera|davit|bert|gpt|whisper)",
    re.IGNORECASE,
)
_LIBRARIES = re.compile(r"(vit|deit|dino|eva|beit|clip|siglip|mae)\w*_", re.IGNORECASE)
_NEAR = 0.7  # likeness of names of which one may be meant by the other


def _unknown(name: str) -> str:
    if _OTHER_KINDS.match(name):
        return f"{name!r} is not a plain Vision Transformer, and Vitral has no other networks."
    near = max(names(), key=lambda known: _likeness(name, known))
    if _likeness(name, near) >= _NEAR:
        return f"there is no model {name!r}; did you mean {near!r}?"
    if _LIBRARIES.match(name):
        return (
            f"there is no model {name!r}: names stand for random weights. Those of other libraries are "
            "files or hf://org/name, such as hf://timm/NAME."
        )
    return f"there is no model {name!r}."


def _likeness(name: str, known: str) -> float:
    return difflib.SequenceMatcher(None, name.lower(), known.lower()).ratio()


def _stem(patch_size: int) -> tuple[int, ...]:
    halvings = patch_size.bit_length() - 1
    if patch_size != 2**halvings or halvings == 0:
        raise ValueError(f"the patch size is {patch_size}; for a Conv+ model it must be 2, 4, 8 and so on")
    return tuple(max(_STEM_CHANNELS >> (halvings - 1 - stage), 16) for stage in range(halvings))
