"""From pixels to tokens (the paper, eq. 1): patches, their positions, and the tokens before them.

A tensor's name ends in its axes, here and in every file of this folder:

    B batch    C channels    H W image height and width in pixels    P numbers of one patch (C * p * p)
    N patches  E tokens before the patches (class, distillation, registers)    T all tokens (E + N)
    D width    A attention heads    K width of one head (D / A)    Q queries, the tokens that are computed
    L classes  M rows of a table    S the images of a batch that take part in a branch
"""

from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model import initialize
from vitral.model.config import EmbeddingOptions, Grid, Norm, Position, Size, height_and_width, patch_grid
from vitral.model.kernels import HasKernels
from vitral.model.positions.tables import (
    LearnedPositions,
    NoPositions,
    PositionalEncoding2d,
    SinusoidalPositions,
)


class PatchEmbedding(HasKernels):
    """Cuts an image into patches and maps each to a vector, x_p E of eq. 1: (B, C, H, W) -> (B, N, D).

    N = (H / p) * (W / p), patches in row-major order. A convolution of kernel p and stride p, and
    one linear map shared by all flattened patches, are the same function of the same weight;
    `convolve` and `project` are those two routes, and `kernels.patches` says which `forward` takes.

    Args:
        img_size: pixels, one number or (height, width); a multiple of `patch_size`. `forward` takes any
            other multiples too.
        patch_size: side of a square patch in pixels.
        in_channels: C.
        embed_dim: D.

    Raises:
        ValueError: if the patch does not divide an image, or the number of channels is another.
    """

    def __init__(
        self,
        img_size: Size = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        embed_dim: int = 768,
    ) -> None:
        super().__init__()
        self.img_size = height_and_width(img_size)
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.grid_size = patch_grid(img_size, patch_size)
        self.n_patches = self.grid_size[0] * self.grid_size[1]
        # The weight (D, C, p, p) and bias that both routes use.
        self.projection = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        initialize.linear_map(self.projection)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        check_images(images_BCHW, self.in_channels, self.patch_size)
        return self.project(images_BCHW) if self.kernels.patches == "product" else self.convolve(images_BCHW)

    def convolve(self, images_BCHW: Tensor) -> Tensor:
        """The stride-p, kernel-p convolution, its feature map flattened."""
        return self.projection(images_BCHW).flatten(2).transpose(1, 2)

    def project(self, images_BCHW: Tensor) -> Tensor:
        """One linear map for every flattened patch."""
        weight_DP = self.projection.weight.flatten(1)
        return F.linear(self.patchify(images_BCHW), weight_DP, self.projection.bias)

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """Flattened patches (B, N, P), each ordered channel, row, column like the weight."""
        batch, channels, height, width = images_BCHW.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        tiles = images_BCHW.reshape(batch, channels, rows, p, columns, p)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * p)


class ConvStem(nn.Module):
    """The hybrid's convolutions (the paper, §3.1): (B, C, H, W) -> (B, C', H / 2^s, W / 2^s) for s stages.

    Each stage is a 3x3 convolution, ReLU and max-pooling by two, the tokenizer of compact
    transformers (Hassani et al., arXiv:2104.05704, §3.3): the locality that a small data set
    cannot teach a plain ViT. The paper's own hybrid uses a ResNet-50 here.

    The maximum comes before the ReLU: the same function, with a quarter of the ReLU's work. The channels are
    last in memory, where pooling is three times as fast (docs/log.md, 2026-11-25).
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        for inputs, outputs in zip((in_channels, *channels), channels, strict=False):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.stages.append(nn.Sequential(convolution, nn.MaxPool2d(2), nn.ReLU()))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.stages(images_BCHW.contiguous(memory_format=torch.channels_last))

    def convolutions(self) -> list[nn.Conv2d]:
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]

    def reset_parameters(self) -> None:
        for convolution in self.convolutions():
            initialize.filter_before_relu(convolution)

    def whiten(self, images_BCHW: Tensor) -> None:
        """Starts the first convolution with `initialize.whitening_filters`."""
        initialize.whitening_filters(self.convolutions()[0].weight, images_BCHW)


class ViTEmbedding(nn.Module):
    """From images to tokens (the paper, eq. 1): (B, C, H, W) -> (B, T, D).

    z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos, then dropout.

    Args:
        img_size: pixels, one number or (height, width); `forward` takes any other multiples of the patch.
        patch_size: side of a patch in image pixels; with a stem it counts the stem's halvings too.
        in_channels: C.
        embed_dim: D.
        dropout: probability, applied after the positions (the paper, appendix B.1).
        position: "learned" (the paper's 1-D table), "sinusoidal", "sinusoidal_2d" or "none".
        stem: output channels of each `ConvStem` stage; empty for the pure ViT.
        options: other tokens before the patches (in the order class, distillation, registers), norms.
        norm: the kind of those norms.

    Raises:
        ValueError: if the patch does not divide an image, the stem does not divide the patch, or the number
            of channels is another.
    """

    def __init__(  # noqa: PLR0913 - the paper's five, and what is chosen of each part
        self,
        img_size: Size,
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        dropout: float = 0.1,
        *,
        position: Position = "learned",
        stem: tuple[int, ...] = (),
        options: EmbeddingOptions = EmbeddingOptions(),
        norm: Norm = Norm(),
    ) -> None:
        super().__init__()
        self.img_size = height_and_width(img_size)
        self.in_channels, self.patch_size = in_channels, patch_size
        rows, columns = self.grid_size = patch_grid(img_size, patch_size)
        reduction = 2 ** len(stem)
        if patch_size % reduction:
            raise ValueError(
                f"patch_size is {patch_size}; it must be a multiple of {reduction}, by which the "
                f"{len(stem)}-stage stem reduces the image"
            )
        self.stem = ConvStem(in_channels, stem) if stem else nn.Identity()
        side = patch_size // reduction
        channels = stem[-1] if stem else in_channels
        self.patches = PatchEmbedding((rows * side, columns * side), side, channels, embed_dim)
        if not options.patch_bias:
            self.patches.projection.register_parameter("bias", None)
        self.patch_norm = norm.build(embed_dim) if options.patch_norm else nn.Identity()
        token = partial(_token, embed_dim)
        self.class_token = token(options.class_token is not False)
        self.distillation_token = token(options.distillation_token)
        self.register_tokens = token(options.register_tokens)
        self.positions = self._positions(position, embed_dim, options)
        self.dropout = nn.Dropout(dropout)
        self.norm = norm.build(embed_dim) if options.norm else nn.Identity()
        initialize.initialize_weights(self)

    def reset_parameters(self) -> None:
        for token in self._prefix_tokens():
            initialize.truncated_normal(token)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before the patches."""
        return sum(token.shape[1] for token in self._prefix_tokens())

    def _prefix_tokens(self) -> list[Tensor]:
        tokens = self.class_token, self.distillation_token, self.register_tokens
        return [token for token in tokens if token is not None]

    def _positions(
        self, position: Position, embed_dim: int, options: EmbeddingOptions
    ) -> LearnedPositions | SinusoidalPositions | PositionalEncoding2d | NoPositions:
        match position:
            case "learned":
                without = {"all": 0, "class": options.register_tokens, "patches": self.num_prefix_tokens}
                with_vector = self.num_prefix_tokens - without[options.positioned]
                return LearnedPositions(embed_dim, self.grid_size, with_vector, options.resize)
            case "sinusoidal":
                return SinusoidalPositions(embed_dim, self.num_prefix_tokens, self.grid_size)
            case "sinusoidal_2d":
                return PositionalEncoding2d(embed_dim, self.grid_size)
            case "none":
                return NoPositions()
        raise ValueError(f"position is {position!r}; it must be one of {', '.join(get_args(Position))}")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Computes eq. 1, with its sum in another order.

        Positions are added to the patches, then to the tokens before them, and then both are joined: the
        result is the same, and patches can be masked, dropped or merged between the steps.

        Raises:
            ValueError: if the images do not fit (`grid_of`).
        """
        grid = self.grid_of(images_BCHW)
        patches_BND = self.embed_patches(images_BCHW)
        patches_BND = self.positions(patches_BND, grid)
        return self.prepend_tokens(patches_BND)

    def grid_of(self, images_BCHW: Tensor) -> Grid:
        """Gives rows and columns of patches. Raises ValueError if the images do not fit."""
        check_images(images_BCHW, self.in_channels, self.patch_size)
        return images_BCHW.shape[2] // self.patch_size, images_BCHW.shape[3] // self.patch_size

    def embed_patches(self, images_BCHW: Tensor) -> Tensor:
        """[x_p^1 E; ...; x_p^N E] of eq. 1, after the stem: (B, C, H, W) -> (B, N, D)."""
        return self.patch_norm(self.patches(self.stem(images_BCHW)))

    def prepend_tokens(self, patches_BND: Tensor) -> Tensor:
        """Puts x_class and the like before the patches, with their positions: (B, N, D) -> (B, T, D)."""
        tokens_BTD = patches_BND
        if tokens := self._prefix_tokens():
            prefix_1ED = self.positions.of_prefix(torch.cat(tokens, dim=1))
            # shape[0], as len() would fix the batch size of an exported graph.
            tokens_BTD = torch.cat([prefix_1ED.expand(patches_BND.shape[0], -1, -1), patches_BND], dim=1)
        return self.norm(self.dropout(tokens_BTD))


def _token(embed_dim: int, count: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(1, int(count), embed_dim)) if count else None


def check_images(images_BCHW: Tensor, in_channels: int, patch_size: int) -> None:
    """Raises ValueError unless the images are (any batch, in_channels, multiples of patch_size)."""
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != in_channels or shape[2] % patch_size or shape[3] % patch_size:
        raise ValueError(
            f"images are {shape}; this model takes (batch, {in_channels}, height, width) with both "
            f"multiples of patch_size {patch_size}. Resize the images, or build the model with "
            "another patch_size or in_channels"
        )
