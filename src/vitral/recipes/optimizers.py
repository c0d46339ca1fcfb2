"""The optimizers that a recipe can name, a row each: how it is built, what it needs, its usual rates."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from vitral.recipes.schema import OptimizerName
from vitral.runtime.extras import need

Group = dict[str, Any]
_NO_CHANGE: Mapping[str, Any] = MappingProxyType({})


class OptimizerRow(NamedTuple):
    """What Vitral knows of an optimizer; nothing else compares its name.

    The settings that go with it, `from_scratch` and `tuning`, stand in the place of those of the packaged
    recipes `small` and `finetune`. They are empty for a recipe's own optimizer.
    """

    build: Callable[[list[Group], tuple[float, float]], torch.optim.Optimizer]  # of groups and betas
    capturable: bool = False  # takes the rate as a tensor, so that a step can be a CUDA graph
    keeps_average: bool = False  # averages the weights itself, and trains at other weights than the average
    takes_matrices: bool = False  # `build` gets all but the matrices inside the encoder, which Muon takes
    from_scratch: Mapping[str, Any] = _NO_CHANGE
    tuning: Mapping[str, Any] = _NO_CHANGE


def _adamw(groups: list[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def _sgd(groups: list[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Coupled weight decay, as the paper's fine-tuning (which has none) and torch's SGD."""
    return torch.optim.SGD(groups, lr=0.0, momentum=betas[0], fused=True)


def _lion(groups: list[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    need("optimizer=lion", "lion_pytorch", extra="optimizers")
    from lion_pytorch import Lion

    return Lion(groups, lr=1.0, betas=betas)  # it refuses a rate of 0; the schedule sets it


def _schedule_free(groups: list[Group], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW whose average takes the schedule's place (The Road Less Scheduled, arXiv:2405.15682)."""
    need("optimizer=schedule_free", "schedulefree", extra="optimizers")
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(groups, lr=1.0, betas=betas)
    optimizer.train()
    return optimizer


OPTIMIZERS: dict[OptimizerName, OptimizerRow] = {
    "adamw": OptimizerRow(
        _adamw,
        capturable=True,
        from_scratch={"learning_rate": 2e-3, "schedule": "cosine"},
    ),
    # When it tunes, it takes AdamW's rate: its updates are as large (`training/optimizers.py: Muon`).
    "muon": OptimizerRow(_adamw, capturable=True, takes_matrices=True),
    # A tenth of AdamW's rate (arXiv:2302.06675, §5).
    "lion": OptimizerRow(
        _lion,
        from_scratch={"learning_rate": 2e-4, "schedule": "cosine"},
        tuning={"learning_rate": 1.5e-5},
    ),
    # The paper's rate of fine-tuning, without decay (table 4).
    "sgd": OptimizerRow(
        _sgd,
        capturable=True,
        from_scratch={"learning_rate": 0.1, "schedule": "cosine", "weight_decay": 5e-4},
        tuning={"learning_rate": 0.03, "weight_decay": 0.0},
    ),
    # Its average takes the place of a falling rate (arXiv:2405.15682).
    "schedule_free": OptimizerRow(
        _schedule_free,
        keeps_average=True,
        from_scratch={"learning_rate": 4e-3, "schedule": "constant"},
        tuning={"learning_rate": 3e-4, "schedule": "constant"},
    ),
}
