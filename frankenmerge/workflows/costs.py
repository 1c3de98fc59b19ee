"""What `analyze`, `align`, `evaluate` and `heal` will cost, from configs and headers alone.

Operations are counted from shapes, bytes from shapes and types. The memory of Python and its
libraries comes on top of it, about 0.3 GB.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from frankenmerge.analysis.analyze import TOP, contexts_of
from frankenmerge.analysis.gauges import MOST_DIRECTIONS
from frankenmerge.analysis.inputs import NEURONS, TOKENS
from frankenmerge.analysis.probes import COUNT, LENGTH
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.costs import Cost, Shape, checkpoint_shape
from frankenmerge.donors.images import need_language
from frankenmerge.evaluation.bench import shared_context
from frankenmerge.evaluation.documents import Text
from frankenmerge.evaluation.domains import LENGTH as ROW
from frankenmerge.evaluation.domains import TARGET_BYTES
from frankenmerge.evaluation.items import encoded_items, read_items
from frankenmerge.evaluation.language import POSITIONS, encode_text, limited, windows
from frankenmerge.evaluation.samples import TOKENS as GENERATED
from frankenmerge.healing.memory import memory_of
from frankenmerge.healing.scopes import Scope
from frankenmerge.healing.tokens import CONFIRMING, STOPPING, fitting_rows
from frankenmerge.healing.training import CHECK, RATES, ROWS, TRIED
from frankenmerge.models.loading import devices_of, load_tokenizer
from frankenmerge.models.passes import BATCH
from frankenmerge.models.rates import LARGEST
from frankenmerge.models.streaming import streamable
from frankenmerge.splicing.assemble import splice_tokenizer
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.storage.safetensors_header import read_header
from frankenmerge.workflows.atlases import is_cached
from frankenmerge.workflows.evaluating import EvaluateOptions, Order, check_texts, order_of
from frankenmerge.workflows.patients import (
    HealOptions,
    Patient,
    computed_elements,
    offloads,
    sizes_of,
    splice_shape,
)
from frankenmerge.workflows.subjects import Model, Subjects, opened_subjects

SCORES, SCORES_NARROW = 3, 6
"""Copies of a donor's probe activations, in float64, that the scores of `align` need at most: of
one that is rotated within its leading directions, and of a narrower one.
"""


def analyze_cost(
    donor: Checkpoint,
    *,
    dtype: str,
    method: str = "complete",
    neurons: Sequence[int] | None = None,
    tokens: int | None = None,
    untrained: bool = False,
) -> Cost:
    """The cost of an atlas.

    Args:
        donor: what is analyzed.
        dtype: in which it computes.
        method: of the search.
        neurons: that a greedy or gradient search is for.
        tokens: of its inputs.
        untrained: whether random weights are analyzed.
    """
    need_language(donor)
    shape, size = checkpoint_shape(donor), torch_dtype(dtype).itemsize
    contexts = len(contexts_of(donor))
    probes = COUNT * LENGTH
    operations = shape.through_blocks(shape.vocabulary, alone=True)
    operations += (contexts - 1) * shape.through_blocks(shape.vocabulary, 2)
    operations += shape.through_blocks(probes, LENGTH)
    positions = shape.vocabulary * contexts + probes
    results = (len(shape.blocks) + 1) * shape.width
    # Inside a block: what its feed-forward maps read and write, and the keys that rank a batch.
    inside = BATCH * (size * (6 * shape.width + 3 * shape.inner) + 4 * 8 * shape.width)
    whole = untrained or method != "complete" or not streamable(donor)
    memory = (
        {"weights": size * shape.parameters}
        if whole
        else {"embedding": size * shape.embedding, "one block": size * max(shape.blocks)}
    )
    memory |= {
        "hidden states": size * shape.width * positions,
        "one batch": inside,
        "results": results * (2 * COUNT * (LENGTH - 1) + 3 * 8 * TOP * contexts),
    }
    unread = 0 if whole else shape.ends - shape.embedding
    read = 0 if untrained else donor.bytes - donor.bytes * unread // shape.parameters
    counts, notes = {"positions": positions}, []
    if method != "complete":
        searched, length = len(neurons) if neurons else NEURONS, tokens or TOKENS
        features = searched * (len(shape.blocks) + 1)
        notes.append(
            f"the {method} search of {features} features of {length} tokens, which runs the whole "
            "model, is not counted"
        )
    return Cost(operations, memory, read, counts, (shape.width, shape.inner), tuple(notes))


def align_cost(
    donors: Sequence[Checkpoint | Path], *, dtype: str, method: str = "complete", runs: bool = False
) -> Cost:
    """The cost of aligning two donors; the scores themselves take memory alone.

    Args:
        donors: two, of which those that are files are atlases.
        dtype: in which they compute.
        method: of the search.
        runs: whether both are also run whole, for `--sampled` `--exchange` or `--modules`.
    """
    opened = {donor.name: donor for donor in donors if isinstance(donor, Checkpoint)}
    searched = [
        analyze_cost(donor, dtype=dtype, method=method)
        for donor in opened.values()
        if method != "complete" or not is_cached(donor, dtype=dtype)
    ]
    probes = [_probed(donor) for donor in donors]
    elements, width = max(probes)
    copies = SCORES if width > MOST_DIRECTIONS else SCORES_NARROW
    scores = {
        "atlases": sum(2 * each for each, _ in probes),
        "scores": copies * 8 * elements,
    }
    notes = ["the scores themselves take time in proportion to the pairs of blocks; not counted"]
    if runs:
        size = torch_dtype(dtype).itemsize
        scores["weights"] = sum(size * donor.parameters for donor in opened.values())
        notes.append("--sampled, --exchange and --modules, which run whole donors, are not counted")
    # One after the other: the larger search, then the scores.
    stages = [each.memory for each in searched] + [scores]
    return Cost(
        sum(each.operations for each in searched),
        max(stages, key=lambda memory: sum(memory.values())),
        sum(each.read for each in searched),
        {
            "donors to analyze": len(searched),
            "positions": sum(each.counts["positions"] for each in searched),
        },
        max((each.product for each in searched), default=(LARGEST, LARGEST)),
        tuple(dict.fromkeys([*(note for each in searched for note in each.notes), *notes])),
    )


def _probed(donor: Checkpoint | Path) -> tuple[int, int]:
    """Numbers in the activations on the probes, and the donor's width."""
    if isinstance(donor, Checkpoint):
        shape = checkpoint_shape(donor)
        return (len(shape.blocks) + 1) * COUNT * (LENGTH - 1) * shape.width, shape.width
    found = read_header(donor)["probes"].shape
    return math.prod(found), found[-1]


def evaluate_cost(models: Sequence[Model], texts: Sequence[Text], options: EvaluateOptions) -> Cost:
    """The cost of measuring models on texts and items; see `evaluating.evaluate`.

    Raises FrankenmergeError as that does for models that cannot be opened.
    """
    check_texts(texts, options)
    with opened_subjects(
        models, download=options.download, allow_pickle=options.allow_pickle, weights=False
    ) as subjects:
        order = order_of(subjects, options, weights=False)
        donors = {**subjects.checkpoints, **subjects.donors, **order.donors}
        context = options.context or shared_context(donors.values())
        costs = []
        for name in order.names:
            splice = subjects.splices.get(name)
            shape = splice_shape(splice) if splice else checkpoint_shape(donors[name])
            tokenizer = splice_tokenizer(splice) if splice else load_tokenizer(donors[name])
            if options.tokens and not costs:
                texts = [limited(tokenizer, text, options.tokens) for text in texts]
            costs.append(_measuring_cost(shape, tokenizer, texts, context, options))
        weights, read = _loaded(subjects, order, donors, options.placement.dtype)
    notes = []
    if options.harness_tasks:
        notes.append(f"the tasks {', '.join(options.harness_tasks)} are not counted")
    if options.seams:
        notes.append("--seams adds a pass over at most 1,024 tokens of every text")
    counted = ("tokens", "positions")
    return Cost(
        sum(each.operations for each in costs),
        {"weights": weights, "one batch": max(each.memory["one batch"] for each in costs)},
        read,
        {"models": len(costs)}
        | {name: sum(each.counts[name] for each in costs) for name in counted},
        max(each.product for each in costs),
        tuple(notes),
    )


def _measuring_cost(
    shape: Shape,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    context: int,
    options: EvaluateOptions,
) -> Cost:
    """The cost of one model that is in memory."""
    size = torch_dtype(options.placement.dtype).itemsize
    encoded = [encode_text(tokenizer, text) for text in texts]
    rows = [each.width for text in encoded for each in windows(text, context)]
    for task in options.item_files:
        items = encoded_items(tokenizer, read_items(Path(task)), context=context, place=task)
        rows += [items.counted.shape[1]] * len(items.ids)
    operations = sum(shape.forward(width, width) for width in rows)
    operations += shape.forward(GENERATED * (options.samples + len(options.prompts)), 1)
    if options.retention:
        operations += shape.through_blocks(shape.vocabulary, alone=True)
    batch = max([*rows, min(POSITIONS, sum(rows))])
    # Logits in the type that is computed in, in float32, and their exponentials.
    inside = size * (6 * shape.width + 3 * shape.inner) + (size + 8) * shape.vocabulary
    counts = {"tokens": sum(text.tokens for text in encoded), "positions": sum(rows)}
    product = shape.width, shape.inner
    return Cost(operations, {"one batch": batch * inside}, 0, counts, product)


def _loaded(
    subjects: Subjects, order: Order, donors: Mapping[str, Checkpoint], dtype: str
) -> tuple[int, int]:
    """The most bytes of weights in memory, and the bytes that are read, model after model."""
    size = torch_dtype(dtype).itemsize
    loaded: set[str] = set()
    most = read = 0
    for number, name in enumerate(order.names, 1):
        splice = subjects.splices.get(name)
        needed = donors.keys() & {*order.needed.get(name, ()), *([] if splice else [name])}
        read += sum(donors[each].bytes for each in needed - loaded)
        loaded |= needed
        made = computed_elements(splice) if splice else 0
        most = max(most, size * (made + sum(donors[each].parameters for each in loaded)))
        loaded &= order.kept_after(number)
    return most, read


def heal_cost(patient: Patient, scope: Scope, options: HealOptions) -> Cost:
    """The cost of healing with all its steps; training may stop earlier.

    Args:
        patient: what is healed.
        scope: what is trained.
        options: how.
    """
    sizes, shape = sizes_of(patient, options), splice_shape(patient.splice)
    spread = sizes_of(patient, options, devices_of(options.placement.device))
    saving = {"checkpointing": options.checkpointing, "offload": offloads(options)}
    memory = memory_of(spread, scope, **saving)
    donors = [checkpoint_shape(donor) for donor in patient.donors.values()]
    steps = patient.steps(options)
    fitting = fitting_rows(steps, len(donors))
    trained = sizes.trained[scope] / max(1, sum(shape.maps))
    deepest = 1 - min(patient.seams, default=0) / len(shape.blocks) if scope == "seams" else 1.0
    # Forward, the gradient of the states down to the first trained block, and of the weights.
    passes = 1 + options.checkpointing + deepest + min(1.0, trained)
    runs = 1 + options.control
    step = ROWS * ROW
    positions = {
        "trained": runs * (steps + len(RATES) * TRIED) * step,
        "checked": runs * (steps // CHECK + 1) * STOPPING * len(donors) * ROW,
        "judged": (2 + options.control) * CONFIRMING * len(donors) * ROW,
    }
    operations = passes * shape.forward(positions["trained"], ROW)
    operations += shape.forward(positions["checked"] + positions["judged"], ROW)
    rows = fitting * len(donors)
    if isinstance(options.on, str):
        positions["sampled"] = (fitting + STOPPING + CONFIRMING) * len(donors) * ROW
        operations += sum(each.forward(positions["sampled"] // len(donors), 1) for each in donors)
    if options.teacher != "none":
        teachers = donors if options.teacher == "ensemble" else donors[:1]
        # The teachers' probabilities are kept where they fit, and computed at every step elsewhere.
        kept = rows * ROW * shape.vocabulary * 4 <= TARGET_BYTES
        taught = rows * ROW if kept else positions["trained"]
        positions["taught"] = taught
        operations += sum(each.forward(taught, ROW) for each in teachers)
    read = sum(donor.bytes for donor in {**patient.splice.donors, **patient.donors}.values())
    notes = ["training stops earlier where it no longer helps"]
    if not isinstance(options.on, str):
        notes.append("counted as if the texts had as many rows as sampled tokens")
    counts = {"steps": steps, **{f"tokens {name}": count for name, count in positions.items()}}
    uses = {name: count for name, count in memory._asdict().items() if count}
    return Cost(operations, uses, read, counts, (shape.width, shape.inner), tuple(notes))
