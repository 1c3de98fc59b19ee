"""Tune the numbers of a recipe by what they gain.

Numbers on which the result depends smoothly are moved by gradient: the loss is differentiated with
respect to the result's tensors by the model itself, and each tensor with respect to the numbers by
a difference of two merges, so that this works for the formula of any method as it is. Numbers that
change the result in steps are searched by CMA-ES (Hansen, arXiv 1604.00772).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from frankenmerge.artefacts.evaluation import TaskDifferenceRecord
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import fail
from frankenmerge.evaluation.bench import Bench
from frankenmerge.evaluation.domains import Domain, split
from frankenmerge.evaluation.gains import (
    Gain,
    answers,
    best_of,
    donor_losses,
    gain_of,
    losses_together,
    mean_loss,
)
from frankenmerge.evaluation.record import task_differences
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.planning.numbers import (
    DECIMALS,
    Number,
    Per,
    numbers_of,
    refined,
    with_numbers,
)
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.assemble import computed_tensors, names_as_stored, separated
from frankenmerge.splicing.opening import open_donors
from frankenmerge.splicing.operations import Combine, Copy, Input, Operation
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.workflows.gaining import domains_on, parts_of
from frankenmerge.workflows.measuring import GainOn

RATE, BATCH, CHECK, PATIENCE = 0.03, 16, 10, 3
"""Adam's rate; rows of every domain in a step; steps between checks; checks without a gain."""
DIFFERENCE = 1e-3
"""By how much a number is changed to differentiate a tensor; float32 keeps three digits of it."""
SIGMA = 0.1
"""The first standard deviation of CMA-ES."""


@dataclass(frozen=True)
class TuneOptions:
    """How numbers are tuned."""

    on: GainOn
    per: Per = "setting"
    """What gets a number of its own."""
    steps: int = 60
    """Most steps of descent, or generations of CMA-ES."""
    seed: int = 0
    """Of sampled tokens, batches, generations and resamples."""
    placement: Placement = CPU
    download: bool = False
    allow_pickle: bool = False


class Tuned(NamedTuple):
    """A recipe with tuned numbers, measured on tokens that nothing was tuned on."""

    recipe: Recipe
    """The one given where no other was better."""
    before: float
    """Nats per token of the recipe given."""
    after: float
    gain: Gain
    """Nats won against the recipe given."""
    best_donor: str
    best_nats: float
    over_donor: Gain
    """Nats won against the best donor."""
    steps: int
    numbers: int
    """How many were tuned."""
    tasks: list[TaskDifferenceRecord]
    """The tuned recipe with the one given, and with the best donor, on the items of each task."""


def tune(
    recipe: Recipe,
    options: TuneOptions,
    *,
    opened: Mapping[str, Checkpoint] | None = None,
    progress: Progress = silent,
) -> Tuned:
    """Choose the numbers of a recipe that gain most, without writing a model.

    Raises:
        FrankenmergeError: for a recipe without numbers to tune, donors that cannot be opened or do
            not read the same tokens, and one donor on its own tokens.
    """
    donors = open_donors(
        recipe, download=options.download, allow_pickle=options.allow_pickle, opened=opened
    )
    start = _finer(recipe, options.per, donors)
    numbers = numbers_of(start)
    if not numbers:
        expected = "numbers to tune: weights, t, densities, scales"
        raise fail("recipe", expected, "none", "write them, such as weight: 0.5 for every model")
    bench = Bench((), donors, placement=options.placement)
    readers = [name for name in donors if name != recipe.base_model or len(donors) == 2]
    domains = domains_on(options.on, bench, readers, options.seed, progress, times=2)
    fitting, kept = split(domains, 2)
    stopping, confirming = split(kept, 2)
    tuning = _Tuning(bench, start, numbers, fitting, stopping, options, progress)
    found, steps = tuning.found()
    return _confirmed(bench, recipe, found, confirming, options, steps, len(numbers))


def one_recipe(recipes: Sequence[Recipe], place: str) -> Recipe:
    """The recipe of a file with a single stage.

    Raises FrankenmergeError for several, and for a mixture of experts.
    """
    if len(recipes) > 1:
        found, remedy = f"{len(recipes)} stages", "merge the earlier stages, and name their results"
        raise fail(place, "one recipe", found, remedy)
    if recipes[0].mixture:
        found, remedy = "a mixture of experts", "tune a recipe that is its base or an expert"
        raise fail(place, "a recipe without experts", found, remedy)
    return recipes[0]


class _Tuning:
    """One search for numbers."""

    def __init__(
        self,
        bench: Bench,
        recipe: Recipe,
        numbers: list[Number],
        fitting: Sequence[Domain],
        stopping: Sequence[Domain],
        options: TuneOptions,
        progress: Progress,
    ) -> None:
        self.bench, self.recipe, self.numbers = bench, recipe, numbers
        self.fitting, self.stopping, self.options = fitting, stopping, options
        self.progress = progress
        self.start = np.array([number.value for number in numbers])

    def splice(self, values: np.ndarray, *, exact: bool = False) -> Splice:
        """The recipe with these values; `exact` without rounding of tensors."""
        recipe = with_numbers(self.recipe, self.numbers, list(values))
        if exact:
            recipe = recipe.model_copy(update={"dtype": "float32", "out_dtype": None})
        return resolve(recipe, self.bench.checkpoints)

    def stopping_loss(self, values: np.ndarray) -> float:
        """The loss on the tokens that decide when to stop."""
        return self._losses([values], self.stopping)[0]

    def _losses(self, values: Sequence[np.ndarray], domains: Sequence[Domain]) -> list[float]:
        splices = [self.splice(each) for each in values]
        return [
            mean_loss(sums) for sums in losses_together(splices, self.bench.assemble, domains).sums
        ]

    def found(self) -> tuple[Recipe, int]:
        """The recipe with the best numbers found, and the number of steps that it took."""
        smooth = all(number.parameter.effect == "smooth" for number in self.numbers)
        if smooth and not self.splice(self.start).has_gauges:
            gradient = _Gradient(self)
            if gradient.complete:
                return self._descent(gradient)
        return self._evolution()

    def _descent(self, gradient: "_Gradient") -> tuple[Recipe, int]:
        """Adam, with the values that lose least on the tokens that decide when to stop."""
        values = torch.tensor(self.start, requires_grad=True)
        adam = torch.optim.Adam([values], lr=RATE)
        kept, least, since, step = self.start, self.stopping_loss(self.start), 0, 0
        with self.progress("tuning", self.options.steps, "steps") as advance:
            for step in range(1, self.options.steps + 1):
                values.grad = torch.from_numpy(gradient.at(values.detach().numpy(), step))
                adam.step()
                advance(1)
                if step % CHECK and step != self.options.steps:
                    continue
                now = values.detach().numpy().copy()
                if (loss := self.stopping_loss(now)) < least:
                    kept, least, since = now, loss, 0
                else:
                    since += 1
                if since == PATIENCE:
                    break
        return self._rounded(kept), step

    def _evolution(self) -> tuple[Recipe, int]:
        """CMA-ES on the tokens to tune on, with the best mean on those that decide when to stop."""
        cma = _cma()
        low, high = (
            [getattr(number.parameter, end) for number in self.numbers] for end in ("low", "high")
        )
        bounds = [[None if abs(each) == np.inf else each for each in end] for end in (low, high)]
        search = cma.CMAEvolutionStrategy(
            list(self.start),
            SIGMA,
            {"seed": self.options.seed + 1, "bounds": bounds, "verbose": -9, "verb_log": 0},
        )
        kept, least, since, step = self.start, self.stopping_loss(self.start), 0, 0
        with self.progress("tuning", self.options.steps, "generations") as advance:
            for step in range(1, self.options.steps + 1):  # noqa: B007 - it is returned
                asked = search.ask()
                search.tell(asked, self._losses([np.array(each) for each in asked], self.fitting))
                advance(1)
                now = np.array(search.result.xfavorite)
                if (loss := self.stopping_loss(now)) < least:
                    kept, least, since = now, loss, 0
                else:
                    since += 1
                if since == PATIENCE * 2 or search.stop():
                    break
        return self._rounded(kept), step

    def _rounded(self, values: np.ndarray) -> Recipe:
        if values is self.start:
            return self.recipe
        return with_numbers(self.recipe, self.numbers, [round(v, DECIMALS) for v in values])


class _Gradient:
    """The derivative of the loss by the numbers of a recipe."""

    def __init__(self, tuning: _Tuning) -> None:
        self.tuning = tuning
        base = tuning.splice(tuning.start, exact=True)
        plain = _by_name(base)
        self.affected = [
            _changed(plain, tuning.splice(self._moved(tuning.start, [place]), exact=True))
            for place in range(len(tuning.numbers))
        ]
        names = dict.fromkeys(name for each in self.affected for name in each)
        self.groups = _apart(self.affected)
        self.model = tuning.bench.assemble(base).requires_grad_(False)
        stored = names_as_stored(self.model, base.base.architecture)
        own = separated(self.model, {name for name, each in stored.items() if each in names})
        self.parameters = {stored[name]: parameter for name, parameter in own.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.complete = self.parameters.keys() == set(names)
        """Whether every tensor is one of the model's parameters; packed experts are not."""

    def _moved(self, values: np.ndarray, places: Sequence[int]) -> np.ndarray:
        """Values with some of them changed a little, towards the inside of their range."""
        moved = values.copy()
        for place in places:
            moved[place] += self._step(values, place)
        return moved

    def _step(self, values: np.ndarray, place: int) -> float:
        high = self.tuning.numbers[place].parameter.high
        return -DIFFERENCE if values[place] + DIFFERENCE > high else DIFFERENCE

    def at(self, values: np.ndarray, step: int) -> np.ndarray:
        """The gradient at some values, on one batch of every domain."""
        tensors = self._tensors(values)
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.parameters[name].copy_(tensor)
        self._backward(step)
        gradient = np.zeros(len(values))
        for group in self.groups:
            moved = self._tensors(self._moved(values, group), group)
            for place in group:
                along = sum(
                    self._along(name, moved[name] - tensors[name]) for name in self.affected[place]
                )
                gradient[place] = along / self._step(values, place)
        self.model.zero_grad(set_to_none=True)
        return gradient

    def _tensors(
        self, values: np.ndarray, places: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """The tensors that all numbers change, or those that some of them do, in float32."""
        chosen = range(len(values)) if places is None else places
        names = {name for place in chosen for name in self.affected[place]}
        operations = self.tuning.splice(values, exact=True).operations
        return dict(computed_tensors([_combine(each) for each in operations if each.name in names]))

    def _along(self, name: str, change: Tensor) -> float:
        """How the loss changes with a change of one tensor, to first order."""
        slope = self.parameters[name].grad
        return 0.0 if slope is None else float((slope.cpu() * change).sum())

    def _backward(self, step: int) -> None:
        """Add up the gradients of the mean loss on one batch of every domain."""
        generator = np.random.default_rng([self.tuning.options.seed, step])
        batches = [domain.of_units(_drawn(generator, domain)) for domain in self.tuning.fitting]
        for batch in batches:
            ids = batch.ids.to(self.model.device)
            nats = batch.nats(self.model(input_ids=ids, use_cache=False).logits)
            losses, weights = batch.losses(nats)
            (losses.sum() / weights.sum() / len(batches)).backward()


def _drawn(generator: np.random.Generator, domain: Domain) -> np.ndarray:
    """Units of a domain with about `BATCH` rows."""
    count = max(1, BATCH * domain.size // len(domain.ids))
    return np.sort(generator.permutation(domain.size)[:count])


def _confirmed(
    bench: Bench,
    before: Recipe,
    after: Recipe,
    domains: Sequence[Domain],
    options: TuneOptions,
    steps: int,
    numbers: int,
) -> Tuned:
    splices = [resolve(recipe, bench.checkpoints) for recipe in (before, after)]
    old, new = losses_together(splices, bench.assemble, domains).sums
    models = {name: bench.load(name).model for name in bench.checkpoints}
    donors, _ = donor_losses(models, domains)
    best = best_of(donors)
    measured = {"tuned": new, "before": old, best: donors[best]}
    answered = {name: answers(sums, domains) for name, sums in measured.items()}
    return Tuned(
        after,
        mean_loss(old),
        mean_loss(new),
        gain_of(new, {"before": old}, seed=options.seed),
        best,
        mean_loss(donors[best]),
        gain_of(new, donors, seed=options.seed),
        steps,
        numbers,
        task_differences([("tuned", "before"), ("tuned", best)], answered),
    )


def _finer(recipe: Recipe, per: Per, donors: Mapping[str, Checkpoint]) -> Recipe:
    base = donors[recipe.base]
    parts = parts_of(donors, None)
    architecture = base.architecture
    ends = [*architecture.embedding, architecture.head]
    names = [name.rstrip(".") for name in ends if any(name in each for each in base.tensors)]
    return refined(recipe, per, base.blocks, parts.maps, names)


def _by_name(splice: Splice) -> dict[str, Operation]:
    return {operation.name: operation for operation in splice.operations}


def _changed(plain: Mapping[str, Operation], splice: Splice) -> list[str]:
    """The names of tensors that are made otherwise than in another splice of the same shape."""
    return [each.name for each in splice.operations if not _same(plain[each.name], each)]


def _same(one: Operation, other: Operation) -> bool:
    """Whether two operations do the same; a gradient's interpolation may differ by rounding."""
    if not (isinstance(one, Combine) and isinstance(other, Combine)):
        return type(one) is type(other)
    settings = [
        [each.parameters, *(given.parameters for given in each.inputs)] for each in (one, other)
    ]
    return all(
        abs(mine[name] - theirs[name]) < DIFFERENCE / 1e6
        for mine, theirs in zip(*settings, strict=True)
        for name in mine
    )


def _combine(operation: Operation) -> Combine:
    """The same, computed: a tensor that is copied is one that is scaled by 1."""
    if isinstance(operation, Combine):
        return operation
    assert isinstance(operation, Copy)
    given = Input(operation.donor, operation.source, operation.tensor, {"scale": 1.0})
    return Combine(
        operation.name, "F32", operation.shape, "passthrough", (given,), None, {}, seed=0
    )


def _apart(affected: Sequence[Sequence[str]]) -> list[list[int]]:
    """Group numbers that change no tensor in common, so that they are differentiated at once."""
    groups: list[tuple[set[str], list[int]]] = []
    for place, names in enumerate(affected):
        for used, members in groups:
            if used.isdisjoint(names):
                used.update(names)
                members.append(place)
                break
        else:
            groups.append((set(names), [place]))
    return [members for _, members in groups]


def _cma() -> Any:
    try:
        import cma
    except ImportError as error:
        expected, remedy = "the package cma", "pip install 'frankenmerge[tune]'"
        raise fail("tune", expected, "it is not installed", remedy) from error
    return cma
