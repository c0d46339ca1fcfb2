"""Which of a model's parameters learn: all, the head alone, or low-rank adapters and the head."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from vitral.data.randomness import seeded
from vitral.model.vit import VisionTransformer
from vitral.recipes.schema import Trained
from vitral.runtime.errors import VitralError
from vitral.runtime.extras import need

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# What learns beside the adapters, or alone: all that stands after the pooled vector.
_HEADS = ("head.", "distillation_head.")
# The linear maps of an `EncoderLayer`.
_ADAPTED = ["qkv", "out", "expand", "contract"]


def choose_trained(model: VisionTransformer, trained: Trained, lora_rank: int, seed: int) -> None:
    """Freezes all but what is to be trained, and adds the adapters of "lora" (arXiv:2106.09685).

    Args:
        model: changed in place.
        trained: "all", the "head" alone, or "lora", adapters and the head.
        lora_rank: of the adapters.
        seed: of their first weights.

    Raises:
        VitralError: if "lora" is asked for and peft is not installed, or there is no head to train.
    """
    if trained == "all":
        return
    if not model.config.num_classes:
        raise VitralError(f"trained={trained} trains the head, and this model has none")
    model.requires_grad_(False)
    if trained == "lora":
        with seeded(seed):
            _add_adapters(model, lora_rank)
    for name, parameter in model.named_parameters():
        if name.startswith(_HEADS):
            parameter.requires_grad_(True)


def _add_adapters(model: VisionTransformer, rank: int) -> None:
    need("trained=lora", "peft", extra="lora")
    from peft import LoraConfig, inject_adapter_in_model

    # Scaled by 2, the usual alpha of twice the rank.
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=_ADAPTED), model.layers)


def adapters(model: nn.Module) -> "dict[str, LoraLayer]":
    """The adapted linear maps by name; none in a plain model."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "lora_A")}  # pyrefly: ignore


def merged(model: VisionTransformer) -> VisionTransformer:
    """A plain model that computes the same: adapters added into the weights that they adapt."""
    if not adapters(model):
        return model
    plain = copy.deepcopy(model)
    for name, adapter in adapters(plain).items():
        adapter.merge()
        parent, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(parent), attribute, adapter.get_base_layer())
    return plain


@torch.no_grad()
def put_into(model: VisionTransformer, plain: VisionTransformer) -> None:
    """Makes a model, adapted or not, compute what a plain one of its shape does; adapters begin anew."""
    weights = plain.state_dict()
    for name, tensor in model.state_dict().items():
        if ".lora_B." in name:
            tensor.zero_()  # whatever A holds, the adapter then adds nothing
        elif ".lora_A." not in name:
            tensor.copy_(weights[name.replace(".base_layer.", ".")])
