"""The alignment: how two atlases agree, block by block; `align` writes it, `plan` reads it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frankenmerge.errors import Fault, fail, raise_all
from frankenmerge.storage.arrays import read_arrays, write_arrays

SUFFIX = ".alignment.safetensors"
_KIND = "frankenmerge.alignment/1"


class Score(NamedTuple):
    """One measure of agreement, with its null models."""

    matrix: np.ndarray
    """`[l_a+1, l_b+1]` float32: A after `i` blocks against B after `j`; 1 is full agreement."""
    nulls: dict[str, np.ndarray]
    """Matrices of the same shape by name: the score expected under each null."""
    detail: np.ndarray
    """`[l_a+1, l_b+1, d]` float16: the score of every shared neuron, NaN for neurons that were not
    searched; `[..., 0]` for a score that has no value per neuron.
    """
    interval: np.ndarray | None = None
    """`[2, l_a+1, l_b+1]` float32: ends of the 95 % bootstrap interval over neurons or probes;
    files from before 0.2 have none.
    """

    @property
    def transposed(self) -> "Score":
        """The same with A and B exchanged."""
        nulls = {null: matrix.T for null, matrix in self.nulls.items()}
        return Score(
            self.matrix.T,
            nulls,
            self.detail.transpose(1, 0, 2),
            None if self.interval is None else self.interval.transpose(0, 2, 1),
        )


class Exchange(NamedTuple):
    """The loss of swapped blocks, nats per token on random tokens, see `evaluation.block_swaps`."""

    replacement: tuple[np.ndarray, np.ndarray]
    """`[l_a, l_b]`: A with its block `i` replaced by B's block `j`; and `[l_b, l_a]`: B with its
    own replaced by A's.
    """
    interchange: tuple[np.ndarray, np.ndarray]
    """`[l_a, l_a]`: A with blocks `i` and `j` interchanged; and B, `[l_b, l_b]`."""

    @property
    def transposed(self) -> "Exchange":
        """The same with A and B exchanged."""
        (replaced_a, replaced_b), (swapped_a, swapped_b) = self
        return Exchange((replaced_b, replaced_a), (swapped_b, swapped_a))


class ModuleScores(NamedTuple):
    """How little a block's result changes with another donor's module, see `analysis.modules`."""

    names: list[str]
    """Of attention, MLP and linear maps, within a block."""
    replacement: tuple[np.ndarray, np.ndarray]
    """`[modules, l_a, l_b]` float32: a module of A's block `i` replaced by that of B's `j`, 1 for
    no change, NaN where blocks are not neighbours; and B's by A's, `[modules, l_b, l_a]`.
    """

    @property
    def transposed(self) -> "ModuleScores":
        """The same with A and B exchanged."""
        of_a, of_b = self.replacement
        return ModuleScores(self.names, (of_b, of_a))


@dataclass(frozen=True)
class Alignment:
    """The agreement of donor A after `i` blocks with donor B after `j`, neuron by neuron."""

    donors: tuple[str, str]
    fingerprints: tuple[str, str]
    widths: tuple[int, int]
    """Neurons of each; the scores compare the indices that both have."""
    scores: dict[str, Score]
    tokens: tuple[np.ndarray, np.ndarray]
    """Each donor's best tokens `[l+1, d, k]`, int32."""
    vocabulary: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    gram: np.ndarray | None = None
    """`[l_a+l_b+2, l_a+l_b+2]` float64: inner products of A's states, then B's, each input's
    divided by their mean norm, a mean over the inputs; absent from older files.
    """
    rotated_gram: np.ndarray | None = None
    """The same with B's states rotated to A's basis, on probes that the rotation was not fitted on;
    absent from older files.
    """
    exchange: Exchange | None = None
    """None if it was not measured."""
    modules: ModuleScores | None = None
    """None if they were not scored."""

    @property
    def blocks(self) -> tuple[int, int]:
        """Number of blocks of each donor."""
        rows, columns = next(iter(self.scores.values())).matrix.shape
        return rows - 1, columns - 1

    @property
    def of_images(self) -> bool:
        """Whether it is of two vision transformers."""
        return bool(self.provenance.get("images"))

    @property
    def transposed(self) -> "Alignment":
        """The same with A and B exchanged; every score is symmetric."""
        return replace(
            self,
            **{
                key: getattr(self, key)[::-1]
                for key in ("donors", "fingerprints", "widths", "tokens")
            },
            scores={name: score.transposed for name, score in self.scores.items()},
            provenance=self.provenance | {"atlases": self.provenance.get("atlases", [])[::-1]},
            gram=self._swapped(self.gram),
            rotated_gram=self._swapped(self.rotated_gram),
            exchange=None if self.exchange is None else self.exchange.transposed,
            modules=None if self.modules is None else self.modules.transposed,
        )

    def _swapped(self, gram: np.ndarray | None) -> np.ndarray | None:
        """Inner products with B's states first."""
        return None if gram is None else np.roll(gram, [self.blocks[1] + 1] * 2, axis=(0, 1))


def save_alignment(alignment: Alignment, path: str | Path) -> None:
    """Write an alignment, complete or not at all."""
    path = Path(path)
    arrays = {"a.tokens": alignment.tokens[0], "b.tokens": alignment.tokens[1]}
    for name, score in alignment.scores.items():
        arrays |= {f"score.{name}": score.matrix, f"detail.{name}": score.detail}
        arrays |= {} if score.interval is None else {f"interval.{name}": score.interval}
        arrays |= {f"null.{name}.{null}": matrix for null, matrix in score.nulls.items()}
    grams = {"state_gram": alignment.gram, "rotated_state_gram": alignment.rotated_gram}
    arrays |= {name: gram for name, gram in grams.items() if gram is not None}
    for name, (of_a, of_b) in (
        {} if alignment.exchange is None else alignment.exchange._asdict().items()
    ):
        arrays |= {f"{name}.a": of_a, f"{name}.b": of_b}
    if alignment.modules is not None:
        of_a, of_b = alignment.modules.replacement
        arrays |= {"modules.a": of_a, "modules.b": of_b}
    arrays["vocabulary"] = np.frombuffer(json.dumps(alignment.vocabulary).encode(), dtype=np.uint8)
    metadata = {
        key: getattr(alignment, key) for key in ("donors", "fingerprints", "widths", "provenance")
    }
    if alignment.modules is not None:
        metadata["modules"] = alignment.modules.names
    write_arrays(path, _KIND, arrays, metadata)


def need_language_alignments(alignments: Iterable[Alignment]) -> None:
    """Raise FrankenmergeError for alignments of vision transformers, which no plan is made of."""
    raise_all(
        Fault(
            " | ".join(alignment.donors),
            "an alignment of language models",
            "one of vision transformers",
            "write a recipe that merges whole models by hand",
        )
        for alignment in alignments
        if alignment.of_images
    )


def load_alignment(path: str | Path) -> Alignment:
    """Read an alignment. Raises FrankenmergeError for a file that is not one."""
    path = Path(path)
    arrays, metadata = read_arrays(
        path, _KIND, f"an alignment, as `frankenmerge align A B -o NAME{SUFFIX}` writes it"
    )
    try:
        scores = {}
        for name in (key.removeprefix("score.") for key in arrays if key.startswith("score.")):
            prefix = f"null.{name}."
            nulls = {
                key.removeprefix(prefix): array
                for key, array in arrays.items()
                if key.startswith(prefix)
            }
            scores[name] = Score(
                arrays[f"score.{name}"],
                nulls,
                arrays[f"detail.{name}"],
                arrays.get(f"interval.{name}"),
            )
        (a, b), (print_a, print_b), (width_a, width_b) = (
            metadata["donors"],
            metadata["fingerprints"],
            metadata["widths"],
        )
        tokens = arrays["a.tokens"], arrays["b.tokens"]
        vocabulary = json.loads(arrays["vocabulary"].tobytes())
        prints, widths = (print_a, print_b), (width_a, width_b)
        tables = [
            (arrays[f"{name}.a"], arrays[f"{name}.b"])
            for name in Exchange._fields
            if f"{name}.a" in arrays
        ]
        exchange = Exchange(*tables) if tables else None
        modules = None
        if "modules" in metadata:
            modules = ModuleScores(metadata["modules"], (arrays["modules.a"], arrays["modules.b"]))
        grams = arrays.get("state_gram"), arrays.get("rotated_state_gram")
        return Alignment(
            (a, b),
            prints,
            widths,
            scores,
            tokens,
            vocabulary,
            metadata["provenance"],
            *grams,
            exchange,
            modules,
        )
    except (KeyError, ValueError) as error:
        raise fail(
            str(path),
            "an alignment with all its parts",
            f"{error} missing or broken",
            "align the donors again",
        ) from error
