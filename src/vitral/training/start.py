"""What comes before the first step of a run from trained weights: a head, and how well the start does."""

from contextlib import nullcontext

from vitral.data.subsets import few_shot
from vitral.evaluation.probing.head_start import fitted_head
from vitral.inference.classifier import Classifier
from vitral.runtime.stopping import Stopped, StopSignal
from vitral.training.adapt import merged
from vitral.training.run import Run
from vitral.training.sharding import load
from vitral.training.validation import validate

# Images that a head may begin with; a part of an epoch.
_PROBED_IMAGES = 2000
_LEAST_OF_A_CLASS = 10
# Of the budget, for the head's start.
_HEAD_SHARE = 0.15


def start_tuning(run: Run, stop: StopSignal) -> None:
    """Fit a head where there is a new one, and judge the start. Raises Stopped."""
    if run.state.step or not run.is_tuning:
        return
    # Several processes stop together, between their steps.
    with stop.raises() if run.world.alone else nullcontext():
        if run.recipe.tuning.probe_head:
            with run.clock.of("starting"):
                start_head(run)
        # The start is the first candidate for the best weights, so that no run ends with worse.
        evaluation = validate(run)
    if run.world.any(stop.requested):
        raise Stopped
    score = f"{evaluation.score_words} {evaluation.score:.1%}"
    run.tell.message(f"before the first step: val loss {evaluation.loss:.3f} {score}")
    run.tick()


def start_head(run: Run) -> None:
    """Fit the head of a run that is tuned, as a linear probe, where there is time for it.

    A drawn head's first gradients spoil what the layers below have learnt (arXiv:2202.10054, §3).
    """
    train, limits = run.data.split("train"), run.recipe.limits
    # Not the run's own seed, whose first epoch takes images in the same order: those that the head knows
    # would come first, and the loss would seem to rise after them.
    seed = run.recipe.course.seed + 1
    images = few_shot(train, max(_head_images(run) // len(run.data.classes), 1), seed)
    # Adapters add nothing yet: the cache then knows the features as those of the model itself. The average
    # is the model still, and whole.
    plain = merged(run.average)
    found = run.world.from_first(
        lambda: fitted_head(
            Classifier(plain, run.checkpoint.preprocess, run.data.classes, run.placement),
            images,
            seed,
            seconds=60 * limits.minutes * _HEAD_SHARE if limits.timed else None,
            on_images=lambda done, total: run.tell.preparing("the head's start", done, total),
            loading=run.loading,
        ),
        patient=True,
    )
    if found is None:
        run.tell.message("no time for the head to begin as a linear probe: it begins at random")
        return
    found.head.put_into(run.average)
    load(run.model.head, run.average.head.state_dict())
    run.follow_average()
    judged = f", right on {found.held_out_top1:.1%} of those held out" if found.held_out_top1 else ""
    run.tell.message(f"the head begins as a linear probe of {found.images:,} images{judged}")


def _head_images(run: Run) -> int:
    """How many images a head may begin with: a step looks at an image three times as long."""
    if run.budget.total_steps is None:
        return _PROBED_IMAGES
    affordable = round(3 * _HEAD_SHARE * run.budget.total_steps * run.recipe.batches.batch_size)
    return min(_PROBED_IMAGES, max(affordable, _LEAST_OF_A_CLASS * len(run.data.classes)))
