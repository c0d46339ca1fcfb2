"""Which vector of a model the field probes."""

from collections.abc import Sequence

from vitral.inference.features import poolings
from vitral.model.config import Pooling
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError


def usual_features(model: VisionTransformer, layers: Sequence[int] = (-1,)) -> tuple[Pooling, Pooling]:
    """What the field takes of such a model, for the linear probe and for nearest neighbours.

    Of a class token that no head was trained on, the class token beside the mean of the patches, and the
    class token alone (DINOv2, arXiv:2304.07193, appendix B.3; DINO, arXiv:2104.14294, appendix F); of any
    other model, the pooled vector that its own head sees.
    """
    pooling = model.config.pooling
    if pooling == "class_mean" or (pooling == "class" and not model.config.num_classes):
        return "class_mean", "class"
    if pooling == "map" and any("map" not in poolings(model, layer) for layer in layers):
        pooling = "mean"
    return pooling, pooling


def check_features(model: VisionTransformer, kind: Pooling, layers: Sequence[int]) -> None:
    for layer in layers:
        known = list(poolings(model, layer))
        if "class" in known:
            known.append("class_mean")
        if kind not in known:
            raise VitralError(
                f"features={kind}: layer {layer} of this model has {', '.join(known)}; choose one of these"
            )
