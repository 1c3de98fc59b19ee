"""Resolve a recipe against its donors: the one place that decides what a recipe means.

Everything that describes a result reads the fields of `Splice` and derives nothing again: the two
executors, summaries, cards, diagrams, lineages, provenance.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmerge.artefacts.json_files import dump_json
from frankenmerge.artefacts.provenance import HealingRecord
from frankenmerge.artefacts.recipe import Block, Recipe, Seam, key_of, renamed
from frankenmerge.artefacts.recipe_schema import Slice
from frankenmerge.donors.checkpoint import PROCESSOR_FILES, Checkpoint
from frankenmerge.donors.config import quantity, with_changes
from frankenmerge.donors.tokens import Tokens
from frankenmerge.donors.views import seen_as, tower_remarks
from frankenmerge.errors import FrankenmergeError, raise_all
from frankenmerge.splicing.listing import Draft, filtered_names, operations_of
from frankenmerge.splicing.methods import METHODS
from frankenmerge.splicing.mixtures import mixture_donor_faults, with_experts
from frankenmerge.splicing.moved_blocks import settled
from frankenmerge.splicing.operations import (
    HEALED,
    Copy,
    Operation,
    Rotate,
    rebound,
    zero_row_remarks,
)
from frankenmerge.splicing.parameters import method_faults, recipe_remarks
from frankenmerge.splicing.result import (
    Donors,
    is_result_tied,
    result_config,
    result_dtype,
    spelled_out,
    stored_remarks,
)
from frankenmerge.splicing.special_ids import with_token_ids
from frankenmerge.splicing.token_differences import token_findings
from frankenmerge.splicing.tokenizer import TurnEnds, tokenizer_files, turn_ends
from frankenmerge.splicing.validation import (
    compatibility_faults,
    donor_faults,
    donor_remarks,
    gauge_recipe_faults,
    left_out_remarks,
    pairing_faults,
    range_faults,
)
from frankenmerge.splicing.vocabulary import (
    Vocabulary,
    known_tokens,
    result_vocabulary,
    rowless_remarks,
)
from frankenmerge.storage.hashing import file_hash
from frankenmerge.storage.safetensors_header import Tensor

if TYPE_CHECKING:
    from frankenmerge.artefacts.evaluation import Evaluation


@dataclass(frozen=True, eq=False)
class Splice:
    """A recipe bound to its donors: everything that is known before a tensor is read."""

    recipe: Recipe
    """As it was written."""
    spelled: Recipe
    """The same with slices instead of whole models."""
    donors: Donors
    """By the names in the recipe."""
    config: dict[str, Any]
    """The result's config.json."""
    dtype: str
    """The type of the result's tensors, by its name in safetensors."""
    vocabulary: Vocabulary | None
    """Where rows of embedding and head are matched by their tokens."""
    tied: bool
    """Whether the result's head is its embedding."""
    operations: tuple[Operation, ...]
    """What makes its tensors, in layer order."""
    tokenizer: dict[str, bytes]
    """The files of its tokenizer, by name."""
    generation_config: bytes | None = None
    """The content of its generation_config.json; None without one."""
    processor: Mapping[str, bytes] = field(default_factory=dict)
    """The files of its processor of images and sound, by name: the base donor's."""
    remarks: tuple[str, ...] = ()
    """Worth knowing about the donors; they forbid nothing."""
    planned: "Splice | None" = None
    """The same before its stages were made, which identifies it."""
    healing: HealingRecord | None = None
    """How some of its tensors were trained."""
    evaluations: "tuple[Evaluation, ...]" = ()
    """What was measured of it, for its card."""
    raw: bool = False
    """Whether it is of tensors without a model, matched by their names: see `resolve_raw`."""

    @property
    def slices(self) -> Sequence[Slice]:
        """What its blocks are, from the input on."""
        return self.spelled.parts

    @property
    def base(self) -> Checkpoint:
        """The donor of config and generation config, but for their token ids."""
        return self.donors[self.recipe.base]

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Where each block is from; of one that is merged from several, its first source."""
        return tuple(self.spelled.blocks)

    @cached_property
    def seams(self) -> tuple[Seam, ...]:
        """Where the block that follows is not the one that followed in the donor."""
        return tuple(self.spelled.seams)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Each donor's share of the blocks; a block merged from several counts for all alike."""
        shares: dict[str, float] = {}
        for part in self.slices:
            for source in part.sources:
                weight = part.length / len(part.sources) / len(self.blocks)
                shares[source.model] = shares.get(source.model, 0.0) + weight
        return shares

    @property
    def parameters(self) -> bool:
        """Whether the recipe sets any parameter of its method."""
        levels = [self.spelled, self.spelled.stack, *self.slices, *self.spelled.sources]
        return any(level.parameters for level in levels)

    @property
    def computed(self) -> int:
        """How many tensors are computed; the others are copied."""
        return sum(not isinstance(operation, Copy) for operation in self.operations)

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(operation.bytes for operation in self.operations)

    @cached_property
    def copied_donors(self) -> tuple[str, ...]:
        """Donors of tensors that are copied, in order of appearance."""
        copies = (operation for operation in self.operations if isinstance(operation, Copy))
        return tuple(dict.fromkeys(copy.donor for copy in copies))

    @cached_property
    def stacks_whole_blocks(self) -> bool:
        """Whether it does no more than put whole blocks of donors one after the other.

        Then the first block's donor gives the embedding, and the last one's final norm and head.
        """
        if self.vocabulary is not None or any(part.by_filter for part in self.slices):
            return False
        ends = {"embedding": self.blocks[0].model, "final": self.blocks[-1].model}
        ends["head"] = ends["final"]
        role = self.base.architecture.role
        for operation in self.operations:
            end = role(operation.name)[0]
            if not isinstance(operation, Copy) or operation.donor != ends.get(end, operation.donor):
                return False
        return not self.tied or ends["embedding"] == ends["head"]

    @property
    def tokens(self) -> Tokens:
        """The result's token ids."""
        return self.vocabulary.tokens if self.vocabulary else self.tokenizer_donor.tokens

    @property
    def tokenizer_hash(self) -> str | None:
        """The hash of the tokenizer donor's vocabulary, None where it is not the result's."""
        return None if self.vocabulary else self.tokenizer_donor.tokenizer_hash

    @property
    def tokenizer_donor(self) -> Checkpoint:
        """The donor of the tokenizer's files."""
        return self.donors[self.recipe.tokenizer_donor]

    @cached_property
    def texts(self) -> dict[str, str]:
        """Hashes of the texts that gauges are fitted to, by path."""
        gauges = (part.gauge for part in self.slices)
        fits = [gauge.fit for gauge in gauges if gauge and gauge.fit != "probes"]
        return {path: file_hash(Path(path)) for path in fits}

    @cached_property
    def key(self) -> str:
        """Identifies the recipe and its donors, whatever they are called; see `key_of`.

        What was trained since has a key of its own: predictions are not about it.
        """
        if self.healing:
            plain = replace(self, healing=None).key
            return hashlib.sha256(plain.encode() + dump_json(self.healing, indent=0)).hexdigest()[
                :32
            ]
        if self.planned:
            return self.planned.key
        fingerprints = {name: donor.fingerprint for name, donor in self.donors.items()}
        return key_of(self.recipe, fingerprints, self.texts)

    def measured(self, evaluations: "Iterable[Evaluation]") -> "Splice":
        """The same with those of `evaluations` in which it was measured."""
        own = [each for each in evaluations if any(model.key == self.key for model in each.models)]
        return replace(self, evaluations=tuple(own))

    @property
    def without_gauges(self) -> "Splice":
        """The same with slices in their donors' own bases: what rotations start from."""
        plain = [part.model_copy(update={"gauge": None}) for part in self.slices]
        operations = tuple(
            Copy(each.name, each.given.donor, each.given.source, each.given.tensor)
            if isinstance(each, Rotate)
            else each
            for each in self.operations
        )
        spelled = self.spelled.model_copy(update={"slices": plain, "modules": None})
        return replace(self, spelled=spelled, operations=operations)

    @property
    def has_gauges(self) -> bool:
        """Whether any slice is rotated to another basis."""
        return any(part.gauge for part in self.slices)

    def healed(self, tensors: Mapping[str, Tensor], record: HealingRecord) -> "Splice":
        """The same with some tensors as they were after training.

        Args:
            tensors: by their names in the result, in the types and shapes of the result.
            record: of the training.
        """
        operations = tuple(
            Copy(each.name, HEALED, each.name, tensors[each.name], each)
            if each.name in tensors
            else each
            for each in self.operations
        )
        return replace(self, operations=operations, healing=record)

    def rebound(self, checkpoints: Mapping[str, Checkpoint]) -> "Splice":
        """The same splice of checkpoints that are elsewhere: fetched, folded or made meanwhile.

        Args:
            checkpoints: replace donors, by the donors' names in the recipe; they have the tensors
                that were planned. The recipe gets their names.
        """
        names = {name: checkpoint.name for name, checkpoint in checkpoints.items()}

        def rebind(donor: str, source: str) -> tuple[str, Tensor]:
            new = checkpoints.get(donor, self.donors[donor])
            return names.get(donor, donor), new.tensors[source]

        def rename(name: str) -> str:
            return names.get(name, name)

        donors = {rename(name): checkpoints.get(name, donor) for name, donor in self.donors.items()}
        vocabulary = self.vocabulary and self.vocabulary._replace(
            donors={rename(name): ids for name, ids in self.vocabulary.donors.items()}
        )
        return replace(
            self,
            recipe=renamed(self.recipe, rename),
            spelled=renamed(self.spelled, rename),
            donors=donors,
            vocabulary=vocabulary,
            operations=rebound(self.operations, rebind),
        )


def processor_files(base: Checkpoint) -> dict[str, bytes]:
    """The files of a donor's processor of images and sound, by name."""
    paths = (base.path / name for name in PROCESSOR_FILES)
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def resolve(recipe: Recipe, donors: Donors, place: str = "recipe") -> Splice:
    """Validate a recipe against its donors and decide what it means.

    Args:
        recipe: any recipe of one stage.
        donors: its donors by name, opened; configs and headers are read, no weights.
        place: where the recipe is from, for faults.

    Raises:
        FrankenmergeError: with everything that keeps the donors from being merged as it says.
    """
    if recipe.mixture is None:
        return _resolved(recipe, donors, place)
    faults = tuple(mixture_donor_faults(recipe, donors, place))
    dense = {name: donors[name] for name in recipe.dense.donors}
    try:
        splice = _resolved(recipe.dense, dense, place)
    except FrankenmergeError as error:
        raise FrankenmergeError(*error.faults, *faults) from error
    raise_all(faults)
    return with_experts(splice, recipe, donors)


def _resolved(recipe: Recipe, donors: Donors, place: str) -> Splice:
    """Resolve a recipe without experts."""
    opened, base = donors, donors[recipe.base]
    donors = {name: seen_as(donor, base) for name, donor in opened.items()}
    faults = method_faults(recipe, place)
    faults += gauge_recipe_faults(recipe, donors, place)
    unlike = tuple(compatibility_faults(recipe, opened, place))
    faults += [*unlike, *donor_faults(recipe, donors, place)]
    if recipe.merge_method not in METHODS:
        raise FrankenmergeError(*faults)
    try:
        spelled = spelled_out(recipe, donors, place)
        beyond = tuple(range_faults(spelled, donors, place))
        faults += beyond
        vocabulary = None
        remarks = [remark for donor in donors.values() for remark in donor.remarks]
        if not unlike and not beyond:
            vocabulary = result_vocabulary(spelled, donors)
            faults += pairing_faults(spelled, donors, vocabulary, place)
            tokens = token_findings(spelled, donors, place)
            faults += tokens.faults
            remarks += [*tokens.remarks, *donor_remarks(recipe, opened)]
    except FrankenmergeError as error:
        raise FrankenmergeError(*faults, *error.faults) from error
    raise_all(faults)
    dtype, tied = result_dtype(recipe, donors), is_result_tied(spelled, donors)
    config = result_config(spelled, donors, vocabulary, dtype=dtype, tied=tied)
    chosen = donors[recipe.tokenizer_donor]
    config = settled(spelled, donors, config, place)
    if base.written is not None:
        config = with_changes(base.written, base.config, config)
    rows = quantity(config, "vocabulary") or quantity(base.config, "vocabulary") or 0
    tokenizer = tokenizer_files(recipe, donors, vocabulary)
    tokens = vocabulary.tokens if vocabulary else known_tokens(chosen)
    ends = turn_ends(tokenizer, tokens) if recipe.chat_template else TurnEnds()
    settings = with_token_ids(config, base, chosen, rows, ends.ids)
    remarks += [
        *ends.remarks,
        *settings.remarks,
        *rowless_remarks(chosen.name, tokens, rows),
        *stored_remarks(base, config),
        *left_out_remarks(recipe, donors),
        *(line for name in recipe.tensor_donors for line in tower_remarks(opened[name], base)),
    ]
    listed = spelled_out(recipe, donors, place, with_base=True)
    operations = operations_of(Draft(listed, donors, vocabulary, dtype, tied), place)
    remarks += recipe_remarks(recipe, filtered_names(operations, donors))
    asked = (recipe.tokenizer and recipe.tokenizer.tokens) or {}
    remarks += zero_row_remarks(operations, vocabulary, asked)
    return Splice(
        recipe,
        spelled,
        opened,
        settings.config,
        dtype,
        vocabulary,
        tied,
        operations,
        tokenizer,
        processor=processor_files(base),
        generation_config=settings.generation,
        remarks=tuple(remarks),
    )
