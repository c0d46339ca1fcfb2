"""The other libraries' own models, to compare with where they are installed; no other module knows them.

`vitral convert` certifies what it writes by loading it with the target's strict loader; `vitral bench` (see
`bench.contenders`) measures the same weights in each library.
"""

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# vit-pytorch's ViT has norms around its patches that no other has, so that no weights fit both.
LIBRARIES = ("timm", "transformers", "torchvision", "vit-pytorch")


@dataclass(frozen=True)
class Peer:
    """A library's model: preprocessed images -> tokens after the final norm, and logits; None for neither."""

    library: str
    version: str
    model: nn.Module
    answer: "Answer"


def load(layout: str, folder: Path) -> Peer | None:
    """Load the model in `folder`, strictly by the library that `layout` is named after; None without it."""
    if layout not in _LOADERS or not is_installed(layout):
        return None
    # A library draws weights before it reads them.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model, answer = _LOADERS[layout](folder)
    return Peer(layout, version(layout), model, answer)


def is_installed(library: str) -> bool:
    try:
        return bool(version(library))
    except PackageNotFoundError:
        return False


Answer = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
Loaded = tuple[nn.Module, Answer]


def _timm(folder: Path) -> Loaded:
    timm = importlib.import_module("timm")
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()

    def answer(images_BCHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        tokens_BTD = model.forward_features(images_BCHW)
        return tokens_BTD, model.forward_head(tokens_BTD)

    return model, answer


def _transformers(folder: Path) -> Loaded:
    transformers = importlib.import_module("transformers")
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    with _quiet(transformers.utils.logging):
        model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    wrong = [str(key) for kind in report.values() for key in kind]
    if wrong:
        raise RuntimeError(f"{name} does not load strictly: {wrong[:6]}")
    model.eval()

    def answer(images_BCHW: Tensor) -> tuple[Tensor | None, Tensor | None]:
        output = model(images_BCHW, **_sized(model, images_BCHW), **_unmasked(model, images_BCHW))
        answers = (output.get(key) for key in ("logits", "image_embeds", "pooler_output"))
        pooled = next((found for found in answers if found is not None), None)
        # CLIP's tokens are those before its final norm, BEiT's with mean pooling too.
        normed = model.config.model_type not in ("clip_vision_model", "beit")
        return output.get("last_hidden_state") if normed else None, pooled

    return model, answer


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Transformers says nothing inside, and all that it said before afterwards."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _unmasked(model: Any, images_BCHW: Tensor) -> dict[str, Tensor]:
    """All patches in their order, of a model that hides a random part of them (MAE)."""
    if model.config.model_type != "vit_mae":
        return {}
    model.config.mask_ratio = 0.0
    patches = model.embeddings.patch_embeddings.num_patches
    return {"noise": torch.arange(patches).float().expand(len(images_BCHW), -1)}


def _sized(model: Any, images_BCHW: Tensor) -> dict[str, bool]:
    size = model.config.image_size
    native = tuple(images_BCHW.shape[2:]) == ((size, size) if isinstance(size, int) else tuple(size))
    flexible = model.config.model_type in ("dinov2", "dinov2_with_registers", "dinov3_vit", "beit")
    return {} if native or flexible else {"interpolate_pos_encoding": True}


def _torchvision(folder: Path) -> Loaded:
    models = importlib.import_module("torchvision.models")
    arguments = json.loads((folder / "vision_transformer.json").read_text())
    model = models.VisionTransformer(**arguments).eval()
    model.load_state_dict(torch.load(folder / "model.pth", weights_only=True), strict=True)
    return model, lambda images_BCHW: (None, model(images_BCHW))


_LOADERS: dict[str, Callable[[Path], Loaded]] = {
    "timm": _timm,
    "transformers": _transformers,
    "torchvision": _torchvision,
}
