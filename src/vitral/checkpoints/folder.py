"""Models on disk: a folder of ours, or any layout of the other libraries.

Ours is a folder with ``config.json`` (what it is) and ``model.safetensors`` (the weights). Nothing here
executes what it reads, and files are replaced as a whole or not at all.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vitral.checkpoints import fields, hub, names, record
from vitral.checkpoints.formats import ENDINGS, one_line, open_weights, shown
from vitral.checkpoints.layouts import adapter, google, originals, tables, timm, torchvision, transformers
from vitral.checkpoints.layouts.layout import Checkpoint, Reading, Source
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.positions.relative import RelativeBias
from vitral.model.positions.resize import resize_patches
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.files import write_atomically
from vitral.runtime.settings import build, deep_merge

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_WEIGHTS_IN_FOLDERS = (
    WEIGHTS_FILE, "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_MAX_FRONT = 2**16  # characters of a model card, whose front matter is its first lines
_PATCHES = "embedding.patches.projection.weight"
# Asked in this order; the first that recognises a source reads it.
LAYOUTS = (timm, transformers, google, torchvision, originals)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the two files into `folder`, making it if need be; each is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in checkpoint.model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, safetensors.torch.save(state))
    write_atomically(folder / CONFIG_FILE, description(checkpoint).encode())


def description(checkpoint: Checkpoint) -> str:
    """All but the weights, as the text of ``config.json``."""
    from vitral import __version__

    config = {
        "vitral": __version__,
        "architecture": asdict(checkpoint.model.config),
        "preprocess": asdict(checkpoint.preprocess),
        "labels": list(checkpoint.labels),
        "temperature": checkpoint.temperature,
        "multi_label": checkpoint.multi_label,
        "metadata": checkpoint.metadata,
    }
    return json.dumps(config, indent=1, allow_nan=False) + "\n"


# --- Reading -------------------------------------------------------------------------------------


def load_checkpoint(source: Path | str, **overrides: Any) -> Checkpoint:
    """Reads a checkpoint of any known layout.

    Args:
        source: a folder of ours, or of timm's or transformers' hub layout; a file of Google's (.npz),
            torchvision's or a model's authors' (.safetensors, .pth, .bin); a folder of peft's with a LoRA
            adapter; ``hf://org/name[@revision]``.
        overrides: fields of `ViTConfig` to change, groups as mappings. For another ``img_size`` or
            ``patch_size`` positions and patches are resized; another ``num_classes`` gives a fresh head,
            and no labels. Further ``preprocess``, a mapping of fields of `Preprocess`, and ``base``, the
            model of an adapter that does not name it.

    Raises:
        VitralError: if there is no model there, or a file is damaged or does not fit.
    """
    name = str(source)
    prepared, base = overrides.get("preprocess"), overrides.pop("base", None)
    try:
        path = hub.download(name) if hub.is_reference(name) else Path(source)
        if not path.exists():
            raise VitralError(
                f"{name} does not exist; a model is a folder that vitral train wrote, with {CONFIG_FILE} and "
                f"{WEIGHTS_FILE}, a checkpoint of another library, or hf://org/name"
            )
        found = _load(name, path, overrides, base)
        if prepared:
            changed = build(Preprocess, deep_merge(asdict(found.preprocess), prepared))
            found = replace(found, preprocess=fields.preprocess(changed))
        return found
    except VitralError as error:
        raise VitralError(shown(error)) from error
    except OSError as error:
        raise VitralError(f"{name} cannot be read: {error.strerror or one_line(error)}") from error
    # A config of other types, or tensors of other shapes, than its layout has: almost anything.
    except Exception as error:
        reason = f"{type(error).__name__} {one_line(error)}"
        raise VitralError(f"{name} cannot be used, its config or weights are damaged: {reason}") from error


def _load(name: str, path: Path, overrides: dict[str, Any], base: str | None) -> Checkpoint:
    if path.is_dir() and adapter.is_adapter(path):
        return _load_adapted(name, path, overrides, base)
    config = fields.read_json(path / CONFIG_FILE) if path.is_dir() else {}
    weights = _find_weights(path) if path.is_dir() else path
    if path.is_dir() and (weights is None or (is_model_folder(path) and not _is_foreign(config))):
        overrides.pop("preprocess", None)
        return _load_ours(path, config, overrides)
    assert weights is not None
    return _load_foreign(_open_source(name, path, weights, config), overrides)


def _load_adapted(name: str, folder: Path, overrides: dict[str, Any], base: str | None) -> Checkpoint:
    base = base or adapter.base_of(folder, name)
    path = hub.download(base) if hub.is_reference(base) else Path(base)
    if not path.exists():
        raise VitralError(f"{name} is a LoRA adapter of {base}, which is not there; pass base=MODEL")
    config = fields.read_json(path / CONFIG_FILE) if path.is_dir() else {}
    weights = _find_weights(path) if path.is_dir() else path
    if weights is None or (path.is_dir() and not _is_foreign(config)):
        raise VitralError(f"{name} is a LoRA adapter of {base}, which is of no library that peft adapts")
    source = _open_source(name, path, weights, config)
    return _load_foreign(replace(source, weights=adapter.AdaptedWeights(source.weights, folder)), overrides)


def is_model_folder(path: Path | str) -> bool:
    return Path(path, CONFIG_FILE).is_file()


def is_checkpoint(source: Path | str) -> bool:
    """Whether `source` names something to load rather than a variant such as "ViT-B/16"."""
    path = Path(source)
    named = path.is_file() and path.name.endswith(ENDINGS)
    return (
        hub.is_reference(str(source))
        or named
        or (path.is_dir() and bool(is_model_folder(path) or _find_weights(path)))
    )


def _not_a_model(folder: Path | str) -> str:
    return (
        f"{folder} has no {CONFIG_FILE}; a model is a folder that vitral train wrote, with {CONFIG_FILE} and "
        f"{WEIGHTS_FILE}, or a checkpoint of another library"
    )


def _is_foreign(config: Mapping[str, Any]) -> bool:
    return "model_type" in config or isinstance(config.get("architecture"), str)


def _load_ours(folder: Path, config: Mapping[str, Any], overrides: dict[str, Any]) -> Checkpoint:
    if not is_model_folder(folder):
        raise VitralError(_not_a_model(folder))
    described = f"{folder / CONFIG_FILE}{_asked(overrides)}"
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise VitralError(f"{path} is missing; the model folder is incomplete")
    weights = open_weights(path)

    def empty_model(architecture: ViTConfig) -> VisionTransformer:
        fields.refuse_costly(described, architecture, weights)
        return _without_weights(described, architecture)

    found = described_checkpoint(config, described, empty_model)
    return _fill(found, dict(weights), overrides, described, str(path))


def described_checkpoint(
    config: Mapping[str, Any], described: str, build_model: Callable[[ViTConfig], VisionTransformer]
) -> Checkpoint:
    """What a ``config.json`` describes, with a model from `build_model`.

    Args:
        config: what `description` wrote, parsed.
        described: what messages call it.
        build_model: makes the model of an architecture.

    Raises:
        VitralError: if something is missing or unfit.
    """
    try:
        saved = build(ViTConfig, config["architecture"])
        preprocess = fields.preprocess(build(Preprocess, config["preprocess"]))
        labels, metadata = fields.labels(config["labels"]), fields.training(config["metadata"])
        temperature = fields.temperature(config.get("temperature", 1.0))
        multi_label = fields.flag("multi_label", config.get("multi_label", False))
    except KeyError as error:
        raise VitralError(f"{described} cannot be used: it has no {error}") from error
    except (TypeError, ValueError, VitralError) as error:
        raise VitralError(f"{described} cannot be used: {error}") from error
    return Checkpoint(build_model(saved), preprocess, labels, metadata, temperature, multi_label)


def _open_source(name: str, path: Path, weights: Path, config: Mapping[str, Any]) -> Source:
    described = path.is_dir() and bool(config)
    opened = names.plain(open_weights(weights), described=described)
    written = record.read(weights)
    if path.is_file():
        return Source(name, path, opened, record=written)
    open_clip = fields.read_json(path / originals.OPEN_CLIP_FILE)
    return Source(name, path, opened, config, _preprocessor(path), _licence(path), open_clip, written)


def _preprocessor(folder: Path) -> Mapping[str, Any]:
    """How images are prepared, from whichever file the library's version keeps it in."""
    processors = fields.read_json(folder / transformers.PROCESSOR_FILE)
    found = processors.get("image_processor")
    return found if isinstance(found, Mapping) else fields.read_json(folder / transformers.PREPROCESSOR_FILE)


def _find_weights(folder: Path) -> Path | None:
    """The weights of a foreign folder: by their usual name, or the only file of weights there."""
    for name in _WEIGHTS_IN_FOLDERS:
        if (folder / name).is_file():
            return folder / name
    files = [file for file in folder.iterdir() if file.is_file() and file.name.endswith(ENDINGS)]
    return files[0] if len(files) == 1 else None


def _licence(folder: Path) -> str | None:
    """What the model card's front matter says."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\n(.*?)\n---", file.read(_MAX_FRONT), re.DOTALL)
    found = re.search(r"^license(?:_name)?:\s*(\S+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _load_foreign(source: Source, overrides: dict[str, Any]) -> Checkpoint:
    described, layout, reading = _read(source, overrides)
    overrides.pop("preprocess", None)
    sizes = {"img_size", "patch_size", "num_classes"}
    told = {name: value for name, value in overrides.items() if name not in sizes}
    try:
        saved = ViTConfig(**deep_merge(reading.draft, told))
        fields.refuse_costly(described, saved, reading.weights)
        # A head of another kind than Vitral's is no loss to who asks for another.
        optional = source.weights.beside if "num_classes" in overrides else ()
        rows = reading.rows(saved)
        state = tables.read(rows, reading.weights, saved.num_layers, reading.ignored, optional)
        prepared = reading.preprocess(height_and_width(saved.img_size)).for_channels(saved.in_channels)
        preprocess = fields.preprocess(prepared)
        labels = fields.foreign_labels(reading.labels) if saved.num_classes and saved.head.bias else ()
    except (TypeError, ValueError) as error:
        raise VitralError(f"{described}, cannot be used: {one_line(error)}") from error
    except VitralError as error:
        beside = (
            source.weights.beside and ". To read the backbone without what is beside it, pass num_classes=0"
        )
        raise VitralError(
            f"{error}{beside or ''}" if described in str(error) else f"{described}: {error}{beside or ''}"
        ) from error
    saved, labels = _answers(saved, state, labels, reading)
    metadata = {
        **source.record.metadata,
        "source": source.name,
        "layout": layout,
        "licence": source.licence or _pretrained_licence(source) or source.record.metadata.get("licence"),
        "origin": source.record.metadata.get("origin") or {"layout": layout, **reading.origin},
        **({"regression": True} if reading.regression else {}),
    }
    found = Checkpoint(
        _without_weights(described, saved),
        preprocess,
        labels,
        metadata,
        multi_label=reading.multi_label,
        notes=reading.notes,
    )
    return _fill(source.record.completed(found), state, overrides, described, source.name)


def _read(source: Source, overrides: dict[str, Any]) -> tuple[str, str, Reading]:
    """What messages call the source, its layout's name, and what the layout makes of it."""
    layout = next((layout for layout in LAYOUTS if layout.recognises(source)), None)
    if layout is None and _PATCHES in source.weights:
        raise VitralError(_not_a_model(source.name))
    if layout is None:
        some = tables.listing(list(source.weights))
        raise VitralError(f"{source.name} is of no layout that Vitral knows; its keys are such as {some}")
    described = f"{source.name}, read as {layout.NAME}'s layout{_asked(overrides)}"
    try:
        return described, layout.NAME, layout.read(source, overrides)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        # A config of another program's, or keys without their usual neighbours.
        raise VitralError(f"{described}, cannot be used: {type(error).__name__} {one_line(error)}") from error


def _answers(
    saved: ViTConfig, state: dict[str, Tensor], labels: tuple[str, ...], reading: Reading
) -> tuple[ViTConfig, tuple[str, ...]]:
    """The config and the labels of a head that is read as a classifier's.

    A head of one number z says yes with probability sigmoid(z): it is one of two, with logits 0 and z.
    The numbers of a regression have no labels.
    """
    if reading.regression:
        return saved, ()
    if len(labels) != 1 or reading.multi_label:
        return saved, labels
    for name in [name for name in state if name.startswith(("head.", "distillation_head."))]:
        state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    numbered = labels == ("class 0",)
    return replace(saved, num_classes=2), ("no", "yes") if numbered else (f"not {labels[0]}", labels[0])


def _pretrained_licence(source: Source) -> str | None:
    about = source.config.get("pretrained_cfg")
    return about.get("license") if isinstance(about, Mapping) else None


def _asked(overrides: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in overrides.items() if name not in ("num_classes", "preprocess")}
    asked = ", ".join(f"{name}={value}" for name, value in plain.items())
    return asked and f" with {asked}"


def _without_weights(described: str, architecture: ViTConfig) -> VisionTransformer:
    # On the meta device nothing is allocated or drawn that a file then replaces.
    try:
        with torch.device("meta"):
            return VisionTransformer.from_config(architecture).eval()
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise VitralError(f"{described} cannot be used: {one_line(error)}") from error


def _fill(
    found: Checkpoint, state: dict[str, Tensor], overrides: dict[str, Any], described: str, weights: str
) -> Checkpoint:
    """The checkpoint with its weights, and what was asked to be changed."""
    saved = found.model.config
    if found.preprocess.channels != saved.in_channels:
        raise VitralError(
            f"{described} cannot be used: the mean of its images is of {found.preprocess.channels} channels, "
            f"the model takes {saved.in_channels}"
        )
    problems = _misfits(found.model, state)
    if problems:
        raise VitralError(f"{weights} does not fit {described}: {tables.listing(problems)}")
    num_classes = overrides.pop("num_classes", None)
    try:
        wanted = build(ViTConfig, deep_merge(asdict(saved), overrides))
    except VitralError as error:
        raise VitralError(f"{described} cannot be used: {error}") from error
    model = found.model if wanted == saved else _without_weights(described, wanted)
    _resize(state, saved, model, described)
    problems = _misfits(model, state)
    if problems:
        raise VitralError(f"{weights} does not fit {described}: {tables.listing(problems)}")
    model.load_state_dict(state, assign=True)
    # Fixed positions are not in the file; they compute in the type of the weights that are.
    model.requires_grad_().to(next(model.parameters()).dtype)
    found = replace(found, model=model, preprocess=_fitting(found.preprocess, saved, wanted))
    if num_classes is not None:
        model.reset_classifier(num_classes)
        found = replace(found, labels=(), temperature=1.0, multi_label=False)
    if found.labels and len(found.labels) != model.config.num_classes:
        raise VitralError(
            f"{described} cannot be used: it has {len(found.labels)} labels for {saved.num_classes} classes"
        )
    return found


def _fitting(preprocess: Preprocess, saved: ViTConfig, wanted: ViTConfig) -> Preprocess:
    """Preprocessing to the model's size if that was changed, or if the patch does not divide its own."""
    divides = all(side % wanted.patch_size == 0 for side in preprocess.img_size)
    if wanted.img_size == saved.img_size and divides:
        return preprocess
    return replace(preprocess, img_size=height_and_width(wanted.img_size))


def _resize(state: dict[str, Tensor], saved: ViTConfig, model: VisionTransformer, described: str) -> None:
    """Patches and tables in `state`, of a model like `saved`, at the sizes of `model`."""
    wanted = model.config
    if wanted.patch_size != saved.patch_size:
        if wanted.stem:
            raise VitralError(f"{described}: the patches of a model with a stem cannot be resized")
        state[_PATCHES] = resize_patches(state[_PATCHES], wanted.patch_size, wanted.embedding.resize)
    if wanted.grid_size == saved.grid_size:
        return
    # Each table resizes itself: filled with what was saved, asked for the new grid.
    old = _without_weights(described, replace(saved, embedding=wanted.embedding, layer=wanted.layer))
    for name, module in old.named_modules():
        if isinstance(module, LearnedPositions | RelativeBias):
            module.table = torch.nn.Parameter(state[f"{name}.table"])
            state[f"{name}.table"] = module.resized(wanted.grid_size).detach()


def _misfits(model: VisionTransformer, state: Mapping[str, Tensor]) -> list[str]:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not of this model" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if wanted[name] != found[name]
    ]
    return sorted(problems)
