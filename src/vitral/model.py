"""`ViTConfig` and `VisionTransformer`: embed, encode, pool, classify (the paper, eq. 1 to 4).

Axes in tensor names are those of `blocks`, and L classes.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from vitral.blocks import (
    NORM_EPS,
    EncoderLayer,
    Position,
    Size,
    ViTEmbedding,
    height_and_width,
    initialize_weights,
    patch_grid,
)

Pooling = Literal["class", "mean"]


@dataclass(frozen=True)
class ViTConfig:
    """Everything that decides a `VisionTransformer`'s shapes and function.

    Raises:
        ValueError: if a number is out of its range or a name unknown.
    """

    img_size: Size = 224  # pixels; one number or (height, width)
    patch_size: int = 16  # pixels, a stem's reduction included
    in_channels: int = 3
    embed_dim: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4  # hidden width of the MLP over embed_dim
    num_classes: int = 1000  # 0: no head, the model gives pooled features
    dropout: float = 0.1
    _: dataclasses.KW_ONLY
    position: Position = "learned"
    pooling: Pooling = "class"  # "mean": average the patch tokens; there is no class token
    stem: tuple[int, ...] = ()  # channels of each halving convolution before the patches
    norm_first: bool = True  # False: the post-norm of the 2017 Transformer
    drop_path: float = 0.0  # stochastic depth of the last layer; the first has 0, linear between

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", height_and_width(self.img_size))
        object.__setattr__(self, "stem", tuple(self.stem))
        if min(height_and_width(self.img_size)) < 1:
            raise ValueError(f"img_size is {self.img_size}; height and width must be at least 1")
        for name in ("patch_size", "in_channels", "embed_dim", "num_layers", "num_heads", "hidden_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; 0 gives features, more a head")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a probability below 1")
        for name, choices in (("position", get_args(Position)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it is one of {', '.join(choices)}")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.img_size, self.patch_size)

    @property
    def hidden_dim(self) -> int:
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True)
class Features:
    """What the encoder knows of each image; tokens after the final norm, layers as they left the block."""

    class_token: Tensor | None  # (B, D), or None for a model without one
    patch_tokens: Tensor  # (B, N, D), row-major over the grid
    grid: tuple[int, int]  # rows and columns of patches
    layers: dict[int, Tensor] = field(default_factory=dict)  # index asked for -> (B, T, D)


class VisionTransformer(nn.Module):
    """The Vision Transformer: images (B, C, H, W) -> logits (B, L), or features (B, D) without a head.

    The first nine arguments are the paper's; `options` are the other fields of `ViTConfig`:
    position, pooling, stem, norm_first, drop_path.

    Raises:
        ValueError: if the numbers do not fit each other (see `ViTConfig`), or `forward` gets images
            of another shape.
        TypeError: if an option is unknown.
    """

    def __init__(  # noqa: PLR0913 - the paper's nine numbers, as its readers expect them
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4,
        num_classes: int = 1000,
        dropout: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__()
        self.config = config = ViTConfig(
            img_size, patch_size, in_channels, embed_dim, num_layers, num_heads, mlp_ratio,
            num_classes, dropout, **options,
        )  # fmt: skip
        self.embedding = ViTEmbedding(
            config.img_size,
            patch_size,
            in_channels,
            embed_dim,
            dropout,
            position=config.position,
            class_token=config.pooling == "class",
            stem=config.stem,
        )
        self.layers = nn.ModuleList(
            EncoderLayer(
                embed_dim,
                num_heads,
                config.hidden_dim,
                dropout,
                norm_first=config.norm_first,
                drop_path=config.drop_path * index / max(num_layers - 1, 1),
            )
            for index in range(num_layers)
        )
        # A post-norm layer already ends in a norm.
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS) if config.norm_first else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.initialize()

    @classmethod
    def from_config(cls, config: ViTConfig) -> Self:
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def initialize(self) -> None:
        """Draws all weights afresh (`blocks.initialize_weights`)."""
        initialize_weights(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.head(self.pool(self.encode(self.embedding(images_BCHW))))

    def encode(self, x_BTD: Tensor) -> Tensor:
        """The layers and the final norm."""
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.norm(x_BTD)

    def pool(self, tokens_BTD: Tensor) -> Tensor:
        """One vector an image (B, D): the class token, y of eq. 4, or the mean of the patches."""
        return tokens_BTD[:, 0] if self.config.pooling == "class" else tokens_BTD.mean(dim=1)

    def features(self, images_BCHW: Tensor, layers: Sequence[int] = ()) -> Features:
        """The tokens behind the logits.

        Args:
            images_BCHW: preprocessed images.
            layers: indices of layers whose output (B, T, D) is wanted too; negative ones count from
                the end, and the answer's keys are the indices as asked for.

        Raises:
            IndexError: if the model has no such layer.
        """
        depth = len(self.layers)
        for index in layers:
            if not -depth <= index < depth:
                raise IndexError(f"there is no layer {index}; this model has 0 to {depth - 1}")
        x_BTD = self.embedding(images_BCHW)
        outputs: list[Tensor] = []
        for layer in self.layers:
            x_BTD = layer(x_BTD)
            outputs.append(x_BTD)
        tokens_BTD = self.norm(x_BTD)
        has_class = self.config.pooling == "class"
        return Features(
            class_token=tokens_BTD[:, 0] if has_class else None,
            patch_tokens=tokens_BTD[:, int(has_class) :],
            grid=self.embedding.patches.grid,
            layers={index: outputs[index] for index in layers},
        )

    @torch.no_grad()
    def replace_head(self, num_classes: int) -> None:
        """A freshly drawn head for another set of classes; 0 removes it."""
        self.config = dataclasses.replace(self.config, num_classes=num_classes)
        width, like = self.config.embed_dim, next(self.parameters())
        self.head = nn.Linear(width, num_classes).to(like) if num_classes else nn.Identity()
        initialize_weights(self.head)
