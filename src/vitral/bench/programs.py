"""Whole programs that predict one photograph, as each library's documentation writes them."""

from dataclasses import dataclass

# Around a program's three parts; it prints what it found and how long it took.
TEMPLATE = """import json, os, sys, time
folder, photo, device, preprocess = sys.argv[1:]
preprocess = json.loads(preprocess)
began_at = time.perf_counter()
{imports}
{load}
loaded_at = time.perf_counter()
{predict}
ended_at = time.perf_counter()
answer = {{"label": label, "probability": probability, "load": loaded_at - began_at}}
answer["predict"] = ended_at - loaded_at
if os.path.exists("/proc/self/status"):  # Linux; getrusage would tell the larger parent's peak
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    answer["peak_bytes"] = 1024 * int(lines["VmHWM"].split()[0])
print(json.dumps(answer))
"""


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


OURS = Program(
    "library",
    "vitral.load(folder).predict(photo)",
    "import vitral",
    "classifier = vitral.load(folder, device=device, precision='float32')",
    "label, probability = classifier.predict(photo)[0].top[0]",
)

THEIRS = {
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
