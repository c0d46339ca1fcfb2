"""An artifact served by LitServe (pip install litserve), for `scripts/serve_compare.py`.

    python scripts/litserve_server.py ARTIFACT FORM PORT WORKERS

Decoding, engine and answer are those of `vitral serve`. One worker computes batches, as LitServe's guide has
it; several compute a picture at a time each.
"""

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np

from vitral.artifacts.open import open_artifact
from vitral.artifacts.predictor import Predictor

BATCH, BATCH_SECONDS = 8, 0.005


class Api(litserve.LitAPI):
    """JSON with a picture as base64 in, labels out."""

    artifact: str
    form: str

    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's name
        self.predictor: Predictor = open_artifact(self.artifact, form=self.form)

    def decode_request(self, request: dict) -> np.ndarray:
        return self.predictor.pixels(base64.b64decode(request["image"]))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Of a batch (B, H, W, 3), or of one picture (H, W, 3) where there are no batches."""
        if pixels.ndim == 4:
            return self.predictor.answers(pixels).probabilities
        return self.predictor.answers(pixels[None]).probabilities[0]

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        top = self.predictor.prediction("", output).top
        pairs = [{"label": label, "probability": probability} for label, probability in top]
        return {"predictions": [{"label": pairs[0]["label"], "top": pairs}]}


def main() -> None:
    artifact, form, port, workers = sys.argv[1:]
    batches = {} if int(workers) > 1 else {"max_batch_size": BATCH, "batch_timeout": BATCH_SECONDS}
    api = Api(**batches)
    api.artifact, api.form = str(Path(artifact).resolve()), form
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(workers))
    server.run(port=int(port), host="127.0.0.1", log_level="error", generate_client_file=False)


if __name__ == "__main__":
    main()
