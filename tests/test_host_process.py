"""A program that calls Vitral is left as it was: environment, warnings, torch, threads, signals, malloc."""

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import write_images
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.images.preprocess import Preprocess
from vitral.model.vit import VisionTransformer

# Prints what differs after each step from what was before it. `torch` and others are imported at first, as
# their own import may change something (rich draws a number). The malloc that `vitral train` tunes shows in
# no flag, so `mallopt` is counted by a stand-in for the library of ctypes.
_PROGRAM = """
import ctypes, json, logging, os, random, signal, sys, threading, warnings
from pathlib import Path
import numpy, rich.style, sklearn, torch, torchvision, PIL.Image, PIL.ImageFile

tuned = []
class Library(ctypes.CDLL):
    def __getattr__(self, name):
        if name == "mallopt":
            tuned.append(name)
        return super().__getattr__(name)
ctypes.CDLL = Library

def state():
    return {
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "warnings": list(map(str, warnings.filters)),
        "warn": str(warnings.showwarning),
        "signals": {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()
                    if number not in (signal.SIGKILL, signal.SIGSTOP)},
        "alarm": signal.getitimer(signal.ITIMER_REAL),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "thread counts": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "determinism": (torch.are_deterministic_algorithms_enabled(),
                        torch.is_deterministic_algorithms_warn_only_enabled(),
                        torch.utils.deterministic.fill_uninitialized_memory,
                        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32,
                      str(torch.get_default_dtype())),
        "gradients": torch.is_grad_enabled(),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
        "randomness": (random.getstate()[1][:3], int(numpy.random.get_state()[1][0]),
                       numpy.random.get_state()[2],
                       torch.random.get_rng_state().sum().item()),
        "pictures": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES),
        "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
        "limit": sys.getrecursionlimit(),
        "hooks": (str(sys.excepthook), str(threading.excepthook), str(sys.unraisablehook)),
        "streams": (str(sys.stdout), str(sys.stderr)),
        "malloc": len(tuned),
    }

def differences(step):
    before = state()
    step()
    after = state()
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}

model, photos, folder = sys.argv[1:]
def load():
    global vitral, classifier
    import vitral
    classifier = vitral.load(model, device="cpu")
def predict():
    classifier.predict([f"{photos}/ant/000.png", f"{photos}/bee/000.png"])
def train():
    vitral.train(photos, folder, model=model, steps=2, batch_size=8, workers=1, device="cpu")
def evaluate():
    vitral.evaluate(classifier, photos)
def convert():
    for layout in ("timm", "transformers"):
        vitral.convert(model, Path(folder).with_name(layout), layout)
steps = (load, predict, train, evaluate, convert)
print(json.dumps({step.__name__: differences(step) for step in steps}))
"""


def test_a_library_call_gives_back_all_that_it_changes(tmp_path: Path) -> None:
    model = VisionTransformer(16, 8, embed_dim=16, num_layers=1, num_heads=2, num_classes=2, dropout=0.0)
    save_checkpoint(tmp_path / "model", Checkpoint(model, Preprocess((16, 16)), ("ant", "bee")))
    write_images(tmp_path / "photos", {"ant": 10, "bee": 10})
    words = [str(tmp_path / name) for name in ("model", "photos", "run")]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {step: {} for step in found}
