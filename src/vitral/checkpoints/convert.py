"""From any layout to any other, with a certificate: what was compared, with what, and how far apart it is."""

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from vitral.checkpoints import peers, record
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.checkpoints.layouts import google, tables, timm, torchvision, transformers
from vitral.checkpoints.layouts.layout import Writing
from vitral.images.preprocess import Preprocess
from vitral.model.config import ViTConfig, height_and_width
from vitral.model.positions.tables import LearnedPositions
from vitral.model.vit import VisionTransformer
from vitral.runtime.errors import VitralError
from vitral.runtime.files import new_folder, write_atomically

CERTIFICATE_FILE = "parity.json"
WRITERS = {layout.NAME: layout for layout in (timm, transformers, torchvision, google)}
LAYOUTS = ("vitral", *WRITERS)
TYPES = ("float32", "float16", "bfloat16")

# What a target may round: a norm's eps and the kind of GELU change results little, and no loader says them.
_ROUNDED = {"norm.eps", "layer.feed_forward.activation"}
# What a target keeps in its own code, or for training only.
_UNWRITTEN = {
    "dropout", "drop_path", "embedding.resize", "layer.attention.relative_resize",
    "layer.attention.relative_start", "mlp_ratio",
}  # fmt: skip
_TOLERANCE = 1e-4  # relative; what float32 sums in another order differ by, with room


@dataclass(frozen=True)
class Certificate:
    """How far the written model's answers are from the read one's."""

    layout: str
    source: str
    compared_with: str  # the library that loaded what was written, and its version
    input_sha256: str
    input_shape: tuple[int, ...]
    features: dict[str, float] | None  # largest absolute and relative difference of tokens
    logits: dict[str, float] | None  # None if the library's class gives none, only tokens
    rounded: tuple[str, ...]  # settings that the target has otherwise
    versions: dict[str, str]
    licence: str | None
    assumed: tuple[str, ...] = ()  # what no file of the source states
    temperature: float = 1.0  # the source's, by which the written head is divided; so are its logits here

    @property
    def worst(self) -> float:
        """The largest relative difference of all that was compared."""
        found = [part["relative"] for part in (self.features, self.logits) if part is not None]
        return math.nan if any(math.isnan(value) for value in found) else max(found)


def convert(source: str, out: Path, to: str, dtype: str | None = None, **overrides: Any) -> Certificate:
    """Writes the model `source` into the new folder `out` as the layout `to`.

    The folder appears whole or not at all, with ``parity.json`` beside the weights.

    Args:
        source: as in `load_checkpoint`, and so are `overrides`.
        out: a folder that is not there yet, or empty.
        to: one of `LAYOUTS`.
        dtype: to store weights in, one of `TYPES`; None: as the source has them.
        overrides: what to change.

    Raises:
        VitralError: if the layout cannot hold the model, `out` exists, or the answers differ.
    """
    if to not in LAYOUTS:
        raise VitralError(f"there is no layout {to!r}; there are {', '.join(LAYOUTS)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise VitralError(f"{out} exists already; choose a new folder")
    checkpoint = _stored_as(dtype, load_checkpoint(source, **overrides))
    _refuse_inexpressible(checkpoint.model.config, source, to)
    staging = out
    try:
        with new_folder(out) as staging:
            certificate = _convert_home(staging, checkpoint, source, to)
            content = json.dumps(asdict(certificate), indent=1, allow_nan=False) + "\n"
            write_atomically(staging / CERTIFICATE_FILE, content.encode())
    except (VitralError, OSError) as error:
        # The folder's other name is no one's business.
        raise VitralError(str(error).replace(staging.name, out.name)) from error
    return certificate


def _convert_home(folder: Path, checkpoint: Checkpoint, source: str, to: str) -> Certificate:
    """As the family that the model came from, if that still holds it; else as the one that is nearest."""
    origin = checkpoint.metadata.get("origin")
    if to == "vitral":
        return _convert_into(folder, checkpoint, source, to)
    if not isinstance(origin, Mapping) or origin.get("layout") != to:
        return _convert_into(folder, _without_origin(checkpoint), source, to)
    try:
        return _convert_into(folder, checkpoint, source, to)
    # Whatever another program's config, which was kept as it was, leads to.
    except Exception:
        for file in folder.iterdir():
            file.unlink()
        return _convert_into(folder, _without_origin(checkpoint), source, to)


def _without_origin(checkpoint: Checkpoint) -> Checkpoint:
    return replace(checkpoint, metadata={k: v for k, v in checkpoint.metadata.items() if k != "origin"})


def _convert_into(folder: Path, checkpoint: Checkpoint, source: str, to: str) -> Certificate:
    if to == "vitral":
        save_checkpoint(folder, checkpoint)
        return _certify(folder, checkpoint, source, to, ())
    cooled = _temperature_folded(checkpoint)
    adapted = _adapted(cooled, to)
    writing = WRITERS[to].write(adapted)
    _write(folder, adapted, writing, to)
    rounded = _check_expressed(folder, adapted, to)
    certificate = _certify(folder, cooled, source, to, rounded)
    # Last, for what was read back was to be what the library's own files say.
    kept = record.content(checkpoint, to, writing.weights_file)
    write_atomically(folder / record.FILE, (json.dumps(kept, indent=1, allow_nan=False) + "\n").encode())
    return replace(certificate, temperature=checkpoint.temperature)


def _stored_as(dtype: str | None, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its weights rounded to a type. Raises VitralError if one is too large for it."""
    if dtype is None:
        return checkpoint
    if dtype not in TYPES:
        raise VitralError(f"there is no type {dtype!r} of weights; there are {', '.join(TYPES)}")
    checkpoint.model.to(getattr(torch, dtype))
    for name, parameter in checkpoint.model.named_parameters():
        if not parameter.isfinite().all():
            raise VitralError(f"{name} holds numbers too large for {dtype}")
    return checkpoint


def _refuse_inexpressible(config: ViTConfig, source: str, to: str) -> None:
    """Says what no other library's ViT has, and what can be done."""
    if to == "transformers" and (reason := transformers.lacks_classifier(config)):
        raise VitralError(
            f"transformers cannot hold this model: {reason}. timm may: vitral convert {source} OUT --to timm"
        )
    if to == "vitral" or not config.stem:
        return
    raise VitralError(
        f"{to} cannot hold this model: no ViT of {', '.join(WRITERS)} has its convolutional stem "
        f"(Conv+). In Python it is: import vitral; model = vitral.load({source!r}); "
        'model.predict(["photo.jpg"]). For another library train a plain one: '
        "vitral train DATA model=ViT-Ti/16"
    )


def _write(folder: Path, checkpoint: Checkpoint, writing: Writing, to: str) -> None:
    model = checkpoint.model
    try:
        state = tables.write(writing.rows, model.state_dict(), len(model.layers))
    except VitralError as error:
        raise VitralError(f"{to} cannot hold this model: {error}") from error
    state = {
        (name if tables.matches(writing.beside, name) else writing.prefix + name): tensor.detach()
        for name, tensor in state.items()
    }
    write_atomically(folder / writing.weights_file, _serialized(state, writing.weights_file))
    for name, content in writing.descriptions.items():
        write_atomically(folder / name, (json.dumps(content, indent=2) + "\n").encode())


def _serialized(state: Mapping[str, Tensor], file: str) -> bytes:
    if file.endswith(".safetensors"):
        return safetensors.torch.save(dict(state), {"format": "pt"})
    buffer = io.BytesIO()
    if file.endswith(".npz"):
        np.savez(buffer, allow_pickle=False, **{name: x.float().numpy() for name, x in state.items()})
    else:
        torch.save(dict(state), buffer)
    return buffer.getvalue()


# --- What a target can express ---------------------------------------------------------------------


@torch.no_grad()
def _temperature_folded(checkpoint: Checkpoint) -> Checkpoint:
    """The same probabilities without a temperature, of which no foreign layout knows: a cooler head."""
    heads = (checkpoint.model.head, checkpoint.model.distillation_head)
    for parameter in (parameter for head in heads if head is not None for parameter in head.parameters()):
        parameter /= checkpoint.temperature
    return replace(checkpoint, temperature=1.0)


def _adapted(checkpoint: Checkpoint, to: str) -> Checkpoint:
    """The same function in a foreign layout's terms: fixed positions as a table, the class token's folded."""
    model = checkpoint.model
    config = model.config
    state = dict(model.state_dict())
    changes: dict[str, Any] = {}
    key = "embedding.positions.table"
    if config.position in ("sinusoidal", "sinusoidal_2d"):
        positions, zeros = model.embedding.positions, torch.zeros(1, 1, config.embed_dim)
        zeros = zeros.to(next(model.parameters()))
        count, (rows, columns) = config.num_prefix_tokens, config.grid_size
        prefix, patches = zeros.expand(1, count, -1), zeros.expand(1, rows * columns, -1)
        state[key] = torch.cat([positions.of_prefix(prefix), positions(patches)], dim=1)[0]
        changes = {"position": "learned", "embedding": replace(config.embedding, positioned="all")}
    elif isinstance(model.embedding.positions, LearnedPositions) and config.embedding.register_tokens:
        positioned = config.embedding.positioned
        if to == "timm" and positioned == "class" and config.class_token:
            # timm's registers stand between; the class token's vector is added to the token itself.
            state["embedding.class_token"] = state["embedding.class_token"] + state[key][:1]
            state[key] = state[key][1:]
            changes = {"embedding": replace(config.embedding, positioned="patches")}
        elif to == "transformers" and positioned == "patches" and config.class_token:
            state[key] = torch.cat([torch.zeros_like(state[key][:1]), state[key]])
            changes = {"embedding": replace(config.embedding, positioned="class")}
    elif (
        to != "timm"
        and config.position == "learned"
        and config.num_prefix_tokens
        and config.embedding.positioned == "patches"
    ):
        state[key] = torch.cat([state[key].new_zeros(config.num_prefix_tokens, config.embed_dim), state[key]])
        changes = {"embedding": replace(config.embedding, positioned="all")}
    if to == "transformers" and transformers.takes_class_and_mean(config):
        # Its classifier reads both; of the one that the head does not read, it takes nothing.
        weight = state["head.weight"]
        halves = [weight, torch.zeros_like(weight)]
        state["head.weight"] = torch.cat(halves if config.pooling == "class" else halves[::-1], dim=1)
        changes["pooling"] = "class_mean"
    if not changes:
        return checkpoint
    with torch.device("meta"):
        adapted = VisionTransformer.from_config(replace(config, **changes)).eval()
    adapted.load_state_dict(state, assign=True)
    return replace(checkpoint, model=adapted)


def _check_expressed(folder: Path, checkpoint: Checkpoint, to: str) -> tuple[str, ...]:
    """Reads back what was written: the same weights to the bit, and a config with the same meaning.

    Returns what was rounded. Raises VitralError naming the settings that the layout has no place for.
    """
    wanted = checkpoint.model.config
    try:
        read = load_checkpoint(folder, **({"num_heads": wanted.num_heads} if to == "torchvision" else {}))
    except VitralError as error:
        lacking = str(error).rpartition("layout: ")[2]
        raise VitralError(f"{to} cannot hold this model: of its tensors {lacking} there") from error
    again = read.model
    asked, found = dict(_leaves(_meaning(wanted))), dict(_leaves(_meaning(again.config)))
    differing = [name for name in asked if asked[name] != found.get(name) and name not in _UNWRITTEN]
    lost = [f"{name}={asked[name]!r}" for name in differing if name not in _ROUNDED]
    if wanted.hidden_dim != again.config.hidden_dim:
        lost.append(f"an MLP of width {wanted.hidden_dim}")
    if lost:
        raise VitralError(f"{to} cannot hold this model: it has no place for {', '.join(lost)}")
    ours, theirs = checkpoint.model.state_dict(), again.state_dict()
    changed = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    if changed:
        raise VitralError(f"{to} cannot hold this model: {tables.listing(changed)} come back changed")
    rounded = [f"{name}: {asked[name]} -> {found[name]}" for name in differing]
    if read.multi_label != checkpoint.multi_label:
        rounded.append("probabilities: sigmoid -> softmax")
    return (*rounded, *_other_preprocessing(checkpoint.preprocess, read.preprocess))


def _other_preprocessing(wanted: Preprocess, found: Preprocess) -> Iterator[str]:
    """What the target does otherwise to an image, or has no file for."""
    for name, value in vars(wanted).items():
        other = vars(found)[name]
        same = np.allclose(value, other) if isinstance(value, tuple | float) else value == other
        if not same:
            yield f"preprocess.{name}: {value} -> {other}"


def _meaning(config: ViTConfig) -> ViTConfig:
    """The config with everything that makes no difference at its default."""
    embedding, head, layer = config.embedding, config.head, config.layer
    as_all = embedding.positioned == "class" and not embedding.register_tokens
    if as_all or not config.num_prefix_tokens or config.position != "learned":
        embedding = replace(embedding, positioned="all")
    if not config.num_prefix_tokens or config.pooling == "class":
        head = replace(head, pool_prefix=False)
    if config.pooling != "map":
        head = replace(head, pool_heads=None, pool_mlp_ratio=None)
    else:
        head = replace(
            head,
            pool_heads=head.pool_heads or config.num_heads,
            pool_mlp_ratio=round(head.pool_mlp_ratio or config.mlp_ratio, 4),
        )
    if not config.num_classes:
        head = replace(head, bias=True)
    scaled = None if layer.layer_scale is None else 1.0
    embedding = replace(embedding, class_token=config.class_token)
    return replace(config, embedding=embedding, head=head, layer=replace(layer, layer_scale=scaled))


def _leaves(options: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


# --- The certificate -------------------------------------------------------------------------------


def _certify(
    folder: Path, checkpoint: Checkpoint, source: str, to: str, rounded: tuple[str, ...]
) -> Certificate:
    model = checkpoint.model
    height, width = height_and_width(model.config.img_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, model.config.in_channels, height, width, generator=generator)
    try:
        peer = peers.load(to, folder)
    except Exception as error:  # whatever the library says of what it cannot load
        reason = " ".join(str(error).split())
        raise VitralError(
            f"{to} cannot hold this model: its own loader refuses it: {reason[:300]}"
        ) from error
    with torch.inference_mode():
        tokens, logits = _answer(model, images)
        if peer is not None:
            peer.model.float()
            their_tokens, their_logits = peer.answer(images)
            compared_with = f"{peer.library} {peer.version}"
        else:
            heads = {"num_heads": model.config.num_heads} if to == "torchvision" else {}
            their_tokens, their_logits = _answer(load_checkpoint(folder, **heads).model, images)
            compared_with = f"vitral {version('vitral')}, which read it back"
    certificate = Certificate(
        to,
        source,
        compared_with,
        hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        tuple(images.shape),
        None if their_tokens is None else _difference(tokens, their_tokens),
        None if their_logits is None else _difference(logits, their_logits),
        rounded,
        {name: version(name) for name in ("vitral", "torch", "numpy", "safetensors")},
        checkpoint.metadata.get("licence"),
        checkpoint.notes,
    )
    rounds = any(not name.startswith(("preprocess.", "probabilities")) for name in rounded)
    # A difference that is no number is none that may be certified.
    if not certificate.worst <= (1e-2 if rounds else _TOLERANCE):
        raise VitralError(
            f"{to} cannot hold this model: {compared_with} answers otherwise, by {certificate.worst:.1e} of "
            "the largest value"
        )
    return certificate


def _answer(model: VisionTransformer, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and logits in float32, whatever the weights are stored in."""
    stored = next(model.parameters()).dtype
    tokens_BTD = model.float().encode(model.embedding(images_BCHW))
    answer = tokens_BTD, model.classify(tokens_BTD)
    model.to(stored)
    return answer


def _difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    absolute = float((ours - theirs).abs().max())
    return {"absolute": absolute, "relative": absolute / max(float(theirs.abs().max()), 1e-12)}
