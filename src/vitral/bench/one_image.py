"""The time of one image through a model with random weights."""

import time

import torch

from vitral.model.config import ViTConfig, height_and_width
from vitral.model.vit import VisionTransformer
from vitral.runtime.devices import Placement


@torch.inference_mode()
def seconds_an_image(config: ViTConfig, placement: Placement, budget_seconds: float = 2.0) -> float:
    """Measure the best of several passes of a single image, each with random weights."""
    with placement.device:
        model = placement.place(VisionTransformer.from_config(config)).eval()
        images = torch.randn(1, config.in_channels, *height_and_width(config.img_size))
    best, began_at = float("inf"), time.monotonic()
    while time.monotonic() - began_at < budget_seconds or best == float("inf"):
        started_at = time.monotonic()
        with placement.autocast():
            model(images).sum().item()  # .item() waits for the device
        best = min(best, time.monotonic() - started_at)
    return best
