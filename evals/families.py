"""Splice and average every decoder family of the installed transformers, and check the results.

Of each family two small donors with random weights are saved, in several variants: the default
settings, tied or untied embeddings, and settings of single blocks where the family has any: lists
with an entry a block in an irregular order, and numbers that say which blocks are of which kind.
Four recipes are resolved, merged and loaded again by
transformers: a taller model, a shorter one, an interleave of both donors, and their average. What
the merged model computes is compared with the donors' own blocks, run in their own models: the
input of each block is replaced by the hidden state that the splice has there. The average is
compared with a model whose parameters are averaged in memory.

The verdict of each is `right`, `wrong`, `refused` with the reason, or `unchecked` where the model
itself cannot be run on a handful of tokens.
"""

import json
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

import frankenmerge as fm
from frankenmerge.artefacts.recipe import Block, Recipe, recipe_of
from frankenmerge.errors import FrankenmergeError

BLOCKS, WIDTH, VOCABULARY, TOKENS = 6, 64, 128, 24
SIZES: dict[str, Any] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), BLOCKS),
    **dict.fromkeys(("num_decoder_layers", "decoder_layers"), BLOCKS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embed_dim", "hidden_dim"), WIDTH),
    **dict.fromkeys(("lru_width", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("backbone_hidden_size", "out_hidden_size", "projection_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("ffn_hidden_size",), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_group_num", "index_n_heads"), 2),
    **dict.fromkeys(("head_dim", "index_head_dim", "v_head_dim", "kv_lora_rank"), 16),
    **dict.fromkeys(("q_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "sliding_window", "attention_window"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "mamba_n_heads"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "time_step_rank"), 8),
    **dict.fromkeys(("rotary_dim", "index_topk"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("max_sequence_length",), 64),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "mamba_d_ssm"), VOCABULARY),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_num_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "linear_num_key_heads"), 2),
    **dict.fromkeys(("altup_num_inputs", "expand", "num_layers_per_block"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("num_centroids", "image_size", "num_position_embeddings"), 16),
    **dict.fromkeys(("image_token_id", "image_token_index", "audio_token_id"), VOCABULARY - 1),
    **dict.fromkeys(("video_token_id", "boi_token_id", "eoi_token_id"), VOCABULARY - 2),
    **dict.fromkeys(("ple_hidden_size", "adapter_rank", "n_mamba_heads"), 8),
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "default_language": "en_XX",
    "num_layers_per_stack": BLOCKS // 2,
    "num_blocks": BLOCKS,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LISTS = re.compile(r"layer_types|layers?_block_type|no_rope_layers|block_types|attention_layers")
"""Lists with an entry a block; a family fills them for its own number of blocks."""
_INDICES = re.compile(r"_only_layers$|layer_ids$|idxs$|layer_indices$")
_COUNTS = re.compile(
    r"first_k_dense|num_dense_layers|sparse_step|_(interval|period|offset|step)$|every_n"
    r"|window_pattern|max_window_layers|kv_shared|layer_(start|end)_index"
)
"""Numbers that say which blocks are of which kind."""
_ORDER = (0, 1, 1, 2, 0, 1)
"""Kinds of blocks in an order that no period and no number of first blocks describes."""
_FITTING: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4, "head_dim": None},
    {"head_dim": 16},
    {"num_experts_per_tok": 1},
    {"num_heads": 8},
    {"is_decoder": True, "axial_pos_embds": False},
    {"num_kv_shared_layers": 0},
    {"attention_types": [[["global", "local"], BLOCKS // 2]]},
    {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}},
    {"layer_types": ["conv", "full_attention"] * (BLOCKS // 2)},
)
"""Changes with which sizes that depend on each other fit, tried one by one."""
RECIPES: dict[str, tuple[tuple[int, int], ...]] = {
    "taller": tuple((0, index) for index in (0, 1, 2, 3, 2, 3, 4, 5)),
    "shorter": tuple((0, index) for index in (0, 1, 4, 5)),
    "interleaved": ((0, 0), (0, 1), (1, 2), (1, 3), (0, 2), (0, 3), (1, 4), (1, 5)),
}


class Outcome(NamedTuple):
    """What came of one recipe of one variant of a family."""

    family: str
    variant: str
    recipe: str
    verdict: str
    reason: str = ""


def small_fields(kind: Any, known: dict[str, Any], listed: bool) -> dict[str, Any]:
    """The fields of a config that sizes depend on, small; of its parts, too.

    Args:
        kind: the class of the config.
        known: its fields with their defaults.
        listed: whether lists with an entry a block keep some of their entries, in their order, or
            are left to the family's rule.
    """
    own = {*known, *getattr(kind, "attribute_map", {})}
    small = {key: value for key, value in SIZES.items() if key in own}
    if "qk_rope_head_dim" in small:
        small["head_dim"] = small["qk_rope_head_dim"]
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    for key in ("attention_hidden_size", "attention_head_dim"):
        if value := known.get(key):
            whole = WIDTH if key == "attention_hidden_size" else 16
            doubled = known.get("attention_hidden_size", 0) == 2 * known["hidden_size"]
            small[key] = whole * (1 + doubled) if value else whole
        elif key == "attention_hidden_size" and key in known:
            small[key] = WIDTH
    for key, value in known.items():
        if _LISTS.search(key) and isinstance(value, list):
            small[key] = [value[index % len(value)] for index in range(BLOCKS)] if listed else None
        elif isinstance(value, list) and len(value) == known.get("num_hidden_layers"):
            small.setdefault(key, value[:BLOCKS])
        elif isinstance(value, dict) and value.get("model_type") in CONFIG_MAPPING:
            part = small_fields(CONFIG_MAPPING[value["model_type"]], value, listed)
            if key != "text_config":
                depths = {each for each in part if part[each] == BLOCKS}
                part |= dict.fromkeys(depths, 2)  # only the language model is to have as many
            small[key] = part | {"model_type": value["model_type"]}
    return small


def tiny_config(family: str, **changes: Any) -> Any:
    """The family's config with small sizes and otherwise its own defaults.

    Raises whatever transformers raises for sizes that do not fit each other.
    """
    kind, failure = CONFIG_MAPPING[family], ValueError(family)
    known = kind().to_dict()
    text = known.get("text_config") or known
    for listed in (False, True):
        small = small_fields(kind, known, listed)
        for fitting in _FITTING:
            own = {key: value for key, value in fitting.items() if key in text}
            if fitting and not own:
                continue
            try:
                config = kind(**deepcopy(_merged(_merged(small, own), changes)))
                known_causal = family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
                if not known_causal or size_of(config) < 20_000_000:
                    return config
            except Exception as error:
                failure = error
    raise failure


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with changes, which are also those of the language model in it."""
    if isinstance(text := fields.get("text_config"), dict):
        fields = fields | {"text_config": text | changes}
    return fields | changes


def size_of(config: Any) -> int:
    """The number of parameters of a config's model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(each.numel() for each in model.parameters())


def variants(family: str) -> Iterator[tuple[str, Any]]:
    """Tied and untied, and those with other settings of single blocks."""
    settings = {"tied": {"tie_word_embeddings": True}, "untied": {"tie_word_embeddings": False}}
    try:
        kind = CONFIG_MAPPING[family]
        known = kind().to_dict()
        text = known.get("text_config") or known
        own = tiny_config(family, tie_word_embeddings=False).to_dict()
        settings |= per_block_settings(text, own.get("text_config", own))
    except Exception:  # the same happens below, or there is no such model
        pass
    for name, changes in settings.items():
        try:
            yield name, tiny_config(family, **changes)
        except Exception:  # a family whose config wants more than sizes
            continue


def per_block_settings(known: dict[str, Any], own: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings of single blocks other than the defaults, by their kind.

    Args:
        known: the language model's fields with their defaults.
        own: the same with small sizes.
    """
    lists, counts = {}, {}
    for key, value in known.items():
        if _INDICES.search(key) and (value is None or isinstance(value, list)):
            lists[key] = [1, 4]
        elif _LISTS.search(key) and isinstance(own.get(key), list) and isinstance(value, list):
            kinds = list(dict.fromkeys([*own[key], *value]))
            if len(kinds) > 1 and len(own[key]) == BLOCKS:
                lists[key] = [kinds[order % len(kinds)] for order in _ORDER]
        elif _COUNTS.search(key) and type(value) is int:
            counts[key] = 3 if value == 2 else 2
    untied = {"tie_word_embeddings": False}
    found = {"lists": lists, "counts": counts}
    return {name: untied | changes for name, changes in found.items() if changes}


@torch.no_grad()
def write_donor(folder: Path, config: Any, seed: int) -> PreTrainedModel:
    """A donor with random weights, larger than usual, so that every part shows in the logits."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel"}}
    tokenizer["model"] |= {"vocab": vocabulary, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loaded = type(model).from_pretrained(folder).eval()
    pairs = zip(loaded.parameters(), model.parameters(), strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise ValueError("transformers loads other weights than it has saved")
    return loaded


def block_list(model: PreTrainedModel) -> Any:
    """The first list of modules with as many entries as the donor has blocks."""
    return next(
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == BLOCKS
        and not re.search("vision|audio", name)
    )


@torch.no_grad()
def spliced_logits(
    models: Sequence[PreTrainedModel], blocks: Sequence[tuple[int, int]], ids: torch.Tensor
) -> torch.Tensor:
    """The logits of a splice, from passes of the whole donors."""
    state: dict[str, torch.Tensor] = {}

    def entering(_module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if "given" not in state:
            state["given"] = args[0] if args else kwargs["hidden_states"]
        if args:
            return (state["given"], *args[1:]), kwargs
        return args, kwargs | {"hidden_states": state["given"]}

    def leaving(_module: Any, _args: tuple, output: Any) -> None:
        state["made"] = output if isinstance(output, torch.Tensor) else output[0]

    def replacing(_module: Any, _args: tuple, output: Any) -> Any:
        return state["given"] if isinstance(output, torch.Tensor) else (state["given"], *output[1:])

    for donor, index in blocks:
        block = block_list(models[donor])[index]
        handles = [block.register_forward_pre_hook(entering, with_kwargs=True)]
        handles.append(block.register_forward_hook(leaving))
        models[donor](input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        state["given"] = state["made"]
    last = models[blocks[-1][0]]
    handle = block_list(last)[-1].register_forward_hook(replacing)
    logits = last(input_ids=ids, use_cache=False).logits
    handle.remove()
    return logits


@torch.no_grad()
def averaged_logits(models: Sequence[PreTrainedModel], ids: torch.Tensor) -> torch.Tensor:
    """The logits of a model whose parameters are the donors' means."""
    model = deepcopy(models[0])
    states = [each.state_dict() for each in models]
    mean = {
        name: (value + states[1][name]) / 2 if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    model.load_state_dict(mean)
    return model(input_ids=ids, use_cache=False).logits


def recipe_for(name: str, folders: Sequence[Path]) -> Recipe:
    """One of `RECIPES`, or the average."""
    if name != "average":
        return recipe_of([Block(str(folders[donor]), index) for donor, index in RECIPES[name]])
    entries = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    return Recipe.model_validate({"merge_method": "linear", "models": entries, "dtype": "float32"})


@torch.no_grad()
def checked(
    name: str, folders: Sequence[Path], models: Sequence[PreTrainedModel], scratch: Path
) -> tuple[str, str]:
    """The verdict on one recipe, and the reason."""
    output = scratch / name
    try:
        fm.merge(recipe_for(name, folders), output)
    except FrankenmergeError as error:
        return "refused", error.faults[0].found
    kind = type(models[0])
    try:
        loaded: Any = kind.from_pretrained(output, output_loading_info=True)
        merged, info = loaded
    except RuntimeError as error:
        return "wrong", f"cannot be loaded: {str(error)[:80]}"
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        return "wrong", f"keys: {sorted(map(str, wrong))[:3]}"
    ids = torch.randint(3, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    try:
        expected = (
            averaged_logits(models, ids)
            if name == "average"
            else spliced_logits(models, RECIPES[name], ids)
        )
        found = merged.eval()(input_ids=ids, use_cache=False).logits
    except Exception as error:
        return "unchecked", f"{type(error).__name__}: {str(error)[:80]}"
    difference, size = (found - expected).abs().max().item(), expected.abs().max().item()
    right = difference <= 1e-4 * max(1.0, size)
    return ("right", "") if right else ("wrong", f"logits differ by {difference:.2g} of {size:.2g}")


def outcomes(families: Sequence[str]) -> Iterator[Outcome]:
    """All recipes of all variants of these families."""
    for family in families:
        for variant, config in variants(family):
            with tempfile.TemporaryDirectory() as scratch:
                folders = [Path(scratch) / donor for donor in ("a", "b")]
                try:
                    models = [write_donor(each, config, seed) for seed, each in enumerate(folders)]
                except Exception as error:
                    yield Outcome(family, variant, "", "unchecked", str(error)[:80])
                    continue
                for name in (*RECIPES, "average"):
                    try:
                        verdict, reason = checked(name, folders, models, Path(scratch))
                    except Exception as error:
                        traceback.print_exc(file=sys.stderr)
                        verdict, reason = "crash", f"{type(error).__name__}: {str(error)[:200]}"
                    yield Outcome(family, variant, name, verdict, reason)


@click.command()
@click.argument("families", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(families: tuple[str, ...], as_json: bool) -> None:
    """Splice and average donors of FAMILIES, by default of all that transformers has."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, counts = [], Counter[str]()
    for outcome in outcomes(families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        rows.append(outcome._asdict())
        counts[outcome.verdict] += 1
        if not as_json and outcome.verdict != "right":
            print(*outcome, sep=" | ", flush=True)
    print(json.dumps({"outcomes": rows, "counts": counts}) if as_json else dict(counts))


if __name__ == "__main__":
    main()
