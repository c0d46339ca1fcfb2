"""Types of numbers within the ranges that can be meant; beyond them a run would hang or fill the memory."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field

from vitral.runtime import limits
from vitral.runtime.errors import VitralError


def _off_or_more(value: float) -> float:
    """Less than this changes nothing, or overflows what is divided by it."""
    if 0 < value < 1e-3:
        raise ValueError("it must be 0 (off), or a number of 0.001 or more")
    return value


def listed(value: Any) -> Any:
    """Make a list of words with commas between."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


Count = Annotated[int, Field(ge=1, le=10**9)]
Batch = Annotated[int, Field(ge=limits.BATCH[0], le=limits.BATCH[1])]
Images = Annotated[int, Field(ge=limits.IMAGES[0], le=limits.IMAGES[1])]
Layer = Annotated[int, Field(ge=limits.LAYER[0], le=limits.LAYER[1])]
Pixels = Annotated[int, Field(ge=limits.PIXELS[0], le=limits.PIXELS[1])]
Seed = Annotated[int, Field(ge=limits.SEED[0], le=limits.SEED[1])]
Threads = Annotated[int, Field(ge=1, le=limits.WORKERS[1])]
Workers = Annotated[int, Field(ge=limits.WORKERS[0], le=limits.WORKERS[1])]

Budget = Annotated[float, Field(ge=0.001, le=10**6)]  # in epochs or minutes
Positive = Annotated[float, Field(ge=1e-12)]
NotNegative = Annotated[float, Field(ge=0, le=10**6)]
Strength = Annotated[float, Field(ge=0, le=100), AfterValidator(_off_or_more)]

Share = Annotated[float, Field(ge=0, lt=1)]
Whole = Annotated[float, Field(ge=0, le=1)]  # a share that may be all
Part = Annotated[float, Field(ge=0.01, le=1)]  # a share that may not be nothing


def refuse_beyond(name: str, value: Any, span: tuple[int, int]) -> None:
    """Raise VitralError if a function's argument is no whole number from the first to the second."""
    if isinstance(value, bool) or not isinstance(value, int) or not span[0] <= value <= span[1]:
        raise VitralError(f"{name}={value!r}: it must be a whole number from {span[0]:,} to {span[1]:,}")
