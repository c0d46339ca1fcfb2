"""Sentences and numbers that several sections say alike."""

from vitral.evaluation.analysis.answers import Answers

_SPLITS = {"val": "validation", "test": "test", "train": "training"}


def clock(seconds: float) -> str:
    """Write 75 seconds as ``1:15 min``, 4,000 as ``1:06 h``."""
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02}\N{NO-BREAK SPACE}min"
    return f"{int(seconds) // 3600}:{int(seconds) % 3600 // 60:02}\N{NO-BREAK SPACE}h"


def split_words(name: str) -> str:
    """Call a split by its name in a sentence."""
    return f"{_SPLITS[name]} images" if name in _SPLITS else "images"


def held_out_words(answers: Answers) -> str:
    """Say whether the model may know the images already."""
    if answers.held_out is None:
        return "No record says whether it learnt from these images; if it did, these figures flatter it."
    if not answers.held_out:
        return "It learnt from some of these images, so these figures flatter it."
    if answers.split_name == "val":
        return (
            "The images were held out from training, but they chose the best epoch, which flatters a little."
        )
    return "The images were held out from training."


def label_words(label: str | tuple[str, ...]) -> str:
    """Write a label, or several."""
    return label if isinstance(label, str) else ", ".join(label) or "nothing"
