"""Measure how a mixture of experts routes, before it is written."""

from contextlib import ExitStack

from frankenmerge.artefacts.mixture import without_experts
from frankenmerge.errors import raise_all
from frankenmerge.evaluation.routing import Routing, measured_routing, routing_faults
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.stages import Stages, execute
from frankenmerge.workflows.merging import with_weights
from frankenmerge.workflows.stages_in_memory import make_in_memory


def routing_of(
    stages: Stages,
    *,
    device: str = "cpu",
    download: bool = False,
    allow_pickle: bool = False,
    place: str = "recipe",
    progress: Progress = silent,
) -> Routing:
    """Measure the routing of held-out prompts; stages that the mixture uses are made in memory.

    Args:
        stages: of which the result is a mixture.
        device: a torch device.
        download: whether weights may be fetched.
        allow_pickle: whether donors that have only pickles are converted.
        place: where the recipe is from.
        progress: in blocks.

    Raises:
        FrankenmergeError: for a recipe without experts, and experts with fewer than two prompts.
    """
    mixture = stages.result.recipe.mixture
    if mixture is None:
        raise without_experts(place)
    raise_all(routing_faults(mixture, place))
    ready = with_weights(stages, download, allow_pickle)
    with ExitStack() as closing:
        splice = execute(ready, make_in_memory, closing, device=device, progress=progress)
        return measured_routing(splice, device=device, progress=progress)
