"""Gates of a mixture of experts: from the base's states on prompts, from its embedding, or random.

A gate's row is a direction of the residual stream: of two tokens the one whose state points more
into it is routed to its expert. The base is read block by block.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from frankenmerge.artefacts.mixture import Expert, Mixture
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.errors import fail
from frankenmerge.progress import Progress, silent
from frankenmerge.splicing.operations import Gate
from frankenmerge.splicing.reading import DonorFiles, encoded, values_of

if TYPE_CHECKING:
    from frankenmerge.models.passes import Passage
    from frankenmerge.models.streaming import Streamed
    from frankenmerge.splicing.resolve import Splice

Array = np.ndarray
Vectors = Mapping[str, Array]
"""What gates are made of, by prompt: a vector for each block `[l, d]`, or one for all `[1, d]`."""
Tokens = Mapping[str, Sequence[int]]
"""Token ids by prompt."""
TOGETHER = 16
"""Most prompts in one batch."""


def with_gates(splice: "Splice", *, device: str = "cpu", progress: Progress = silent) -> "Splice":
    """The same splice with all gates made; one without gates is returned as it is.

    Args:
        splice: whose base has its weights.
        device: the torch device on which the base runs.
        progress: in blocks.

    Raises:
        FrankenmergeError: for a prompt without tokens, and states that are not finite.
    """
    missing = [each for each in splice.operations if isinstance(each, Gate) and not each.content]
    if not missing:
        return splice
    mixture = splice.recipe.mixture
    assert mixture
    vectors = prompt_vectors(splice, device=device, progress=progress)
    made = {
        gate.name: gate._replace(content=encoded(gate_rows(gate, mixture, vectors), gate.dtype))
        for gate in missing
    }
    operations = tuple(made.get(each.name, each) for each in splice.operations)
    return replace(splice, operations=operations)


def prompt_vectors(
    splice: "Splice", *, device: str = "cpu", progress: Progress = silent
) -> Vectors:
    """What a mixture's gates are made of; nothing where they are random."""
    mixture = splice.recipe.mixture
    assert mixture
    if not mixture.gates_from_prompts:
        return {}
    tokens = tokens_of_prompts(splice, prompts_of(mixture))
    if mixture.gate_mode == "cheap_embed":
        return embedding_sums(splice.base, tokens)
    return last_states(splice.base, tokens, device=device, progress=progress)


def prompts_of(mixture: Mixture) -> list[str]:
    """All prompts, each once."""
    lists = (
        prompts or ()
        for each in mixture.all_experts
        for prompts in (each.positive_prompts, each.negative_prompts)
    )
    return list(dict.fromkeys(prompt for prompts in lists for prompt in prompts))


def tokens_of_prompts(splice: "Splice", prompts: Iterable[str]) -> Tokens:
    """The ids of prompts after BOS, where the tokenizer has one.

    Raises FrankenmergeError for a prompt without tokens.
    """
    from frankenmerge.splicing.assemble import splice_tokenizer

    tokenizer = splice_tokenizer(splice)
    start = str(tokenizer.bos_token or "")
    encode: Any = partial(tokenizer, add_special_tokens=False, verbose=False)
    tokens = {prompt: encode(start + prompt)["input_ids"] for prompt in prompts}
    for prompt, ids in tokens.items():
        if not ids:
            remedy = "write another prompt"
            raise fail(f"prompt {prompt!r}", f"tokens of {splice.base.name}", "none", remedy)
    return tokens


def embedding_rows(base: Checkpoint, tokens: Tokens) -> dict[int, Array]:
    """The embeddings `[d]` of all tokens of prompts, by id, in float64; no other row is read."""
    matrix = base.tensors[base.by_role["embedding", None][base.architecture.matrix]]
    width = matrix.shape[1]
    files = DonorFiles()
    try:
        return {
            index: values_of(matrix, files, index * width, (index + 1) * width).astype(np.float64)
            for index in sorted({index for ids in tokens.values() for index in ids})
        }
    finally:
        files.close()


def embedding_sums(base: Checkpoint, tokens: Tokens) -> Vectors:
    """The sum of the embeddings of each prompt's tokens, `[1, d]`."""
    rows = embedding_rows(base, tokens)
    return {
        prompt: np.sum([rows[index] for index in ids], axis=0, keepdims=True)
        for prompt, ids in tokens.items()
    }


class Batch(NamedTuple):
    """Prompts that pass the base together."""

    prompts: list[str]
    passage: "Passage"
    """Padded after their ends: attention is causal, so that what comes after a token does not
    change its state.
    """


def entering(
    base: Checkpoint, tokens: Tokens, device: str = "cpu"
) -> "tuple[Streamed, list[Batch]]":
    """The base, to be run block by block, and prompts of similar length at its first block."""
    import torch

    from frankenmerge.models.passes import Passage
    from frankenmerge.models.streaming import stream_model

    rows = embedding_rows(base, tokens)
    place = {index: number for number, index in enumerate(rows)}
    embedding = torch.from_numpy(np.stack([*rows.values()]))
    donor = stream_model(base, device=device, embedding=embedding)
    ordered = sorted(tokens, key=lambda prompt: (len(tokens[prompt]), prompt))
    batches = []
    for start in range(0, len(ordered), TOGETHER):
        prompts = ordered[start : start + TOGETHER]
        ids = torch.zeros(len(prompts), len(tokens[prompts[-1]]), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(tokens[prompt])] = torch.tensor([place[each] for each in tokens[prompt]])
        batches.append(Batch(prompts, Passage(donor, ids, batch=len(prompts))))
    return donor, batches


def last_states(
    base: Checkpoint, tokens: Tokens, *, device: str = "cpu", progress: Progress = silent
) -> Vectors:
    """The residual stream that enters each block at each prompt's last token, `[l, d]`.

    Computed in float32, block by block. Raises FrankenmergeError for states that are not finite.
    """
    from frankenmerge.models.streaming import each_block

    donor, batches = entering(base, tokens, device)
    # Made before any block is read: small arrays between large ones would fragment the memory.
    shape = base.blocks, quantity(base.config, "width") or 0
    vectors = {prompt: np.empty(shape) for prompt in tokens}

    def keep(place: int) -> None:
        for prompts, passage in batches:
            for row, prompt in enumerate(prompts):
                last = passage.states[row, len(tokens[prompt]) - 1]
                vectors[prompt][place] = last.double().cpu().numpy()

    keep(0)
    with progress("prompts through the base", base.blocks - 1, "blocks") as advance:
        # Nothing needs what leaves the last block: `zip` ends before it is read.
        for place, (index, block) in zip(range(1, base.blocks), each_block(donor), strict=False):
            for _, passage in batches:
                for _ in passage.through(index, block):
                    pass
            keep(place)
            advance(1)
    for prompt, rows in vectors.items():
        if not np.isfinite(rows).all():
            place, remedy = f"{base.name} on the prompt {prompt!r}"[:200], "use another base"
            raise fail(place, "finite hidden states", "NaN or Inf", remedy)
    return vectors


def gate_rows(
    gate: Gate, mixture: Mixture, vectors: Vectors, without: Collection[str] = ()
) -> Array:
    """The elements of a gate `[experts, d]`, in float32.

    Args:
        gate: which one.
        mixture: its mixture.
        vectors: of all prompts, see `prompt_vectors`.
        without: prompts that are left out.
    """
    if not mixture.gates_from_prompts:
        generator = np.random.default_rng(gate.seed)
        if gate.mode == "random":
            return generator.standard_normal(gate.shape, dtype=np.float32)
        bound = 1 / math.sqrt(gate.shape[1])
        return generator.uniform(-bound, bound, gate.shape).astype(np.float32)
    experts = mixture.shared_experts if gate.shared else mixture.experts
    rows = [_direction(each, gate, vectors, without) for each in experts or []]
    return np.stack(rows).astype(np.float32)


def _direction(expert: Expert, gate: Gate, vectors: Vectors, without: Collection[str]) -> Array:
    """A unit vector: the mean of an expert's positive prompts minus that of its negative ones.

    Embeddings are summed and normalised before they are subtracted, as in mergekit.
    """

    def centre(prompts: Sequence[str] | None) -> Array | None:
        chosen = [vectors[prompt] for prompt in prompts or () if prompt not in without]
        if not chosen:
            return None
        mean = np.mean([rows[min(gate.block, len(rows) - 1)] for rows in chosen], axis=0)
        return _unit(mean) if gate.mode == "cheap_embed" else mean

    positive, negative = centre(expert.positive_prompts), centre(expert.negative_prompts)
    assert positive is not None
    return _unit(positive if negative is None else positive - negative)


def _unit(vector: Array) -> Array:
    return vector / max(float(np.linalg.norm(vector)), 1e-8)
