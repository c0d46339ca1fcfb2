"""From a method and a batch of images to maps over the grid of patches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitral.explain.attribution.method import Found, Method, Settings, Subject
from vitral.explain.maps import Relevance
from vitral.explain.target import Question
from vitral.inference.activation import log_activation
from vitral.inference.classifier import Classifier
from vitral.runtime.errors import VitralError


def attribute(
    classifier: Classifier,
    images_BCHW: Tensor,
    method: Method,
    ask: Callable[[Tensor], Question],
    settings: Settings = Settings(),
) -> Relevance:
    """Computes the maps of one batch by one method.

    Args:
        classifier: of one of our models.
        images_BCHW: preprocessed, on the model's device.
        method: a row of `methods.METHODS`.
        ask: from logits (B, L) to the score to explain: `target.ask`, or a question that is settled.
        settings: of slow and random methods.

    Raises:
        VitralError: if the map would hold numbers that are none, as weights overflow.
    """
    found = method.compute(Subject(classifier, images_BCHW, ask, settings))
    grid = classifier.model.embedding.grid_of(images_BCHW)
    patches_BN, prefix_mass_B = _split(found, grid[0] * grid[1])
    if not patches_BN.isfinite().all():
        raise VitralError(
            f"the map of {method.name} holds numbers that are none: the model's weights or gradients overflow"
        )
    return Relevance(
        values=patches_BN.unflatten(1, grid),
        prefix_mass=prefix_mass_B,
        method=method.name,
        certificate=found.certificate,
        images=tuple(range(len(images_BCHW))),
        layers=method.layers,
        **_answer(classifier, method, ask, found.logits_BL),
    )


def _answer(
    classifier: Classifier, method: Method, ask: Callable[[Tensor], Question], logits_BL: Tensor
) -> dict[str, Any]:
    """What was explained, and what the model says of it."""
    nameless = ("",) * len(logits_BL)
    if not (method.of_class or classifier.model.config.num_classes):
        nothing_B = torch.full((len(logits_BL),), torch.nan)
        return {"targets": nameless, "against": None, "scores": nothing_B, "probabilities": nothing_B}
    question = ask(logits_BL)
    activation = log_activation(multi_label=classifier.multi_label)
    probabilities_BL = activation(logits_BL.float() / classifier.temperature).exp()
    against_B = question.against_B
    return {
        "targets": _names(classifier, question.target_B) if method.of_class else nameless,
        "against": None if against_B is None else _names(classifier, against_B),
        "scores": question.scores(logits_BL).cpu(),
        "probabilities": probabilities_BL.gather(1, question.target_B[:, None])[:, 0].cpu(),
    }


def joined(parts: Sequence[Relevance]) -> Relevance:
    """Puts the maps of several batches after each other."""
    first = parts[0]
    against = [part.against for part in parts if part.against is not None]
    return Relevance(
        values=torch.cat([part.values for part in parts]),
        prefix_mass=torch.cat([part.prefix_mass for part in parts]),
        method=first.method,
        targets=tuple(name for part in parts for name in part.targets),
        against=tuple(name for names in against for name in names) if against else None,
        scores=torch.cat([part.scores for part in parts]),
        probabilities=torch.cat([part.probabilities for part in parts]),
        certificate=max(part.certificate for part in parts),
        images=tuple(image for part in parts for image in part.images),
        layers=first.layers,
    )


def _split(found: Found, num_patches: int) -> tuple[Tensor, Tensor]:
    """The map of the patches, and the share that fell on the tokens before them."""
    map_BT = found.map_BT.float().cpu()
    prefix_BP, patches_BN = map_BT[:, : map_BT.shape[1] - num_patches], map_BT[:, -num_patches:]
    whole_B = map_BT.abs().sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return patches_BN.contiguous(), prefix_BP.abs().sum(dim=1) / whole_B


def _names(classifier: Classifier, classes_B: Tensor) -> tuple[str, ...]:
    labels = classifier.labels
    return tuple(labels[index] if index < len(labels) else str(index) for index in classes_B.tolist())
