"""What a loaded model is: the kinds in which checkpoints of other libraries were read wrongly, or not at all.

Each test makes what the other library makes, with that library where it is installed.
"""

import argparse
import json
import re
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import vitral
from vitral.checkpoints.convert import convert
from vitral.checkpoints.folder import Checkpoint, load_checkpoint, save_checkpoint
from vitral.data.image_data import open_data
from vitral.evaluation.evaluate import choose_split
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer
from vitral.recipes.recipe import Recipe
from vitral.runtime.errors import VitralError
from vitral.training.loop import train

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
PIXELS = {"image_size": 32, "patch_size": 8}
TIMM = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2}


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ours(folder: Path, labels: tuple[str, ...] = ("a", "b", "c"), **options: Any) -> Path:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 3, 32, 2, 2, 2, len(labels), 0.0, **options).eval()
    nn.init.normal_(model.get_parameter("head.weight"))
    save_checkpoint(folder, Checkpoint(model, Preprocess((16, 16)), labels))
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def transformers_vit(folder: Path, *, processor: bool = True, **options: Any) -> Any:
    """Saves a tiny ViTForImageClassification and gives it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(**SHAPE, **PIXELS, **options)
        ).eval()
        model.save_pretrained(folder)
        if processor:
            transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return model


def timm_vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**TIMM, "num_classes": 3, **options}).eval()


# --- Types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_any_type_compute_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = ours(tmp_path / "a")
    stored = load_checkpoint(path)
    save_checkpoint(tmp_path / "b", Checkpoint(stored.model.to(dtype), stored.preprocess, stored.labels))
    read = vitral.load(tmp_path / "b", device="cpu", precision="float32")
    assert {parameter.dtype for parameter in read.model.parameters()} == {torch.float32}
    exact = vitral.load(path, device="cpu", precision="float32")
    rounded = [parameter.to(dtype).float() for parameter in exact.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(read.model.parameters(), rounded, strict=True))
    for precision in ("auto", "bfloat16"):
        answer = vitral.load(tmp_path / "b", device="cpu", precision=precision).logits(picture())  # pyrefly: ignore
        assert torch.allclose(answer, read.logits(picture()), rtol=0.05, atol=0.05)


def test_training_keeps_float32_whatever_the_file_holds(image_folder: Path, tmp_path: Path) -> None:
    base = load_checkpoint(ours(tmp_path / "base"))
    save_checkpoint(tmp_path / "half", Checkpoint(base.model.bfloat16(), base.preprocess, base.labels))
    recipe = Recipe(
        model=str(tmp_path / "half"), steps=2, batch_size=8, device="cpu", probe_head=False, keep_state=True
    )
    train(open_data(str(image_folder)), tmp_path / "run", recipe)
    state = torch.load(tmp_path / "run/checkpoints/state.pt", weights_only=True)
    tensors: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            tensors.append(value)
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)

    collect({name: value for name, value in state.items() if name in ("model", "average", "optimizer")})
    assert len(tensors) > 20
    assert {tensor.dtype for tensor in tensors} <= {torch.float32, torch.float64}
    assert load_checkpoint(tmp_path / "run").model.get_parameter("head.weight").dtype == torch.float32


@pytest.mark.parametrize("to", ["vitral", "timm", "transformers"])
def test_a_model_is_written_in_the_type_that_was_asked_for(to: str, tmp_path: Path) -> None:
    convert(str(ours(tmp_path / "a")), tmp_path / "b", to, "bfloat16")
    assert {p.dtype for p in load_checkpoint(tmp_path / "b").model.parameters()} == {torch.bfloat16}


def test_a_number_too_large_for_the_type_is_named(tmp_path: Path) -> None:
    found = load_checkpoint(ours(tmp_path / "a"))
    nn.init.constant_(found.model.get_parameter("head.weight"), 1e6)
    save_checkpoint(tmp_path / "a", found)
    with pytest.raises(VitralError, match=r"head\.weight has numbers too large for float16"):
        convert(str(tmp_path / "a"), tmp_path / "b", "vitral", "float16")


# --- Preprocessing ---------------------------------------------------------------------------------


def test_settings_of_images_are_read_from_the_processor_of_version_5(tmp_path: Path) -> None:
    transformers_vit(tmp_path, processor=False, num_labels=3)
    about = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "size": {"height": 32, "width": 32}}
    about |= {"image_processor_type": "ViTImageProcessor", "resample": 2}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": about}))
    found = load_checkpoint(tmp_path)
    assert found.preprocess.mean == pytest.approx((0.1, 0.2, 0.3))
    assert not found.notes


def test_a_default_that_no_file_states_is_that_of_the_family_and_is_said(tmp_path: Path) -> None:
    transformers_vit(tmp_path, processor=False, num_labels=3)
    with pytest.warns(UserWarning, match="does not say how its images were prepared"):
        found = vitral.load(tmp_path)
    theirs = pytest.importorskip("transformers").ViTImageProcessor()
    assert found.preprocess.mean == tuple(theirs.image_mean)
    assert found.preprocess.interpolation == "bilinear"  # PIL's 2
    assert theirs.resample == 2
    asked = vitral.load(tmp_path, preprocess={"mean": (0.1, 0.2, 0.3)})  # no warning, which would be an error
    assert asked.preprocess.mean == (0.1, 0.2, 0.3)


def test_what_timm_publishes_its_models_with_is_known_by_name() -> None:
    timm = pytest.importorskip("timm")
    from vitral.checkpoints.layouts.preprocessing import timm_published
    from vitral.checkpoints.layouts.timm.read import _PLAIN

    others = (
        "hybrid", "_r26", "_r50", "_r_s", "resnet", "relpos", "naflex", "miil", "mci", "sapiens", "tips",
        "18x2", "36x1",
    )  # fmt: skip
    names = [n for n in timm.list_models() if _PLAIN.fullmatch(n) and not any(o in n for o in others)]
    compared = 0
    for name in names:
        theirs = timm.get_pretrained_cfg(name)
        if theirs is not None:
            mine = timm_published(name)
            assert (tuple(mine["mean"]), tuple(mine["std"])) == (tuple(theirs.mean), tuple(theirs.std)), name
            for field in ("crop_pct", "crop_mode", "interpolation"):
                assert mine[field] == getattr(theirs, field), name
            compared += 1
    assert compared > 200


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_training_script_of_timms_names_its_architecture(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, depth=1)
    saved = {
        "arch": name,
        "state_dict": model.state_dict(),
        "args": argparse.Namespace(model=name, mean=None),
    }
    torch.save(saved, tmp_path / "last.pth.tar")
    theirs = timm.data.resolve_model_data_config(model)
    found = load_checkpoint(tmp_path / "last.pth.tar")
    assert (found.preprocess.mean, found.preprocess.crop_fraction) == (theirs["mean"], theirs["crop_pct"])
    assert not found.notes
    saved["args"] = argparse.Namespace(model=name, mean=[0.1, 0.2, 0.3], crop_pct=1.0)
    torch.save(saved, tmp_path / "last.pth.tar")
    found = load_checkpoint(tmp_path / "last.pth.tar")
    assert (found.preprocess.mean, found.preprocess.crop_fraction) == ((0.1, 0.2, 0.3), 1.0)


def test_models_of_one_channel_are_read(tmp_path: Path) -> None:
    models = pytest.importorskip("timm.models")
    model = timm_vit(in_chans=1)
    about = {"input_size": (1, 32, 32), "mean": (0.4,), "std": (0.2,)}
    arguments = {"model_args": {**TIMM, "in_chans": 1}, "pretrained_cfg": about}
    models.save_for_hf(model, tmp_path, model_config=arguments)
    found = load_checkpoint(tmp_path)
    assert (found.preprocess.mean, found.preprocess.std) == ((0.4,), (0.2,))
    images = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.model(images), model(images), atol=1e-5)
    for to in ("timm", "transformers", "google", "vitral"):
        convert(str(tmp_path), tmp_path / to, to)
        assert load_checkpoint(tmp_path / to).preprocess.mean == pytest.approx((0.4,))
    with pytest.raises(VitralError, match="torchvision's ViT takes 3 channels; this model takes 1"):
        convert(str(tmp_path), tmp_path / "torchvision", "torchvision")


# --- Answers ---------------------------------------------------------------------------------------


def test_one_logit_is_yes_or_no(tmp_path: Path) -> None:
    theirs = transformers_vit(tmp_path / "a", num_labels=1)
    classifier = vitral.load(tmp_path / "a", device="cpu", precision="float32")
    (answer,) = classifier.predict(picture())
    with torch.inference_mode():
        yes = float(theirs(classifier.preprocess(picture())[None]).logits.sigmoid())
    assert dict(answer.top) == pytest.approx({"yes": yes, "no": 1 - yes}, abs=1e-5)


def test_one_logit_with_a_name(tmp_path: Path) -> None:
    transformers_vit(tmp_path, num_labels=1, id2label={0: "cat"})
    assert load_checkpoint(tmp_path).labels == ("not cat", "cat")


def test_a_regression_has_no_labels_to_predict(tmp_path: Path) -> None:
    theirs = transformers_vit(tmp_path / "a", num_labels=3, problem_type="regression")
    classifier = vitral.load(tmp_path / "a", device="cpu", precision="float32")
    with torch.inference_mode():
        numbers = theirs(classifier.preprocess(picture())[None]).logits
    assert torch.allclose(classifier.logits(picture()), numbers, atol=1e-5)
    with pytest.raises(VitralError, match="is a regression, whose numbers are no labels' probabilities"):
        classifier.predict(picture())
    convert(str(tmp_path / "a"), tmp_path / "b", "transformers")
    assert json.loads((tmp_path / "b/config.json").read_text())["problem_type"] == "regression"


# --- Keys ------------------------------------------------------------------------------------------


class Beside(nn.Module):
    def __init__(self, head: str, module: nn.Module) -> None:
        super().__init__()
        self.backbone = timm_vit(num_classes=0)
        setattr(self, head, module)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return list(self.children())[1](self.backbone(images))


@pytest.mark.parametrize("head", ["head", "fc", "classifier"])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_head_beside_the_backbone_is_read(head: str, ending: str, tmp_path: Path) -> None:
    net, path = Beside(head, nn.Linear(64, 4)).eval(), tmp_path / f"net.{ending}"
    if ending == "pth":
        torch.save(net.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(net.state_dict(), path)
    found = load_checkpoint(path, num_heads=2)
    assert len(found.labels) == 4
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.model(images), net(images), atol=1e-5)


def test_what_stands_beside_a_backbone_and_is_no_head_is_named(tmp_path: Path) -> None:
    net = Beside("top", nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 4)))
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(VitralError, match=r"top\.0\.bias, .* pass num_classes=0"):
        load_checkpoint(tmp_path / "net.pth", num_heads=2)
    found = load_checkpoint(tmp_path / "net.pth", num_heads=2, num_classes=0)
    assert found.model.config.num_classes == 0


@pytest.mark.parametrize("prefix", ["model.", "net.vit.", "model._orig_mod.", "module.backbone."])
def test_prefixes_of_training_code_are_taken_off(prefix: str, tmp_path: Path) -> None:
    model = timm_vit()
    state = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    found = load_checkpoint(tmp_path / "last.ckpt", num_heads=2)
    assert torch.equal(found.model.get_parameter("head.weight"), model.head.weight)


def test_several_models_in_a_file_are_not_chosen_from(tmp_path: Path) -> None:
    state = timm_vit().state_dict()
    both = {f"{prefix}.{name}": x.clone() for prefix in ("student", "teacher") for name, x in state.items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(VitralError, match=r"holds several models \(student, teacher\)"):
        load_checkpoint(tmp_path / "both.pth")


def test_timms_model_in_transformers_wrapper(tmp_path: Path) -> None:
    transformers, shape = pytest.importorskip("transformers"), {"img_size": 32, "patch_size": 8, "depth": 2}
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=3, model_args=shape
    )
    theirs = transformers.TimmWrapperForImageClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found.model(images), theirs(images).logits, atol=1e-5)
    assert len(found.labels) == 3


@pytest.mark.parametrize("named", [True, False])
def test_an_adapter_is_added_to_its_base(named: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers_vit(tmp_path / "base", num_labels=5)
    transformers = pytest.importorskip("transformers")
    base = transformers.ViTForImageClassification.from_pretrained(tmp_path / "base").eval()
    if not named:
        base.config._name_or_path = base.name_or_path = ""
    settings = peft.LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "fc1"],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, settings).eval()
        nn.init.normal_(theirs.base_model.model.classifier.modules_to_save.default.weight)
        theirs.save_pretrained(tmp_path / "adapter")
    if not named:
        with pytest.raises(VitralError, match=r"does not name its base model; pass base=MODEL"):
            load_checkpoint(tmp_path / "adapter")
    found = load_checkpoint(tmp_path / "adapter", **({} if named else {"base": str(tmp_path / "base")}))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(found.model(images), theirs(images).logits, atol=1e-4)


def test_an_adapter_whose_base_is_away_names_it(tmp_path: Path) -> None:
    settings = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": "../gone/base/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(VitralError, match=r"adapter of \.\./gone/base/model, which is not there; pass base="):
        load_checkpoint(tmp_path)


def test_a_thousand_classes_are_imagenets_only_if_the_source_says_so(tmp_path: Path) -> None:
    state = timm_vit(num_classes=1000).state_dict()
    for name, first in (("mine.pth", "class 0"), ("deit_tiny_patch16_224-a1311bcf.pth", "tench")):
        torch.save({"model": state}, tmp_path / name)
        assert load_checkpoint(tmp_path / name, num_heads=2).labels[0] == first


# --- Conversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["class", "mean", "class_mean"])
@pytest.mark.parametrize("registers", [0, 2])
def test_tuned_dinov2_is_written_for_transformers(pooling: str, registers: int, tmp_path: Path) -> None:
    embedding = {"class_token": True, "register_tokens": registers}
    positioned = {"positioned": "class"} if registers else {}
    options = {"layer": {"layer_scale": 1.0}, "embedding": embedding | positioned}
    source = ours(tmp_path / "a", pooling=pooling, **options)
    certificate = convert(str(source), tmp_path / "b", "transformers")
    assert certificate.worst < 1e-5
    before, after = load_checkpoint(source).model, load_checkpoint(tmp_path / "b").model
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(before.eval()(images), after(images), atol=1e-6)


@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision", "google"])
def test_a_hybrid_is_refused_with_a_way_out(to: str, tmp_path: Path) -> None:
    model = vitral.create("Conv+ViT-Pico/4", img_size=16, num_classes=2)
    save_checkpoint(tmp_path / "a", Checkpoint(model, Preprocess((16, 16)), ("x", "y")))
    with pytest.raises(VitralError, match=r"stem \(Conv\+\).*vitral\.load.*model=ViT-Ti/16") as caught:
        convert(str(tmp_path / "a"), tmp_path / "b", to)
    assert "layers." not in str(caught.value)


def test_no_message_names_a_temporary_folder(tmp_path: Path) -> None:
    source = ours(tmp_path / "a", layer={"order": "post"})
    for to in ("timm", "transformers", "torchvision", "google"):
        with pytest.raises(VitralError) as caught:
            convert(str(source), tmp_path / "out", to)
        assert ".out." not in str(caught.value)
        assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", ["IJepa", "ViTMAE", "Data2VecVision"])
def test_what_came_from_a_family_goes_home_to_it(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    extra = {"mask_ratio": 0.6} if kind == "ViTMAE" else {}
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **PIXELS, **extra)
    theirs = getattr(transformers, f"{kind}Model")(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "b", "vitral")
    convert(str(tmp_path / "b"), tmp_path / "c", "transformers")
    written = json.loads((tmp_path / "c/config.json").read_text())
    assert written["model_type"] == config.model_type
    assert written["architectures"] == [f"{kind}Model"]
    assert written.get("mask_ratio") == extra.get("mask_ratio")


def test_a_timm_architecture_goes_home(tmp_path: Path) -> None:
    models = pytest.importorskip("timm.models")
    timm = pytest.importorskip("timm")
    shape = {"img_size": 28, "depth": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 3}
    model = timm.create_model("eva02_large_patch14_224", **shape)
    models.save_for_hf(model, tmp_path / "a", model_config={"model_args": shape})
    convert(str(tmp_path / "a"), tmp_path / "b", "timm")
    assert json.loads((tmp_path / "b/config.json").read_text())["architecture"] == "eva02_large_patch14_224"


@pytest.mark.parametrize("to", ["timm", "transformers", "torchvision", "google", "vitral"])
def test_the_held_out_images_are_known_after_every_conversion(
    to: str, image_folder: Path, tmp_path: Path
) -> None:
    images = image_folder

    data = open_data(str(images), val_fraction=0.25, seed=5)
    record = {
        "data": str(images),
        "val_fraction": 0.25,
        "seed": 5,
        "held_out": data.split("val").fingerprint,
    }
    found = load_checkpoint(ours(tmp_path / "a", ("ant", "bee", "cat")))
    prepared = Preprocess((16, 16), mean=(0.3, 0.4, 0.5))
    save_checkpoint(tmp_path / "a", Checkpoint(found.model, prepared, found.labels, record))
    convert(str(tmp_path / "a"), tmp_path / "b", to)
    heads: dict[str, Any] = {"num_heads": 2} if to == "torchvision" else {}
    convert(str(tmp_path / "b"), tmp_path / "c", "timm", **heads)
    classifier = vitral.load(tmp_path / "c", device="cpu")
    assert classifier.labels == ("ant", "bee", "cat")
    assert classifier.preprocess.mean == pytest.approx((0.3, 0.4, 0.5))
    said: list[str] = []
    name, split = choose_split(classifier, str(images), None, said.append)
    assert (name, len(split), said) == ("val", len(data.split("val")), [])
    (tmp_path / "c/vitral.json").unlink()
    name, split = choose_split(vitral.load(tmp_path / "c", device="cpu"), str(images), None, said.append)
    assert (name, len(split)) == ("all", 36)
    assert said[0].startswith("no record says which images this model was trained on")


# --- Fields and costs ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["preprocess"].update(mean=[float("nan")] * 3), "NaN is not a number"),
        (lambda c: c["preprocess"].update(mean=[1e300] * 3), "finite numbers"),
        (lambda c: c["preprocess"].update(std=[1e-320] * 3), "above 0"),
        (lambda c: c["preprocess"].update(mean=[0.5], std=[0.5]), "is of 1 channels, the model takes 3"),
        (lambda c: c["preprocess"].update(img_size=[100_000, 100_000]), "more than Vitral computes at once"),
        (lambda c: c["architecture"]["norm"].update(eps=float("inf")), "Infinity is not a number"),
        (lambda c: c["architecture"]["norm"].update(eps=-1.0), "eps is -1.0"),
        (lambda c: c["architecture"].update(mlp_ratio=1e300), "mlp_ratio"),
        (lambda c: c.update(temperature=1e-300), "temperature is 1e-300"),
        (lambda c: c.update(labels=["a", "b", None]), "label 2 is None; it must be text"),
        (lambda c: c.update(labels=["a", "b", "a"]), "labels hold 'a' twice"),
        (lambda c: c.update(labels=["a", "b"]), "2 labels for 3 classes"),
        (lambda c: c.update(labels="abc"), "they must be a list of names"),
        (lambda c: c["metadata"].update(val_fraction="x"), "val_fraction is 'x'"),
        (lambda c: c["metadata"].update(seed=-1), "seed is -1"),
        (lambda c: c["architecture"].update(position="sinusoidal", img_size=16_000), "4,000,000 patches"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_is_named(change: Callable, text: str, tmp_path: Path) -> None:
    with pytest.raises(VitralError, match=text):
        load_checkpoint(edited(ours(tmp_path), change))


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ({"0": "a", "1": None, "2": "c"}, "label 1 is None; it must be text"),
        ({"0": "a", "1": "b"}, "id2label names 2 classes, its head has 3"),
    ],
)
def test_labels_of_transformers_are_checked(names: dict[str, Any], text: str, tmp_path: Path) -> None:
    transformers_vit(tmp_path, num_labels=3)
    with pytest.raises(VitralError, match=text):
        load_checkpoint(edited(tmp_path, lambda c: c.update(id2label=names)))


def test_weights_that_overflow_give_no_answer_and_no_certificate(tmp_path: Path) -> None:
    found = load_checkpoint(ours(tmp_path / "a"))
    for layer in found.model.layers:
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 1e30)
    save_checkpoint(tmp_path / "a", found)
    with pytest.raises(
        VitralError, match="the model's outputs are not finite numbers: its weights are damaged"
    ):
        vitral.load(tmp_path / "a", device="cpu").predict(picture())
    with pytest.raises(VitralError, match=r"answers otherwise|refuses it"):
        convert(str(tmp_path / "a"), tmp_path / "b", "timm")
    assert not (tmp_path / "b").exists()


def test_a_pickle_that_makes_gigabytes_is_refused_before_it_does(tmp_path: Path) -> None:
    class Huge:
        def __reduce__(self) -> tuple[Any, tuple[int]]:
            return bytearray, (3 << 30,)

    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pth"
        torch.save({"a": torch.ones(3), "b": Huge()}, path, _use_new_zipfile_serialization=zipped)
        began = time.monotonic()
        with pytest.raises(VitralError, match="it makes a bytearray, which a state_dict does not hold"):
            load_checkpoint(path)
        assert time.monotonic() - began < 5


def test_a_header_of_90_megabytes_is_refused_unread(tmp_path: Path) -> None:
    header = b'{"' + b"a" * 90_000_000 + b'": 1}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    began = time.monotonic()
    with pytest.raises(VitralError, match="its header has 90,000,007 bytes"):
        load_checkpoint(tmp_path / "model.safetensors")
    assert time.monotonic() - began < 5


def test_dangerous_advice_is_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"\x80\x02c__main__\nX\nq\x00\x97.")
    with pytest.raises(VitralError) as caught:
        load_checkpoint(tmp_path / "model.pth")
    assert "weights_only" not in str(caught.value)
    assert "trust" not in str(caught.value)


def test_a_permission_that_is_missing_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ours(tmp_path)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(VitralError, match=r"config\.json cannot be read: Permission denied"):
        load_checkpoint(folder)


# --- Layers and names ------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", [{"relative_bias": "layer"}, {"rotary": {"temperature": 100.0}}])
def test_a_layer_that_needs_places_does_not_do_without(attention: dict[str, Any]) -> None:
    model = VisionTransformer(
        16, 8, 3, 32, 2, 2, 2, 3, 0.0, position="none", layer={"attention": attention}
    ).eval()  # fmt: skip
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = model.embedding(images)
    with pytest.raises(ValueError, match="attention depends on where tokens stand"):
        model.layers[0](tokens)
    relation = model.relations_of_layers(tokens)[0]
    assert torch.equal(model.layers[0](tokens, relation), model.features(images, [0]).layers[0])


def test_a_network_of_another_kind_is_called_that() -> None:
    with pytest.raises(ValueError, match="'resnet50' is not a plain Vision Transformer"):
        vitral.create("resnet50")
    with pytest.raises(ValueError, match=r"there is no model 'pineapple'\. Known"):
        vitral.create("pineapple")


def test_the_public_names_are_there_before_they_are_used() -> None:
    assert set(vitral.__all__) <= set(dir(vitral))


# --- OpenCLIP --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quick", "activation"), [(True, "quick_gelu"), (False, "gelu")])
def test_open_clips_config_says_what_its_weights_do_not(quick: Any, activation: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    timm = pytest.importorskip("timm")
    shape = {"depth": 1, "embed_dim": 64, "num_heads": 1, "img_size": 32, "patch_size": 8, "num_classes": 0}
    state = timm.create_model("vit_base_patch32_clip_224", **shape).state_dict()
    named = {f"visual.trunk.{name}": tensor for name, tensor in state.items()}
    save_file(named | {"text.token": torch.ones(2)}, tmp_path / "open_clip_model.safetensors")
    prepared = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
    about = {"model_cfg": {"quick_gelu": quick}, "preprocess_cfg": prepared}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    found = load_checkpoint(tmp_path)
    assert found.model.config.layer.feed_forward.activation == activation
    assert (found.preprocess.mean, found.preprocess.resize) == ((0.1, 0.2, 0.3), "squash")
    assert not found.notes


def test_a_head_that_transformers_has_no_class_for_is_said_to_be_one(tmp_path: Path) -> None:
    rotary = {"attention": {"rotary": {"temperature": 100.0, "places": "centered", "halves": True}}}
    source = ours(tmp_path / "a", position="none", layer=rotary)
    with pytest.raises(VitralError, match=r"no classifier for DINOv3's family .* timm may: vitral convert"):
        convert(str(source), tmp_path / "b", "transformers")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"embed_dim": 10**9}, "embed_dim is 1000000000; it must be from 1 to 65,536"),
        ({"img_size": 1_000_000}, "height and width must be from 1 to 16,384"),
        ({"num_layers": 10**6}, "num_layers is 1000000; it must be from 1 to 4,096"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio is nan; it must be a finite number"),
        ({"embedding": {"register_tokens": 10**8}}, "register_tokens is 100000000; it must be from 0"),
        ({"norm": {"eps": -1.0}}, "norm.eps is -1.0"),
    ],
)
def test_sizes_that_cannot_be_meant_are_refused_with_their_range(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        vitral.create("ViT-Ti/16", **change)


def test_a_tensor_without_numbers_makes_no_million_labels(tmp_path: Path) -> None:
    state = timm_vit().state_dict() | {"head.weight": torch.empty(60_000_000, 0)}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(VitralError, match=r"head\.weight of shape \(60000000, 0\) holds nothing"):
        load_checkpoint(tmp_path / "net.pth", num_heads=2)
