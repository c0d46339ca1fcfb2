"""Where a token stands: position tables at any grid, rotary embeddings and relative biases.

Axes in tensor names are those of `blocks`; M counts the distances of a relative table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02  # of all weights, truncated normal
Grid = tuple[int, int]  # rows and columns of patches
RelativeStart = Literal["zero", "local"]
Resize = Literal[
    "bilinear", "bilinear_antialias", "bilinear_corners",
    "bicubic", "bicubic_antialias", "bicubic_corners", "bicubic_offset", "geometric",
]  # fmt: skip


# --- Tables at another grid ----------------------------------------------------------------------


def _interpolate(mode: str, **options: bool) -> Callable[[Tensor, Grid], Tensor]:
    return lambda image_1DHW, grid: F.interpolate(image_1DHW, grid, mode=mode, **options)


def _bicubic_offset(image_1DHW: Tensor, grid: Grid) -> Tensor:
    rows, columns = image_1DHW.shape[2:]
    scale = (grid[0] + 0.1) / rows, (grid[1] + 0.1) / columns
    return F.interpolate(image_1DHW, scale_factor=scale, mode="bicubic")


def _geometric(image_1DHW: Tensor, grid: Grid) -> Tensor:
    """Linear between distances spaced in geometric progression, dense near zero (BEiT's fine-tuning code)."""
    down, across = (
        _geometric_weights(old, new).to(image_1DHW)
        for old, new in zip(image_1DHW.shape[2:], grid, strict=True)
    )
    return down @ image_1DHW @ across.T


def _geometric_weights(old: int, new: int) -> Tensor:
    """(new, old): each new distance as a mixture of the two old ones around it."""
    low = ratio = 1.01
    high = 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        reach = (1 - ratio ** (old // 2)) / (1 - ratio)
        low, high = (low, ratio) if reach > new // 2 else (ratio, high)
    distances = [sum(ratio**step for step in range(count)) for count in range(old // 2 + 1)]
    old_places = torch.tensor([-d for d in distances[:0:-1]] + distances, dtype=torch.float64)
    new_places = torch.arange(-(new // 2), new // 2 + 1, dtype=torch.float64)
    right = torch.searchsorted(old_places, new_places).clamp(1, old - 1)
    span = old_places[right] - old_places[right - 1]
    share = ((new_places - old_places[right - 1]) / span).clamp(0, 1)
    weights = torch.zeros(new, old, dtype=torch.float64)
    weights.scatter_(1, (right - 1)[:, None], (1 - share)[:, None])
    return weights.scatter_add_(1, right[:, None], share[:, None])


# The rules in use. None is better; the one that a model was trained or evaluated with is right for it.
RESIZE: dict[str, Callable[[Tensor, Grid], Tensor]] = {
    "bilinear": _interpolate("bilinear"),  # timm on .npz files, RADIO; BEiT's tables in transformers
    "bilinear_antialias": _interpolate("bilinear", antialias=True),  # jax.image: FlexiViT; SigLIP 2
    "bilinear_corners": _interpolate(
        "bilinear", align_corners=True
    ),  # scipy's zoom: Google's ViT, big_vision
    "bicubic": _interpolate("bicubic"),  # DeiT, MAE, transformers
    "bicubic_antialias": _interpolate("bicubic", antialias=True),  # timm; DINOv2 with registers
    "bicubic_corners": _interpolate("bicubic", align_corners=True),  # torchvision
    "bicubic_offset": _bicubic_offset,  # DINO and DINOv2: a scale 0.1 patches too large
    "geometric": _geometric,  # BEiT's relative tables in timm
}
assert set(RESIZE) == set(get_args(Resize))


def resize_grid(table_ND: Tensor, old: Grid, new: Grid, rule: Resize) -> Tensor:
    """A row-major table (N, D) over the grid `old`, at the grid `new`; computed in float32."""
    if old == new:
        return table_ND
    image_1DHW = table_ND.float().unflatten(0, old).permute(2, 0, 1)[None]
    return RESIZE[rule](image_1DHW, new)[0].flatten(1).T.to(table_ND.dtype).contiguous()


def resize_patches(weight_DCHW: Tensor, patch_size: int, rule: Resize) -> Tensor:
    """A patch projection (D, C, p, p) for another patch size, by pseudo-inverse.

    FlexiViT (arXiv:2212.08013), §3.4: the weights under which a patch that is resized as `rule` does
    gives the token that the old weights gave.
    """
    old = weight_DCHW.shape[-1]
    if old == patch_size:
        return weight_DCHW
    basis = torch.eye(old * old, dtype=torch.float64).reshape(-1, 1, old, old)
    resized = [RESIZE[rule](image[None], (patch_size, patch_size)).flatten() for image in basis]
    # Rows are the old pixels; a new weight w' solves resize(x) . w' = x . w in the least squares sense.
    inverse = torch.linalg.pinv(torch.stack(resized))
    pixels = weight_DCHW.double().flatten(2) @ inverse.T
    return pixels.unflatten(2, (patch_size, patch_size)).to(weight_DCHW.dtype)


# --- Added to tokens -----------------------------------------------------------------------------


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


class SinusoidalPositions(PositionalEncoding):
    """`PositionalEncoding` of all tokens in a row, whatever the grid."""

    def forward(self, tokens_BND: Tensor, grid: Grid | None = None) -> Tensor:  # noqa: ARG002 - as others
        length, (max_len, embed_dim) = tokens_BND.shape[1], self.table.shape
        if length <= max_len:
            return super().forward(tokens_BND)
        return tokens_BND + sinusoidal_table(_positions_on_cpu(length), embed_dim).to(tokens_BND)


class PositionalEncoding2d(nn.Module):
    """Adds fixed 2-D sine/cosine encodings to the patches; the `prefix` tokens before them get none.

    (B, T, D) -> (B, T, D), as in MAE (arXiv:2111.06377) but for the order of channels.
    """

    table: Tensor

    def __init__(self, embed_dim: int, grid: Grid, *, prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix
        self.register_buffer("table", self._table(grid, embed_dim), persistent=False)

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:
        same = grid is None or grid == self.grid
        table_TD = self.table if same else self._table(grid, tokens_BTD.shape[2]).to(self.table)
        return tokens_BTD + table_TD.to(tokens_BTD.device)

    def _table(self, grid: Grid, embed_dim: int) -> Tensor:
        return F.pad(sinusoidal_table_2d(grid, embed_dim), (0, 0, self.prefix, 0))


class LearnedPositions(nn.Module):
    """Adds a learned vector to each token, the paper's E_pos in eq. 1: (B, T, D) -> (B, T, D).

    Args:
        embed_dim: D.
        grid: rows and columns of patches that the table has vectors for; at another grid they are resized.
        prefix: how many of the tokens before the patches have vectors, from the first.
        without: how many more tokens stand before the patches, and have none.
        resize: the rule for another grid.
    """

    def __init__(self, embed_dim: int, grid: Grid, prefix: int, without: int, resize: Resize) -> None:
        super().__init__()
        self.grid, self.prefix, self.without, self.resize = grid, prefix, without, resize
        self.table = nn.Parameter(torch.empty(prefix + grid[0] * grid[1], embed_dim))
        self.draw()

    def draw(self) -> None:
        nn.init.trunc_normal_(self.table, std=INIT_STD)

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:
        return tokens_BTD + self.at(grid or self.grid)

    def at(self, grid: Grid) -> Tensor:
        """What is added to each token, (T, D), for another grid of patches."""
        table = self.resized(grid)
        if not self.without:
            return table
        none = table.new_zeros(self.without, table.shape[1])
        return torch.cat([table[: self.prefix], none, table[self.prefix :]])

    def resized(self, grid: Grid) -> Tensor:
        """The table for another grid of patches."""
        if grid == self.grid:
            return self.table
        prefix, patches = self.table[: self.prefix], self.table[self.prefix :]
        return torch.cat([prefix, resize_grid(patches, self.grid, grid, self.resize)])


class NoPositions(nn.Module):
    """Tokens as they are; attention may know their places (`positions.Relation`)."""

    def forward(self, tokens_BTD: Tensor, grid: Grid | None = None) -> Tensor:  # noqa: ARG002 - as others
        return tokens_BTD


# --- What attention knows of places --------------------------------------------------------------


class Rotation(NamedTuple):
    """Angles that queries and keys turn by; (T, K), or (A, T, K) where heads differ."""

    cos: Tensor
    sin: Tensor
    halves: bool  # channel c turns with c + K/2, else with its neighbour


class Relation(NamedTuple):
    """What attention knows of the places of two tokens."""

    rotation: Rotation | None = None
    bias_ATT: Tensor | None = None


def rotate(x_BATK: Tensor, rotation: Rotation) -> Tensor:
    """Turns pairs of channels; in the angles' float32, answered in the type of `x`."""
    if rotation.halves:
        first, second = x_BATK.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-x_BATK[..., 1::2], x_BATK[..., ::2]], dim=-1).flatten(-2)
    return (x_BATK * rotation.cos + turned * rotation.sin).to(x_BATK.dtype)


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

    def coordinates(self, grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two coordinates of each patch, (N,) each."""
        axes = [self._places(count, axis) for axis, count in enumerate(grid)]
        rows, columns = (places.flatten() for places in torch.meshgrid(*axes, indexing="ij"))
        both = (columns, rows) if self.column_first else (rows, columns)
        return both[0].to(device), both[1].to(device)

    def _places(self, count: int, axis: int) -> Tensor:
        index = torch.arange(count, dtype=torch.float32, device="cpu")
        if self.places == "centered":
            return (2 * (index + 0.5) / count - 1) * 2 * pi
        scale = 1 if self.reference_grid is None else self.reference_grid[axis] / count
        return (index + self.offset) * scale

    def bands(self, head_dim: int, device: torch.device) -> Tensor:
        """Frequencies from 1 down to 1 / temperature, (K / 4,)."""
        index = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
        return self.temperature ** -(index / (head_dim // 4))


class RotaryPositions(nn.Module):
    """Rotary positions of the patches; tokens before them do not turn.

    Raises:
        ValueError: if the head's width is no multiple of four.
    """

    def __init__(self, head_dim: int, num_heads: int, prefix: int, options: RotaryOptions) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need heads of a width divisible by 4; it is {head_dim}")
        self.head_dim, self.prefix, self.options = head_dim, prefix, options
        # Of the first and the second coordinate, for each head and pair of channels.
        shape = (2, num_heads, head_dim // 2)
        self.frequencies = nn.Parameter(torch.empty(shape)) if options.kind == "mixed" else None

    def forward(self, grid: Grid, device: torch.device) -> Relation:
        first, second = self.options.coordinates(grid, device)
        if self.frequencies is None:
            bands = self.options.bands(self.head_dim, device)
            angles = torch.cat([first[:, None] * bands, second[:, None] * bands], dim=-1)
        else:
            by_first, by_second = self.frequencies.float()[:, :, None]
            angles = first[:, None] * by_first + second[:, None] * by_second
        angles = F.pad(angles, (0, 0, self.prefix, 0))
        if self.options.halves:
            angles = torch.cat([angles, angles], dim=-1)
        else:
            angles = angles.repeat_interleave(2, dim=-1)
        return Relation(Rotation(angles.cos(), angles.sin(), self.options.halves))

    @torch.no_grad()
    def draw(self) -> None:
        """RoPE-ViT's start of "mixed": the axial frequencies, turned by a random angle for each head."""
        if self.frequencies is not None:
            bands = self.options.bands(self.head_dim, self.frequencies.device)
            angle = torch.rand(self.frequencies.shape[1], 1, device=bands.device) * 2 * pi
            turned = [
                torch.cat([bands * f(angle), bands * f(angle + pi / 2)], -1) for f in (torch.cos, torch.sin)
            ]
            self.frequencies.copy_(torch.stack(turned))


class RelativeBias(nn.Module):
    """A learned addition to each head's attention logits for each distance of two patches.

    BEiT (arXiv:2106.08254) after Swin. The last three rows of the table (M, A) are for the class
    token: to a patch, from a patch, to itself.

    Args:
        grid: rows and columns of patches.
        num_heads: A.
        resize: rule for the table at another image size.
        start: "zero", BEiT's, or "local": each head begins by looking at one neighbour of every patch
            (`local_bias`), the locality that few images cannot teach.
    """

    down: Tensor
    across: Tensor

    def __init__(self, grid: Grid, num_heads: int, resize: Resize, start: RelativeStart = "zero") -> None:
        super().__init__()
        self.grid, self.resize, self.start = grid, resize, start
        self.table = nn.Parameter(torch.empty((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, num_heads))
        # On the model's device, for a pass that copies to a GPU waits for it.
        for name, side in zip(("down", "across"), grid, strict=True):
            self.register_buffer(name, _differences(side), persistent=False)

    def draw(self) -> None:
        nn.init.zeros_(self.table)
        if self.start == "local":
            with torch.no_grad():
                self.table[:-3] = local_bias(self.grid, self.table.shape[1])

    def forward(self, grid: Grid, device: torch.device) -> Relation:
        # The gradient of an index adds in any order on a GPU, or sorts first.
        learns_on_gpu = device.type == "cuda" and torch.is_grad_enabled()
        return Relation(bias_ATT=self.by_products(grid) if learns_on_gpu else self.by_index(grid))

    def by_index(self, grid: Grid) -> Tensor:
        """Each pair's row of the table, (A, T, T)."""
        table_MA = self.resized(grid)
        return table_MA[_distances(grid).to(table_MA.device)].permute(2, 0, 1)

    def by_products(self, grid: Grid) -> Tensor:
        """The same, exactly, by products with selections: of rows, then of columns."""
        table_MA = self.resized(grid)
        native = grid == self.grid
        down, across = (self.down, self.across) if native else map(_differences, grid)
        down, across = down.to(table_MA), across.to(table_MA)
        with torch.autocast(table_MA.device.type, enabled=False):
            table_YXA = table_MA[:-3].unflatten(0, (down.shape[2], across.shape[2]))
            rows_IJXA = torch.einsum("ijy,yxa->ijxa", down, table_YXA)
            bias_AIKJL = torch.einsum("klx,ijxa->aikjl", across, rows_IJXA)
        patches_ANN = bias_AIKJL.flatten(3).flatten(1, 2)
        count = patches_ANN.shape[1]
        to_patch, from_patch, itself = table_MA[-3:, :, None, None]
        class_A1T = torch.cat([itself, to_patch.expand(-1, -1, count)], dim=2)
        others_ANT = torch.cat([from_patch.expand(-1, count, -1), patches_ANN], dim=2)
        return torch.cat([class_A1T, others_ANT], dim=1)

    def resized(self, grid: Grid) -> Tensor:
        """The table for another grid of patches."""
        old, new = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (self.grid, grid))
        if old == new:
            return self.table
        patches, class_token = self.table[:-3], self.table[-3:]
        return torch.cat([resize_grid(patches, old, new, self.resize), class_token])


def local_bias(grid: Grid, num_heads: int) -> Tensor:
    """Rows (M, A) that centre each head's attention on one of its patch's nearest neighbours.

    -(distance to that neighbour)^2, the start of ConViT's positional attention (arXiv:2103.10697, eq. 5
    and 6, locality strength 1): a softmax of it is a blurred 3x3 filter with a single tap.
    """
    rows, columns = grid
    steps = torch.cartesian_prod(torch.arange(1 - rows, rows), torch.arange(1 - columns, columns)).float()
    # The table's row is "query minus key", and the key stands where the head looks.
    places = -steps
    nearest = places[places.norm(dim=1).argsort(stable=True)][1 : num_heads + 1]
    if len(nearest) < num_heads:
        raise ValueError(f"{num_heads} heads are more than the neighbours that {rows}x{columns} patches have")
    # What is further than a few patches has weight nought in any case, and may be learnt from there.
    return -torch.cdist(places, nearest).square().clamp(max=12)


def _distances(grid: Grid) -> Tensor:
    """(T, T): the row of the table for each pair of tokens, the class token first."""
    rows, columns = grid
    places = torch.meshgrid(*map(_positions_on_cpu, grid), indexing="ij")
    row, column = (place.flatten() for place in places)
    down = row[:, None] - row + rows - 1
    across = column[:, None] - column + columns - 1
    between = F.pad(down * (2 * columns - 1) + across, (1, 0, 1, 0))
    count = (2 * rows - 1) * (2 * columns - 1)
    between[0, :], between[:, 0], between[0, 0] = count, count + 1, count + 2
    return between


def _differences(side: int) -> Tensor:
    """(side, side, 2 side - 1): 1 where one place less another is the third, counted from 1 - side."""
    places = _positions_on_cpu(side)
    return F.one_hot(places[:, None] - places + side - 1, 2 * side - 1).float()
