"""Every benchmark by its name, as `vitral bench` knows it."""

from collections.abc import Callable, Sequence

from vitral.bench.kernels import kernels
from vitral.bench.report import Report
from vitral.bench.rounds import Settings
from vitral.bench.speed import infer, train
from vitral.bench.start import start
from vitral.bench.workload import Workload, choose_workload
from vitral.checkpoints import peers
from vitral.runtime.errors import VitralError
from vitral.runtime.limits import ROUNDS
from vitral.runtime.ranges import refuse_beyond

_OF_MODELS: dict[str, Callable[[Workload, Settings], Report]] = {
    "train": train,
    "infer": infer,
    "start": start,
}


def run(benchmark: str, words: Sequence[str], settings: Settings) -> Report:
    """Run one of the benchmarks.

    Args:
        benchmark: "train", "infer", "start" or "kernels".
        words: the model and settings, such as ``["ViT-Ti/4", "img_size=32", "batch_size=64"]``; "kernels"
            takes none.
        settings: how to run it.

    Raises:
        VitralError: if there is no such benchmark, or a word cannot be used.
    """
    refuse_beyond("rounds", settings.rounds, ROUNDS)
    unknown = [name for name in settings.peers if name not in peers.LIBRARIES]
    if unknown:
        raise VitralError(f"peer={unknown[0]}: it is one of {', '.join(peers.LIBRARIES)}")
    if benchmark in _OF_MODELS:
        return _OF_MODELS[benchmark](choose_workload(benchmark, words, settings.placement), settings)
    if benchmark != "kernels":
        raise VitralError(f"there is no benchmark {benchmark!r}; there are train, infer, start and kernels")
    if words:
        raise VitralError(f"bench kernels takes no model and no setting; it was given {words[0]!r}")
    return kernels(settings)
