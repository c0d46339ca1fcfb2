"""Every choice that makes a Vision Transformer what it is, in groups; the defaults are the paper's.

"The paper" is Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv:2010.11929); "the 2017
Transformer" is Vaswani et al., Attention Is All You Need (arXiv:1706.03762).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from torch import nn

Size = int | tuple[int, int]  # pixels: one number or (height, width)
Grid = tuple[int, int]  # rows and columns of patches
Position = Literal["learned", "sinusoidal", "sinusoidal_2d", "none"]
Pooling = Literal["class", "mean", "map", "class_mean"]
# Of norms and residuals, z the tokens and f attention or MLP. "pre": z + f(norm(z)), the paper's eq. 2 and 3.
# "post": norm(z + f(z)), the 2017 Transformer. "residual_post": z + norm(f(z)), Swin v2 and EVA-02 E.
# "parallel": z + attention(norm(z)) + mlp(norm(z)), Scaling ViT to 22 billion parameters.
Order = Literal["pre", "post", "residual_post", "parallel"]
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
RelativeStart = Literal["zero", "local"]
Resize = Literal[
    "bilinear", "bilinear_antialias", "bilinear_corners",
    "bicubic", "bicubic_antialias", "bicubic_corners", "bicubic_offset", "geometric",
]  # fmt: skip


# --- Sizes -----------------------------------------------------------------------------------------


def height_and_width(size: Size) -> tuple[int, int]:
    """Gives (height, width) of ``224``, which is short for ``(224, 224)``, or of a pair."""
    if isinstance(size, int):
        return size, size
    if len(size) != 2:
        raise ValueError(f"img_size is {size}; it must be one number or (height, width)")
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
class RotaryOptions:
    """Rotary positions (RoFormer, arXiv:2104.09864) in two dimensions.

    "axial" turns half of a head by the row and half by the column (EVA-02, arXiv:2303.11331; RoPE-ViT,
    arXiv:2403.13298); "mixed" learns both frequencies for each head of each layer (RoPE-ViT).
    """

    kind: Literal["axial", "mixed"] = "axial"
    temperature: float = 10_000.0
    places: Literal["index", "centered"] = "index"  # "centered": -1..1 across the image (DINOv3)
    reference_grid: Grid | None = None  # indices are scaled to span it (EVA-02)
    offset: float = 0.0  # of indices
    column_first: bool = False
    halves: bool = False  # see `Rotation`


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

    order: Order = "pre"
    layer_scale: float | None = None  # initial value of CaiT's scales (arXiv:2103.17239); None: no scales
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    feed_forward: FeedForwardOptions = field(default_factory=FeedForwardOptions)


@dataclass(frozen=True)
class HeadOptions:
    """What stands between the last layer and the logits; the defaults are the paper's."""

    # Where the final norm stands: on all "tokens", on the "pooled" vector (DeiT's and MAE's mean
    # pooling), or nowhere.
    norm: Literal["tokens", "pooled", "none"] = "tokens"
    bias: bool = True  # CLIP's projection has none
    # Width of a tanh layer before the head: the paper's head in pre-training (§3.1), BERT's pooler.
    hidden_dim: int | None = None
    pool_prefix: bool = False  # "map" and "mean" see class and register tokens too
    pool_heads: int | None = None  # of "map"; None: as many as a layer has
    pool_mlp_ratio: float | None = None  # of "map"; None: as in a layer
    distillation_head: bool = False  # a second head, on the distillation token (DeiT, §3)


# --- The whole -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViTConfig:
    """Everything that decides a `VisionTransformer`'s shapes and function.

    The groups `norm`, `embedding`, `layer` and `head` may be given as mappings of the fields to change.

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
    pooling: Pooling = "class"  # "mean": of the patch tokens; "class_mean": both, concatenated
    stem: tuple[int, ...] = ()  # channels of each halving convolution before the patches
    drop_path: float = 0.0  # stochastic depth of the last layer; the first has 0, linear between
    norm: Norm = field(default_factory=Norm)  # of all norms in the model
    embedding: EmbeddingOptions = field(default_factory=EmbeddingOptions)
    layer: LayerOptions = field(default_factory=LayerOptions)
    head: HeadOptions = field(default_factory=HeadOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", height_and_width(self.img_size))
        object.__setattr__(self, "stem", tuple(self.stem))
        for group in ("norm", "embedding", "layer", "head"):
            object.__setattr__(self, group, _changed(_GROUPS[group](), getattr(self, group)))
        self._check_numbers()
        self._check_sizes()
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; it must be 0 (features, no head) or more")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to below 1")
        for name, choices in (("position", get_args(Position)), ("pooling", get_args(Pooling))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        self._check_tokens()

    def _check_numbers(self) -> None:
        for name, value in _numbers(self):
            if not math.isfinite(value) or abs(value) > _LARGEST:
                raise ValueError(f"{name} is {value}; it must be a finite number, {_LARGEST:g} at most")
        if self.norm.eps < 0:
            raise ValueError(f"norm.eps is {self.norm.eps}; it must be 0 or more")

    def _check_sizes(self) -> None:
        if min(height_and_width(self.img_size)) < 1:
            raise ValueError(f"img_size is {self.img_size}; height and width must be at least 1")
        if max(height_and_width(self.img_size)) > _MOST_PIXELS:
            raise ValueError(
                f"img_size is {self.img_size}; height and width must be from 1 to {_MOST_PIXELS:,}"
            )
        for name, most in _MOST.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 1 to {most:,}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"num_heads is {self.num_heads}; it must divide embed_dim {self.embed_dim}")
        height, width = (side // self.patch_size for side in height_and_width(self.img_size))
        if height * width > _MOST_PATCHES:
            raise ValueError(
                f"img_size {self.img_size} gives {height * width:,} patches of {self.patch_size} pixels; "
                f"a model takes {_MOST_PATCHES:,} at most"
            )
        registers = self.embedding.register_tokens
        if not 0 <= registers <= _MOST["embed_dim"]:
            raise ValueError(
                f"embedding.register_tokens is {registers}; it must be from 0 to {_MOST['embed_dim']:,}"
            )

    def _check_tokens(self) -> None:
        if self.pooling in ("class", "class_mean") and not self.class_token:
            raise ValueError(
                f"pooling is {self.pooling!r}, which needs a class token, and embedding.class_token is off"
            )
        if self.head.distillation_head and not (
            self.pooling == "class" and self.embedding.distillation_token
        ):
            raise ValueError("a distillation head needs pooling='class' and a distillation token")
        if self.layer.attention.relative_bias != "none" and self.num_prefix_tokens != 1:
            raise ValueError("relative biases need a class token, and no other token before the patches")

    @property
    def class_token(self) -> bool:
        """Whether there is one: as `embedding` says, else where the pooling needs it."""
        if self.embedding.class_token is None:
            return self.pooling in ("class", "class_mean")
        return self.embedding.class_token

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before the patches."""
        return len(self.prefix_names)

    @property
    def prefix_names(self) -> list[str]:
        """What each token before the patches is called, in words for people."""
        names = ["class token"] * self.class_token
        names += ["distillation token"] * self.embedding.distillation_token
        return names + [f"register {number + 1}" for number in range(self.embedding.register_tokens)]

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return patch_grid(self.img_size, self.patch_size)

    @property
    def hidden_dim(self) -> int:
        # Rounded where the ratio was hidden / embed_dim, which times embed_dim may fall just short.
        return int(self.embed_dim * self.mlp_ratio + 1e-6)


_LARGEST = 1e9  # of any number in a config
# Several times what anyone has built; more is a typing error, and takes the machine's memory.
_MOST_PIXELS = 16_384
_MOST_PATCHES = 2**18
_MOST = {
    "patch_size": _MOST_PIXELS, "in_channels": 4_096, "embed_dim": 65_536, "num_layers": 4_096,
    "num_heads": 65_536, "hidden_dim": 2**20,
}  # fmt: skip


def _numbers(options: Any, group: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a config by their dotted names, those of groups too."""
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{group}{name}.")
        elif isinstance(value, int | float):
            yield f"{group}{name}", value


def _changed(options: Any, change: Any) -> Any:
    """Options of a part with a mapping's fields changed, groups within groups too."""
    if not isinstance(change, Mapping):
        return change
    fields = {}
    for name, value in change.items():
        if name not in vars(options):
            raise ValueError(f"{type(options).__name__} has no {name!r}; it has {', '.join(vars(options))}")
        old = getattr(options, name)
        if old is None and isinstance(value, Mapping):
            old = RotaryOptions()
        fields[name] = _changed(old, value)
        if isinstance(fields[name], list):
            fields[name] = tuple(fields[name])
    return dataclasses.replace(options, **fields)


_GROUPS = {"norm": Norm, "embedding": EmbeddingOptions, "layer": LayerOptions, "head": HeadOptions}
