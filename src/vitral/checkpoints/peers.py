"""The other libraries' own models, to compare with where they are installed; no other module knows them.

`vitral convert` certifies what it writes by loading it with the target's strict loader, and `vitral bench`
measures the same weights in each library.
"""

import importlib
import json
import warnings
from collections.abc import Callable
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
    """The model in `folder`, loaded strictly by the library that `layout` is named after; None without it."""
    if layout not in _LOADERS or not is_installed(layout):
        return None
    with warnings.catch_warnings():
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
    logging = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    # A mask token is for pre-training only; no registers are a tensor of size nought.
    empty = {key for key, tensor in model.state_dict().items() if not tensor.numel()}
    keys = [str(key) for kind in report.values() for key in kind]
    wrong = [key for key in keys if "mask_token" not in key and key not in empty]
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


# --- For `vitral bench` ----------------------------------------------------------------------------


class _Logits(nn.Module):
    """A model of transformers as a function: images (B, C, H, W) -> logits (B, L)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.model(pixel_values=images_BCHW).logits


# What each library recommends for speed beyond its defaults.
BEST_DOCUMENTED = {
    "timm": "torch.compile",  # as in its published results (results/benchmark-*.csv, "dynamo")
    "transformers": 'attn_implementation="sdpa", torch.compile',  # its documentation, perf_torch_compile
    # These two name nothing; PyTorch's own documentation does.
    "torchvision": "torch.compile",
    "vit-pytorch": "torch.compile",
}


def classifier(library: str, folder: Path, *, best_documented: bool) -> nn.Module:
    """The model that `vitral convert` wrote for `library`, as the library builds it: images -> logits.

    `best_documented` sets what can be set on the model; compiling it is left to the caller.
    """
    loaded = load(library, folder)
    if loaded is None:
        raise RuntimeError(f"{library} is not installed")
    if library != "transformers":
        return loaded.model
    model: Any = loaded.model
    if best_documented:
        model.set_attn_implementation("sdpa")
    return _Logits(model)


def vit_pytorch(**arguments: int | str) -> nn.Module:
    """vit-pytorch's `ViT` with random weights: images -> logits."""
    return importlib.import_module("vit_pytorch").ViT(**arguments)


@dataclass(frozen=True)
class Program:
    """A whole program that predicts one photograph, as the library's documentation writes it.

    `folder`, `photo`, `device` and `preprocess`, the fields of our `Preprocess`, are given. It ends with
    `label`, a class's name or index, and `probability`.
    """

    configuration: str
    detail: str
    imports: str
    load: str
    predict: str


FIRST_PREDICTIONS = {
    "transformers": (
        Program(
            "default",
            "pipeline",
            "from transformers import pipeline",
            "classify = pipeline('image-classification', model=folder, device=device)",
            "best = classify(photo)[0]\nlabel, probability = best['label'], best['score']",
        ),
        Program(
            "best documented",
            "AutoModel and AutoImageProcessor",
            """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification""",
            """processor = AutoImageProcessor.from_pretrained(folder)
model = AutoModelForImageClassification.from_pretrained(folder).to(device)""",
            """with torch.inference_mode():
    inputs = processor(Image.open(photo).convert("RGB"), return_tensors="pt").to(device)
    probability, label = (x.item() for x in model(**inputs).logits.softmax(1)[0].max(0))""",
        ),
    ),
    "timm": (
        Program(
            "default",
            "create_model and create_transform",
            "import timm, torch\nfrom PIL import Image",
            """model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))""",
            """with torch.inference_mode():
    image = transform(Image.open(photo).convert("RGB"))[None].to(device)
    probability, label = (x.item() for x in model(image).softmax(1)[0].max(0))""",
        ),
    ),
    "torchvision": (
        Program(
            "default",
            "VisionTransformer and ImageClassification",
            """import json
import torch
from PIL import Image
from torchvision.models import VisionTransformer
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification""",
            """arguments = json.load(open(f"{folder}/vision_transformer.json"))
model = VisionTransformer(**arguments).eval()
model.load_state_dict(torch.load(f"{folder}/model.pth", weights_only=True))
model.to(device)
side = arguments["image_size"]
transform = ImageClassification(
    crop_size=side,
    resize_size=int(side / preprocess["crop_fraction"]),
    mean=preprocess["mean"],
    std=preprocess["std"],
    interpolation=InterpolationMode(preprocess["interpolation"]),
)""",
            """with torch.inference_mode():
    image = transform(Image.open(photo).convert("RGB"))[None].to(device)
    probability, label = (x.item() for x in model(image).softmax(1)[0].max(0))""",
        ),
    ),
}
