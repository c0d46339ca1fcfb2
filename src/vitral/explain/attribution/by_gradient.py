"""Methods that read the gradient of the score at tokens or pixels.

Grad-CAM is ours; input x gradient and integrated gradients are captum's. Axes are those of
`model/embedding.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitral.explain.attribution.method import Found, Subject
from vitral.explain.observe import frozen, observe
from vitral.model.encoder import EncoderLayer
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import why_not

_IMAGES_A_PASS = 32  # of integrated gradients: an image at so many points


def grad_cam(subject: Subject) -> Found:
    """Grad-CAM (arXiv:1610.02391, eq. 1 and 2), on the tokens that the last layer's attention reads.

    What leaves the last layer would not do: of a class token's model no patch has a gradient there. Only that
    layer is run again for a gradient.
    """
    model = subject.model
    layer = model.layers[-1]
    assert isinstance(layer, EncoderLayer)
    with frozen(model), torch.enable_grad(), subject.classifier.placement.autocast():
        with torch.no_grad():
            seen = observe(model, subject.images_BCHW, layers=[], all_queries=False, keep_outputs=True)
        entering_BTD = [seen.embedded_BTD, *seen.outputs][-2].detach().requires_grad_()
        relation = model.relations_of_layers(entering_BTD, seen.grid)[-1]
        with _what_is_read(layer.attention) as read:
            leaving_BQD = layer(entering_BTD, relation._replace(num_queries=model.num_tokens_read))
        logits_BL = model.classify(model.norm(leaving_BQD))
        score = subject.ask(logits_BL).scores(logits_BL).sum()
    (gradient_BTD,) = torch.autograd.grad(score, read)
    prefix = model.config.num_prefix_tokens
    patches_BND = read[0][:, prefix:].detach().float()
    weights_BD = gradient_BTD[:, prefix:].float().mean(dim=1)
    return Found((patches_BND @ weights_BD[:, :, None])[:, :, 0].relu(), logits_BL.detach())


@contextmanager
def _what_is_read(attention: nn.Module) -> Iterator[list[Tensor]]:
    """Shows the tokens that a layer's attention reads, which its order of norms decides."""
    read: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _, arguments: read.append(arguments[1]))
    try:
        yield read
    finally:
        handle.remove()


def input_gradient(subject: Subject) -> Found:
    """Input x gradient (arXiv:1605.01713): each pixel's value times its gradient, summed over a patch."""
    captum = _captum()
    logits_BL = _logits(subject)
    with frozen(subject.model):
        method = captum.InputXGradient(_scores_of(subject, logits_BL))
        images_BCHW = subject.images_BCHW.clone().requires_grad_()
        pixels_BCHW = method.attribute(images_BCHW, additional_forward_args=_rows(subject))
    return Found(_patches(subject, pixels_BCHW), logits_BL)


def integrated_gradients(subject: Subject) -> Found:
    """Integrated gradients (arXiv:1703.01365, eq. 1) from the mean colour to the image, summed over a patch.

    Its certificate is that a map sums up to the score of the image less that of the mean colour.
    """
    captum = _captum()
    logits_BL = _logits(subject)
    settings, images_BCHW = subject.settings, subject.images_BCHW
    passes = settings.steps * len(images_BCHW)
    with frozen(subject.model):
        scores = _scores_of(subject, logits_BL, _counted(settings.progress, passes))
        pixels_BCHW, difference_B = captum.IntegratedGradients(scores).attribute(
            images_BCHW,
            baselines=torch.zeros_like(images_BCHW),
            additional_forward_args=_rows(subject),
            n_steps=settings.steps,
            internal_batch_size=max(_IMAGES_A_PASS, len(images_BCHW)),
            return_convergence_delta=True,
        )
    return Found(_patches(subject, pixels_BCHW), logits_BL, float(difference_B.abs().max()))


def _captum() -> Any:
    if reason := why_not("this method", ["captum"], "explain"):
        raise VitralError(f"{reason}; legrad does without")
    from captum import attr

    return attr


def _rows(subject: Subject) -> Tensor:
    """Which image of the batch each is; captum repeats it as it repeats the images."""
    return torch.arange(len(subject.images_BCHW), device=subject.images_BCHW.device)


def _logits(subject: Subject) -> Tensor:
    with torch.no_grad(), subject.classifier.placement.autocast():
        return subject.model(subject.images_BCHW)


def _scores_of(
    subject: Subject, logits_BL: Tensor, count: Callable[[int], None] = lambda _: None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The explained score as a function of pixels (R, C, H, W) and of which image of the batch each is."""
    question = subject.ask(logits_BL)

    def scores(pixels_RCHW: Tensor, images_R: Tensor) -> Tensor:
        with subject.classifier.placement.autocast():
            logits_RL = subject.model(pixels_RCHW)
        count(len(pixels_RCHW))
        return question.take(images_R).scores(logits_RL)

    return scores


def _counted(progress: Callable[[float], None], total: int) -> Callable[[int], None]:
    done = 0

    def count(images: int) -> None:
        nonlocal done
        done += images
        progress(min(done / total, 1))

    return count


def _patches(subject: Subject, pixels_BCHW: Tensor) -> Tensor:
    """Sums over the pixels of each patch: (B, N)."""
    side = subject.model.config.patch_size
    tiles = pixels_BCHW.detach().float().unflatten(2, (-1, side)).unflatten(4, (-1, side))
    return tiles.sum(dim=(1, 3, 5)).flatten(1)
