"""`Candidate`: one way to compute the model; the table of those that are tried on a machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vitral.artifacts.manifest import FormPrecision, Kind

if TYPE_CHECKING:  # the process of a form need not have torch
    from vitral.ship.optimize.processor import Processor

Library = Literal["torch", "openvino", "onnxruntime"]
# How much of what makes an activation hard to round moves into the weights (SmoothQuant, arXiv:2211.10438,
# eq. 4): these strengths are tried, the library's own first.
STRENGTHS = (0.95, 0.85, 0.7, 0.5)
# Layers that stay in float32, of those whose rounding changes most, where all in int8 loses too much.
LEFT_IN_FLOAT = (2, 4, 8)
# From so many patches on, merging tokens spares more than it costs.
LEAST_PATCHES = 150
# Of the patches, merged over all layers: 13 of 196 in each of 12 layers are 0.8 (ToMe, arXiv:2210.09461,
# table 1), 23 of 576 in each of 24 are 0.96.
MERGED_SHARES = (0.8, 0.4)


@dataclass(frozen=True)
class Candidate:
    """One way to compute the model."""

    library: Library
    precision: FormPrecision = "float32"
    how: Literal["", "compiled", "dynamic"] = ""  # torch.compile; torchao, ranges from each image
    merge: int = 0  # tokens that each layer merges
    strength: float | None = None  # of SmoothQuant; None: it has none
    in_float: tuple[str, ...] = ()  # layers of an int8 form that stay in float32
    draft: bool = False  # calibrated on a few images, to be timed alone

    @property
    def name(self) -> str:
        parts = [f"{self.library} {self.precision}", self.how]
        parts.append(f"merge {self.merge}" if self.merge else "")
        parts.append(f"{len(self.in_float)} layers float32" if self.in_float else "")
        return ", ".join(filter(None, parts))

    @property
    def exact(self) -> bool:
        """Whether it computes the function of the eager model, in another order at most."""
        return self.precision == "float32" and not self.merge

    @property
    def kind(self) -> Kind | None:
        """The form in which an artifact has it; None: it is no file, it only competes."""
        kinds: dict[Library, Kind] = {"openvino": "openvino", "onnxruntime": "onnx"}
        return kinds.get(self.library)


EAGER = Candidate("torch")


def candidates(processor: "Processor") -> Iterator[tuple[Candidate, str | None]]:
    """Give each candidate, and why it is not tried on this machine; the quickest to build first."""
    no_bfloat16 = None if processor.bfloat16 else "the processor does not multiply in bfloat16"
    yield Candidate("openvino"), None
    yield Candidate("onnxruntime"), None
    yield Candidate("torch", "bfloat16"), no_bfloat16
    yield Candidate("openvino", "bfloat16"), no_bfloat16
    yield Candidate("openvino", "int8", strength=STRENGTHS[0], draft=True), None
    yield Candidate("onnxruntime", "int8", draft=True), None


# They are slow to make and no files: tried only where no other form is faster than the eager model.
LAST_RESORTS = (Candidate("torch", "int8", "dynamic"), Candidate("torch", how="compiled"))


def merged_counts(patches: int, layers: int) -> tuple[int, ...]:
    """How many tokens a layer may merge, the most first; none where there are few patches."""
    if patches < LEAST_PATCHES:
        return ()
    counts = (round(share * patches / layers) for share in MERGED_SHARES)
    return tuple(dict.fromkeys(count for count in counts if count))
