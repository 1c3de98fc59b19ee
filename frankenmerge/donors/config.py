"""A donor's config.json: read with its family's defaults, compared, spliced with the blocks."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

from frankenmerge.donors.architecture import (
    FULL,
    LAYER_TYPES,
    SLIDING,
    Architecture,
    Config,
    Keys,
    PerBlock,
)
from frankenmerge.donors.families import FAMILIES, INDEX_BOUND, TEXT_ONLY, USUAL
from frankenmerge.donors.library import completed, declared, own_names
from frankenmerge.donors.moving import DEPTHS, is_per_block, moved
from frankenmerge.errors import Fault

STORAGE_KEYS = ("quantization_config", "compression_config")
"""Config fields that say how the tensors of a donor's file were stored."""

FREE = {
    *STORAGE_KEYS,
    "_name_or_path",
    "architectures",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "hidden_dropout",
    "classifier_dropout",
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "task_specific_params",
    "pretraining_tp",
    "vocab_size",
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "num_hidden_layers",
    "n_layer",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "rotary_pct",
    "rotary_emb_base",
    "partial_rotary_factor",
    "_attn_implementation_autoset",
    "id2label",
    "label2id",
    "problem_type",
    "cache_implementation",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
}
"""Config fields in which donors may differ, because no block's computation depends on them or they
are compared separately.
"""

BOOKKEEPING = {
    *("auto_map", "unsloth_version", "unsloth_fixed", "_commit_hash", "tokenizer_class"),
    *("attn_implementation", "_attn_implementation", "_flash_attn_2_enabled", "use_flash_attn"),
    *("return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_bfloat16"),
    *("tf_legacy_loss", "finetuning_task", "prefix", "sep_token_id", "decoder_start_token_id"),
    *("model_max_length", "tokenizer_model_max_length", "tokenizer_padding_side", "pad_token"),
    *("max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping", "num_beams"),
    *("num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "typical_p"),
    *("repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids"),
    *("encoder_no_repeat_ngram_size", "num_return_sequences", "output_scores"),
    *("return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
    *("begin_suppress_tokens", "chunk_size_feed_forward"),
}
"""Config fields that say how a file was made or how text is generated. Differences are remarks in
every family.
"""

_EPSILONS = {"rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps"}


def language(config: Config) -> Config:
    """The part of a config that describes the language model: text_config of a multimodal one."""
    text = config.get("text_config")
    return text if isinstance(text, Mapping) and "model_type" in text else config


def is_multimodal(config: Config) -> bool:
    """Whether a config describes a language model among other parts, such as vision towers."""
    return language(config) is not config


def text_only(config: Config) -> dict[str, Any]:
    """The config of the language model alone, complete, as one of its text-only family.

    Positions of images (`mrope_section` and the like) are left out.
    """
    text = dict(language(completed(config) or config))
    text["model_type"] = TEXT_ONLY.get(name := str(text["model_type"]), name)
    if isinstance(rope := text.get("rope_parameters"), Mapping):
        text["rope_parameters"] = {
            key: value for key, value in rope.items() if not key.startswith("mrope_")
        }
    return text


def family(config: Config) -> Architecture:
    """The entry for a config's family; the usual architecture for a family that has none."""
    if listed := FAMILIES.get(config["model_type"]):
        return listed
    names = own_names(str(language(config)["model_type"]))
    usual = asdict(USUAL.keys)
    found = (key for key in DEPTHS if key in language(config))
    usual["blocks"] = next(found, usual["blocks"])
    return replace(USUAL, keys=Keys(**{key: names.get(name, name) for key, name in usual.items()}))


def quantity(config: Config, name: str) -> int | None:
    """A size by its common name, which is one of the fields of `Keys`; None if it is not known."""
    architecture = family(config)
    keys, config = architecture.keys, language(config)
    value = config.get(getattr(keys, name))
    if value is None and name == "kv_heads":
        if config.get("multi_query") and not config.get("new_decoder_architecture"):
            return 1  # Falcon, StarCoder
        return config.get("num_kv_heads") or config.get(keys.heads)
    if value is None and name == "inner" and architecture.widening:
        return architecture.widening * config[keys.width]
    return value


def is_tied(config: Config) -> bool:
    """Whether the head is the embedding matrix."""
    return config.get("tie_word_embeddings", family(config).tied)


def rope(config: Config) -> dict[str, Any]:
    """Rotary position settings in one form, for all forms of config.json.

    In a family whose kinds of attention have settings of their own, a mapping with one form per
    kind.
    """
    architecture = family(config)
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not architecture.rope_kinds:
        return _rope(config, written, "rope_theta")
    # The flat form, of older versions, applies to the blocks with full attention.
    by_kind = written if set(written) & set(architecture.rope_kinds) else {FULL: written}
    return {
        kind: _rope(config, by_kind.get(kind) or {}, base)
        for kind, base in architecture.rope_kinds.items()
    }


def _rope(config: Config, written: Config, base: str) -> dict[str, Any]:
    settings = {key: value for key, value in written.items() if value is not None}
    defaults = family(config).defaults
    settings["rope_type"] = kind = _rope_type(settings)
    settings.pop("type", None)
    bases = (
        settings.get("rope_theta"),
        config.get(base),
        config.get("rotary_emb_base"),
        defaults.get(base),
    )
    settings["rope_theta"] = next((float(value) for value in bases if value), None)
    shares = (
        settings.pop("partial_rotary_factor", None),
        config.get("partial_rotary_factor"),
        config.get("rotary_pct"),
        defaults.get("partial_rotary_factor"),
    )
    if (share := next((share for share in shares if share is not None), 1.0)) != 1.0:
        settings["partial_rotary_factor"] = share
    if kind in _SCALED:
        positions = config.get(family(config).keys.positions)
        original = "original_max_position_embeddings"
        own = config.get(original) or settings.get(original) or defaults.get(original) or positions
        settings[original] = own
        if kind == "longrope" and own and positions:
            settings.setdefault("factor", positions / own)
    return settings


def _rope_type(written: Config) -> str:
    """The kind of scaling. Phi-3's older names of long rope, `su` and `yarn`, have its factors."""
    kind = written.get("rope_type") or written.get("type") or "default"
    return "longrope" if "long_factor" in written else kind


_SCALED = ("dynamic", "llama3", "longrope", "yarn")
"""Rotary settings that depend on the number of positions that a donor was first trained for."""


def window(config: Config) -> int | None:
    """The window of blocks with limited attention; None if no block's attention is limited."""
    architecture = family(config)
    kinds = next((part for part in architecture.per_block if part.key == LAYER_TYPES.key), None)
    if kinds is None:
        return language(config).get("sliding_window")
    if kinds.rule or isinstance(config.get(kinds.key), list):
        limited = any(
            kinds.of(config, index) == SLIDING for index in range(quantity(config, "blocks") or 0)
        )
    else:
        limited = config.get(
            "use_sliding_window", architecture.defaults.get("use_sliding_window", True)
        )
    return (
        config.get("sliding_window", architecture.defaults.get("sliding_window"))
        if limited
        else None
    )


def head_width(config: Config) -> int | None:
    """Width of one attention head."""
    width, heads = quantity(config, "width"), quantity(config, "heads")
    shared = width // heads if width and heads else None
    return config.get("head_dim") or family(config).defaults.get("head_dim") or shared


def block_kind(config: Config, index: int) -> tuple[Any, ...]:
    """The properties that decide which tensors a block has: equal for blocks of the same kind."""
    return tuple(part.of(config, index) for part in family(config).per_block if part.marker)


def differences(
    first: Config, other: Config, *, based: bool = False
) -> tuple[list[str], list[str]]:
    """Compare two configs.

    Args:
        first: one config.
        other: another one.
        based: whether the blocks are merged with those of a base model, whose rotary positions then
            apply to all.

    Returns:
        The reasons why one config cannot describe blocks of both, and remarks on differences that
        do no harm.
    """
    wrapped = is_multimodal(first) or is_multimodal(other)
    if wrapped and first["model_type"] != other["model_type"]:
        first, other = text_only(first), text_only(other)
    names = [str(language(config)["model_type"]) for config in (first, other)]
    if names[0] != names[1]:
        return [f"family: {names[0]} and {names[1]} compute differently"], []
    both = _compared(first, other)
    unequal = {key: pair for key, pair in both.items() if pair[0] != pair[1]}
    lines = {key: f"{key}: {a} and {b}" for key, (a, b) in unequal.items()}
    if based and "rope_parameters" in unequal:
        lines["rope_parameters"] += "; the result has the base model's"
    harmless = _harmless(unequal, first, other) | ({"rope_parameters"} if based else set())
    return [lines[key] for key in lines if key not in harmless], [
        lines[key] for key in lines if key in harmless
    ]


def tower_differences(first: Config, other: Config) -> list[str]:
    """Settings of what surrounds the language models of multimodal configs, where they differ."""
    free = (FREE - _COMPARED) | BOOKKEEPING | {"text_config", "model_type"}

    def settings(config: Config) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in config.items():
            parts = value if isinstance(value, Mapping) and key != "text_config" else None
            named = {f"{key}.{name}": part for name, part in (parts or {}).items()}
            found |= named if parts is not None else {key: value}
        return {
            key: value
            for key, value in found.items()
            if key.rpartition(".")[2] not in free
            and not key.endswith(("_token_id", "_token_index"))
        }

    both = [settings(config) for config in (first, other)]
    names = sorted(both[0].keys() | both[1].keys())
    pairs = {name: (both[0].get(name), both[1].get(name)) for name in names}
    return [f"{name}: {one} and {two}" for name, (one, two) in pairs.items() if one != two]


def _compared(first: Config, other: Config) -> dict[str, tuple[Any, ...]]:
    """The values of both configs, by field; defaults of the table filled in."""
    architecture = family(first)
    if not architecture.listed:
        return _compared_inferred(first, other)
    both: dict[str, tuple[Any, ...]] = {"head_dim": (head_width(first), head_width(other))}
    named = [
        {architecture.synonyms.get(key, key): value for key, value in config.items()}
        for config in (first, other)
    ]
    separate = {key for part in architecture.per_block for key in (part.key, *part.numbers)} | set(
        architecture.rope_kinds.values()
    )
    fields = set(named[0]) | set(named[1]) | set(architecture.defaults)
    for key in sorted(fields - FREE - separate):
        both[key] = tuple(config.get(key, architecture.defaults.get(key)) for config in named)
    both["rope_parameters"] = (rope(first), rope(other))
    both["sliding_window"] = (window(first), window(other))
    return both


_COMPARED = {"rope_parameters", "rope_theta", "rope_scaling", "sliding_window", "head_dim"}
"""Fields of `FREE` that are compared as they are in families that are not in the table."""


_SUPERSEDED = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "max_window_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "rope_theta": "rope_parameters",
    "rope_scaling": "rope_parameters",
}
"""Fields that are not read where the one that has taken their place is there."""


def _compared_inferred(first: Config, other: Config) -> dict[str, tuple[Any, ...]]:
    """The same for language models that are not in the table; settings of single blocks aside."""
    depth = family(first).keys.blocks
    texts = [language(completed(config) or config) for config in (first, other)]

    def shown(text: Config, key: str) -> Any:
        value = text.get(key)
        if isinstance(value, Mapping):
            free = FREE - _COMPARED
            return {name: each for name, each in value.items() if name not in free}
        return "one a block" if is_per_block(key, value, text.get(depth)) else value

    listed = {number for number, key in _SUPERSEDED.items() if all(text.get(key) for text in texts)}
    # A field that its family does not declare, and one of both has, is of another version.
    known = declared(str(texts[0]["model_type"])) | {"head_dim"}
    known = known if len(known) > 1 else set(texts[0]) | set(texts[1])
    fields = (set(texts[0]) & set(texts[1])) | ((set(texts[0]) | set(texts[1])) & known)
    fields -= (FREE - _COMPARED) | {depth} | listed
    return {key: (shown(texts[0], key), shown(texts[1], key)) for key in sorted(fields)}


def _harmless(unequal: Config, first: Config, other: Config) -> set[str]:
    """Those of the fields in which two configs differ that change no computation."""
    architecture = family(first)
    harmless = (_EPSILONS | BOOKKEEPING) & set(unequal)
    if architecture.listed:
        read = set(architecture.defaults) | set(asdict(architecture.keys).values())
        read |= {"head_dim", "rope_parameters", "sliding_window", *architecture.index_bound}
        # The family reads no other field; one without a default that only one config has is a size,
        # which shows in the tensors' shapes.
        one_sided = {key for key in unequal if None in unequal[key]}
        one_sided -= {"sliding_window", *architecture.defaults}
        return harmless | (set(unequal) - read) | one_sided
    return harmless


def spliced_config(
    base: Config, blocks: Sequence[tuple[Config, int]], tied: bool
) -> dict[str, Any]:
    """The config of a model with these blocks, otherwise as `base`.

    Settings of single blocks move with them, even if a donor's config.json leaves them to its
    family's rule.

    Args:
        base: the config for everything else.
        blocks: for each block the config of its donor and its index there.
        tied: whether the head is the embedding matrix.
    """
    if not family(base).listed:
        return _spliced_inferred(base, blocks, tied)
    config = deepcopy(dict(base))
    config[family(base).keys.blocks] = len(blocks)
    for part in family(base).per_block:
        config = _with_entries(config, part, [part.of(donor, index) for donor, index in blocks])
    config["tie_word_embeddings"] = tied
    if isinstance(scaling := config.get("rope_scaling"), dict) and scaling.get("type") == "su":
        scaling["type"] = "longrope"  # transformers 5 reads the older name in part alone
    config.pop("auto_map", None)  # names files with code, which the result does not have
    return config


def _spliced_inferred(
    base: Config, blocks: Sequence[tuple[Config, int]], tied: bool
) -> dict[str, Any]:
    """The same for a family that is not in the table: what has an entry a block moves."""
    depth = family(base).keys.blocks
    texts = [(language(donor), index) for donor, index in blocks]
    config = deepcopy(dict(base))
    text = moved(language(base), texts, depth, FREE - {"num_hidden_layers", "n_layer"})
    if is_multimodal(base):
        config["text_config"] = text
    else:
        config = text
    if is_tied(base) != tied:
        config["tie_word_embeddings"] = tied
    return config


def with_changes(written: Config, completed: Config, changed: Config) -> dict[str, Any]:
    """A config as it was written, with what differs between its completed form and `changed`."""
    result = deepcopy(dict(written))
    for key, value in changed.items():
        if key in completed and completed[key] == value:
            continue
        if isinstance(value, Mapping) and isinstance(written.get(key), Mapping):
            result[key] = with_changes(written[key], completed.get(key) or {}, value)
        else:
            result[key] = deepcopy(value)
    for key in completed.keys() - changed.keys():
        result.pop(key, None)
    return result


def _with_entries(config: dict[str, Any], part: PerBlock, entries: list[Any]) -> dict[str, Any]:
    """The config with `entries` for its blocks.

    They are a list if the config has or needs one. Numbers that a rule reads are kept only if the
    rule then gives the same entries.
    """
    listed = {part.key: part.written(entries)}
    rest = {key: value for key, value in config.items() if key != part.key}
    rule = part.rule or (lambda _config, _index: part.usual)

    def agrees(trial: Config) -> bool:
        return [rule(trial, index) for index in range(len(entries))] == entries

    for number, least in part.numbers.items():
        own = rest.pop(number, None)
        read = next(iter(part.numbers))  # the others are its names in other versions
        values = (own, *range(least, len(entries) + 2)) if part.rule and own is not None else ()
        fitting = [
            value
            for value in values
            if agrees(rest | (listed if part.marker else {}) | {read: value})
        ]
        rest |= {number: fitting[0]} if fitting else {}
    return rest | listed if part.key in config or not agrees(rest) else rest


def config_faults(config: Config, place: str) -> list[Fault]:
    """The reasons why a donor's blocks cannot be moved."""
    architecture = family(config)
    remedy = "fix the donor's config.json"
    faults: list[Fault] = []
    for key in (*architecture.index_bound, *(INDEX_BOUND if architecture.listed else ())):
        if config.get(key):
            faults.append(
                Fault(
                    f"{place}: {key}",
                    "not set",
                    repr(config[key]),
                    "a block of this model depends on its position; use another donor",
                )
            )
    for part in architecture.per_block:
        faults += _per_block_faults(config, part, place)
    if not architecture.listed:
        return faults
    for key in ("rope_parameters", "rope_scaling"):
        kinds = architecture.rope_kinds if isinstance(config.get(key), Mapping) else ()
        for name, value in (
            (key, config.get(key)),
            *((f"{key}.{kind}", config[key].get(kind)) for kind in kinds),
        ):
            if not isinstance(value, Mapping | None):
                faults.append(Fault(f"{place}: {name}", "an object", repr(value), remedy))
    for key in ("rope_theta", "rotary_emb_base", *architecture.rope_kinds.values()):
        if not isinstance(config.get(key), int | float | None):
            faults.append(Fault(f"{place}: {key}", "a number", repr(config[key]), remedy))
    return faults


def _per_block_faults(config: Config, part: PerBlock, place: str) -> Iterator[Fault]:
    listed, blocks = config.get(part.key), quantity(config, "blocks") or 0
    where, remedy = f"{place}: {part.key}", "fix the donor's config.json"
    if not isinstance(listed, list | None):
        yield Fault(where, "a list", repr(listed), remedy)
    elif listed is not None and not part.marker and len(listed) != blocks:
        yield Fault(
            where, f"one entry for each of {blocks} blocks", f"{len(listed)} entries", remedy
        )
    elif (
        listed
        and part.marker
        and any(type(index) is not int or not 0 <= index < blocks for index in listed)
    ):
        yield Fault(where, f"indices of blocks, 0 to {blocks - 1}", repr(listed), remedy)
    for number, least in part.numbers.items():
        value = config.get(number, least)
        unread = listed is not None and (value is None or part.rule is None)
        if not unread and (type(value) is not int or value < least):
            yield Fault(
                f"{place}: {number}", f"a whole number, {least} or more", repr(value), remedy
            )
