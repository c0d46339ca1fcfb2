"""The encoder's layers against torch's, and what stochastic depth leaves out."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parts import (
    BATCH,
    DIM,
    HEADS,
    HIDDEN,
    OURS_TO_TORCH,
    TOKENS,
    away_from_initial_values,
    close,
)
from vitral.model.config import LayerOptions, Norm
from vitral.model.encoder import EncoderLayer, FeedForward, encoder_layer


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, DIM)


def torch_name(name: str) -> str:
    for ours, theirs in OURS_TO_TORCH.items():
        name = name.replace(ours, theirs)
    return name


def layer(*, norm_first: bool = True, dropout: float = 0.0, drop_path: float = 0.0) -> EncoderLayer:
    options = LayerOptions(order="pre" if norm_first else "post")
    built = encoder_layer(DIM, HEADS, HIDDEN, dropout, options=options, norm=Norm(), drop_path=drop_path)
    return away_from_initial_values(built)


def torch_layer(ours: EncoderLayer) -> nn.TransformerEncoderLayer:
    theirs = nn.TransformerEncoderLayer(
        DIM, HEADS, HIDDEN, 0.0, "gelu", 1e-6, batch_first=True, norm_first=ours.order == "pre"
    )
    theirs.load_state_dict({torch_name(name): tensor for name, tensor in ours.state_dict().items()})
    return theirs


def named_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        yield name, parameter.grad


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layer_is_torchs(norm_first: bool, tokens: Tensor) -> None:
    ours = layer(norm_first=norm_first).eval()
    with torch.no_grad():
        close(ours(tokens), torch_layer(ours).eval()(tokens))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_encoder_layers_gradients_are_torchs(norm_first: bool, tokens: Tensor) -> None:
    ours = layer(norm_first=norm_first)
    theirs = torch_layer(ours)
    inputs, direction = [tokens.clone().requires_grad_() for _ in range(2)], torch.randn_like(tokens)
    for module, x in zip((ours, theirs), inputs, strict=True):
        (module(x) * direction).mean().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    close(inputs[0].grad, inputs[1].grad)
    expected = dict(named_gradients(theirs))
    for name, gradient in named_gradients(ours):
        close(gradient, expected[torch_name(name)])


def test_feed_forward_is_two_maps_around_the_exact_gelu(tokens: Tensor) -> None:
    mlp = away_from_initial_values(FeedForward(DIM, HIDDEN))
    hidden = tokens @ mlp.expand.weight.T + mlp.expand.bias
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    close(mlp(tokens), gelu @ mlp.contract.weight.T + mlp.contract.bias)


def test_feed_forward_drops_after_each_map(tokens: Tensor) -> None:
    mlp, seen = FeedForward(DIM, HIDDEN, 0.5), []
    mlp.dropout.register_forward_hook(lambda _, __, output: seen.append((output == 0).float().mean().item()))
    mlp(tokens)
    assert seen == [pytest.approx(0.5, abs=0.1)] * 2


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre-norm", "post-norm"])
def test_drop_path_skips_or_doubles_each_branch_of_each_image(norm_first: bool) -> None:
    ours, images = layer(norm_first=norm_first, drop_path=0.5).train(), 400
    x = torch.randn(1, TOKENS, DIM)
    outcomes = [x]
    for norm, f in (
        (ours.attention_norm, lambda z: ours.attention(z, z)),
        (ours.feed_forward_norm, ours.feed_forward),
    ):
        outcomes = [
            y + factor * f(norm(y)) if norm_first else norm(y + factor * f(y))
            for y in outcomes
            for factor in (0, 2)
        ]
    trained = ours(x.expand(images, -1, -1))
    matches = torch.stack([torch.isclose(trained, outcome, atol=1e-5).all((1, 2)) for outcome in outcomes])
    assert torch.equal(matches.sum(0), torch.ones(images, dtype=torch.long))
    assert matches.sum(1).min() > images / 4 - 5 * math.sqrt(images * 3 / 16)
    # By subset: exactly half of the images go through each branch.
    through_attention, through_mlp = matches[2:].sum(), matches[1::2].sum()
    assert (through_attention, through_mlp) == (images / 2, images / 2)


@pytest.mark.parametrize("drop_path", [0.25, 0.4, 0.9])
def test_a_branch_keeps_its_expected_value_under_drop_path(drop_path: float) -> None:
    ours = layer(drop_path=drop_path).train()
    x = torch.zeros(8, 1, 1)
    added = [ours.residual(x, lambda x: x + 1) for _ in range(500)]
    assert torch.stack(added).mean().item() == pytest.approx(1, abs=1e-5)
    assert torch.stack(added).mean(0).flatten().tolist() == pytest.approx([1] * 8, abs=0.7)


def test_what_drop_path_drops_is_not_computed() -> None:
    ours, sizes = layer(drop_path=0.75).train(), []
    ours.feed_forward.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    ours(torch.randn(8, TOKENS, DIM))
    assert sizes == [2]


def test_drop_path_does_nothing_in_eval(tokens: Tensor) -> None:
    ours = layer(drop_path=0.9).eval()
    close(ours(tokens), torch_layer(ours).eval()(tokens))


@pytest.mark.parametrize("order", ["post", "residual_post", "parallel"])
def test_a_layer_of_another_order_is_refused(order: Any) -> None:
    with pytest.raises(ValueError, match=f"EncoderLayer has the order 'pre'; options.order is '{order}'"):
        EncoderLayer(DIM, HEADS, HIDDEN, 0.0, options=LayerOptions(order=order))
