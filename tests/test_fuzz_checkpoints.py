"""500 damaged and hostile checkpoints of every layout: each is read, or refused in one line, at little cost.

The cases run in a process of their own, which measures its memory. A case is a function of its number.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = 500
_MAX_SECONDS, _MAX_BYTES = 10, 2**30

CHILD = r'''
import io, json, pickle, random, resource, shutil, signal, struct, sys, time, warnings, zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vitral
from vitral.checkpoints.folder import Checkpoint, save_checkpoint
from vitral.checkpoints.convert import convert
from vitral.runtime.errors import VitralError
from vitral.model.vit import VisionTransformer
from vitral.images.preprocess import Preprocess

work, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
warnings.simplefilter("ignore")
torch.set_num_threads(1)
picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8))


def originals(folder):
    """A sound checkpoint of each layout, by name."""
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, 3, 64, 2, 2, 2, 3, 0.0).eval()
    made = {"ours": folder / "ours"}
    save_checkpoint(made["ours"], Checkpoint(model, Preprocess((16, 16)), ("a", "b", "c")))
    fixed = VisionTransformer(16, 8, 3, 64, 2, 2, 2, 3, 0.0, position="sinusoidal_2d").eval()
    made["fixed"] = folder / "fixed"
    save_checkpoint(made["fixed"], Checkpoint(fixed, Preprocess((16, 16)), ("a", "b", "c")))
    for layout in ("timm", "transformers", "google", "torchvision"):
        made[layout] = folder / layout
        convert(str(made["ours"]), made[layout], layout)
    from safetensors.torch import load_file
    state = load_file(made["timm"] / "model.safetensors")
    made["zip"] = folder / "zip"
    made["zip"].mkdir()
    torch.save({"arch": "vit_tiny_patch16_224", "state_dict": state}, made["zip"] / "model.pth")
    made["legacy"] = folder / "legacy"
    made["legacy"].mkdir()
    torch.save(state, made["legacy"] / "model.pth", _use_new_zipfile_serialization=False)
    made["adapter"] = folder / "adapter"
    made["adapter"].mkdir()
    settings = {"peft_type": "LORA", "lora_alpha": 8, "base_model_name_or_path": str(made["transformers"])}
    (made["adapter"] / "adapter_config.json").write_text(json.dumps(settings))
    from safetensors.torch import save_file
    name = "base_model.model.vit.encoder.layer.0.attention.attention.query"
    factors = {f"{name}.lora_A.weight": torch.ones(2, 64), f"{name}.lora_B.weight": torch.ones(64, 2)}
    save_file(factors, made["adapter"] / "adapter_model.safetensors")
    return made


def odd(draw):
    return draw.choice([
        float("nan"), float("inf"), -1, 0, 1, 3, 1e308, 1e-320, 10**12, -(10**9), 2**63, 16000, "", "x",
        "nan", None, [], {}, True, [1, 2], [float("nan")] * 3, [0.5], ["a", "a", "b"], [None] * 3,
        "[/b]\n\x1b[31m", "x" * 5000, [[[[[[]]]]]], "learned", "sinusoidal", "sinusoidal_2d", 1e5,
        4096, 100000, {"a": {"b": []}},
    ])


def mutated(value, draw):
    """JSON with one field changed, removed or added."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        if draw.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if draw.random() < 0.05:
            return {**value, draw.choice(["", "model_type", "architecture", "x"]): odd(draw)}
        deeper = isinstance(value[key], (dict, list)) and draw.random() < 0.7
        return {**value, key: mutated(value[key], draw) if deeper else odd(draw)}
    if isinstance(value, list) and value and draw.random() < 0.9:
        changed = list(value)
        changed[draw.randrange(len(changed))] = odd(draw)
        return changed
    return odd(draw)


def scrambled(content, draw):
    """Bytes flipped, cut, zeroed, doubled or put in."""
    content = bytearray(content)
    kind = draw.randrange(6)
    place = draw.randrange(max(len(content), 1))
    if kind == 0:
        return bytes(content[:place])
    if kind == 1:
        content[place : place + draw.randrange(200)] = b""
    elif kind == 2:
        content[place:place] = draw.randbytes(draw.randrange(1, 50))
    elif kind == 3:
        content[place : place + 100] = bytes(len(content[place : place + 100]))
    else:
        # Where a file says what it holds: its first and last bytes.
        near = draw.choice([len(content), 600, 60])
        for _ in range(draw.randrange(1, 20)):
            at = draw.randrange(min(near, len(content)))
            content[at if draw.random() < 0.6 else -1 - at] = draw.randrange(256)
    return bytes(content)


def header_edited(content, draw):
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if draw.random() < 0.1:
        header |= {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20000)}
    name = draw.choice(sorted(header))
    header[name] = mutated(header[name], draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


class Call:
    def __init__(self, function, *arguments):
        self.pair = function, arguments

    def __reduce__(self):
        return self.pair


def hostile(draw):
    import codecs, collections, os
    kind = draw.randrange(8)
    if kind == 0:
        return Call(bytearray, 3 << 30)
    if kind == 1:
        return Call(os.system, "touch executed")
    if kind == 2:
        text = b"ab" * 10
        for _ in range(27):
            text = Call(codecs.encode, text, "hex")
        return text
    if kind == 3:
        rows = [0.0] * 10
        for _ in range(8):
            rows = [rows] * 10
        return Call(torch.Tensor, rows)
    if kind == 4:
        return Call(torch.Tensor, 3 << 28)
    if kind == 5:
        deep = []
        for _ in range(150):
            deep = [deep]
        return deep
    if kind == 6:
        return Call(collections.Counter, "x" * 1000)
    return Call(set, list(range(1000)))


def pickled(path, draw):
    """A state dict with something beside it, or a pickle of nothing but that."""
    content = {"state_dict": {"blocks.0.norm1.weight": torch.ones(64)}, "extra": hostile(draw)}
    if draw.random() < 0.3:
        content = content["extra"]
    if draw.random() < 0.5:
        torch.save(content, path, _use_new_zipfile_serialization=draw.random() < 0.5)
        return
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")


def repacked(content, draw):
    """A zip archive with one member changed, dropped, doubled or blown up."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw.choice(sorted(members))
    kind = draw.randrange(4)
    if kind == 0:
        members[name] = scrambled(members[name], draw)
    elif kind == 1:
        del members[name]
    elif kind == 2:
        members[name] = members[name][:128] + bytes(draw.choice([10**4, 10**7]))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", draw.choice([0, 8])) as archive:
        for member, inner in members.items():
            archive.writestr(member, inner)
        if kind == 3:
            archive.writestr(name + "x", members[name])
    return packed.getvalue()


def damage(folder, draw):
    file = draw.choice(sorted(f for f in folder.iterdir() if f.name != "parity.json"))
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.85:
        changed = json.loads(content)
        for _ in range(draw.choice([1, 1, 1, 3])):
            changed = mutated(changed, draw)
        file.write_text(json.dumps(changed))
    elif file.suffix == ".safetensors" and draw.random() < 0.7:
        file.write_bytes(header_edited(content, draw))
    elif file.suffix == ".pth" and draw.random() < 0.4:
        pickled(file, draw)
    elif content[:2] == b"PK" and draw.random() < 0.5:
        file.write_bytes(repacked(content, draw))
    else:
        file.write_bytes(scrambled(content, draw))
    return file.name


def attempt(folder):
    """What came of loading and asking."""
    try:
        path = folder / "model.npz" if (folder / "model.npz").exists() else folder
        classifier = vitral.load(path, device="cpu", precision="float32")
        if classifier.labels:
            answers = classifier.predict(picture)
            json.dumps([a.top for a in answers], allow_nan=False)
            return "answered"
        classifier.features([picture])
        return "read"
    except (VitralError, OSError) as error:
        text = str(error)
        wrong = "\n" in text or "weights_only" in text or len(text) > 2000
        return f"defect: {text!r}" if wrong else "refused"
    except Exception as error:
        return f"defect: {type(error).__name__} {error}"


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def too_long(*_):
    raise KeyboardInterrupt


sound = originals(work / "sound")
outcomes, worst, slowest = {}, 0, 0.0
for name, folder in sound.items():
    assert attempt(folder) == "answered", name
signal.signal(signal.SIGALRM, too_long)
for number in range(first, last):
    draw = random.Random(number)
    name = sorted(sound)[number % len(sound)]
    folder = work / "case"
    shutil.copytree(sound[name], folder)
    file = damage(folder, draw)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    before, began = peak(), time.monotonic()
    signal.alarm(LIMIT)
    try:
        outcome = attempt(folder)
    except KeyboardInterrupt:
        outcome = "defect: it hangs"
    signal.alarm(0)
    slowest = max(slowest, time.monotonic() - began)
    grown = peak() - before
    worst = max(worst, grown)
    if grown > MEMORY:
        outcome = f"defect: {grown} bytes"
    if outcome.startswith("defect"):
        outcomes.setdefault("defects", []).append(f"case {number}, {file} of {name}: {outcome[:300]}")
    outcomes[outcome.split(":")[0]] = outcomes.get(outcome.split(":")[0], 0) + 1
    shutil.rmtree(folder)
outcomes["executed"] = Path("executed").exists()
print(json.dumps({**outcomes, "bytes": worst, "seconds": slowest}))
'''


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads its memory from /proc")
def test_damaged_and_hostile_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    code = CHILD.replace("LIMIT", str(_MAX_SECONDS)).replace("MEMORY", str(_MAX_BYTES))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "0", str(CASES)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found.get("defects"), "\n".join(found["defects"])
    assert not found["executed"]
    assert found["refused"] > CASES / 2
    assert found["answered"] > 20  # what does not matter to the model does not stop it
