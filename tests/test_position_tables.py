"""Tables of positions against the paper's formulas and timm."""

import math

import pytest
import torch
from torch import Tensor

from tests.parts import (
    BATCH,
    COLUMNS,
    DIM,
    ROWS,
    TOKENS,
    close,
)
from vitral.model.positions.tables import LearnedPositions, PositionalEncoding, PositionalEncoding2d


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM)


def paper_encoding(position: int, channel: int, width: int) -> float:
    """Attention Is All You Need, §3.5."""
    angle = position / 10_000 ** ((channel - channel % 2) / width)
    return math.cos(angle) if channel % 2 else math.sin(angle)


@pytest.mark.parametrize("width", [2, 11, 12, DIM])
def test_positional_encoding_is_the_papers_formula(width: int) -> None:
    encoding = PositionalEncoding(embed_dim=width, max_len=TOKENS)(torch.zeros(BATCH, TOKENS, width))
    expected = [[paper_encoding(p, c, width) for c in range(width)] for p in range(TOKENS)]
    close(encoding, torch.tensor(expected).expand(BATCH, -1, -1))


def test_positional_encoding_stays_exact_far_along_the_sequence() -> None:
    encoding = PositionalEncoding(4, 100_000)(torch.zeros(1, 100_000, 4))
    close(encoding[0, -1], torch.tensor([paper_encoding(99_999, c, 4) for c in range(4)]))


def test_positional_encoding_is_added_to_the_tokens(tokens: Tensor) -> None:
    encode = PositionalEncoding(DIM, TOKENS)
    close(encode(tokens) - tokens, encode(torch.zeros_like(tokens)))


def test_a_shorter_sequence_takes_the_first_positions(tokens: Tensor) -> None:
    encode = PositionalEncoding(DIM, TOKENS)
    assert torch.equal(encode(tokens[:, :3]), encode(tokens)[:, :3])


def test_a_longer_sequence_is_refused(tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="the sequence has 13 tokens; this encoding takes 12"):
        PositionalEncoding(DIM, TOKENS - 1)(tokens)


def test_fixed_encodings_are_neither_trained_nor_saved() -> None:
    for encode in (PositionalEncoding(DIM, TOKENS), PositionalEncoding2d(12, (2, 3))):
        assert not list(encode.parameters())
        assert not encode.state_dict()


def encoding_2d(grid: tuple[int, int], width: int) -> Tensor:
    return PositionalEncoding2d(width, grid)(torch.zeros(1, grid[0] * grid[1], width))[0]


def test_2d_encoding_is_timms_but_for_the_order_of_sines_and_cosines() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    theirs = timm_layers.build_sincos2d_pos_embed([ROWS, COLUMNS], dim=12, interleave_sin_cos=True)
    pairs = encoding_2d((ROWS, COLUMNS), 12).unflatten(1, (2, 3, 2))
    close(pairs.transpose(2, 3).flatten(1), theirs)


def test_2d_encoding_is_the_rows_formula_then_the_columns() -> None:
    table = encoding_2d((ROWS, COLUMNS), 12).unflatten(0, (ROWS, COLUMNS))
    for row, column in [(0, 0), (0, 10), (6, 0), (4, 9)]:
        halves = [[paper_encoding(place, c, 6) for c in range(6)] for place in (row, column)]
        close(table[row, column], torch.tensor(halves).flatten())


def test_2d_encoding_leaves_the_class_token_as_it_is() -> None:
    tokens = torch.randn(1, 3, 12)
    assert torch.equal(PositionalEncoding2d(12, (ROWS, COLUMNS)).of_prefix(tokens), tokens)


def test_2d_encoding_at_another_grid_is_that_of_the_grid() -> None:
    encode = PositionalEncoding2d(12, (ROWS, COLUMNS))
    for _ in range(2):
        assert torch.equal(encode(torch.zeros(1, 15, 12), (3, 5))[0], encoding_2d((3, 5), 12))


def test_2d_encoding_needs_a_width_of_fours() -> None:
    with pytest.raises(ValueError, match="embed_dim is 35; for 2-D"):
        PositionalEncoding2d(DIM, (ROWS, COLUMNS))


def test_learned_positions_are_added_one_a_token(tokens: Tensor) -> None:
    learned = LearnedPositions(DIM, (3, 4), num_prefix_tokens=1, resize="bicubic")
    close(learned.of_prefix(tokens[:, :1])[:, 0], tokens[:, 0] + learned.table[0])
    for t in range(1, TOKENS):
        close(learned(tokens[:, 1:])[:, t - 1], tokens[:, t] + learned.table[t])
