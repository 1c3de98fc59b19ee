"""The description of a family: tensor names, config names, and per-block config fields.

The families themselves are entries of the table in `families`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from frankenmerge.errors import fail

Config = Mapping[str, Any]
VALUE_HEADS = r"^(v_head|value_head|reward_head)\."
"""Pattern of the heads of reward and value models, which no causal language model reads."""
LEFT_OUT = (
    rf"{VALUE_HEADS}"
    r"|\.((weight|input|output|[kqv])_scale(_inv|_2)?|(weight|input)_zero_point|(weight_)?g_idx"
    r"|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+|SCB|weight_format)$"
)
"""Pattern of tensors that are next to a plain model's: heads of reward and value models, and scales
that a quantisation has left. No plain model reads them; quantised ones need their scales.
"""
Role = Literal["block", "embedding", "final", "head", "rest", "ignored"]
"""What a tensor is part of; `rest` is all that surrounds a language model, such as the towers of a
multimodal one.
"""


@dataclass(frozen=True)
class Keys:
    """The names in a family's config.json of the quantities that every family has."""

    blocks: str = "num_hidden_layers"
    width: str = "hidden_size"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    inner: str = "intermediate_size"
    positions: str = "max_position_embeddings"
    vocabulary: str = "vocab_size"


@dataclass(frozen=True)
class PerBlock:
    """A property that config.json specifies for every block, and that moves with the block."""

    key: str
    """The list in config.json."""
    usual: Any
    """The value for a block if neither the list nor a rule specifies one."""
    rule: Callable[[Config, int], Any] | None = None
    """The family's default for the block of a given index if config.json has no list."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Numbers in the config that a rule reads, in this or in older versions of the family, each
    with its minimum.
    """
    marker: str | None = None
    """Set if the list has the indices of some blocks instead of one entry per block, and the rule
    always reads it: a part of a tensor name that those blocks have and the others have not.
    """

    def of(self, config: Config, index: int) -> Any:
        """The entry of one block."""
        listed = config.get(self.key)
        if isinstance(listed, list) and not self.marker:
            return listed[index]
        return self.rule(config, index) if self.rule else self.usual

    def written(self, entries: Sequence[Any]) -> list[Any]:
        """The list in config.json for blocks with these entries."""
        return (
            [index for index, entry in enumerate(entries) if entry]
            if self.marker
            else list(entries)
        )


FULL, SLIDING = "full_attention", "sliding_attention"
LAYER_TYPES = PerBlock("layer_types", FULL)
NO_ROPE_LAYERS = PerBlock("no_rope_layers", 1)


@dataclass(frozen=True)
class Stream:
    """How a block's tensors read and write the residual stream, so that it can be rotated.

    Names are relative to the block's prefix.
    """

    norms: Mapping[str, tuple[str, ...]]
    """Norms of the stream, each with the maps that read its output; experts' maps without the
    expert's number.
    """
    writes: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj")
    """Maps whose outputs are added to the stream."""
    inside: tuple[str, ...] = ()
    """Tensors that neither read nor write the stream, such as norms of single heads."""
    output_norms: tuple[str, ...] = ()
    """Norms of a map's output: their gains belong to the donor's own basis, so such a block cannot
    be rotated.
    """
    transposed: bool = False
    """Whether maps are stored `[in, out]`."""


@dataclass(frozen=True)
class Architecture:
    """One family's names; tensor names are prefixes, as they are in a checkpoint."""

    root: str
    """The inner model's prefix; old checkpoints may omit it."""
    block: str
    """A block's prefix after `root`, `{}` for its index."""
    embedding: tuple[str, ...]
    """Prefixes after `root` of the tensors before the first block."""
    final: str
    """Prefix after `root` of the final norm."""
    head: str = "lm_head."
    """Prefix, without `root`, of the map from the last hidden state to the vocabulary."""
    head_parts: tuple[str, ...] = ()
    """Prefixes, without `root`, of what else is between the last hidden state and the logits, such
    as the dense map and the norm of an encoder's head.
    """
    ties: Mapping[str, str] = field(default_factory=dict)
    """Tensors of the head that are another one in a tied model, with that one's name; empty where
    it is the weight of `head` alone, which is the embedding matrix.
    """
    norm: Literal["rms", "layer"] = "rms"
    keys: Keys = field(default_factory=Keys)
    per_block: tuple[PerBlock, ...] = (NO_ROPE_LAYERS, LAYER_TYPES)
    """Properties that move with the blocks; those that a rule needs come before it."""
    index_bound: tuple[str, ...] = ()
    """Config fields that, when set, make a block's computation depend on its index: such donors
    cannot be respliced.
    """
    rope_kinds: Mapping[str, str] = field(default_factory=dict)
    """Kinds of attention that have rotary settings of their own, each with the older config field
    for its base.
    """
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Older names of config fields, with the newer ones."""
    ignored: str = r"(?!)"
    """Pattern of constant buffers that old checkpoints have and no loader reads."""
    defaults: Config = field(default_factory=dict)
    """The family's defaults for fields that config.json may omit, of the fields that are compared
    between donors.
    """
    learned_positions: bool = False
    """Whether positions are a matrix alongside the embedding."""
    tied: bool = False
    """Whether the head is the embedding if config.json does not say."""
    widening: int = 0
    """The inner width as a multiple of the width if config.json does not say."""
    queries_keys: tuple[str, ...] = ("q_proj", "k_proj")
    """Maps of a block's attention that compute only queries and keys; attention to a single
    position does not depend on them.
    """
    fused: str | None = None
    """The map that computes queries, keys and values together, in this order."""
    fused_by_head: bool = False
    """Whether the fused outputs are in that order within each head, instead of over all."""
    left_out: str = LEFT_OUT
    """Pattern of tensors that are no part of the model."""
    stream: Stream | None = None
    """How its blocks read and write the residual stream; None if that is not known."""
    listed: bool = True
    """Whether this is an entry of the table, whose `defaults` are known."""

    @property
    def unread(self) -> str:
        """Pattern of tensors that no loader of the family reads."""
        return f"{self.ignored}|{self.left_out}"

    @property
    def matrix(self) -> str:
        """The name of the embedding matrix."""
        return f"{self.root}{next(iter(self.embedding), '')}weight"

    @property
    def tied_names(self) -> Mapping[str, str]:
        """Tensors of a tied model's head that no file has, with those that they are."""
        return self.ties or {f"{self.head}weight": self.matrix}

    def role(self, name: str) -> tuple[Role, int | None, str]:
        """The role of a tensor: (role, block index or None, canonical name).

        The canonical name of a block's tensor has `{}` for the index. Raises FrankenmergeError for
        a tensor of no known role.
        """
        if re.search(self.unread, name):
            return "ignored", None, name
        if name.startswith((self.head, *self.head_parts)):
            return "head", None, name
        inner = name.removeprefix(self.root)
        if match := re.match(re.escape(self.block).replace(r"\{\}", r"(\d+)"), inner):
            return "block", int(match[1]), self.root + self.block + inner[match.end() :]
        if inner.startswith(self.embedding):
            return "embedding", None, self.root + inner
        if inner.startswith(self.final):
            return "final", None, self.root + inner
        if not self.listed:
            return "rest", None, name
        raise fail(
            f"tensor {name}",
            "a tensor of a block, the embedding, the final norm or the head",
            "a name of none of these",
            "use a plain causal language model; adapters and multimodal towers cannot be spliced",
        )
