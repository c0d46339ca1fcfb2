"""The parts of a Vision Transformer: tensors in, tensors out, plain numbers as arguments.

A tensor's name ends in its axes:

    B batch    C channels    H W image height and width in pixels    P pixels of one patch (C * p * p)
    N patches  T tokens (the class token, if any, then the N patches)
    D width    A attention heads    K width of one head (D / A)

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv:2010.11929); "the 2017
Transformer" is Vaswani et al., Attention Is All You Need (arXiv:1706.03762).
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

Size = int | tuple[int, int]
Position = Literal["learned", "sinusoidal", "sinusoidal_2d", "none"]

INIT_STD = 0.02
# Google's and timm's ViTs; PyTorch's own default is 1e-5.
NORM_EPS = 1e-6


def height_and_width(size: Size) -> tuple[int, int]:
    """``224`` and ``(224, 224)`` name the same size; the answer is always (height, width)."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"img_size is {size}; give one number or (height, width)")
    height, width = size
    return height, width


def patch_grid(img_size: Size, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches.

    Raises:
        ValueError: if the patch does not divide the image.
    """
    height, width = height_and_width(img_size)
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"img_size is {height}x{width}, which patch_size {patch_size} does not divide; "
            "choose multiples of the patch size"
        )
    return height // patch_size, width // patch_size


def check_images(images_BCHW: Tensor, in_channels: int, img_size: tuple[int, int]) -> None:
    """Raises ValueError unless the images are (any batch, in_channels, *img_size)."""
    expected = (in_channels, *img_size)
    if images_BCHW.ndim != 4 or tuple(images_BCHW.shape[1:]) != expected:
        raise ValueError(
            f"images are {tuple(images_BCHW.shape)}; this model takes (batch, "
            f"{', '.join(map(str, expected))}). Resize the images, or build the model with "
            "another img_size or in_channels"
        )


# --- Patches -------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and maps each to a vector (the paper, eq. 1): (B, C, H, W) -> (B, N, D).

    N = (H / p) * (W / p), patches in row-major order. A convolution of kernel p and stride p, and
    one linear map shared by all flattened patches, are the same function of the same weight;
    `convolve` and `project` are those two routes and `forward` takes the faster one for the device.

    Args:
        img_size: pixels, one number or (height, width); a multiple of `patch_size`.
        patch_size: side of a square patch in pixels.
        in_channels: C.
        embed_dim: D.

    Raises:
        ValueError: if the patch does not divide the image, or `forward` gets another image shape.
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
        self.grid = patch_grid(img_size, patch_size)
        self.n_patches = self.grid[0] * self.grid[1]
        # The weight (D, C, p, p) and bias that both routes use.
        self.projection = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        check_images(images_BCHW, self.in_channels, self.img_size)
        if prefers_linear_patches(images_BCHW):
            return self.project(images_BCHW)
        return self.convolve(images_BCHW)

    def convolve(self, images_BCHW: Tensor) -> Tensor:
        """The stride-p, kernel-p convolution, its feature map flattened."""
        return self.projection(images_BCHW).flatten(2).transpose(1, 2)

    def project(self, images_BCHW: Tensor) -> Tensor:
        """One linear map for every flattened patch."""
        weight_DP = self.projection.weight.flatten(1)
        return F.linear(self.patchify(images_BCHW), weight_DP, self.projection.bias)

    def patchify(self, images_BCHW: Tensor) -> Tensor:
        """Flattened patches (B, N, P), each ordered channel, row, column like the weight."""
        batch, channels = images_BCHW.shape[:2]
        (rows, columns), p = self.grid, self.patch_size
        tiles = images_BCHW.reshape(batch, channels, rows, p, columns, p)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, self.n_patches, channels * p * p)


class ConvStem(nn.Module):
    """The hybrid's convolutions (the paper, §3.1): (B, C, H, W) -> (B, C', H / 2^s, W / 2^s) for s stages.

    Each stage is a 3x3 convolution, ReLU and max-pooling by two, the tokenizer of compact
    transformers (Hassani et al., arXiv:2104.05704, §3.3): the locality that a small data set
    cannot teach a plain ViT. The paper's own hybrid uses a ResNet-50 here.
    """

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        for inputs, outputs in zip((in_channels, *channels), channels, strict=False):
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            self.stages.append(nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.stages(images_BCHW)

    def convolutions(self) -> list[nn.Conv2d]:
        return [module for module in self.modules() if isinstance(module, nn.Conv2d)]


# --- Positions -----------------------------------------------------------------------------------


def sinusoidal_table(positions: Tensor, embed_dim: int) -> Tensor:
    """Sine/cosine encodings of real-valued positions, (M,) -> (M, D).

    The 2017 Transformer, §3.5: channel 2i is sin(pos / 10000^(2i/D)), channel 2i + 1 its cosine.
    """
    channels = torch.arange(0, embed_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, None] * 10_000.0 ** (-channels / embed_dim)
    # An odd width ends on a sine.
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :embed_dim].float()


def _positions_on_cpu(count: int) -> Tensor:
    """On the CPU whatever device a model is built on: MPS has no float64, and no file fills a meta table."""
    return torch.arange(count, device="cpu")


def sinusoidal_table_2d(grid: tuple[int, int], embed_dim: int) -> Tensor:
    """Row-major (rows * columns, D): half the channels encode the row, the other half the column."""
    if embed_dim % 4:
        raise ValueError(f"2-D sine/cosine positions need embed_dim % 4 == 0; it is {embed_dim}")
    rows, columns = torch.meshgrid(*(_positions_on_cpu(n) for n in grid), indexing="ij")
    halves = [sinusoidal_table(axis.flatten(), embed_dim // 2) for axis in (rows, columns)]
    return torch.cat(halves, dim=1)


class PositionalEncoding(nn.Module):
    """Adds the fixed sine/cosine encoding of the 2017 Transformer, §3.5: (B, N, D) -> (B, N, D).

    Args:
        embed_dim: D.
        max_len: the longest sequence; shorter ones take the first rows of the table.

    Raises:
        ValueError: if a sequence is longer than `max_len`.
    """

    table: Tensor

    def __init__(self, embed_dim: int, max_len: int) -> None:
        super().__init__()
        table = sinusoidal_table(_positions_on_cpu(max_len), embed_dim)
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        length, max_len = tokens_BND.shape[1], self.table.shape[0]
        if length > max_len:
            raise ValueError(f"the sequence has {length} tokens; this encoding has {max_len}")
        return tokens_BND + self.table[:length].to(tokens_BND.device)


class PositionalEncoding2d(nn.Module):
    """Adds fixed 2-D sine/cosine encodings to the patches; the class token, if any, gets none.

    (B, T, D) -> (B, T, D), as in MAE (arXiv:2111.06377) but for the order of channels.
    """

    table: Tensor

    def __init__(self, embed_dim: int, grid: tuple[int, int], *, class_token: bool) -> None:
        super().__init__()
        table = F.pad(sinusoidal_table_2d(grid, embed_dim), (0, 0, int(class_token), 0))
        self.register_buffer("table", table, persistent=False)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD + self.table.to(tokens_BTD.device)


class LearnedPositions(nn.Module):
    """Adds a learned vector to each token, the paper's E_pos in eq. 1: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim: int, max_len: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_len, embed_dim))
        initialize_weights(self)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        return tokens_BTD + self.table


class ViTEmbedding(nn.Module):
    """z_0 of the paper's eq. 1, [class; patches] + positions, then dropout: (B, C, H, W) -> (B, T, D).

    Args:
        img_size: pixels, one number or (height, width).
        patch_size: side of a patch in image pixels; with a stem it counts the stem's halvings too.
        in_channels: C.
        embed_dim: D.
        dropout: probability, applied after the positions (the paper, appendix B.1).
        position: "learned" (the paper's 1-D table), "sinusoidal", "sinusoidal_2d" or "none".
        class_token: prepend the class token, so that T = N + 1; without it T = N.
        stem: output channels of each `ConvStem` stage; empty for the pure ViT.

    Raises:
        ValueError: if the patch does not divide the image, or the stem the patch, or `forward` gets
            another image shape.
    """

    def __init__(
        self,
        img_size: Size,
        patch_size: int,
        in_channels: int,
        embed_dim: int,
        dropout: float = 0.1,
        *,
        position: Position = "learned",
        class_token: bool = True,
        stem: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.img_size = height_and_width(img_size)
        self.in_channels = in_channels
        rows, columns = patch_grid(img_size, patch_size)
        reduction = 2 ** len(stem)
        if patch_size % reduction:
            raise ValueError(
                f"patch_size {patch_size} is no multiple of {reduction}, the reduction of the "
                f"{len(stem)}-stage stem"
            )
        self.stem = ConvStem(in_channels, stem) if stem else nn.Identity()
        side = patch_size // reduction
        channels = stem[-1] if stem else in_channels
        self.patches = PatchEmbedding((rows * side, columns * side), side, channels, embed_dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if class_token else None
        self.positions = self._positions(position, embed_dim)
        self.dropout = nn.Dropout(dropout)
        initialize_weights(self)

    def _positions(self, position: Position, embed_dim: int) -> nn.Module:
        has_class = self.class_token is not None
        length = self.patches.n_patches + has_class
        match position:
            case "learned":
                return LearnedPositions(embed_dim, length)
            case "sinusoidal":
                return PositionalEncoding(embed_dim, length)
            case "sinusoidal_2d":
                return PositionalEncoding2d(embed_dim, self.patches.grid, class_token=has_class)
            case "none":
                return nn.Identity()
        raise ValueError(f"position is {position!r}; it is one of {', '.join(get_args(Position))}")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        check_images(images_BCHW, self.in_channels, self.img_size)
        patches_BND = self.patches(self.stem(images_BCHW))
        return self.dropout(self.positions(self.prepend_class(patches_BND)))

    def prepend_class(self, patches_BND: Tensor) -> Tensor:
        if self.class_token is None:
            return patches_BND
        # shape[0], as len() would fix the batch size of an exported graph.
        class_B1D = self.class_token.expand(patches_BND.shape[0], -1, -1)
        return torch.cat([class_B1D, patches_BND], dim=1)


# --- The encoder layer ---------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (the paper, appendix A, eq. 5 to 8): (B, T, D) -> (B, T, D).

    Dropout follows the output projection only, as in the paper (appendix B.1), not the weights.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        # One product for all three; rows ordered q, k, v and then by head.
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        mixed_BATK = attend(*self.queries_keys_values(tokens_BTD))
        mixed_BTD = mixed_BATK.transpose(1, 2).flatten(2)
        return self.dropout(self.out(mixed_BTD))

    def weights(self, tokens_BTD: Tensor) -> Tensor:
        """The attention probabilities A of eq. 6 that `forward` mixes with: (B, A, T, T), rows sum to 1."""
        q_BATK, k_BATK, _ = self.queries_keys_values(tokens_BTD)
        return attention_weights(q_BATK, k_BATK)

    def queries_keys_values(self, tokens_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_BTD3 = self.qkv(tokens_BTD)
        q, k, v = qkv_BTD3.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v


def attention_weights(q_BATK: Tensor, k_BATK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)), the 2017 Transformer's eq. 1 and the paper's eq. 6."""
    scaled_q_BATK = q_BATK * q_BATK.shape[-1] ** -0.5
    return (scaled_q_BATK @ k_BATK.transpose(-2, -1)).softmax(dim=-1)


def attend(q_BATK: Tensor, k_BATK: Tensor, v_BATK: Tensor) -> Tensor:
    """Values mixed by the attention weights, (B, A, T, K), by the kernel that is faster here."""
    if prefers_explicit_attention(q_BATK):
        return attention_weights(q_BATK, k_BATK) @ v_BATK
    return F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK)


class FeedForward(nn.Module):
    """The MLP of the paper's eq. 3, two linear maps around a GELU: (B, T, D) -> (B, T, D)."""

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Linear(embed_dim, hidden_dim)
        self.activation = nn.GELU()
        self.contract = nn.Linear(hidden_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        hidden = self.dropout(self.activation(self.expand(tokens_BTD)))
        return self.dropout(self.contract(hidden))


class EncoderLayer(nn.Module):
    """Attention and MLP, each with a norm and a residual: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        num_heads: A.
        hidden_dim: width of the MLP.
        dropout: probability after each dense layer but the q, k, v projection.
        norm_first: True is the paper's eq. 2 and 3 (x + f(norm(x))); False is the post-norm of the
            2017 Transformer (norm(x + f(x))).
        drop_path: stochastic depth (arXiv:1603.09382), the probability that an image skips a
            residual branch in training.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        *,
        norm_first: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.attention_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, dropout)
        self.drop_path = StochasticDepth(drop_path, mode="row") if drop_path else nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.norm_first:
            x_BTD = x_BTD + self.drop_path(self.attention(self.attention_norm(x_BTD)))
            return x_BTD + self.drop_path(self.feed_forward(self.feed_forward_norm(x_BTD)))
        x_BTD = self.attention_norm(x_BTD + self.drop_path(self.attention(x_BTD)))
        return self.feed_forward_norm(x_BTD + self.drop_path(self.feed_forward(x_BTD)))


# --- Initialization ------------------------------------------------------------------------------


@torch.no_grad()
def initialize_weights(root: nn.Module) -> None:
    """Draws every parameter under `root` afresh; the one place that decides how a ViT starts.

    Linear maps (the patch projection is one) are truncated normal, std 0.02, with zero biases, as in
    timm and DeiT; norms are the identity; stem convolutions are He-normal for their ReLU.
    """
    for module in root.modules():
        match module:
            case ViTEmbedding(class_token=Tensor() as token):
                nn.init.trunc_normal_(token, std=INIT_STD)
            case LearnedPositions():
                nn.init.trunc_normal_(module.table, std=INIT_STD)
            case ConvStem():
                for convolution in module.convolutions():
                    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            case PatchEmbedding():
                _draw_linear(module.projection)
            case nn.Linear():
                _draw_linear(module)
            case nn.LayerNorm():
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def _draw_linear(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- Which of two equal computations is faster --------------------------------------------------------


def prefers_linear_patches(images_BCHW: Tensor) -> bool:
    """Patches by one matrix product rather than a convolution; measured in docs/log.md, 2026-11-22."""
    return images_BCHW.device.type == "cpu" and _compute_dtype(images_BCHW) == torch.bfloat16


def prefers_explicit_attention(q_BATK: Tensor) -> bool:
    """Two batched products rather than the fused kernel; measured in docs/log.md, 2026-11-22."""
    return q_BATK.device.type == "cpu" and _compute_dtype(q_BATK) == torch.bfloat16


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in, which autocast may have lowered."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
