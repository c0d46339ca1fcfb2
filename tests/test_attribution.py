"""Each method of attribution against another's code, or against plain autograd through explicit attention."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vitral
from tests.parts import away_from_initial_values
from tests.test_layouts import NARROW, pictures, randomize
from vitral.checkpoints.folder import load_checkpoint
from vitral.explain.attribution.attribute import attribute
from vitral.explain.attribution.by_removal import smooth_choices
from vitral.explain.attribution.method import Settings
from vitral.explain.attribution.methods import METHODS, find
from vitral.explain.maps import Relevance
from vitral.explain.target import Question
from vitral.images.preprocess import Preprocess
from vitral.inference.classifier import Classifier, as_classifier
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

CPU = Placement.choose("cpu", "float32")
TOLERANCE = 1e-4  # relative to the largest value of a map
# Class token, registers, a relative bias and mean pooling, attention pooling, two heads, rotary positions.
FAMILIES = [
    "vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224",
    "vit_base_patch16_siglip_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("timm").setLevel(logging.ERROR)


def explain(
    classifier: Classifier, images: Tensor, method: str, question: Question | None = None, **settings: Any
) -> Relevance:
    settled = question or Question(torch.full((len(images),), 3))
    return attribute(classifier, images, find(method), lambda _: settled, Settings.of(settings))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE


# --- timm's models with explicit attention, and the methods as their papers write them --------------


class Reference:
    """A tiny model of timm's with random weights: A and dA of each layer, and what leaves it."""

    def __init__(self, name: str, folder: Path) -> None:
        timm = pytest.importorskip("timm")
        patch = 14 if "14" in name else 16
        # BEiT in timm has one table, for the size it is built with.
        self.size = (4 * patch, 5 * patch)
        self.theirs = timm.create_model(
            name, img_size=self.size, **{**NARROW, "depth": 3}, num_classes=7
        ).eval()
        randomize(self.theirs)
        timm.models.save_for_hf(self.theirs, folder, safe_serialization=True)
        self.ours = as_classifier(load_checkpoint(folder), CPU)
        self.prefix = self.ours.model.config.num_prefix_tokens
        self.images = pictures(self.size)
        self.attentions: list[Tensor] = []
        self.outputs: list[Tensor] = []
        for block in self.theirs.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _, __, weights: self.attentions.append(weights))
            block.register_forward_hook(lambda _, __, tokens: self.outputs.append(tokens))
        self.logits = self.theirs(self.images)

    def gradients(self, score: Callable[[Tensor], Tensor] = lambda logits: logits[:, 3]) -> list[Tensor]:
        return list(torch.autograd.grad(score(self.logits).sum(), self.attentions, retain_graph=True))

    def row(self, product_BTT: Tensor) -> Tensor:
        """What the head reads of a product over layers: the patches' share, (B, N)."""
        match self.ours.model.config.pooling:
            case "class":
                read = product_BTT[:, : self.ours.model.num_tokens_read].mean(1)
            case "mean":
                read = product_BTT[:, self.prefix :].mean(1)
            case _:
                read = (self.pool_attention() @ product_BTT)[:, 0]
        return read[:, self.prefix :].detach()

    def pool_attention(self) -> Tensor:
        """What timm's attention pooling takes of each token, mean over heads: (B, 1, T)."""
        pool = self.theirs.attn_pool
        tokens = self.theirs.norm(self.outputs[-1])
        q = pool.q(pool.latent).view(1, 1, pool.num_heads, -1).transpose(1, 2)
        k = pool.kv(tokens).chunk(2, -1)[0].view(2, tokens.shape[1], pool.num_heads, -1).transpose(1, 2)
        return (q @ k.transpose(2, 3) * pool.scale).softmax(-1).mean(1)

    def eye(self) -> Tensor:
        return torch.eye(self.attentions[0].shape[-1])


@pytest.fixture(params=FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path: Path) -> Reference:
    return Reference(request.param, tmp_path)


def test_rollout(reference: Reference) -> None:
    """The authors' rule (google-research/vision_transformer, issue 18): mean, add I, normalize, multiply."""
    product = reference.eye()
    for weights in reference.attentions:
        mixed = weights.mean(1) + reference.eye()
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    found = explain(reference.ours, reference.images, "rollout")
    close(found.values.flatten(1), reference.row(product))
    assert found.certificate <= 1e-5


def test_raw_attention(reference: Reference) -> None:
    found = explain(reference.ours, reference.images, "attention").values.flatten(1)
    if reference.ours.model.config.pooling == "map":
        close(found, reference.pool_attention()[:, 0].detach())
    else:
        close(found, reference.row(reference.attentions[-1].mean(1)))


def test_gradient_rollout(reference: Reference) -> None:
    """vit-explain's, with a layer's own gradient (its issue 6), and rows divided, not columns (issue 16)."""
    product = reference.eye()
    for weights, gradient in zip(reference.attentions, reference.gradients(), strict=True):
        fused = (weights * gradient).mean(1)
        fused[fused < 0] = 0
        mixed = (fused + reference.eye()) / 2
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    close(
        explain(reference.ours, reference.images, "gradient_rollout").values.flatten(1),
        reference.row(product),
    )


def test_attention_gradient(reference: Reference) -> None:
    """The rule of Transformer-MM-Explainability for encoders, R <- R + A R, A the mean of clamped heads."""
    product = reference.eye()
    for weights, gradient in zip(reference.attentions, reference.gradients(), strict=True):
        product = product + (weights * gradient).clamp(min=0).mean(1) @ product
    found = explain(reference.ours, reference.images, "attention_gradient")
    close(found.values.flatten(1), reference.row(product))
    assert found.certificate <= 1e-5


def test_one_class_against_another(reference: Reference) -> None:
    product = reference.eye()
    gradients = reference.gradients(lambda logits: logits[:, 3] - logits[:, 5])
    for weights, gradient in zip(reference.attentions, gradients, strict=True):
        product = product + (weights * gradient).clamp(min=0).mean(1) @ product
    question = Question(torch.full((2,), 3), torch.full((2,), 5))
    found = explain(reference.ours, reference.images, "attention_gradient", question)
    close(found.values.flatten(1), reference.row(product))
    close(found.scores, (reference.logits[:, 3] - reference.logits[:, 5]).detach())
    assert found.targets == ("class 3", "class 3")
    assert found.against == ("class 5", "class 5")


def test_legrad(reference: Reference) -> None:
    """The paper's formula by autograd through the whole graph, timm's own norm, pool, head at each layer."""
    total = torch.zeros(())
    for weights, tokens in zip(reference.attentions, reference.outputs, strict=True):
        logits = reference.theirs.forward_head(reference.theirs.norm(tokens))
        (gradient,) = torch.autograd.grad(logits[:, 3].sum(), weights, create_graph=True)
        total = total + gradient.clamp(min=0).mean(dim=(1, 2)) / len(reference.outputs)
    found = explain(reference.ours, reference.images, "legrad")
    close(found.values.flatten(1), total[:, reference.prefix :].detach())
    share = total[:, : reference.prefix].sum(1) / total.sum(1)
    assert float((found.prefix_mass - share.detach()).abs().max()) <= 1e-5


def test_legrad_is_torchcams(tmp_path: Path) -> None:
    """torch-cam takes the mean token to the head, but here is told to take the class token, as the model."""
    methods = pytest.importorskip("torchcam.methods")
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, 3, 4, 40, 72, num_classes=7).eval()
    randomize(theirs)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = as_classifier(load_checkpoint(tmp_path / "vit.pth", num_heads=4), CPU)
    images = pictures((32, 32))
    with methods.LeGrad(
        theirs,
        list(theirs.encoder.layers),
        score_projection=lambda tokens: theirs.heads(theirs.encoder.ln(tokens)[:, 0]),
    ) as extractor:
        theirs(images)
        expected = torch.stack(extractor._get_weights(3, retain_graph=False)).mean(0)
    close(explain(ours, images, "legrad").values.flatten(1), expected.detach())


def test_grad_cam_is_pytorch_grad_cams(reference: Reference) -> None:
    """On the norm before the last attention, as its author says for transformers (its issue 363)."""
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    rows = reference.ours.model.embedding.grid_of(reference.images)[0]

    def reshape(tokens: Tensor) -> Tensor:
        return tokens[:, reference.prefix :].unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    layer = reference.theirs.blocks[-1].norm1
    with grad_cam.GradCAM(reference.theirs, [layer], reshape_transform=reshape) as cam:
        targets = [lambda logits: logits[3]] * 2
        cam(reference.images, targets)
        held = cam.activations_and_grads
        arrays = [part[0].detach().numpy() for part in (held.activations, held.gradients)]
        expected = cam.get_cam_image(reference.images, layer, targets, *arrays).clip(min=0)
    close(explain(reference.ours, reference.images, "grad_cam").values, torch.from_numpy(expected))


def patch_sums(pixels: Tensor, side: int) -> Tensor:
    return nn.functional.avg_pool2d(pixels.sum(1, keepdim=True), side)[:, 0] * side**2


def test_input_gradient(reference: Reference) -> None:
    """By autograd from the pixels of timm's model, through explicit attention."""
    images = reference.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reference.theirs(images)[:, 3].sum(), images)
    side = reference.ours.model.config.patch_size
    expected = patch_sums((gradient * images).detach(), side)
    close(explain(reference.ours, reference.images, "input_gradient").values, expected)


def test_integrated_gradients(reference: Reference) -> None:
    """By a hand-written sum over the path: Gauss-Legendre's points, as captum's."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    total = torch.zeros(())
    for node, weight in zip((1 + nodes) / 2, weights / 2, strict=True):
        images = (reference.images * node).float().requires_grad_()
        (gradient,) = torch.autograd.grad(reference.theirs(images)[:, 3].sum(), images)
        total = total + gradient * weight
    side = reference.ours.model.config.patch_size
    expected = patch_sums((total * reference.images).float(), side)
    found = explain(reference.ours, reference.images, "integrated_gradients", steps=4)
    close(found.values, expected)
    with torch.no_grad():
        blank = reference.theirs(torch.zeros_like(reference.images))[:, 3]
    gap = (expected.sum((1, 2)) - (reference.logits[:, 3] - blank)).detach().abs().max()
    assert found.certificate == pytest.approx(float(gap), rel=1e-2, abs=1e-4)


def without_patches(reference: Reference, image: Tensor, kept: list[int]) -> Tensor:
    """The score of one image by timm's parts, some patches left out after positions were added."""
    theirs, prefix = reference.theirs, reference.prefix
    tokens = theirs._pos_embed(theirs.patch_embed(image[None]))
    chosen = [*range(prefix), *(prefix + patch for patch in kept)]
    tokens = theirs.norm_pre(tokens)[:, chosen]
    for block in theirs.blocks:
        tokens = block(tokens)
    return theirs.forward_head(theirs.norm(tokens))[0, 3]


REMOVABLE = ["vit_base_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]


@pytest.mark.parametrize("name", REMOVABLE)
def test_occlusion_is_captums_ablation(name: str, tmp_path: Path) -> None:
    """captum's FeatureAblation of a mask that says which tokens of timm's model are there."""
    ablation = pytest.importorskip("captum.attr").FeatureAblation
    reference = Reference(name, tmp_path)
    rows = []
    with torch.no_grad():
        for image in reference.images:

            def score(mask: Tensor, image: Tensor = image) -> Tensor:
                return without_patches(reference, image, mask[0].nonzero()[:, 0].tolist())[None]

            rows.append(ablation(score).attribute(torch.ones(1, 20))[0])
    close(explain(reference.ours, reference.images, "occlusion").values.flatten(1), torch.stack(rows))


def test_rise_is_the_mean_over_choices(tmp_path: Path) -> None:
    reference = Reference("vit_base_patch16_224", tmp_path)
    choices = smooth_choices((4, 5), 10, 12, seed=4)
    scores, masks = torch.empty(2, 12), torch.zeros(12, 20)
    with torch.no_grad():
        for number, kept in enumerate(choices):
            masks[number, kept] = 1
            for index, image in enumerate(reference.images):
                scores[index, number] = without_patches(reference, image, kept.tolist())
    # Eq. 6 of the paper, with the counted share of masks for E[M], less the mean of all scores.
    expected = (scores[:, :, None] * masks).sum(1) / 12 / masks.mean(0).clamp_min(1 / 12)
    expected = expected - scores.mean(1, keepdim=True)
    found = explain(reference.ours, reference.images, "rise", masks=12, seed=4)
    close(found.values.flatten(1), expected)


def test_choices_are_smooth_and_even() -> None:
    masks = torch.zeros(4000, 16 * 24).scatter_(1, smooth_choices((16, 24), 96, 4000, seed=0), 1)
    assert masks.sum(1).eq(96).all()
    share = masks.mean(0)
    assert float((share - 0.25).abs().max()) < 0.05  # no place is kept much more often
    maps = masks.view(-1, 16, 24)
    alike = float((maps[:, :, 1:] == maps[:, :, :-1]).float().mean())
    assert alike > 0.75  # of independent choices, 0.625 of neighbours agree
    assert not torch.equal(smooth_choices((4, 4), 8, 9, seed=0), smooth_choices((4, 4), 8, 9, seed=1))


# --- What is asked ---------------------------------------------------------------------------------

SIZE = (12, 20)  # a grid of 3 by 5
FEW: dict[str, Any] = {"steps": 4, "masks": 40}  # of slow methods


def inside(
    precision: str = "float32", *, num_classes: int = 7, multi_label: bool = False, **options: Any
) -> vitral.Inside:
    torch.manual_seed(0)
    placement = Placement.choose("cpu", precision)  # pyrefly: ignore[bad-argument-type]
    model = VisionTransformer(SIZE, 4, 3, 24, 3, 3, 2, num_classes, **options)
    model = placement.place(away_from_initial_values(model)).eval()
    labels = tuple("abcdefg"[:num_classes])
    return vitral.Inside(Classifier(model, Preprocess(SIZE), labels, placement, multi_label=multi_label))


def photographs(count: int = 3) -> list[Tensor]:
    return list(torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_map_is_of_the_image_whatever_its_batch(method: str) -> None:
    looked = inside()
    together = looked.relevance(photographs(), method=method, **FEW, seed=5)
    alone = [looked.relevance(image, method=method, **FEW, seed=5) for image in photographs()]
    assert together.values.shape == (3, 3, 5)
    assert together.images == (0, 1, 2)
    close(together.values, torch.cat([part.values for part in alone]))
    close(together.scores, torch.cat([part.scores for part in alone]))
    done: list[float] = []
    in_twos = looked.relevance(
        photographs(), method=method, **FEW, seed=5, batch_size=2, progress=done.append
    )
    close(together.values, in_twos.values)
    assert done == sorted(done)
    assert done[-1] == 3


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.of_class])
def test_the_class_that_is_asked_for_is_explained(method: str) -> None:
    looked = inside()
    predicted = looked.classifier.predict(photographs(), top=1)
    found = looked.relevance(photographs(), method=method, **FEW)
    assert found.targets == tuple(prediction.label for prediction in predicted)
    close(found.probabilities, torch.tensor([prediction.top[0][1] for prediction in predicted]))
    of_b = looked.relevance(photographs(), method=method, target="b", **FEW)
    assert of_b.targets == ("b", "b", "b")
    close(of_b.scores, looked.classifier.logits(photographs())[:, 1])
    close(of_b.values, looked.relevance(photographs(), method=method, target=1, **FEW).values)
    assert (
        float(
            (of_b.values - looked.relevance(photographs(), method=method, target="c", **FEW).values)
            .abs()
            .max()
        )
        > 0
    )
    contrast = looked.relevance(photographs(), method=method, target="b", against="c", **FEW)
    assert contrast.against == ("c", "c", "c")
    assert float((of_b.values - contrast.values).abs().max()) > 0


def test_each_label_that_is_there_has_a_map() -> None:
    looked = inside(multi_label=True)
    there = looked.classifier.logits(photographs()) > 0
    assert there.sum(1).min() >= 1
    found = looked.relevance(
        photographs(), method="attention_gradient", target="positive labels", batch_size=2
    )
    assert found.images == tuple(there.nonzero()[:, 0].tolist())
    assert found.targets == tuple("abcdefg"[index] for index in there.nonzero()[:, 1])
    for place, (image, target) in enumerate(zip(found.images, found.targets, strict=True)):
        alone = looked.relevance(photographs()[image], method="attention_gradient", target=target)
        close(found.values[place], alone.values[0])


def test_who_cannot_serve_names_who_can() -> None:
    looked, headless = inside(), inside(num_classes=0)
    with pytest.raises(VitralError, match=r"rollout gives one map whatever the class.*'b'; .*legrad.* can"):
        looked.relevance(photographs(), method="rollout", target="b")
    with pytest.raises(VitralError, match=r"one map whatever the class.*why 'predicted' and not 'b'"):
        looked.relevance(photographs(), method="attention", against="b")
    with pytest.raises(VitralError, match=r"features and no classes.*; attention, rollout can serve"):
        headless.relevance(photographs(), method="legrad")
    with pytest.raises(VitralError, match="several labels an image"):
        looked.relevance(photographs(), target="positive labels")
    with pytest.raises(VitralError, match="each label for itself; name one to set 'b' against"):
        inside(multi_label=True).relevance(photographs(), target="positive labels", against="b")
    with pytest.raises(VitralError, match=r"rollout gives one map whatever the class.*can"):
        inside(multi_label=True).relevance(photographs(), method="rollout", target="positive labels")
    with pytest.raises(VitralError, match=r"method=legrat: it is one of attention.*did you mean 'legrad'"):
        looked.relevance(photographs(), method="legrat")
    with pytest.raises(VitralError, match=r"no setting 'sede'.*did you mean 'seed'"):
        looked.relevance(photographs(), sede=1)
    with pytest.raises(VitralError, match="kept is 1; it is a share above 0 and below 1"):
        looked.relevance(photographs(), kept=1)
    found = headless.relevance(photographs(), method="rollout")
    assert found.targets == ("", "", "")
    assert found.scores.isnan().all()
    assert headless.relevance(photographs(), method="legrad", target=2).targets == ("2", "2", "2")


@pytest.mark.parametrize("method", ["input_gradient", "integrated_gradients"])
def test_without_captum_the_extra_is_named(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(VitralError, match=r"pip install 'vitral\[explain\]'; legrad does without"):
        inside().relevance(photographs(), method=method)


def test_one_patch_cannot_be_left_out() -> None:
    torch.manual_seed(0)
    model = CPU.place(VisionTransformer(4, 4, 3, 24, 2, 3, 2, 7)).eval()
    looked = vitral.Inside(Classifier(model, Preprocess((4, 4)), tuple("abcdefg"), CPU))
    for method in ("occlusion", "rise"):
        with pytest.raises(VitralError, match="sees one patch, and nothing is left without it; legrad can"):
            looked.relevance(photographs(1), method=method)
    assert looked.relevance(photographs(1)).values.shape == (1, 1, 1)


def test_weights_that_overflow_are_named() -> None:
    looked = inside()
    with torch.no_grad():
        next(looked.model.head.parameters()).fill_(torch.inf)
    with pytest.raises(VitralError, match="numbers that are none"):
        looked.relevance(photographs(), target="a")


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_near(method: str) -> None:
    """Products that round to three digits, layer upon layer, leave a map right to a tenth."""
    full, half = (
        inside(precision).relevance(photographs(), method=method, **FEW)
        for precision in ("float32", "bfloat16")
    )
    assert half.values.dtype == torch.float32
    assert float((full.values - half.values).abs().max() / full.values.abs().max()) <= 0.1


def test_a_caller_in_inference_mode_is_served() -> None:
    looked = inside()
    expected = looked.relevance(photographs())
    with torch.inference_mode():
        looked.classifier.predict(photographs())
        close(looked.relevance(photographs()).values, expected.values)


def test_nothing_is_left_behind() -> None:
    looked = inside()
    looked.model.train()
    before = {name: parameter.clone() for name, parameter in looked.model.named_parameters()}
    for method in METHODS:
        looked.relevance(photographs(), method=method, **FEW)
    assert looked.model.training
    for name, parameter in looked.model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in looked.model.modules())


def test_controls_know_nothing_of_the_model() -> None:
    looked, other = inside(), inside(pooling="mean")
    for method in ("random", "centre"):
        assert torch.equal(
            looked.relevance(photographs(), method=method, **FEW).values,
            other.relevance(photographs(), method=method, **FEW).values,
        )
    one, two = (looked.relevance(photographs(), method="random", seed=seed).values for seed in (1, 2))
    assert not torch.equal(one, two)
    assert not torch.equal(one[0], one[1])
    centre = looked.relevance(photographs(), method="centre").values[0]
    assert centre.argmax() == 7
    close(centre, centre.flip(0, 1))


def test_each_row_tells_a_stranger_what_it_is() -> None:
    config = inside().model.config
    for row in METHODS.values():
        assert min(len(row.says), len(row.needs), len(row.reference)) > 0
        assert row.cost(config, Settings()) >= 1
