"""Who competes: Vitral and every library that can hold the model, as it comes and as its makers advise."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitral.bench.report import Row
from vitral.bench.rounds import Settings
from vitral.bench.steps import Contender
from vitral.checkpoints import peers
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.model.config import ViTConfig, height_and_width
from vitral.runtime.devices import Placement
from vitral.runtime.errors import VitralError

# What each library recommends for speed beyond its defaults.
_BEST_DOCUMENTED = {
    "timm": "torch.compile",  # as in its published results (results/benchmark-*.csv, "dynamo")
    "transformers": 'attn_implementation="sdpa", torch.compile',  # its documentation, perf_torch_compile
    # These two name nothing; PyTorch's own documentation does.
    "torchvision": "torch.compile",
    "vit-pytorch": "torch.compile",
}


def contenders(checkpoint: Checkpoint, folder: Path, settings: Settings) -> tuple[list[Contender], list[Row]]:
    """List Vitral and every library that can hold the model, twice each; and say why others cannot.

    Args:
        checkpoint: the model with its weights.
        folder: where it is written in each library's layout.
        settings: whether to compile.
    """
    ours = partial(_ours, folder / "vitral")
    found = [
        Contender("vitral", "eager", "", ours),
        Contender("vitral", "compiled", _how_compiled(settings.placement), ours, compiled=True),
    ]
    absent = []
    save_checkpoint(folder / "vitral", checkpoint)
    for library in settings.peers or peers.LIBRARIES:
        settings.say(f"writing the model for {library}")
        try:
            make = _maker(library, checkpoint, folder)
        except VitralError as error:
            absent.append(Row("", library, reason=str(error)))
            continue
        same = library != "vit-pytorch"
        best = _BEST_DOCUMENTED[library]
        found += [
            Contender(library, "default", "", make(False), same_weights=same),
            Contender(library, "best documented", best, make(True), compiled=True, same_weights=same),
        ]
    if not settings.compiled:
        left_out = [contender for contender in found if contender.compiled]
        found = [contender for contender in found if not contender.compiled]
        absent += [_without_numbers(c, "left out with --no-compile") for c in left_out]
    return found, absent


def _how_compiled(placement: Placement) -> str:
    mode = placement.compile_options()["mode"]
    return f'torch.compile, mode "{mode}"' if mode else "torch.compile"


def _without_numbers(contender: Contender, reason: str) -> Row:
    return Row("", contender.library, contender.configuration, contender.detail, reason=reason)


def _ours(folder: Path) -> nn.Module:
    return load_checkpoint(folder).model


def _maker(library: str, checkpoint: Checkpoint, folder: Path) -> Callable[[bool], Callable[[], nn.Module]]:
    """Make what builds the model in `library`: in its best documented configuration, or as it comes.

    Raises:
        VitralError: if the library is not installed or cannot hold the model.
    """
    if not peers.is_installed(library):
        raise VitralError("not installed")
    if library == "vit-pytorch":
        arguments = _vit_pytorch_arguments(checkpoint.model.config)
        return lambda _: partial(_vit_pytorch, **arguments)
    place = folder / library
    convert(str(folder / "vitral"), place, library)
    return lambda best: partial(_classifier, library, place, best_documented=best)


def _vit_pytorch_arguments(config: ViTConfig) -> dict[str, Any]:
    """The paper's numbers under vit-pytorch's names. Raises VitralError for a model that it has not."""
    paper = ViTConfig(num_classes=1)
    plain = all(
        getattr(config, part) == getattr(paper, part) for part in ("layer", "head", "stem", "position")
    )
    if not plain or config.pooling not in ("class", "mean") or config.embedding != paper.embedding:
        raise VitralError("its ViT is the paper's model only")
    return {
        "image_size": height_and_width(config.img_size),
        "patch_size": config.patch_size,
        "channels": config.in_channels,
        "dim": config.embed_dim,
        "depth": config.num_layers,
        "heads": config.num_heads,
        "dim_head": config.embed_dim // config.num_heads,
        "mlp_dim": config.hidden_dim,
        "num_classes": config.num_classes,
        "pool": "cls" if config.pooling == "class" else "mean",
    }


class _Logits(nn.Module):
    """A model of transformers as a function: images (B, C, H, W) -> logits (B, L)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=images_BCHW).logits


def _classifier(library: str, folder: Path, *, best_documented: bool) -> nn.Module:
    """The model that `vitral convert` wrote for `library`, as the library builds it: images -> logits.

    `best_documented` sets what can be set on the model; compiling it is left to the caller.
    """
    loaded = peers.load(library, folder)
    if loaded is None:
        raise RuntimeError(f"{library} is not installed")
    if library != "transformers":
        return loaded.model
    model: Any = loaded.model
    if best_documented:
        model.set_attn_implementation("sdpa")
    return _Logits(model)


def _vit_pytorch(**arguments: int | str) -> nn.Module:
    """vit-pytorch's `ViT` with random weights: images -> logits."""
    return importlib.import_module("vit_pytorch").ViT(**arguments)
