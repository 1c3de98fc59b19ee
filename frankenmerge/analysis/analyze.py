"""From a donor to its atlas, block by block.

An interrupted analysis continues after the last block that it finished.
"""

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor

import frankenmerge
from frankenmerge.analysis.complete import Ranked, searched
from frankenmerge.analysis.images import analyze_images
from frankenmerge.analysis.probes import LENGTH, SEED, probe_hash, probe_states, random_probes
from frankenmerge.analysis.provenance import analysis_provenance, analyzed_name
from frankenmerge.analysis.ranking import top_tokens
from frankenmerge.artefacts.atlas import SUFFIX, Atlas, TopTokens, load_atlas, save_atlas
from frankenmerge.distributed import Rank, gathered, own_rank
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import quantity
from frankenmerge.donors.images import image_shape
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.models.images import ImageSet
from frankenmerge.models.loading import Placement, load_model, load_tokenizer
from frankenmerge.models.passes import BATCH, Passage
from frankenmerge.models.streaming import Donor, each_block, stream_model, streamable
from frankenmerge.progress import Advance, ignore
from frankenmerge.storage.arrays import read_arrays, write_arrays

TOP = 10
PROBE_BATCH = 16
SAVE_AFTER = 1.0
"""Seconds since the last save after which a finished block is saved: blocks that take less
time are faster to run again.
"""
_KIND = "frankenmerge.analysis-under-way/1"
_STATE = "state.safetensors"


def token_texts(checkpoint: Checkpoint) -> list[str]:
    """The text of every token of the vocabulary; ids unknown to the tokenizer become `<id>`."""
    tokenizer = load_tokenizer(checkpoint)
    size = quantity(checkpoint.config, "vocabulary") or 0
    known = min(size, len(tokenizer))
    texts = tokenizer.batch_decode(
        [[index] for index in range(known)], clean_up_tokenization_spaces=False
    )
    return [*texts, *(f"<{index}>" for index in range(known, size))]


def analyze(
    checkpoint: Checkpoint,
    *,
    k: int = TOP,
    untrained: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    rank: Rank = Rank(),
    under_way: Path | None = None,
    advance: Advance = ignore,
) -> Atlas:
    """Search a donor's features, plain and after BOS, and record its activations on the probes.

    The donor is read block by block: memory holds one block, the hidden states of all inputs, and
    the results so far.

    Args:
        checkpoint: the donor.
        k: how many tokens to keep for every feature.
        untrained: a seed: analyze a random model of the same config, the control for the effect of
            training.
        dtype: the type to compute in.
        device: a torch device.
        rank: which of several processes this is; each searches its batches of the vocabulary, and
            all return the same atlas.
        under_way: a folder for finished blocks; an analysis continues from the blocks in it. It is
            removed at the end.
        advance: called with the number of inputs that passed a block since its last call; see
            `work` for their total.

    Raises:
        FrankenmergeError: for a donor without a tokenizer, or one whose activations are not finite.
    """
    vocabulary = token_texts(checkpoint)
    if (positions := quantity(checkpoint.config, "positions") or LENGTH) < LENGTH:
        raise fail(
            checkpoint.name,
            f"a donor made for {LENGTH} positions, the length of a probe",
            str(positions),
            "use another donor",
        )
    if untrained is None and streamable(checkpoint):
        donor = stream_model(checkpoint, dtype=dtype, device=device)
    else:
        donor = load_model(checkpoint, Placement(dtype, device), untrained=untrained)
    probes = random_probes(len(vocabulary))
    run = _run_of(donor, checkpoint, probes, k, rank)
    done = run.restore(under_way, advance) if under_way else 0
    saved = time.monotonic()
    for index, block in each_block(donor, done + 1):
        run.through(index, block, advance)
        if under_way and index < checkpoint.blocks and time.monotonic() - saved >= SAVE_AFTER:
            run.save(under_way, index)
            saved = time.monotonic()
    top = {
        context: _best_of_all(run.keys(context, k), rank, len(vocabulary))
        for context in contexts_of(checkpoint)
    }
    if under_way:
        shutil.rmtree(under_way, ignore_errors=True)
    return Atlas(
        donor=analyzed_name(checkpoint, untrained),
        fingerprint=checkpoint.fingerprint,
        top=top,
        probes=run.activations,
        probe_scale=run.scales,
        vocabulary=vocabulary,
        provenance=analysis_provenance(
            dtype=dtype,
            untrained=untrained,
            k=k,
            probes={"shape": list(probes.shape), "sha256": probe_hash(probes), "seed": SEED},
            tokenizer=checkpoint.tokenizer_hash,
        )
        | ({"skipped_blocks": skipped} if (skipped := run.probes.skipped_blocks) else {}),
    )


@dataclass
class _Run:
    """An analysis under way: the inputs after the blocks so far, and the results for those."""

    contexts: dict[str, Passage]
    probes: Passage
    ranked: dict[str, Ranked]
    activations: np.ndarray
    """The probes' residual stream `[l+1, n, d]`, float16 after division by its scale; filled up to
    the last finished block.
    """
    scales: np.ndarray
    """`[l+1, d]`, float32."""
    kept: int = -1
    """The last block whose results are in files."""

    def begin(self) -> None:
        """Record what enters the first block."""
        for context, passage in self.contexts.items():
            self.ranked[context].add(passage.entering())
        self._record(0, probe_states(self.probes.entering(), "block 0"))

    def through(self, index: int, block: torch.nn.Module, advance: Advance) -> None:
        """Take all inputs through a block."""
        for context, passage in self.contexts.items():
            self.ranked[context].add(passage.through(index, block), advance)
        self._record(index, probe_states(self.probes.through(index, block), f"block {index}"))
        advance(self.probes.count)

    def _record(self, index: int, states: np.ndarray) -> None:
        self.scales[index] = np.maximum(np.abs(states).max(axis=0), np.finfo(np.float32).tiny)
        self.activations[index] = states / self.scales[index]

    def keys(self, context: str, k: int) -> Tensor:
        """Packed keys of a context, `[l+1, d, k]`, padded with the lowest key for fewer tokens."""
        filled = torch.full((*self.scales.shape, k), torch.iinfo(torch.int64).min)
        if context in self.ranked:
            found = torch.stack(self.ranked[context].keys)
            filled[:, :, : found.shape[2]] = found
        return filled

    def save(self, folder: Path, index: int) -> None:
        """Save the results up to a block, one file per block, then the hidden states after it."""
        for block in range(self.kept + 1, index + 1):
            arrays = {"activations": self.activations[block], "scale": self.scales[block]}
            arrays |= {
                f"{context}.keys": ranked.keys[block].numpy()
                for context, ranked in self.ranked.items()
            }
            write_arrays(folder / f"block-{block}.safetensors", _KIND, arrays, {})
        passages = {**self.contexts, "probes": self.probes}
        arrays = {
            f"{name}.{part}": _bytes_of(value)
            for name, passage in passages.items()
            for part, value in passage.state.items()
        }
        write_arrays(folder / _STATE, _KIND, arrays, {"block": index})
        self.kept = index

    def restore(self, folder: Path, advance: Advance) -> int:
        """Continue from a folder if it is complete; returns the last finished block, or 0."""
        try:
            states, metadata = read_arrays(folder / _STATE, _KIND, "an analysis under way")
            found = [
                read_arrays(folder / f"block-{block}.safetensors", _KIND, "a block's")[0]
                for block in range(metadata["block"] + 1)
            ]
        except FrankenmergeError:
            return 0
        passages = {**self.contexts, "probes": self.probes}
        for name, passage in passages.items():
            passage.state = {
                part: _tensor_of(states[f"{name}.{part}"], value)
                for part, value in passage.state.items()
            }
        for context, ranked in self.ranked.items():
            ranked.keys = [torch.from_numpy(block[f"{context}.keys"]) for block in found]
        for block, arrays in enumerate(found):
            self.activations[block], self.scales[block] = arrays["activations"], arrays["scale"]
        self.kept = metadata["block"]
        advance(self.kept * sum(passage.count for passage in passages.values()))
        return self.kept


def _run_of(donor: Donor, checkpoint: Checkpoint, probes: np.ndarray, k: int, rank: Rank) -> _Run:
    batches = searched(donor).split(BATCH)[rank.number :: rank.count]
    tokens = torch.cat(batches) if batches else torch.empty(0, dtype=torch.long)
    contexts = contexts_of(checkpoint) if batches else {}
    passages = {
        name: Passage(donor, tokens[:, None], prefix=prefix) for name, prefix in contexts.items()
    }
    shown = Passage(donor, torch.from_numpy(probes), batch=PROBE_BATCH)
    positions, width = shown.states[:, 1:].flatten(0, 1).shape
    activations = np.empty((checkpoint.blocks + 1, positions, width), np.float16)
    ranked = {name: Ranked(tokens, k) for name in contexts}
    run = _Run(
        passages, shown, ranked, activations, np.empty((checkpoint.blocks + 1, width), np.float32)
    )
    run.begin()
    return run


def _best_of_all(keys: Tensor, rank: Rank, vocabulary: int) -> TopTokens:
    """The best tokens over the shares of all processes."""
    together = torch.cat(gathered(keys, rank), dim=2)
    return top_tokens(together.topk(min(keys.shape[2], vocabulary), dim=2).values)


def _bytes_of(value: Tensor) -> np.ndarray:
    return value.contiguous().cpu().view(torch.uint8).numpy()


def _tensor_of(content: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(content).view(like.dtype).to(like.device)


def cached_path(
    checkpoint: Checkpoint,
    cache: Path,
    *,
    images: ImageSet | None = None,
    untrained: int | None,
    dtype: str,
) -> Path:
    """Where the donor's atlas is kept in the folder `cache`.

    The fingerprint, the tokenizer, the dtype, the seed of random weights, the images and the
    versions that could change a value are part of the name.
    """
    key = [
        checkpoint.fingerprint,
        checkpoint.tokenizer_hash,
        dtype,
        untrained,
        TOP,
        frankenmerge.__version__,
        torch.__version__,
        transformers.__version__,
        *([images.identity, images.names, asdict(image_shape(checkpoint))] if images else []),
    ]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    return cache / f"{name}{SUFFIX}"


def cached_analyze(
    checkpoint: Checkpoint,
    *,
    cache: Path,
    images: ImageSet | None = None,
    untrained: int | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    advance: Advance = ignore,
) -> Atlas:
    """Return the donor's atlas from the folder `cache`, or analyze the donor and save it there.

    An interrupted analysis leaves its finished blocks there, and the next one continues after them.
    `images` are for vision transformers.
    """
    path = cached_path(checkpoint, cache, images=images, untrained=untrained, dtype=dtype)
    rank = own_rank()
    if path.exists():
        return replace(load_atlas(path), donor=analyzed_name(checkpoint, untrained))
    name = path.name.removesuffix(SUFFIX)
    if images:
        atlas = analyze_images(
            checkpoint,
            images,
            k=TOP,
            untrained=untrained,
            dtype=dtype,
            device=device,
            advance=advance,
        )
        save_atlas(atlas, path)
        return atlas
    under_way = cache / f"{name}.{rank.number}-of-{rank.count}.under-way"
    atlas = analyze(
        checkpoint,
        untrained=untrained,
        dtype=dtype,
        device=device,
        rank=rank,
        under_way=under_way,
        advance=advance,
    )
    if rank.first:
        save_atlas(atlas, path)
    return atlas


def contexts_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The tokens before every token that is searched: none, and BOS where the donor has one."""
    contexts: dict[str, tuple[int, ...]] = {"plain": ()}
    bos = checkpoint.config.get("bos_token_id")
    if isinstance(bos, int) and 0 <= bos < (quantity(checkpoint.config, "vocabulary") or 0):
        contexts["bos"] = (bos,)
    return contexts


def work(checkpoint: Checkpoint) -> int:
    """Inputs times blocks in `analyze`, the total of a progress bar."""
    vocabulary = quantity(checkpoint.config, "vocabulary") or 0
    return (
        vocabulary * len(contexts_of(checkpoint)) + len(random_probes(vocabulary))
    ) * checkpoint.blocks
