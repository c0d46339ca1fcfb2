"""The parts of a Vision Transformer: tensors in, tensors out, plain numbers as arguments.

A tensor's name ends in its axes:

    B batch    C channels    H W image height and width in pixels    P pixels of one patch (C * p * p)
    N patches  T tokens (class, distillation and register tokens, if any, then the N patches)
    D width    A attention heads    K width of one head (D / A)

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv:2010.11929); "the 2017
Transformer" is Vaswani et al., Attention Is All You Need (arXiv:1706.03762).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitral.model.positions import (
    INIT_STD,
    Grid,
    LearnedPositions,
    NoPositions,
    PositionalEncoding2d,
    Relation,
    RelativeBias,
    RelativeStart,
    Resize,
    RotaryOptions,
    RotaryPositions,
    SinusoidalPositions,
    rotate,
)
from vitral.model.positions import PositionalEncoding as PositionalEncoding

Size = int | tuple[int, int]
Position = Literal["learned", "sinusoidal", "sinusoidal_2d", "none"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]


# --- What can be chosen of each part ---------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """LayerNorm (arXiv:1607.06450), or "rms": RMSNorm (arXiv:1910.07467), which has no bias."""

    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-6  # Google's and timm's ViTs; PyTorch's own default is 1e-5

    def build(self, width: int) -> nn.Module:
        return (nn.LayerNorm if self.kind == "layer" else nn.RMSNorm)(width, eps=self.eps)


@dataclass(frozen=True)
class EmbeddingOptions:
    """What stands between the pixels and the first layer; the defaults are the paper's."""

    class_token: bool | None = None  # None: if the pooling needs it
    distillation_token: bool = False  # DeiT (arXiv:2012.12877), §3
    register_tokens: int = 0  # Vision Transformers Need Registers (arXiv:2309.16588)
    # Which tokens the learned table has rows for: "all", "patches" (DeiT-III, big_vision), or "class":
    # all but the registers (DINOv2).
    positioned: Literal["all", "class", "patches"] = "all"
    resize: Resize = "bicubic_antialias"  # of tables, at another image size
    patch_bias: bool = True  # CLIP has none
    patch_norm: bool = False  # on each patch's embedding (AIMv2)
    norm: bool = False  # on all tokens before the first layer (CLIP)


@dataclass(frozen=True)
class AttentionOptions:
    """What attention does beyond the paper's; the defaults are the paper's."""

    biases: Literal["qkv", "qv", "none"] = "qkv"  # which of the three projections have one
    out_bias: bool = True
    qk_norm: bool = False  # Scaling ViT to 22 billion parameters (arXiv:2302.05442)
    norm: bool = False  # before the output projection (NormFormer, arXiv:2110.09456)
    rotary: RotaryOptions | None = None
    # BEiT's: a table for each layer, or one that all layers share.
    relative_bias: Literal["none", "layer", "shared"] = "none"
    relative_resize: Resize = "geometric"  # of those tables, at another image size
    relative_start: RelativeStart = "zero"  # "local": a head looks at one neighbour, as in ConViT


@dataclass(frozen=True)
class FeedForwardOptions:
    """What the MLP is; the defaults are the paper's."""

    activation: Activation = "gelu"
    gated: bool = False  # GLU variants (arXiv:2002.05202): activation(gate) * value
    norm: bool = False  # before the second linear map (NormFormer)
    bias: bool = True


@dataclass(frozen=True)
class LayerOptions:
    """How attention and MLP make a layer; the defaults are the paper's."""

    # "pre": x + f(norm(x)), the paper's eq. 2 and 3. "post": norm(x + f(x)), the 2017 Transformer.
    # Further "residual_post" of Swin v2 and EVA-02 E, x + norm(f(x)), and "parallel" of Scaling ViT to 22
    # billion parameters, where both branches start from one norm: x + attention(norm(x)) + mlp(norm(x)).
    order: Literal["pre", "post", "residual_post", "parallel"] = "pre"
    layer_scale: float | None = None  # initial value of CaiT's scales (arXiv:2103.17239); None: no scales
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    feed_forward: FeedForwardOptions = field(default_factory=FeedForwardOptions)


# --- Sizes -----------------------------------------------------------------------------------------


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


def check_images(images_BCHW: Tensor, in_channels: int, patch_size: int) -> None:
    """Raises ValueError unless the images are (any batch, in_channels, multiples of patch_size)."""
    shape = tuple(images_BCHW.shape)
    if len(shape) != 4 or shape[1] != in_channels or shape[2] % patch_size or shape[3] % patch_size:
        raise ValueError(
            f"images are {shape}; this model takes (batch, {in_channels}, height, width) with both "
            f"multiples of patch_size {patch_size}. Resize the images, or build the model with "
            "another patch_size or in_channels"
        )


# --- Patches -------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and maps each to a vector (the paper, eq. 1): (B, C, H, W) -> (B, N, D).

    N = (H / p) * (W / p), patches in row-major order. A convolution of kernel p and stride p, and
    one linear map shared by all flattened patches, are the same function of the same weight;
    `convolve` and `project` are those two routes and `forward` takes the faster one for the device.

    Args:
        img_size: pixels, one number or (height, width); a multiple of `patch_size`. `forward` takes any
            other multiples too.
        patch_size: side of a square patch in pixels.
        in_channels: C.
        embed_dim: D.

    Raises:
        ValueError: if the patch does not divide an image, or the channels are others.
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
        check_images(images_BCHW, self.in_channels, self.patch_size)
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
        batch, channels, height, width = images_BCHW.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        tiles = images_BCHW.reshape(batch, channels, rows, p, columns, p)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * p * p)


# Added to variances, of pixels that deviate by about 0.5: directions that hold only noise are not blown up.
_WHITENING_FLOOR = 0.01


class ConvStem(nn.Module):
    """The hybrid's convolutions (the paper, §3.1): (B, C, H, W) -> (B, C', H / 2^s, W / 2^s) for s stages.

    Each stage is a 3x3 convolution, ReLU and max-pooling by two, the tokenizer of compact
    transformers (Hassani et al., arXiv:2104.05704, §3.3): the locality that a small data set
    cannot teach a plain ViT. The paper's own hybrid uses a ResNet-50 here.

    The maximum is taken first, which is the same function for a quarter of the ReLU's work, and on
    images with the channels last in memory, where pooling is three times as fast (docs/log.md, 2026-11-25).
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

    @torch.no_grad()
    def whiten(self, images_BCHW: Tensor) -> None:
        """Starts the first convolution with filters that whiten the 3x3 patches of these images.

        They are the patches' principal directions, each divided by its deviation, the largest first, then
        their negatives, for ReLU keeps one side (Jordan, arXiv:2404.00498, §3.1, where they stay fixed).
        Filters beyond those are left as they were drawn.
        """
        weight = self.convolutions()[0].weight
        patches_NP = F.unfold(images_BCHW, weight.shape[2]).transpose(1, 2).flatten(0, 1)
        variances, directions = torch.linalg.eigh(patches_NP.T.cov())
        filters = (directions / (variances + _WHITENING_FLOOR).sqrt()).T.flip(0)
        both = torch.cat([filters, -filters])[: len(weight)]
        weight[: len(both)] = both.view(-1, *weight.shape[1:])


# --- The embedding ---------------------------------------------------------------------------------


class ViTEmbedding(nn.Module):
    """z_0 of the paper's eq. 1, [class; patches] + positions, then dropout: (B, C, H, W) -> (B, T, D).

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
        ValueError: if the patch does not divide an image, or the stem the patch, or the channels are others.
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
        rows, columns = self.grid = patch_grid(img_size, patch_size)
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
        initialize_weights(self)

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return sum(token.shape[1] for token in self._prefix_tokens())

    def _prefix_tokens(self) -> list[Tensor]:
        tokens = self.class_token, self.distillation_token, self.register_tokens
        return [token for token in tokens if token is not None]

    def _positions(self, position: Position, embed_dim: int, options: EmbeddingOptions) -> nn.Module:
        match position:
            case "learned":
                kept = {"all": self.prefix, "class": self.prefix - options.register_tokens, "patches": 0}
                with_vector = kept[options.positioned]
                without = self.prefix - with_vector
                return LearnedPositions(embed_dim, self.grid, with_vector, without, options.resize)
            case "sinusoidal":
                return SinusoidalPositions(embed_dim, self.prefix + self.patches.n_patches)
            case "sinusoidal_2d":
                return PositionalEncoding2d(embed_dim, self.grid, prefix=self.prefix)
            case "none":
                return NoPositions()
        raise ValueError(f"position is {position!r}; it is one of {', '.join(get_args(Position))}")

    def forward(self, images_BCHW: Tensor) -> Tensor:
        grid = self.grid_of(images_BCHW)
        patches_BND = self.patch_norm(self.patches(self.stem(images_BCHW)))
        return self.norm(self.dropout(self.positions(self.prepend_tokens(patches_BND), grid)))

    def grid_of(self, images_BCHW: Tensor) -> Grid:
        """Rows and columns of patches. Raises ValueError if the images do not fit."""
        check_images(images_BCHW, self.in_channels, self.patch_size)
        return images_BCHW.shape[2] // self.patch_size, images_BCHW.shape[3] // self.patch_size

    def prepend_tokens(self, patches_BND: Tensor) -> Tensor:
        # shape[0], as len() would fix the batch size of an exported graph.
        prefix = [token.expand(patches_BND.shape[0], -1, -1) for token in self._prefix_tokens()]
        return torch.cat([*prefix, patches_BND], dim=1) if prefix else patches_BND


def _token(embed_dim: int, count: int) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(1, int(count), embed_dim)) if count else None


# --- The encoder layer ---------------------------------------------------------------------------


class MultiHeadAttention(nn.Module):
    """Multi-head self-attention (the paper, appendix A, eq. 5 to 8): (B, T, D) -> (B, T, D).

    Dropout follows the output projection only, as in the paper (appendix B.1), not the weights.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        options: AttentionOptions = AttentionOptions(),
        norm: Norm = Norm(),
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        self.num_heads = num_heads
        self.needs_relation = options.rotary is not None or options.relative_bias != "none"
        # One product for all three; rows ordered q, k, v and then by head.
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=options.biases == "qkv")
        # The biases of q and v where k has none.
        self.qv_bias = nn.Parameter(torch.empty(2 * embed_dim)) if options.biases == "qv" else None
        head_norm = norm.build if options.qk_norm else lambda _: nn.Identity()
        self.q_norm, self.k_norm = (head_norm(embed_dim // num_heads) for _ in "qk")
        self.norm = norm.build(embed_dim) if options.norm else nn.Identity()
        self.out = nn.Linear(embed_dim, embed_dim, bias=options.out_bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens_BTD: Tensor, relation: Relation | None = None, first: int | None = None
    ) -> Tensor:
        """With `first`, what so many of the first tokens take from all: (B, first, D).

        Raises:
            ValueError: if its attention depends on places, and no relation says them.
        """
        relation = self._known(relation)
        q_BATK, k_BATK, v_BATK = self.queries_keys_values(tokens_BTD, relation)
        bias_ATT = relation.bias_ATT
        if first is not None:
            q_BATK = q_BATK[:, :, :first]
            bias_ATT = None if bias_ATT is None else bias_ATT[:, :first]
        mixed_BATK = attend(q_BATK, k_BATK, v_BATK, bias_ATT)
        mixed_BTD = mixed_BATK.transpose(1, 2).flatten(2)
        return self.dropout(self.out(self.norm(mixed_BTD)))

    def _known(self, relation: Relation | None) -> Relation:
        if relation is None and self.needs_relation:
            raise ValueError(
                "this layer's attention depends on where tokens stand (rotary or relative positions): pass "
                "model.relations_of_layers(tokens)[i] to layer i, or use model.features(images, layers=[i])"
            )
        return relation or Relation()

    def weights(self, tokens_BTD: Tensor, relation: Relation | None = None) -> Tensor:
        """The attention probabilities A of eq. 6 that `forward` mixes with: (B, A, T, T), rows sum to 1."""
        relation = self._known(relation)
        q_BATK, k_BATK, _ = self.queries_keys_values(tokens_BTD, relation)
        return attention_weights(q_BATK, k_BATK, relation.bias_ATT)

    def queries_keys_values(
        self, tokens_BTD: Tensor, relation: Relation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        relation = self._known(relation)
        qkv_BTD3 = self.qkv(tokens_BTD)
        if self.qv_bias is not None:
            q_D, v_D = self.qv_bias.chunk(2)
            qkv_BTD3 = qkv_BTD3 + torch.cat([q_D, torch.zeros_like(q_D), v_D])
        q, k, v = qkv_BTD3.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        q, k = self.q_norm(q), self.k_norm(k)
        if relation.rotation is not None:
            q, k = rotate(q, relation.rotation), rotate(k, relation.rotation)
        return q, k, v


def attention_weights(q_BATK: Tensor, k_BATK: Tensor, bias_ATT: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(K) + bias), the 2017 Transformer's eq. 1 and the paper's eq. 6."""
    scaled_q_BATK = q_BATK * q_BATK.shape[-1] ** -0.5
    logits_BATT = scaled_q_BATK @ k_BATK.transpose(-2, -1)
    return (logits_BATT if bias_ATT is None else logits_BATT + bias_ATT).softmax(dim=-1)


def attend(q_BATK: Tensor, k_BATK: Tensor, v_BATK: Tensor, bias_ATT: Tensor | None = None) -> Tensor:
    """Values mixed by the attention weights, (B, A, T, K), by the kernel that is faster here."""
    # The fused kernels have no gradient for a bias: torch would fall back to a slower explicit form.
    learned_bias = bias_ATT is not None and bias_ATT.requires_grad
    if learned_bias or prefers_explicit_attention(q_BATK):
        return attention_weights(q_BATK, k_BATK, bias_ATT).to(v_BATK.dtype) @ v_BATK
    mask = None if bias_ATT is None else bias_ATT.to(q_BATK.dtype)
    return F.scaled_dot_product_attention(q_BATK, k_BATK, v_BATK, mask)


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), what OpenAI's CLIP was trained with; its weights lose accuracy under GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Gated(nn.Module):
    """activation(gate) * value of the halves of the last axis: (..., 2 H) -> (..., H)."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}


class FeedForward(nn.Module):
    """The MLP of the paper's eq. 3, two linear maps around a GELU: (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
        options: FeedForwardOptions = FeedForwardOptions(),
        norm: Norm = Norm(),
    ) -> None:
        super().__init__()
        # Gate and value in one product, the gate first.
        self.expand = nn.Linear(embed_dim, hidden_dim * (1 + options.gated), bias=options.bias)
        activation = ACTIVATIONS[options.activation]()
        self.activation = Gated(activation) if options.gated else activation
        self.norm = norm.build(hidden_dim) if options.norm else nn.Identity()
        self.contract = nn.Linear(hidden_dim, embed_dim, bias=options.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        hidden = self.norm(self.dropout(self.activation(self.expand(tokens_BTD))))
        return self.dropout(self.contract(hidden))


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch (CaiT, arXiv:2103.17239, eq. 4)."""

    def __init__(self, embed_dim: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.gamma = nn.Parameter(torch.empty(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class EncoderLayer(nn.Module):
    """Attention and MLP, each with a norm and a residual: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        num_heads: A.
        hidden_dim: width of the MLP.
        dropout: probability after each dense layer but the q, k, v projection.
        options: the order of norms and residuals, scales, and what attention and MLP are.
        norm: the kind of the norms.
        drop_path: stochastic depth (arXiv:1603.09382), the share of the images that skip a residual
            branch in training.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        hidden_dim: int,
        dropout: float,
        *,
        options: LayerOptions = LayerOptions(),
        norm: Norm = Norm(),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.order = options.order
        one_norm = self.order == "parallel"
        self.attention_norm = norm.build(embed_dim)
        self.attention = MultiHeadAttention(embed_dim, num_heads, dropout, options.attention, norm)
        self.attention_scale = _scale(embed_dim, options.layer_scale)
        self.feed_forward_norm = nn.Identity() if one_norm else norm.build(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, dropout, options.feed_forward, norm)
        self.feed_forward_scale = nn.Identity() if one_norm else _scale(embed_dim, options.layer_scale)
        self.drop_path = drop_path

    def forward(self, x_BTD: Tensor, relation: Relation | None = None, first: int | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D), or (B, first, D): as many of the first tokens as are read."""

        def attention(x_BTD: Tensor) -> Tensor:
            return self.attention(x_BTD, relation, first)

        attention_norm, feed_forward_norm = self.attention_norm, self.feed_forward_norm
        match self.order:
            case "pre":
                x_BTD = self.residual(x_BTD, attention_norm, attention, self.attention_scale)
                return self.residual(x_BTD, feed_forward_norm, self.feed_forward, self.feed_forward_scale)
            case "post":
                x_BTD = attention_norm(self.residual(x_BTD, attention, self.attention_scale))
                return feed_forward_norm(self.residual(x_BTD, self.feed_forward, self.feed_forward_scale))
            case "residual_post":
                x_BTD = self.residual(x_BTD, attention, attention_norm, self.attention_scale)
                return self.residual(x_BTD, self.feed_forward, feed_forward_norm, self.feed_forward_scale)

        def both(x_BTD: Tensor) -> Tensor:
            return attention(x_BTD) + self.feed_forward(x_BTD[:, :first])

        return self.residual(x_BTD, attention_norm, both, self.attention_scale)

    def residual(self, x_BTD: Tensor, *branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum x + branch(x), in training for some of the images only: stochastic depth by subset.

        A random share `1 - drop_path` of the batch goes through the branch and counts for all, as in
        DINOv2's code: the same mean as dropping image by image, and what is dropped is not computed.
        """
        if not (self.training and self.drop_path):
            branch_BTD = _chain(branch, x_BTD)
            return (x_BTD[:, : branch_BTD.shape[1]] + branch_BTD).to(x_BTD.dtype)
        batch = x_BTD.shape[0]
        kept = torch.randperm(batch, device=x_BTD.device)[: max(round(batch * (1 - self.drop_path)), 1)]
        branch_KTD = _chain(branch, x_BTD[kept])
        x_BTD = x_BTD[:, : branch_KTD.shape[1]]
        return x_BTD.index_add(0, kept, branch_KTD.to(x_BTD.dtype), alpha=batch / len(kept))


def _chain(functions: tuple[Callable[[Tensor], Tensor], ...], x: Tensor) -> Tensor:
    for function in functions:
        x = function(x)
    return x


def _scale(embed_dim: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(embed_dim, start)


class AttentionPool(nn.Module):
    """One vector of all tokens, by a learned query and an MLP: (B, T, D) -> (B, D).

    "MAP", multihead attention pooling, of Scaling ViT (arXiv:2106.04560), §3.2, and SigLIP.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, hidden_dim: int, activation: Activation, norm: Norm
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.norm = norm.build(embed_dim)
        self.feed_forward = FeedForward(embed_dim, hidden_dim, options=FeedForwardOptions(activation))
        initialize_weights(self)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        width = tokens_BTD.shape[2]
        query_B1D = self.query.expand(tokens_BTD.shape[0], -1, -1)
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(query_B1D, weight[:width], bias[:width])
        k, v = F.linear(tokens_BTD, weight[width:], bias[width:]).chunk(2, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (q, k, v))
        pooled_B1D = self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return (pooled_B1D + self.feed_forward(self.norm(pooled_B1D)))[:, 0]


# --- Initialization ------------------------------------------------------------------------------


@torch.no_grad()
def initialize_weights(root: nn.Module) -> None:
    """Draws every parameter under `root` afresh; the one place that decides how a ViT starts.

    Linear maps (the patch projection is one) are truncated normal, std 0.02, with zero biases, as in
    timm and DeiT; norms are the identity; stem convolutions are He-normal for their ReLU.
    """
    for module in root.modules():
        match module:
            case ViTEmbedding():
                for token in module._prefix_tokens():
                    nn.init.trunc_normal_(token, std=INIT_STD)
            case LearnedPositions() | RotaryPositions() | RelativeBias():
                module.draw()
            case ConvStem():
                for convolution in module.convolutions():
                    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            case PatchEmbedding():
                _draw_linear(module.projection)
            case AttentionPool():
                nn.init.trunc_normal_(module.query, std=INIT_STD)
            case LayerScale():
                nn.init.constant_(module.gamma, module.start)
            case _:
                _draw_weights(module)


def _draw_weights(module: nn.Module) -> None:
    match module:
        case MultiHeadAttention(qv_bias=Tensor() as bias):
            nn.init.zeros_(bias)
        case nn.Linear():
            _draw_linear(module)
        case nn.LayerNorm() | nn.RMSNorm():
            nn.init.ones_(module.weight)
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)


def _draw_linear(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.trunc_normal_(layer.weight, std=INIT_STD)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --- Which of two equal computations is faster --------------------------------------------------------


def prefers_linear_patches(images_BCHW: Tensor) -> bool:
    """Patches by one matrix product rather than a convolution; measured in docs/log.md, 2026-11-22 and 26."""
    return images_BCHW.device.type in ("cpu", "cuda") and _compute_dtype(images_BCHW) == torch.bfloat16


def prefers_explicit_attention(q_BATK: Tensor) -> bool:
    """Two batched products rather than the fused kernel; measured in docs/log.md, 2026-11-22."""
    return q_BATK.device.type == "cpu" and _compute_dtype(q_BATK) == torch.bfloat16


def stream_dtype(x_BTD: Tensor) -> torch.dtype:
    """What the sum that runs through the layers is kept in while training: that of the products.

    Casts and norms of float32 tokens cost a tenth of a step on a CPU, a twentieth on a GPU (docs/log.md,
    2026-11-25 and 26). Weights and their gradients are float32 in any case; so are, on a GPU, the tokens that
    a post-norm layer's norms give.
    """
    return _compute_dtype(x_BTD)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` computes in, which autocast may have lowered."""
    device = x.device.type
    if device == "meta":  # autocast does not know it
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
