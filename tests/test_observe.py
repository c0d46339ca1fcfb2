"""What is seen of attention is what the kernels computed: for every kind of model, against other routes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitral
from tests.parts import away_from_initial_values, close
from tests.test_layouts import NARROW, pictures, randomize
from vitral.checkpoints.folder import load_checkpoint
from vitral.explain.observe import SeenAttention, frozen, observe, start_row
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier
from vitral.model import attention
from vitral.model.kernels import Kernels, set_kernels
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

KINDS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sinusoidal": {"position": "sinusoidal"},
    "sinusoidal_2d": {"position": "sinusoidal_2d", "pooling": "mean"},
    "no positions": {"position": "none"},
    "registers": {"embedding": {"register_tokens": 2}},
    "class and mean": {"pooling": "class_mean"},
    "map": {"pooling": "map"},
    "map that sees the class token": {"pooling": "map", "head": {"pool_prefix": True}},
    "distilled": {"embedding": {"distillation_token": True}, "head": {"distillation_head": True}},
    "rotary": {"layer": {"attention": {"rotary": {}}}},
    "mixed rotary": {"layer": {"attention": {"rotary": {"kind": "mixed"}}}},
    "relative": {"layer": {"attention": {"relative_bias": "layer"}}},
    "shared relative": {"layer": {"attention": {"relative_bias": "shared"}}},
    "post-norm": {"layer": {"order": "post"}},
    "residual post-norm": {"layer": {"order": "residual_post"}},
    "parallel": {"layer": {"order": "parallel"}},
    "norms in attention": {"layer": {"attention": {"norm": True, "qk_norm": True}}},
    "layer scale": {"layer": {"layer_scale": 0.3}},
    "hybrid": {"stem": (6, 8)},
}
SIZE = (12, 20)  # a grid of 3 by 5


def build(kind: str) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(SIZE, 4, 3, 24, 3, 3, 2, 7, 0.1, **KINDS[kind])
    return away_from_initial_values(model).eval()


def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(3))


@contextmanager
def explicit_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every layer's A as a part of the graph, by torch's operations, in the place of the kernel."""
    found: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kernel: str = "") -> Tensor:
        logits = torch.einsum("baqk,batk->baqt", q, k) / q.shape[-1] ** 0.5
        weights = torch.softmax(logits if bias is None else logits + bias[:, : q.shape[2]], -1)
        found.append(weights)
        return torch.einsum("baqt,batk->baqk", weights, v)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "attend", attend)
        yield found


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_their_gradients_are_those_of_explicit_attention(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    with frozen(model):
        seen = observe(model, images())
        layers = [seen.taken[index] for index in range(3)]
        gradients = torch.autograd.grad(seen.logits_BL[:, 2].sum(), [layer.mixed_BAQK for layer in layers])
    with explicit_attention(monkeypatch) as explicit:
        logits = model.classify(model.encode(model.embedding(images())))
        of_weights = torch.autograd.grad(logits[:, 2].sum(), explicit[:3])
    close(seen.logits_BL, logits.detach())
    explicit = [weights.detach() for weights in explicit]
    for layer, gradient, weights, expected in zip(layers, gradients, explicit[:3], of_weights, strict=True):
        assert float((layer.weights() - weights).abs().max()) <= 1e-5
        relative = (layer.gradient(gradient) - expected).abs().max() / expected.abs().max()
        assert float(relative) <= 1e-4
        for head in layer.each_head():
            chosen = slice(1, 4)
            close(layer.weights(head, chosen), weights[:, head, chosen])
            close(layer.gradient(gradient, head, chosen), expected[:, head, chosen])
            assert layer.difference(layer.weights(head, chosen), head, chosen) <= 1e-5
    assert layers[0].difference(layers[0].weights().roll(1, -1)) > 1e-3  # others do not pass


@pytest.mark.parametrize("kind", KINDS)
def test_looking_changes_no_answer_and_leaves_nothing_behind(kind: str) -> None:
    model = build(kind).train()
    learned = [parameter.requires_grad for parameter in model.parameters()]
    with torch.inference_mode():
        expected = model.eval()(images())
        model.train()
        with frozen(model):
            seen = observe(model, images(), all_queries=False)
    close(seen.logits_BL, expected)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == learned
    last = seen.taken[2]
    assert last.q_BAQK.shape[2] == (model.num_tokens_read or last.k_BATK.shape[2])


@pytest.mark.parametrize("kind", KINDS)
def test_patches_that_are_left_out_are_as_if_nothing_could_look_at_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind)
    prefix = model.config.num_prefix_tokens
    patches = torch.tensor([[0, 3, 4, 9], [14, 2, 7, 1]])
    with torch.inference_mode():
        seen = observe(model, images(), patches=patches)
        visible = torch.zeros(2, prefix + 15, dtype=torch.bool)
        visible[:, :prefix] = True
        visible.scatter_(1, patches + prefix, True)

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kernel: str = "") -> Tensor:
            mask = torch.zeros(2, 1, 1, k.shape[2]).masked_fill(~visible[:, None, None], -torch.inf)
            mask = mask if bias is None else mask + bias
            return nn.functional.scaled_dot_product_attention(q, k, v, mask.expand(2, *q.shape[1:3], -1))

        with monkeypatch.context() as patch:
            patch.setattr(attention, "attend", attend)
            encoded = model.encode(model.embedding(images()))
        for image, kept in enumerate(patches):
            expected = torch.cat([encoded[image, :prefix], encoded[image, prefix:][kept]])
            close(seen.encoded_BTD[image], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_row_is_what_it_reads(kind: str) -> None:
    """The gradient of a linear head's logit at the tokens is in proportion to what it reads of them."""
    model = build(kind)
    with torch.inference_mode():
        seen = observe(model, images(), all_queries=False)
        row_BT = start_row(model, seen)
    assert row_BT.shape == seen.embedded_BTD.shape[:2]
    close(row_BT.sum(1), torch.ones(2))
    encoded = model.encode(model.embedding(images())).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.classify(encoded).sum(), [encoded])
    assert torch.equal(row_BT > 0, gradient.abs().sum(2) > 0)


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224",
        "beit_base_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch16_rope_mixed_ape_224",
    ],
)  # fmt: skip
def test_attention_is_timms(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    patch = 14 if "14" in name else 16
    size = (4 * patch, 4 * patch)
    theirs = timm.create_model(name, img_size=size, **NARROW).eval()
    randomize(theirs)
    expected: list[Tensor] = []
    for block in theirs.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, weights: expected.append(weights))
    timm.models.save_for_hf(theirs, tmp_path / name, safe_serialization=True)
    ours = load_checkpoint(tmp_path / name).model
    with torch.inference_mode():
        theirs(pictures(size))
        seen = observe(ours, pictures(size))
    for index, weights in enumerate(expected):
        assert float((seen.taken[index].weights() - weights).abs().max()) <= 1e-5


def inside(kind: str, precision: str = "float32") -> vitral.Inside:
    placement = Placement.choose("cpu", precision)  # pyrefly: ignore[bad-argument-type]
    labels = tuple("abcdefg")
    model = placement.place(build(kind)).eval()
    return vitral.Inside(Classifier(model, Preprocess(SIZE), labels, placement))


def picture() -> Tensor:
    return torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_maps_are_rows_of_the_weights(kind: str) -> None:
    looked = inside(kind)
    maps = looked.attention(
        [picture()] * 3, layers=[0, -1], heads=[2, 0], queries=["mean", (1, 2)], batch_size=2
    )
    prefix = looked.model.config.num_prefix_tokens
    images_BCHW = next(iter(looked.classifier.batches([picture()], 1)))
    with torch.inference_mode():
        weights = observe(looked.model, images_BCHW).taken[2].weights()[0, [2, 0]]
    assert maps.layers == (0, 2)
    assert maps.values.shape == (3, 2, 2, 2, 3, 5)
    assert maps.queries == ("mean", "1,2")
    rows = torch.stack([weights[:, prefix:].mean(1), weights[:, prefix + 7]], dim=1)
    close(maps.values[2, 1].flatten(-2), rows[..., prefix:])
    close(maps.prefix[2, 1], rows[..., :prefix])
    assert max(maps.certificate) <= 1e-5


def test_attention_under_bfloat16_is_near_the_explicit_route() -> None:
    half = inside("rotary", "bfloat16").attention(picture(), layers=[0, 1, 2])
    full = inside("rotary").attention(picture(), layers=[0, 1, 2])
    assert float((half.values - full.values).abs().max()) <= 1e-2
    assert max(half.certificate) <= 5e-2


def test_the_fused_kernel_stays_on_and_one_head_at_most_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    weights = SeenAttention.weights

    def counted(self: SeenAttention, *args: Any) -> Tensor:
        shapes.append((found := weights(self, *args)).shape)
        return found

    calls: list[int] = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *args: calls.append(1) or fused(*args)
    )
    monkeypatch.setattr(SeenAttention, "weights", counted)
    looked = inside("relative")
    looked.attention(picture(), layers=[0, 1, 2])
    assert len(calls) == 3
    assert {tuple(shape) for shape in shapes} == {(1, 3, 1, 16)}
    shapes.clear()
    looked.attention(picture(), layers=[1], queries=["mean"])
    assert {tuple(shape) for shape in shapes} == {(1, 1, 15, 16)}


def test_what_a_model_lacks_is_named() -> None:
    looked = inside("sinusoidal_2d")
    with pytest.raises(VitralError, match="no layer 3; this model has 0 to 2"):
        looked.attention(picture(), layers=[3])
    with pytest.raises(VitralError, match="no head 3; this model has 0 to 2"):
        looked.attention(picture(), heads=[3])
    with pytest.raises(VitralError, match='no class token; ask for queries=\\["mean"\\]'):
        looked.attention(picture(), queries=["class"])
    with pytest.raises(VitralError, match="no patch \\(3, 0\\); rows are 0 to 2, columns 0 to 4"):
        looked.attention(picture(), queries=[(3, 0)])
    with pytest.raises(VitralError, match="Linear gives logits alone"):
        vitral.Inside(replace(looked.classifier, model=nn.Linear(2, 2)))  # pyrefly: ignore[bad-argument-type]


def test_explicit_kernels_are_seen_alike() -> None:
    model = build("shared relative")
    with torch.inference_mode():
        fused = observe(model, images())
        set_kernels(model, Kernels(attention="explicit"))
        explicit = observe(model, images())
    close(fused.taken[1].weights(), explicit.taken[1].weights())


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("timm").setLevel(logging.ERROR)
