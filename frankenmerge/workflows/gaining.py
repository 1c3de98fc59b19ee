"""Plans that gain: candidates of every kind, measured in memory against the best donor.

Candidates are compared on one half of the tokens; the finalists are measured on the other half,
which nothing was chosen by.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from frankenmerge.artefacts import gain as artefact
from frankenmerge.artefacts.alignment import Alignment, need_language_alignments
from frankenmerge.artefacts.evaluation import TaskDifferenceRecord
from frankenmerge.artefacts.gain import (
    ControlsRecord,
    DonorControl,
    GainControl,
    GainFile,
    GainPlanRecord,
)
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.artefacts.recipe_label import label
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.evaluation.bench import Bench, Loaded
from frankenmerge.evaluation.documents import Chat, Text
from frankenmerge.evaluation.domains import (
    ROWS,
    Domain,
    sampled_domain,
    split,
    stages,
    task_domain,
    text_domain,
)
from frankenmerge.evaluation.gains import (
    Gain,
    Sums,
    answers,
    best_of,
    captured_share,
    counted,
    donor_losses,
    gain_of,
    joined,
    losses_together,
    mean_loss,
)
from frankenmerge.evaluation.items import Task, encoded_items
from frankenmerge.evaluation.language import encode_documents, positions_for, start_token
from frankenmerge.evaluation.record import library_versions, task_differences
from frankenmerge.evaluation.sampled_damage import disagreement
from frankenmerge.models.hooks import embedding_of
from frankenmerge.models.loading import CPU, Placement
from frankenmerge.planning.candidates import (
    Candidate,
    Donors,
    candidates,
    uniform_average,
    with_weight,
)
from frankenmerge.planning.prediction import default_model
from frankenmerge.planning.search import Constraints
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.opening import open_named
from frankenmerge.splicing.resolve import Splice, resolve
from frankenmerge.storage.atomic import write_file
from frankenmerge.workflows.measuring import GainOn
from frankenmerge.workflows.planning import recipe_paths

CONTEXT = 128
"""Most tokens in a row of a text."""
FEWEST_ROWS = 4
"""Fewest rows of a text."""
FEWEST_ITEMS = 40
"""Fewest items of a task."""
SHARES = (1 / 6, 1 / 3, 1 / 2)
"""Shares of the selection's tokens by which candidates are compared, one stage after the other."""
KEPT = (16, 6)
"""How many candidates stay after each stage but the last."""
FINALISTS = 3
"""How many are confirmed."""
SIGNIFICANCE = 0.05
"""The chance that a gain is claimed where there is none, for all finalists together."""


@dataclass(frozen=True)
class GainOptions:
    """How plans that gain are searched for."""

    on: GainOn
    """What gains are measured on."""
    constraints: Constraints
    """Of stacks; the depth of recipes."""
    any_depth: bool = False
    """Whether recipes may have other depths, up to that one."""
    base: str | None = None
    """What the donors were fine-tuned from."""
    top: int = 1
    """How many plans to return, at most `FINALISTS`."""
    seed: int = 0
    """Of sampled tokens and resamples."""
    placement: Placement = CPU
    download: bool = False
    allow_pickle: bool = False


class GainPlan(NamedTuple):
    """A recipe and its gain on tokens that it was not chosen by."""

    candidate: Candidate
    splice: Splice
    gain: Gain
    """With an interval for all finalists together."""
    text_interval: tuple[float, float] | None = None
    """90 % interval of the gain on a text, where it was measured on sampled tokens."""


class Controls(NamedTuple):
    """What every gain is compared with, on the same tokens."""

    best_donor: str
    best_nats: float
    average: Gain | None
    """Of the uniform average; None where donors cannot be averaged."""
    ensemble: Gain
    """Of the mean of the donors' probabilities: a ceiling, no single model."""


class Gains(NamedTuple):
    """Plans that were searched for by their gain."""

    plans: list[GainPlan]
    """The best by the selection's tokens first."""
    controls: Controls
    count: int
    """Candidates that were measured."""
    refused: list[str]
    """Of every candidate that these donors do not allow, the reason."""
    passes: int
    """What the search cost, in passes of all the selection's tokens through a donor."""
    tokens: int
    """Tokens, or items of tasks, that were confirmed on."""
    tasks: list[TaskDifferenceRecord]
    """The best plan and the best donor on the items of each task; empty for texts."""

    @property
    def confirmed(self) -> bool:
        """Whether the best plan's gain is above 0 beyond chance."""
        return self.plans[0].gain.interval[0] > 0

    def captured(self, gain: Gain) -> float | None:
        """The share of the ensemble's gain; None where the ensemble gains nothing."""
        return captured_share(gain, self.controls.ensemble)


def plan_gains(
    alignments: Sequence[Alignment],
    options: GainOptions,
    *,
    opened: Mapping[str, Checkpoint] | None = None,
    progress: Progress = silent,
) -> Gains:
    """Search for recipes that are better than the best donor, and measure whether they are.

    Args:
        alignments: of pairs of donors, each pair once.
        options: on what, of which depth, with which base.
        opened: donors that are open already, by name.
        progress: of every stage.

    Raises:
        FrankenmergeError: for donors that cannot be opened or do not read the same tokens, and for
            a single donor on its own tokens.
    """
    need_language_alignments(alignments)
    names = list(dict.fromkeys(name for each in alignments for name in each.donors))
    if options.base and options.base not in names:
        names.append(options.base)
    donors = open_named(
        names, download=options.download, allow_pickle=options.allow_pickle, opened=opened
    )
    bench = Bench((), donors, placement=options.placement)
    found = candidates(
        alignments,
        parts_of(donors, options.base),
        options.constraints,
        any_depth=options.any_depth,
    )
    readers = [name for name in names if name != options.base]
    domains = domains_on(options.on, bench, readers, options.seed, progress)
    return Search(bench, options, progress).of(found, domains)


class Search:
    """A search among candidates with donors in memory."""

    def __init__(self, bench: Bench, options: GainOptions, progress: Progress = silent) -> None:
        self.bench, self.options, self.progress = bench, options, progress
        self.models = {name: bench.load(name).model for name in bench.checkpoints}
        self.ensemble = {name: model for name, model in self.models.items() if name != options.base}
        self.blocks = 0
        self.count = 0
        self.refused: list[str] = []

    def of(self, found: Sequence[Candidate], domains: Sequence[Domain]) -> Gains:
        """Choose among candidates on one half of the tokens, and confirm on the other."""
        selection, confirmation = split(domains, 2)
        finalists = self._selected(found, selection)
        return self._confirmed(finalists, confirmation, selection)

    def _selected(
        self, found: Sequence[Candidate], domains: Sequence[Domain]
    ) -> list[tuple[Candidate, Splice]]:
        """Successive halving: the best go on to more tokens, until `FINALISTS` are left."""
        left = [(each, splice) for each in found if (splice := self._resolved(each))]
        if not left:
            refused = f"none; {self.refused[0]}" if self.refused else "none"
            raise fail("plan", "recipes of these donors", refused, "ask for another depth")
        earlier: list[Sums] = []
        for number, stage in enumerate(stages(domains, SHARES)):
            sums = self._losses([splice for _, splice in left], stage, "comparing candidates")
            if earlier:
                sums = [joined(pair) for pair in zip(earlier, sums, strict=True)]
            losses = [mean_loss(each) for each in sums]
            if number == 0:
                more = [
                    (each, splice)
                    for each in _between(left, losses)
                    if (splice := self._resolved(each))
                ]
                made = self._losses([splice for _, splice in more], stage, "comparing averages")
                left, sums = [*left, *more], [*sums, *made]
                losses += [mean_loss(each) for each in made]
                self.count = len(left)
            kept = np.argsort(losses, kind="stable")[: (*KEPT, FINALISTS)[number]]
            left, earlier = [left[place] for place in kept], [sums[place] for place in kept]
        return left

    def _confirmed(
        self,
        finalists: Sequence[tuple[Candidate, Splice]],
        domains: Sequence[Domain],
        selection: Sequence[Domain],
    ) -> Gains:
        splices = [splice for _, splice in finalists]
        refused, searched = list(self.refused), self.blocks
        average = self._resolved(Candidate("average", uniform_average(list(self.ensemble))))
        several = average is not None and len(self.ensemble) > 1
        measured = self._losses(
            [*splices, *([average] if average and several else [])], domains, "confirming"
        )
        donors, ensemble = donor_losses(self.models, domains)
        if len(self.ensemble) < len(self.models):
            ensemble = donor_losses(self.ensemble, domains)[1]
        coverage = 1 - SIGNIFICANCE / len(finalists)

        def gain(sums: Sums, coverage: float = 1 - SIGNIFICANCE) -> Gain:
            return gain_of(sums, donors, seed=self.options.seed, coverage=coverage)

        plans = [
            GainPlan(candidate, splice, found := gain(sums, coverage), self._on_text(found, donors))
            for (candidate, splice), sums in zip(finalists, measured, strict=False)
        ]
        best = best_of(donors)
        controls = Controls(
            best, mean_loss(donors[best]), gain(measured[-1]) if several else None, gain(ensemble)
        )
        batches = sum(len(domain.batches()) for domain in selection)
        passes = round(searched / (self.bench.checkpoints[best].blocks * batches))
        names = str(finalists[0][0].recipe), best
        answered = {
            name: answers(sums, domains)
            for name, sums in zip(names, (measured[0], donors[best]), strict=True)
        }
        tasks = task_differences([names], answered)
        return Gains(
            plans[: self.options.top],
            controls,
            self.count,
            refused,
            passes,
            counted(ensemble),
            tasks,
        )

    def _on_text(self, gain: Gain, donors: Mapping[str, Sums]) -> tuple[float, float] | None:
        """Where the gain on a text is expected, from that on sampled tokens."""
        if not isinstance(self.options.on, str):
            return None
        names = list(self.ensemble)
        cross = [[mean_loss({name: donors[other][name]}) for other in names] for name in names]
        low, high = default_model().interval(
            -gain.nats, sampled=True, disagreement=disagreement(np.array(cross))
        )
        return -high, -low

    def _losses(
        self, splices: Sequence[Splice], domains: Sequence[Domain], what: str
    ) -> list[Sums]:
        with self.progress(what, len(splices), "recipes") as advance:
            found = losses_together(splices, self.bench.assemble, domains, advance=advance)
        self.blocks += found.blocks
        return found.sums

    def _resolved(self, candidate: Candidate) -> Splice | None:
        """The splice of a candidate; None, and the reason in `refused`, where it is not allowed."""
        try:
            return resolve(candidate.recipe, self.bench.checkpoints)
        except FrankenmergeError as error:
            fault = error.faults[0]
            reason = f"expected {fault.expected}, found {fault.found}"
            self.refused.append(f"{candidate.kind}: {reason}")
            return None


def write_gains(gains: Gains, options: GainOptions, output: Path) -> tuple[GainFile, list[Path]]:
    """Write the best recipe to `output`, others to NAME.2.yaml and so on, and NAME.gain.json.

    Returns the file of gains and the recipes' paths.
    """
    paths = recipe_paths(output, len(gains.plans))
    for path, plan in zip(paths, gains.plans, strict=True):
        write_file(path, plan.candidate.recipe.dump().encode())
    made = gain_file(gains, options)
    artefact.save(made, artefact.gain_path(output))
    return made, paths


def gain_file(gains: Gains, options: GainOptions) -> GainFile:
    """What is known of the plans, with what produced it."""
    controls = gains.controls

    def control(gain: Gain) -> GainControl:
        nats = controls.best_nats - gain.nats
        return GainControl(nats=nats, gain=gain.nats, interval=gain.interval)

    return GainFile(
        kind=artefact.KIND,
        plans=[
            GainPlanRecord.of(
                recipe=plan.candidate.recipe.model_dump(exclude_none=True),
                summary=label(plan.candidate.recipe),
                key=plan.splice.key,
                kind=plan.candidate.kind,
                gain=plan.gain.nats,
                interval=plan.gain.interval,
                text_interval=plan.text_interval,
                captured_share=gains.captured(plan.gain),
                domains=plan.gain.domains,
            )
            for plan in gains.plans
        ],
        controls=ControlsRecord.of(
            best_donor=DonorControl(name=controls.best_donor, nats=controls.best_nats),
            average=control(controls.average) if controls.average else None,
            ensemble=control(controls.ensemble),
        ),
        confirmed=gains.confirmed,
        on=list(controls.ensemble.domains),
        tokens=gains.tokens,
        candidates=gains.count,
        refused=dict(Counter(gains.refused)),
        passes=gains.passes,
        tasks=gains.tasks,
        seed=options.seed,
        versions=library_versions(),
    )


def domains_on(
    on: GainOn,
    bench: Bench,
    names: Sequence[str],
    seed: int,
    progress: Progress = silent,
    *,
    times: int = 1,
) -> list[Domain]:
    """What to measure on: what each donor generates (`times * ROWS` rows), texts or tasks.

    Raises FrankenmergeError for donors of different tokens, a short text, and a single donor on its
    own tokens.
    """
    loaded = {name: bench.load(name) for name in names}
    check_same_tokens(list(loaded.values()))
    if isinstance(on, str):
        if len(loaded) == 1:
            expected = "a text or a task: a donor predicts its own tokens best"
            raise fail(f"--on {on}", expected, "a single donor", "name a text with --on FILE")
        with progress("sampling tokens", len(loaded), "donors") as advance:
            made = []
            for name, each in loaded.items():
                made.append(sampled_domain(name, each.model, seed, times * ROWS))
                advance(1)
    else:
        tokenizers = [each.tokenizer for each in loaded.values()]
        made = [_domain(each, tokenizers, bench) for each in on]
    first = next(iter(loaded.values()))
    positions = positions_for(embedding_of(first.model).shape[0])
    return [domain._replace(positions=positions) for domain in made]


def check_same_tokens(loaded: Sequence[Loaded]) -> None:
    """Raise FrankenmergeError for models whose tokenizers have different tokens."""
    first, *others = loaded
    for other in others:
        if other.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            place = f"{other.checkpoint.name}: tokenizer"
            expected = f"the tokens of {first.checkpoint.name}"
            remedy = "give one the other's tokenizer first, with transplant-tokenizer"
            raise fail(place, expected, "other tokens", remedy)


def _domain(
    each: Text | Task, tokenizers: Sequence[PreTrainedTokenizerBase], bench: Bench
) -> Domain:
    """A text or a task as the donors read it, by their tokenizers, which have the same tokens."""
    tokenizer = tokenizers[0]
    if isinstance(each, Task):
        if len(each.items) < FEWEST_ITEMS:
            expected = f"at least {FEWEST_ITEMS} items: some to choose by, others to confirm with"
            raise fail(each.name, expected, str(len(each.items)), "give more items")
        rows = encoded_items(tokenizer, each.items, context=bench.context, place=each.name)
        return task_domain(each.name, rows)
    context = min(bench.context, CONTEXT)
    if any(isinstance(document, Chat) for document in each.documents):
        # Of a base and what was tuned from it, only one may have a chat template.
        tokenizer = next((own for own in tokenizers if own.chat_template), tokenizer)
    start = start_token(tokenizer)
    skipped = 0 if start is None else 1
    encoded = encode_documents(tokenizer, each)
    if (tokens := sum(document.tokens for document in encoded)) < 4 * context:
        expected = f"at least {4 * context} tokens: some to choose by, others to confirm with"
        raise fail(each.name, expected, str(tokens), "give a longer text")
    documents = [
        found if isinstance(document, Chat) else found.ids[skipped:]
        for document, found in zip(each.documents, encoded, strict=True)
    ]
    domain = text_domain(each.name, documents, start, context)
    if domain.size < FEWEST_ROWS:
        expected = f"at least {FEWEST_ROWS} rows of up to {context} tokens, half to confirm with"
        raise fail(each.name, expected, str(domain.size), "give a longer text")
    return domain


def parts_of(donors: Mapping[str, Checkpoint], base: str | None) -> Donors:
    """What candidates need to know of the donors."""
    first = next(iter(donors.values()))
    stream = first.architecture.stream
    prefix = first.architecture.root + first.architecture.block
    maps = tuple(
        name.removeprefix(prefix).removesuffix(".weight")
        for name, stored in first.by_role.get(("block", 0), {}).items()
        if name.endswith(".weight") and len(first.tensors[stored].shape) > 1
    )
    # A norm after a block's maps undoes what they are scaled by.
    writes = stream.writes if stream and not stream.output_norms else ()
    blocks = {name: donor.blocks for name, donor in donors.items() if name != base}
    return Donors(blocks, maps, writes, base)


def _between(left: Sequence[tuple[Candidate, Splice]], losses: Sequence[float]) -> list[Candidate]:
    """For every pair of donors the average whose loss is least on the parabola of three weights."""
    pairs: dict[tuple[str, ...], list[tuple[float, float, Recipe]]] = {}
    for (candidate, _), loss in zip(left, losses, strict=True):
        models = candidate.recipe.models
        if candidate.kind == "average" and models and len(models) == 2:
            weight = models[1].parameters["weight"] if models[1].parameters else 0.5
            names = tuple(whole.model for whole in models)
            pairs.setdefault(names, []).append((weight, loss, candidate.recipe))
    made = []
    for found in pairs.values():
        if len(found) < 3:
            continue
        weights, values = [weight for weight, _, _ in found], [loss for _, loss, _ in found]
        curve, slope, _ = np.polyfit(weights, values, 2)
        if curve > 0 and min(weights) < (least := -slope / (2 * curve)) < max(weights):
            made.append(Candidate("average", with_weight(found[0][2], float(least))))
    return made
