"""An artifact as a `Classifier`: its engine in the place of the model, for what judges a model in torch."""

import numpy as np
import torch
from torch import Tensor, nn

from vitral.artifacts.engine import Engine
from vitral.images.preprocess import Preprocess


class EngineModule(nn.Module):
    """Images (B, C, H, W), normalized as the artifact expects -> logits (B, L), by its engine.

    The graph takes bytes, so the normalization is undone; of what was made of bytes that is exact.
    """

    def __init__(self, engine: Engine, preprocess: Preprocess) -> None:
        super().__init__()
        self.engine = engine
        means_and_stds = preprocess.mean, preprocess.std
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in means_and_stds)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pixels_BCHW = (images_BCHW.float() * self._std + self._mean).mul(255).round().clamp(0, 255).byte()
        pixels_BHWC = pixels_BCHW.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous().numpy()
        return torch.from_numpy(np.ascontiguousarray(self.engine(pixels_BHWC).logits))
