"""`VisionTransformer`: embed, encode, pool, classify (the paper, eq. 1 to 4).

Axes in tensor names are those of `embedding`.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitral.model.config import (
    EmbeddingOptions,
    Grid,
    HeadOptions,
    LayerOptions,
    Norm,
    Pooling,
    Position,
    Size,
    ViTConfig,
)
from vitral.model.embedding import ViTEmbedding
from vitral.model.encoder import EncoderLayer, encoder_layer
from vitral.model.initialize import initialize_weights
from vitral.model.kernels import HasKernels, fastest, set_kernels
from vitral.model.merging import Merge, Merging, log_sizes, merging_in, plan
from vitral.model.pooling import AttentionPool, mean
from vitral.model.positions.relation import NO_RELATION, Relation
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.rotary import RotaryPositions


@dataclass(frozen=True)
class Features:
    """Tokens of each image, after the final norm if that is on tokens; `layers`: outputs of single layers."""

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


class VisionTransformer(HasKernels):
    """The Vision Transformer: images (B, C, H, W) -> logits (B, L), or features (B, D) without a head.

    The first nine arguments are the paper's. The groups `norm`, `embedding`, `layer` and `head` may be
    given as mappings of the fields to change; `ViTConfig` says what each choice means. Images may have any
    height and width that the patch divides: tables of positions are resized by the model's rule.

    A model with a distillation head gives, in training mode, the logits of both heads, (2, B, L), and in
    evaluation their mean, (B, L) (DeiT, arXiv:2012.12877, §3).

    `merge_tokens` lets similar patches become one between the layers, which is faster and nearly the same
    (`model/merging.py`).

    `checkpoint_layers` is no part of the function: it keeps only what enters each layer for the backward
    pass and computes the rest again (arXiv:1604.06174), for the memory of a larger batch.

    Raises:
        ValueError: if the numbers do not fit each other (see `ViTConfig`), or `forward` gets images
            that the patch does not divide.
    """

    checkpoint_layers = False
    merge: tuple[int, ...] = ()  # patches that merge in each layer (`merge_tokens`)

    def __init__(  # noqa: PLR0913 - the paper's nine numbers, as its readers expect them, and every choice
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
        *,
        position: Position = "learned",
        pooling: Pooling = "class",
        stem: Sequence[int] = (),
        drop_path: float = 0.0,
        norm: Norm | Mapping[str, Any] = Norm(),
        embedding: EmbeddingOptions | Mapping[str, Any] = EmbeddingOptions(),
        layer: LayerOptions | Mapping[str, Any] = LayerOptions(),
        head: HeadOptions | Mapping[str, Any] = HeadOptions(),
    ) -> None:
        super().__init__()
        groups: dict[str, Any] = {"norm": norm, "embedding": embedding, "layer": layer, "head": head}
        self.config = config = ViTConfig(
            img_size, patch_size, in_channels, embed_dim, num_layers, num_heads, mlp_ratio,
            num_classes, dropout, position=position, pooling=pooling, stem=tuple(stem), drop_path=drop_path,
            **groups,
        )  # fmt: skip
        self.embedding = ViTEmbedding(
            config.img_size, patch_size, in_channels, embed_dim, dropout,
            position=position, stem=config.stem, norm=config.norm,
            options=dataclasses.replace(config.embedding, class_token=config.class_token),
        )  # fmt: skip
        self.layers = nn.ModuleList(_layers(config))
        self.relations = nn.ModuleList(_relations(config))
        # A post-norm layer already ends in a norm.
        final = "none" if config.layer.order == "post" else config.head.norm
        self.norm = config.norm.build(embed_dim) if final == "tokens" else nn.Identity()
        self.attention_pool = _attention_pool(config) if pooling == "map" else None
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

    def choose_kernels(self, device: torch.device, precision: torch.dtype, *, training: bool = False) -> None:
        """Takes the kernels that are faster there (`kernels.fastest`); called when the model is placed."""
        set_kernels(self, fastest(device, precision, training=training))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, L); while training with a distillation head both heads', (2, B, L).

        Raises:
            ValueError: if the images do not fit, or tokens are to merge and stochastic depth is on.
        """
        z_BTD = self.embedding(images_BCHW)  # eq. 1
        if self.training and self.kernels.stream is not None:
            z_BTD = z_BTD.to(self.kernels.stream)
        grid = self.embedding.grid_of(images_BCHW)
        *relations, last = self.relations_of_layers(z_BTD, grid)
        # The class token's head reads that token alone, so the last layer computes no other.
        last = last._replace(num_queries=self.num_tokens_read)
        merging = self._merging(grid, z_BTD.device)
        z_BQD = self._through_layers(z_BTD, [*relations, last], merging=merging)  # eq. 2 and 3
        sizes_BT = None if merging is None else merging.sizes_BT
        return self.classify(self.norm(z_BQD), sizes_BT)  # eq. 4

    @property
    def num_tokens_read(self) -> int | None:
        """How many of the first tokens the heads read; None: all."""
        return 1 + (self.distillation_head is not None) if self.config.pooling == "class" else None

    def encode(
        self,
        x_BTD: Tensor,
        grid: Grid | None = None,
        *,
        relations: Sequence[Relation] | None = None,
        outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """The layers and the final norm: (B, T, D) -> (B, T, D).

        Where tokens merge, each patch gets the vector of the token that it became part of.

        Args:
            x_BTD: embedded tokens.
            grid: rows and columns of patches, if the images are of another size than the model.
            relations: one for each layer, in the place of `relations_of_layers(x_BTD, grid)`: with an
                observer of their attention, or of the tokens that were not left out. Then none merge.
            outputs: gets what leaves each layer, (B, T, D).
        """
        merging = None
        if relations is None:
            relations = self.relations_of_layers(x_BTD, grid)
            merging = self._merging(grid or self.embedding.grid_size, x_BTD.device)
        z_BTD = self._through_layers(x_BTD, relations, outputs, merging)
        return self.norm(z_BTD if merging is None else merging.unmerged(z_BTD))

    def _through_layers(
        self,
        z_BTD: Tensor,
        relations: Sequence[Relation],
        outputs: list[Tensor] | None = None,
        merging: Merging | None = None,
    ) -> Tensor:
        for index, (layer, relation) in enumerate(zip(self.layers, relations, strict=True)):
            if merging is not None:
                relation = merging.relation(index, relation)
            if self.checkpoint_layers and self.training:
                z_BTD = checkpoint(layer, z_BTD, relation, use_reentrant=False)
            else:
                z_BTD = layer(z_BTD, relation)
            if outputs is not None:
                outputs.append(z_BTD if merging is None else merging.unmerged(z_BTD))
        return z_BTD

    def merge_tokens(self, merge: Merge | None) -> None:
        """Lets patches merge from now on, wherever images go through all layers; None: no longer.

        Raises:
            ValueError: if `merge` says nothing of use, or tokens of this model cannot merge.
        """
        if merge is None:
            self.merge = ()
            return
        counts = plan(merge, len(self.layers))
        if self.config.layer.attention.relative_bias != "none":
            raise ValueError(
                "tokens cannot merge in a model with relative biases, which are of pairs of places of the "
                "grid: use it without merge"
            )
        if self.config.layer.order == "parallel":
            raise ValueError(
                "tokens merge between attention and MLP, which this model's layers compute side by side: use "
                "it without merge"
            )
        # Of the last layer the class token alone is read.
        self.merge = counts if self.num_tokens_read is None else (*counts[:-1], 0)

    def _merging(self, grid: Grid, device: torch.device) -> Merging | None:
        """The patches of a pass, if some are to merge."""
        if not any(self.merge):
            return None
        if self.training and self.config.drop_path:
            raise ValueError(
                "tokens cannot merge while stochastic depth leaves images out of attention: set drop_path to "
                "0, or merge after training"
            )
        counts = merging_in(self.merge, grid[0] * grid[1])
        rotaries = [relation for relation in self.relations if isinstance(relation, RotaryPositions)]
        if not rotaries:
            return Merging(counts, self.config.num_prefix_tokens)
        places_T2 = rotaries[0].places(grid, device)
        each = rotaries if len(rotaries) == len(counts) else rotaries * len(counts)
        return Merging(counts, self.config.num_prefix_tokens, each, places_T2)

    def relations_of_layers(self, x_BTD: Tensor, grid: Grid | None = None) -> list[Relation]:
        """What the attention of each layer knows of places."""
        found = [relation(grid or self.embedding.grid_size, x_BTD.device) for relation in self.relations]
        match len(found):
            case 0:
                return [NO_RELATION] * len(self.layers)
            case 1:  # all layers share it
                return found * len(self.layers)
            case _:
                return found

    def pool(
        self, tokens_BTD: Tensor, pooling: Pooling | None = None, sizes_BT: Tensor | None = None
    ) -> Tensor:
        """Makes one vector of each image, y of eq. 4 for "class": (B, D), or (B, 2 D) for "class_mean".

        Args:
            tokens_BTD: encoded tokens.
            pooling: None: the model's own.
            sizes_BT: how many patches each token stands for, where some merged; None: one each.

        Raises:
            ValueError: if it is "map", which the model has not learned.
        """
        first = 0 if self.config.head.pool_prefix else self.config.num_prefix_tokens
        others_BTD = tokens_BTD[:, first:]
        sizes_BT = None if sizes_BT is None else sizes_BT[:, first:]
        match pooling or self.config.pooling:
            case "class":
                pooled = tokens_BTD[:, 0]
            case "mean":
                pooled = mean(others_BTD, sizes_BT)
            case "class_mean":
                pooled = torch.cat([tokens_BTD[:, 0], mean(others_BTD, sizes_BT)], dim=1)
            case "map":
                if self.attention_pool is None:
                    raise ValueError("pooling is 'map', and this model has no attention pooling")
                pooled = self.attention_pool(others_BTD, None if sizes_BT is None else log_sizes(sizes_BT))
        return self.pooled_norm(pooled)

    def classify(self, tokens_BTD: Tensor, sizes_BT: Tensor | None = None) -> Tensor:
        """Logits of encoded tokens, as `forward` gives them; `sizes_BT` as in `pool`."""
        logits_BL = self.head(self.hidden(self.pool(tokens_BTD, sizes_BT=sizes_BT)))
        if self.distillation_head is None:
            return logits_BL
        both_2BL = torch.stack([logits_BL, self.distillation_head(tokens_BTD[:, 1])])
        return both_2BL if self.training else both_2BL.mean(dim=0)

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
        x_BTD = self.encode(x_BTD, grid, outputs=outputs)
        return self._features(x_BTD, grid, {index: outputs[index] for index in layers})

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
        """Draws a new head for another number of classes, after the pooled vector; 0 removes it."""
        head = dataclasses.replace(self.config.head, hidden_dim=None, bias=True)
        self.config = dataclasses.replace(self.config, num_classes=num_classes, head=head)
        like = next(self.parameters())
        self._build_head()
        for part in (self.head, self.distillation_head):
            if part is not None:
                initialize_weights(part.to(like))


def _layers(config: ViTConfig) -> Iterator[EncoderLayer]:
    """Stochastic depth grows linearly from the first, which has none."""
    for index in range(config.num_layers):
        yield encoder_layer(
            config.embed_dim,
            config.num_heads,
            config.hidden_dim,
            config.dropout,
            options=config.layer,
            norm=config.norm,
            drop_path=config.drop_path * index / max(config.num_layers - 1, 1),
        )


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
        return [RelativeBias(config.grid_size, config.num_heads, resize, begin) for _ in range(count)]
    return []


def _attention_pool(config: ViTConfig) -> AttentionPool:
    heads = config.head.pool_heads or config.num_heads
    activation = config.layer.feed_forward.activation
    ratio = config.head.pool_mlp_ratio
    hidden_dim = config.hidden_dim if ratio is None else int(config.embed_dim * ratio + 1e-6)
    return AttentionPool(config.embed_dim, heads, hidden_dim, activation, config.norm)
