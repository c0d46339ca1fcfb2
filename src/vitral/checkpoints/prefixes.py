"""What training code puts before the names of a model's tensors, and beside them.

A wrapper (DDP, torch.compile, a LightningModule, a net with a `backbone`) gives every tensor of the model
one prefix. What has none stands beside the model, such as a classifier, and no one may drop it unseen.
"""

import re

from vitral.checkpoints.formats.damage import refuse_repeated
from vitral.checkpoints.formats.weights import Renamed, Weights
from vitral.runtime.errors import VitralError

# Names that each layout has once: the projection of patches, or of CLIP's tower, its class token.
_ANCHOR = re.compile(
    r"(?P<prefix>.*?)(?P<trunk>visual\.(trunk\.)?)?"
    r"(patch_embed\.proj\.weight|conv_proj\.weight|(?<!embeddings\.)class_embedding)"
)
_WHOLE = ("module.", "_orig_mod.")  # of DDP and torch.compile
# Heads of training without labels, which are no part of the encoder (DINO, iBOT, MAE, I-JEPA, SimCLR).
_PRETRAINING = re.compile(
    r"(dino_head|ibot_head|projector|projection_head|predictor|decoder|head\.(mlp|last_layer))\b"
)
# What a linear classifier beside a backbone is called.
_HEADS = ("head", "classifier", "fc", "linear", "linear_head")


def strip_prefixes(weights: Weights, *, described: bool) -> Weights:
    """Returns the weights under their model's own names.

    Args:
        weights: as the file names them.
        described: whether a config says what they are: then only wrappers of all names are taken off.

    Raises:
        VitralError: if there are several models, or two tensors would have one name.
    """
    prefix = next((p for p in _WHOLE if all(name.startswith(p) for name in weights)), "")
    if prefix:
        return strip_prefixes(
            _renamed(weights, {name: name.removeprefix(prefix) for name in weights}), described=described
        )
    return weights if described else _without_model_prefix(weights)


def _without_model_prefix(weights: Weights) -> Weights:
    found = [match for name in weights if (match := _ANCHOR.fullmatch(name))]
    prefixes = sorted({match["prefix"] for match in found})
    if len(prefixes) > 1:
        models = ", ".join(prefix.rstrip(".") or "one without a prefix" for prefix in prefixes)
        raise VitralError(f"{weights.path} holds several models ({models}); save the state_dict() of one")
    if not prefixes or not prefixes[0]:
        return weights
    prefix = prefixes[0]
    names, beside = {}, {}
    for name in weights:
        if name.startswith(prefix):
            names[name] = name.removeprefix(prefix)
        elif not _PRETRAINING.match(name):
            beside[name] = _as_head(name, weights)
    renamed = _renamed(weights, names | beside)
    renamed.beside = frozenset(beside.values())
    return renamed


def _as_head(name: str, weights: Weights) -> str:
    """Renames ``classifier.weight`` to ``head.weight`` if it is the only linear map beside the backbone."""
    part, _, kind = name.rpartition(".")
    others = [head for head in _HEADS if f"{head}.weight" in weights]
    return f"head.{kind}" if others == [part] and kind in ("weight", "bias") else name


def _renamed(weights: Weights, names: dict[str, str]) -> Weights:
    refuse_repeated(weights.path, names.values())
    return Renamed(weights, {new: old for old, new in names.items()})
