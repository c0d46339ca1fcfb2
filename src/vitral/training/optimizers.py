"""How weights change: groups of parameters, and the optimizers over them."""

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from vitral.model.vit import VisionTransformer
from vitral.recipes.optimizers import OPTIMIZERS, Group
from vitral.recipes.schema import OptimizerName
from vitral.training.muon import Muon, Sharing
from vitral.training.sharding import laid_out_like

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
        """What is kept of each parameter, by its name; and of the groups of each optimizer."""
        parameters: dict[str, dict[str, Any]] = {}
        groups = []
        for part in self.parts:
            saved, named = part.state_dict(), _by_name(part)
            for place, (name, _) in enumerate(named):
                if place in saved["state"]:
                    parameters[name] = saved["state"][place]
            groups.append(
                [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in saved["param_groups"]
                ]
            )
        return {"parameters": parameters, "groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes tensors that are whole, or divided as the parameters are.

        Raises:
            KeyError: if it is not a state of these parameters; ValueError as well.
        """
        for part, groups in zip(self.parts, state["groups"], strict=True):
            named, places = _by_name(part), count()
            moments = {
                place: {key: _as_kept(parameter, value) for key, value in state["parameters"][name].items()}
                for place, (name, parameter) in enumerate(named)
                if name in state["parameters"]
            }
            placed = [
                {**saved, "params": [next(places) for _ in group["params"]]}
                for saved, group in zip(groups, part.param_groups, strict=True)
            ]
            part.load_state_dict({"state": moments, "param_groups": placed})
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
    sharing: Sharing | None = None,
) -> ChainedOptimizer:
    """An optimizer over `parameter_groups`.

    Args:
        name: of a row of `OPTIMIZERS`; Muon takes the orthogonal groups.
        groups: with "scale", "weight_decay" and "orthogonal".
        betas: of Adam and Lion; SGD's momentum is the first.
        muon_momentum: Nesterov's.
        sharing: which process computes Muon's updates; None: this one all.

    Raises:
        VitralError: if it needs a package that is not installed.
    """
    matrices = [group for group in groups if group["orthogonal"]]
    others = [group for group in groups if not group["orthogonal"]]
    row = OPTIMIZERS[name]
    parts: list[torch.optim.Optimizer] = [row.build(others, betas)] if others else []
    if matrices:
        parts.append(Muon(matrices, muon_momentum, sharing))
    device = groups[0]["params"][0].device
    capturable = device.type == "cuda" and row.capturable
    return ChainedOptimizer(parts, device, capturable=capturable, keeps_average=row.keeps_average)


def _by_name(part: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """An optimizer's parameters in its order; those of groups without names are called by their place."""
    named = []
    for group in part.param_groups:
        names = group.get("names") or range(len(named), len(named) + len(group["params"]))
        named += [(str(name), parameter) for name, parameter in zip(names, group["params"], strict=True)]
    return named


def _as_kept(parameter: Tensor, value: Any) -> Any:
    return laid_out_like(parameter, value) if isinstance(value, Tensor) else value
