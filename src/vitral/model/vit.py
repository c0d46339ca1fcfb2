"""`VisionTransformer`: embed, encode, pool, classify (the paper, eq. 1 to 4).

Axes in tensor names are those of `embedding`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitral.model.config import Grid, Size, ViTConfig
from vitral.model.embedding import ViTEmbedding
from vitral.model.encoder import EncoderLayer
from vitral.model.initialize import initialize_weights
from vitral.model.kernels import stream_dtype
from vitral.model.pooling import AttentionPool
from vitral.model.positions.relation import Relation
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.rotary import RotaryPositions


@dataclass(frozen=True)
class Features:
    """What the encoder knows of each image; tokens after the final norm, layers as they left the block."""

    class_token: Tensor | None  # (B, D), or None for a model without one
    distillation_token: Tensor | None  # (B, D), or None for a model without one
    register_tokens: Tensor  # (B, R, D); R may be 0
    patch_tokens: Tensor  # (B, N, D), row-major over the grid
    grid: Grid  # rows and columns of patches
    layers: dict[int, Tensor] = field(default_factory=dict)  # index asked for -> (B, T, D)

    def __repr__(self) -> str:
        tensors = [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]
        tensors += [(f"layer {index}", tokens) for index, tokens in self.layers.items()]
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors)
        return f"<Features of {self.grid[0]}x{self.grid[1]} patches: {shapes}>"


class VisionTransformer(nn.Module):
    """The Vision Transformer: images (B, C, H, W) -> logits (B, L), or features (B, D) without a head.

    The first nine arguments are the paper's; `options` are the other fields of `ViTConfig`. Images may
    have any height and width that the patch divides: tables of positions are resized by the model's rule.

    `checkpoint_layers` is no part of the function: it keeps only what enters each layer for the backward
    pass and computes the rest again (arXiv:1604.06174), for the memory of a larger batch.

    Raises:
        ValueError: if the numbers do not fit each other (see `ViTConfig`), or `forward` gets images
            that the patch does not divide.
        TypeError: if an option is unknown.
    """

    checkpoint_layers = False

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
            config.img_size, patch_size, in_channels, embed_dim, dropout,
            position=config.position, stem=config.stem, norm=config.norm,
            options=dataclasses.replace(config.embedding, class_token=config.class_token),
        )  # fmt: skip
        self.layers = nn.ModuleList(
            EncoderLayer(
                embed_dim,
                num_heads,
                config.hidden_dim,
                dropout,
                options=config.layer,
                norm=config.norm,
                drop_path=config.drop_path * index / max(num_layers - 1, 1),
            )
            for index in range(num_layers)
        )
        self.relations = nn.ModuleList(_relations(config))
        # A post-norm layer already ends in a norm.
        final = "none" if config.layer.order == "post" else config.head.norm
        self.norm = config.norm.build(embed_dim) if final == "tokens" else nn.Identity()
        self.attention_pool = _attention_pool(config) if config.pooling == "map" else None
        self.pooled_norm = config.norm.build(embed_dim) if final == "pooled" else nn.Identity()
        self._build_head()
        self.reset_parameters()

    @classmethod
    def from_config(cls, config: ViTConfig) -> Self:
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})

    def _build_head(self) -> None:
        config = self.config
        width = config.embed_dim * (1 + (config.pooling == "class_mean"))
        self.hidden: nn.Module = nn.Identity()
        if config.head.hidden_dim is not None:
            self.hidden = nn.Sequential(nn.Linear(width, config.head.hidden_dim), nn.Tanh())
            width = config.head.hidden_dim

        def linear() -> nn.Module:
            if not config.num_classes:
                return nn.Identity()
            return nn.Linear(width, config.num_classes, bias=config.head.bias)

        self.head = linear()
        self.distillation_head = linear() if config.head.distillation_head else None

    def reset_parameters(self) -> None:
        """Draws all weights afresh, by the rules of `model/initialize.py`."""
        for part in self.children():
            initialize_weights(part)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, L); while a model with a distillation head trains, those of both heads, (2, B, L)."""
        tokens_BTD = self._tokens(images_BCHW)
        if self.training and self.distillation_head is not None:
            return torch.stack(self._heads(tokens_BTD))
        return self.classify(tokens_BTD)

    def _tokens(self, images_BCHW: Tensor) -> Tensor:
        x_BTD = self.embedding(images_BCHW)
        if self.training:
            x_BTD = x_BTD.to(stream_dtype(x_BTD))
        return self.encode(x_BTD, self.embedding.grid_of(images_BCHW), self._tokens_read())

    def _tokens_read(self) -> int | None:
        """How many of the first tokens the heads read; None: all.

        Of twelve layers' work, most of the last one's is on tokens that no class token's head sees.
        """
        if self.config.pooling != "class":
            return None
        return 1 + (self.distillation_head is not None)

    def encode(self, x_BTD: Tensor, grid: Grid | None = None, first: int | None = None) -> Tensor:
        """The layers and the final norm: (B, T, D) -> (B, T, D), or (B, first, D).

        Args:
            x_BTD: embedded tokens.
            grid: rows and columns of patches, if the images are of another size than the model.
            first: how many of the first tokens are wanted, if not all.
        """
        relations = self.relations_of_layers(x_BTD, grid)
        *others, (last, its_relation) = zip(self.layers, relations, strict=True)
        for layer, relation in others:
            x_BTD = self._run(layer, x_BTD, relation)
        return self.norm(self._run(last, x_BTD, its_relation, first))

    def _run(self, layer: nn.Module, x_BTD: Tensor, relation: Relation, first: int | None = None) -> Tensor:
        if self.checkpoint_layers and self.training:
            return checkpoint(layer, x_BTD, relation, first, use_reentrant=False)
        return layer(x_BTD, relation, first)

    def relations_of_layers(self, x_BTD: Tensor, grid: Grid | None = None) -> list[Relation]:
        """What the attention of each layer knows of places."""
        found = [relation(grid or self.embedding.grid, x_BTD.device) for relation in self.relations]
        if len(found) <= 1:
            return (found or [Relation()]) * len(self.layers)
        return found

    def pool(self, tokens_BTD: Tensor) -> Tensor:
        """One vector an image, y of eq. 4 for "class": (B, D), or (B, 2 D) for "class_mean"."""
        others_BTD = (
            tokens_BTD if self.config.head.pool_prefix else tokens_BTD[:, self.config.num_prefix_tokens :]
        )
        match self.config.pooling:
            case "class":
                pooled = tokens_BTD[:, 0]
            case "mean":
                pooled = others_BTD.mean(dim=1)
            case "class_mean":
                pooled = torch.cat([tokens_BTD[:, 0], others_BTD.mean(dim=1)], dim=1)
            case "map":
                assert self.attention_pool is not None
                pooled = self.attention_pool(others_BTD)
        return self.pooled_norm(pooled)

    def classify(self, tokens_BTD: Tensor) -> Tensor:
        """Logits of encoded tokens; with a distillation head the mean of both heads' (DeiT, §3)."""
        logits_BL, *distilled = self._heads(tokens_BTD)
        return (logits_BL + distilled[0]) / 2 if distilled else logits_BL

    def _heads(self, tokens_BTD: Tensor) -> list[Tensor]:
        logits_BL = self.head(self.hidden(self.pool(tokens_BTD)))
        if self.distillation_head is None:
            return [logits_BL]
        return [logits_BL, self.distillation_head(tokens_BTD[:, 1])]

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
        grid = self.embedding.grid_of(images_BCHW)
        x_BTD = self.embedding(images_BCHW)
        outputs: list[Tensor] = []
        for layer, relation in zip(self.layers, self.relations_of_layers(x_BTD, grid), strict=True):
            x_BTD = layer(x_BTD, relation)
            outputs.append(x_BTD)
        return self._features(self.norm(x_BTD), grid, {index: outputs[index] for index in layers})

    def _features(self, tokens_BTD: Tensor, grid: Grid, layers: dict[int, Tensor]) -> Features:
        options, prefix = self.config.embedding, self.config.num_prefix_tokens
        return Features(
            class_token=tokens_BTD[:, 0] if self.config.class_token else None,
            distillation_token=tokens_BTD[:, 1] if options.distillation_token else None,
            register_tokens=tokens_BTD[:, prefix - options.register_tokens : prefix],
            patch_tokens=tokens_BTD[:, prefix:],
            grid=grid,
            layers=layers,
        )

    @torch.no_grad()
    def reset_classifier(self, num_classes: int) -> None:
        """A freshly drawn head for another set of classes, after the pooled vector; 0 removes it."""
        head = dataclasses.replace(self.config.head, hidden_dim=None, bias=True)
        self.config = dataclasses.replace(self.config, num_classes=num_classes, head=head)
        like = next(self.parameters())
        self._build_head()
        for part in (self.head, self.distillation_head):
            if part is not None:
                initialize_weights(part.to(like))


def _relations(config: ViTConfig) -> list[nn.Module]:
    """None, one for all layers, or one for each."""
    options = config.layer.attention
    if options.rotary is not None:
        head_dim = config.embed_dim // config.num_heads
        count = config.num_layers if options.rotary.kind == "mixed" else 1
        return [
            RotaryPositions(head_dim, config.num_heads, config.num_prefix_tokens, options.rotary)
            for _ in range(count)
        ]
    if options.relative_bias != "none":
        count = config.num_layers if options.relative_bias == "layer" else 1
        resize, begin = options.relative_resize, options.relative_start
        return [RelativeBias(config.grid, config.num_heads, resize, begin) for _ in range(count)]
    return []


def _attention_pool(config: ViTConfig) -> AttentionPool:
    heads = config.head.pool_heads or config.num_heads
    activation = config.layer.feed_forward.activation
    ratio = config.head.pool_mlp_ratio
    hidden_dim = config.hidden_dim if ratio is None else int(config.embed_dim * ratio + 1e-6)
    return AttentionPool(config.embed_dim, heads, hidden_dim, activation, config.norm)
