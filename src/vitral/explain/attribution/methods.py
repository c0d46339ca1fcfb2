"""The table of methods: what each shows, needs and costs, and where it is from."""

import math
from collections.abc import Callable

from vitral.explain.attribution import by_attention, by_gradient, by_removal, controls
from vitral.explain.attribution.method import Method, Settings
from vitral.model.config import ViTConfig
from vitral.runtime.errors import VitralError
from vitral.runtime.spelling import meant

DEFAULT = "legrad"


def _forwards(count: float) -> Callable[[ViTConfig, Settings], float]:
    return lambda _config, _settings: count


METHODS = {
    method.name: method
    for method in (
        Method(
            "attention",
            "where the token that the head reads looks in the last layer, whatever the class",
            "nothing",
            of_class=False,
            cost=_forwards(1),
            reference="DINO, arXiv:2104.14294",
            compute=by_attention.raw_attention,
            layers="last",
            limits="a look is no reason; registers and background tokens draw much of it",
        ),
        Method(
            "rollout",
            "how much of each patch the layers together mix into the answer, whatever the class",
            "nothing",
            of_class=False,
            cost=_forwards(1.1),
            reference="arXiv:2005.00928",
            compute=by_attention.rollout,
            limits="knows no class; positive and negative influence look the same",
        ),
        Method(
            "gradient_rollout",
            "rollout of attention that the class's score grows with",
            "classes",
            of_class=True,
            cost=_forwards(2.2),
            reference="github.com/jacobgil/vit-explain, with its issues 6 and 16 mended",
            compute=by_attention.gradient_rollout,
        ),
        Method(
            "attention_gradient",
            "attention of all layers, where more of it would raise the class's score",
            "classes",
            of_class=True,
            cost=_forwards(2.2),
            reference="Chefer et al., ICCV 2021, arXiv:2103.15679",
            compute=by_attention.attention_gradient,
        ),
        Method(
            "legrad",
            "where each layer's own verdict on the class would rise with attention",
            "classes",
            of_class=True,
            cost=_forwards(1.8),
            reference="LeGrad, ICCV 2025, arXiv:2404.03214",
            compute=by_attention.legrad,
            limits="reads early layers with the last layer's head",
        ),
        Method(
            "grad_cam",
            "which patches' features in the last layer speak for the class",
            "classes",
            of_class=True,
            cost=_forwards(1.1),
            reference="Grad-CAM, arXiv:1610.02391",
            compute=by_gradient.grad_cam,
            layers="last",
            limits="one layer only; made for convolutions, whose features stay where they are",
        ),
        Method(
            "input_gradient",
            "each pixel times the slope of the class's score there, summed over a patch",
            "captum",
            of_class=True,
            cost=_forwards(3),
            reference="arXiv:1605.01713",
            compute=by_gradient.input_gradient,
            layers="none",
            limits="noisy: the slope at one point of a curved function",
        ),
        Method(
            "integrated_gradients",
            "each pixel's part in how the class's score changes from the mean colour to the image",
            "captum",
            of_class=True,
            cost=lambda _, settings: 1 + 2 * settings.steps,
            reference="arXiv:1703.01365",
            compute=by_gradient.integrated_gradients,
            layers="none",
            limits="on its way it asks about pictures that no camera takes",
        ),
        Method(
            "occlusion",
            "how much the class's score falls when the model is not shown a patch",
            "classes",
            of_class=True,
            cost=lambda config, _: 1 + math.prod(config.grid_size),
            reference="arXiv:1311.2901, with tokens left out",
            compute=by_removal.occlusion,
            layers="none",
            limits="one patch at a time: what two patches both show counts for nothing",
        ),
        Method(
            "rise",
            "how high the class's score is when a patch is among the random half that the model is shown",
            "classes",
            of_class=True,
            cost=lambda _, settings: 1 + settings.masks * settings.kept,
            reference="RISE, arXiv:1806.07421, with tokens left out",
            compute=by_removal.rise,
            layers="none",
            limits="slow, and noisy with few masks",
        ),
        Method(
            "random",
            "noise: a control that no method may lose to",
            "nothing",
            of_class=False,
            cost=_forwards(1),
            reference="control",
            compute=controls.random_maps,
            layers="none",
            is_control=True,
        ),
        Method(
            "centre",
            "the middle of the picture: a control that knows how people take photographs",
            "nothing",
            of_class=False,
            cost=_forwards(1),
            reference="control",
            compute=controls.centre_maps,
            layers="none",
            is_control=True,
        ),
    )
}


def find(name: str) -> Method:
    """Finds a method by its name. Raises VitralError if there is none."""
    if name not in METHODS:
        raise VitralError(f"method={name}: it is one of {', '.join(METHODS)}{meant(name, METHODS)}")
    return METHODS[name]
