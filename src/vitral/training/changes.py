"""What of a run's recipe may change when it is taken up again."""

from vitral.data.workers import worker_count
from vitral.recipes.recipe import Recipe
from vitral.recipes.schema import BUDGET, Resolved, default
from vitral.runtime.errors import VitralError
from vitral.runtime.threads import cpu_count

# Settings that may change when a run is taken up again, for they do not change what it computes; the budget
# changes what is still to come.
CHANGEABLE = {
    "epochs", "steps", "minutes", "checkpoint_steps", "eval_epochs", "max_damaged", "keep_state", "report",
    "threads", "workers", "device", "accumulate", "checkpoint_layers", "image_root",
    "track",
}  # fmt: skip


def changed(recipe: Resolved, asked: Recipe) -> Resolved:
    """A run's recipe with what of `asked` may change it; None takes a setting back to its default.

    Raises:
        VitralError: if `asked` would change what the run computes, or leaves it without a budget.
    """
    settings = recipe.settings()
    fixed = sorted(
        name
        for name in asked.settings.keys() - CHANGEABLE
        if asked.settings[name] != settings.get(name, default(name))
    )
    if fixed:
        raise VitralError(
            f"{fixed[0]} cannot change in a resumed run; what can: {', '.join(sorted(CHANGEABLE))}"
        )
    kept = {name: value for name, value in settings.items() if name not in asked.settings}
    kept |= asked.given
    kept.setdefault("workers", worker_count(cores=cpu_count()))
    if not any(name in kept for name in BUDGET):
        raise VitralError("the run would have no budget; name epochs, steps or minutes")
    return Resolved.of(kept)
