"""The table of methods: what each shows, needs and costs, and where it is from."""

from collections.abc import Callable

from vitral.explain.attribution import by_attention, controls
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
            cost=_forwards(2.3),
            reference="github.com/jacobgil/vit-explain, with its issues 6 and 16 mended",
            compute=by_attention.gradient_rollout,
        ),
        Method(
            "attention_gradient",
            "attention of all layers, where more of it would raise the class's score",
            "classes",
            of_class=True,
            cost=_forwards(2.3),
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
            "random",
            "noise: a control that no method may lose to",
            "nothing",
            of_class=False,
            cost=_forwards(1),
            reference="control",
            compute=controls.random_maps,
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
            is_control=True,
        ),
    )
}


def find(name: str) -> Method:
    """Finds a method by its name. Raises VitralError if there is none."""
    if name not in METHODS:
        raise VitralError(f"method={name}: it is one of {', '.join(METHODS)}{meant(name, METHODS)}")
    return METHODS[name]
