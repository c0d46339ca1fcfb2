"""How weights change: groups of parameters, and the optimizers over them."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vitral.model.vit import VisionTransformer
from vitral.recipes.optimizers import OPTIMIZERS, Group
from vitral.recipes.schema import OptimizerName
from vitral.runtime.devices import multiplies_bfloat16

# --- Groups of parameters ------------------------------------------------------------------------


def parameter_groups(
    model: nn.Module, *, layer_decay: float, weight_decay: float, orthogonal: bool = False
) -> list[Group]:
    """The parameters that are trained, by depth, decay and kind, the head's first.

    Weight matrices decay; biases, norms, scales, tokens and positions do not (BEiT,
    arXiv:2106.08254, appendix). A layer `d` levels below the head learns at `layer_decay ** d` times
    the rate: the head is level 0, the last layer 1, the embedding `num_layers + 1`.

    Args:
        model: some of whose parameters may be frozen.
        layer_decay: of the rate, from layer to layer down.
        weight_decay: of weight matrices.
        orthogonal: whether the matrices inside the encoder (and the stem's filters but the first) are groups
            of their own, for Muon.
    """
    groups: dict[tuple[int, bool, bool], Group] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level = _levels_below_head(name, model)
        # Tokens, tables, scales and frequencies are no weights, whatever their number of axes.
        decays = parameter.ndim > 1 and name.endswith("weight")
        hidden = orthogonal and decays and _is_hidden(name, parameter)
        group = groups.setdefault(
            (level, decays, hidden),
            {
                "params": [],
                "names": [],
                "level": level,
                "scale": layer_decay**level,
                "weight_decay": weight_decay if decays else 0.0,
                "orthogonal": hidden,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return [groups[key] for key in sorted(groups)]


def _levels_below_head(name: str, model: nn.Module) -> int:
    """0 for all of a module that is the user's own."""
    if not isinstance(model, VisionTransformer):
        return 0
    part, _, rest = name.partition(".")
    num_layers = len(model.layers)
    match part:
        case "head" | "distillation_head" | "hidden" | "norm" | "attention_pool" | "pooled_norm":
            return 0
        case "layers" | "relations":  # a relation that all layers share is as deep as the first
            return num_layers - int(rest.partition(".")[0])
        case "embedding":
            return num_layers + 1
    raise AssertionError(f"no depth is known for {name}")


def _is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether both sides of a matrix are hidden: neither pixels nor labels."""
    in_encoder = name.startswith("layers.") and parameter.ndim == 2
    in_stem = name.startswith("embedding.stem.") and not name.startswith("embedding.stem.stages.0.")
    return in_encoder or in_stem


# --- Optimizers ----------------------------------------------------------------------------------


class ChainedOptimizer:
    """Several optimizers, each with parameters of its own, used as one.

    Args:
        parts: the optimizers; each group has a "scale" of the learning rate.
        device: of the parameters.
        capturable: whether rates are kept in tensors on the device, so that a step can be recorded as a
            CUDA graph.
        keeps_average: whether one of them averages the weights itself (`average`).
    """

    def __init__(
        self,
        parts: Iterable[torch.optim.Optimizer],
        device: torch.device,
        *,
        capturable: bool = False,
        keeps_average: bool = False,
    ) -> None:
        self.parts, self.capturable, self.keeps_average = list(parts), capturable, keeps_average
        self._scales_G = torch.tensor([group["scale"] for group in self.param_groups], device=device)
        self._rates_G = torch.zeros_like(self._scales_G)
        self._tie_rates()

    @property
    def param_groups(self) -> list[Group]:
        return [group for part in self.parts for group in part.param_groups]

    def _tie_rates(self) -> None:
        """Makes each group's rate an element of one tensor, so that one kernel sets all."""
        for part in self.parts:
            for group in part.param_groups:
                if "capturable" in group:
                    group["capturable"] = self.capturable
        if self.capturable:
            for group, rate in zip(self.param_groups, self._rates_G.unbind(), strict=True):
                group["lr"] = rate

    def set_learning_rate(self, rate: float | Tensor) -> None:
        """Each group's rate becomes `rate`, a scalar on the device if capturable, times its scale."""
        if isinstance(rate, Tensor):
            torch.mul(self._scales_G, rate, out=self._rates_G)
            return
        for group in self.param_groups:
            group["lr"] = rate * group["scale"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def forget(self) -> None:
        """Begins anew: moments and momentum of the steps so far are 0, in the tensors that they stand in."""
        for part in self.parts:
            for state in part.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        value.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._tie_rates()

    def average(self, on: bool) -> None:  # noqa: FBT001 - a switch, as in module.train(mode)
        """Schedule-free methods: puts their average into the weights, or takes it out again."""
        for part in self.parts:
            if averages := getattr(part, "eval" if on else "train", None):
                averages()


def build_optimizer(
    name: OptimizerName,
    groups: list[Group],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    muon_momentum: float = 0.95,
) -> ChainedOptimizer:
    """An optimizer over `parameter_groups`.

    Args:
        name: of a row of `OPTIMIZERS`; Muon takes the orthogonal groups.
        groups: with "scale", "weight_decay" and "orthogonal".
        betas: of Adam and Lion; SGD's momentum is the first.
        muon_momentum: Nesterov's.

    Raises:
        VitralError: if it needs a package that is not installed.
    """
    matrices = [group for group in groups if group["orthogonal"]]
    others = [group for group in groups if not group["orthogonal"]]
    row = OPTIMIZERS[name]
    parts: list[torch.optim.Optimizer] = [row.build(others, betas)] if others else []
    if matrices:
        parts.append(Muon(matrices, momentum=muon_momentum))
    device = groups[0]["params"][0].device
    capturable = device.type == "cuda" and row.capturable
    return ChainedOptimizer(parts, device, capturable=capturable, keeps_average=row.keeps_average)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized (Jordan et al., https://kellerjordan.github.io/posts/muon).

    The update of a matrix is the nearest semi-orthogonal one, scaled to the size of AdamW's updates so
    that one learning rate and weight decay serve both (Moonlight, arXiv:2502.16982, eq. 4). Matrices of
    one shape go through the iteration together, in bfloat16 where the device multiplies in it, for the
    iteration forgives rounding: torch's own `torch.optim.Muon` takes them one by one and always in
    bfloat16, which some CPUs emulate (docs/log.md, 2026-11-25). Filters (out, in, h, w) are matrices
    (out, in * h * w).

    Args:
        groups: with "scale" and "weight_decay"; the schedule sets "lr".
        momentum: Nesterov's.
    """

    def __init__(self, groups: list[Group], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002  # pyrefly: ignore[bad-override]
        for group in self.param_groups:
            if trained := [weight for weight in group["params"] if weight.grad is not None]:
                torch._foreach_mul_(trained, 1 - group["lr"] * group["weight_decay"])
        for alike in _by_shape(self.param_groups):
            self._update(*alike)

    def _update(self, weights: list[Tensor], groups: list[Group]) -> None:
        """Weights of one shape or its transpose, each with its group."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        buffers = [self._buffer(weight) for weight in weights]
        momentum = self.defaults["momentum"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_add(gradients, buffers, alpha=momentum)
        stacked = torch.stack([_wide(direction) for direction in directions])
        dtype = torch.bfloat16 if multiplies_bfloat16(stacked.device) else torch.float32
        size = 0.2 * math.sqrt(max(stacked.shape[1:]))
        rates_G = _stacked_rates(groups).mul(-size).to(stacked)
        scaled = orthogonalize(stacked, dtype) * rates_G[:, None, None]
        updates = [
            (update if update.shape == weight.flatten(1).shape else update.mT).reshape(weight.shape)
            for update, weight in zip(scaled, weights, strict=True)
        ]
        torch._foreach_add_(weights, updates)

    def _buffer(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


def _wide(weight: Tensor) -> Tensor:
    """As a matrix with at least as many columns as rows."""
    matrix = weight.flatten(1)
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _stacked_rates(groups: list[Group]) -> Tensor:
    """Numbers of the host in all their digits, tensors of the device as they are."""
    rates = [group["lr"] for group in groups]
    if isinstance(rates[0], Tensor):
        return torch.stack(rates)
    return torch.tensor(rates, dtype=torch.float64)


def _by_shape(groups: list[Group]) -> Iterator[tuple[list[Tensor], list[Group]]]:
    """Weights of each shape or its transpose, whatever their groups, which differ from layer to layer."""
    shapes: dict[torch.Size, tuple[list[Tensor], list[Group]]] = {}
    for group in groups:
        for weight in group["params"]:
            if weight.grad is not None:
                weights, theirs = shapes.setdefault(_wide(weight).shape, ([], []))
                weights.append(weight)
                theirs.append(group)
    yield from shapes.values()


# Quintic whose slope at 0 is large: singular values from 1e-3 to 1 end between 0.7 and 1.2 after five
# rounds (Jordan's post, "Newton-Schulz").
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5


def orthogonalize(matrices_GMN: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V^T for each matrix U S V^T of a stack (G, M, N), by Newton-Schulz iteration in `dtype`.

    Tall matrices take longer than their transposes, whose Gram matrices are smaller.
    """
    a, b, c = _QUINTIC
    x = matrices_GMN / (matrices_GMN.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.to(dtype)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices_GMN.dtype)
