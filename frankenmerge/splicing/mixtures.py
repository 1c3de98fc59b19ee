"""Mixtures of experts: whether donors fit into one, and what makes its tensors.

Attention, norms, embedding and head are the base's; every expert is one donor's MLPs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from frankenmerge.artefacts.mixture import Expert, Mixture
from frankenmerge.artefacts.recipe import Recipe
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.config import family, is_multimodal, quantity
from frankenmerge.donors.mixtures import DENSE, KINDS, MLP, Kind, kind_for, mixture_config
from frankenmerge.donors.quantisation import DEQUANTISE, title
from frankenmerge.errors import Fault, FrankenmergeError
from frankenmerge.splicing.compatibility import tensor_names
from frankenmerge.splicing.listing import tensor_seed
from frankenmerge.splicing.operations import Combine, Copy, Gate, Input, Operation, Perturb
from frankenmerge.splicing.result import Donors
from frankenmerge.splicing.similarity import alike
from frankenmerge.splicing.token_differences import (
    TOLERATED,
    TokenDifference,
    token_difference,
)
from frankenmerge.storage.dtypes import COMPUTED, DTYPES

if TYPE_CHECKING:
    from frankenmerge.splicing.resolve import Splice

_ANY = ", ".join(DENSE)


def mixture_donor_faults(recipe: Recipe, donors: Donors, place: str) -> Iterator[Fault]:
    """What keeps donors from being the experts of one model."""
    assert recipe.mixture
    mixture, base = recipe.mixture, donors[recipe.base]
    if base.config["model_type"] in DENSE and not is_multimodal(base.config):
        yield from _kind_faults(mixture, base, place)
    else:
        yield _family_fault(f"{place}: base_model", base)
    first = donors[mixture.experts[0].source_model]
    for where, expert in _places(mixture):
        donor, where = donors[expert.source_model], f"{place}: {where}.source_model"
        if donor.config["model_type"] not in DENSE or is_multimodal(donor.config):
            yield _family_fault(where, donor)
            continue
        yield from _expert_faults(donor, base, first, where)
        yield from _type_faults(recipe, donor, base, place)
        yield from _token_faults(donor, base, where)


def _places(mixture: Mixture) -> Iterator[tuple[str, Expert]]:
    """Every expert with its place in the YAML; each donor once."""
    seen = set()
    listed = {"experts": mixture.experts, "shared_experts": mixture.shared_experts or []}
    for key, experts in listed.items():
        for number, expert in enumerate(experts):
            if expert.source_model not in seen:
                seen.add(expert.source_model)
                yield f"{key}[{number}]", expert


def _family_fault(where: str, donor: Checkpoint) -> Fault:
    found = f"{donor.config['model_type']}, which {donor.name} is"
    return Fault(where, f"a dense donor of one of the families {_ANY}", found, "use another donor")


def _kind(mixture: Mixture, base: Checkpoint) -> Kind | None:
    """What the mixture becomes."""
    if mixture.architecture:
        return KINDS[mixture.architecture]
    shared = mixture.shared_experts or []
    prompted = any(each.positive_prompts for each in shared)
    return kind_for(base.config["model_type"], shared=bool(shared), prompted=prompted)


def _kind_faults(mixture: Mixture, base: Checkpoint, place: str) -> Iterator[Fault]:
    """Why the base cannot become the kind that is asked for, or that fits it."""
    kind, name = _kind(mixture, base), base.config["model_type"]
    assert kind
    if name not in kind.bases:
        fitting = [each.model_type for each in KINDS.values() if name in each.bases]
        expected = f"what donors of the family {name} become: {', '.join(fitting)}"
        found = f"{kind.model_type}, which donors of the families {', '.join(kind.bases)} become"
        yield Fault(f"{place}: architecture", expected, found, f"write {fitting[0]}, or remove it")
        return
    yield from _shared_faults(mixture, kind, name, place)
    place = f"{place}: base_model, as {kind.model_type}"
    remedy = f"use another base, or another architecture than {kind.model_type}"
    for expected, found in kind.obstacles(base.config):
        yield Fault(place, expected, found, remedy)
    if base.quantisation:
        yield Fault(place, "plain weights", title(base.quantisation), DEQUANTISE)
    for canonical in tensor_names(base, "block", 0):
        within = _within(base, canonical)
        if not within.startswith("mlp.") and within not in kind.tensors:
            expected = f"only tensors that a block of {kind.model_type} has"
            yield Fault(place, expected, canonical.format(0), remedy)


def _shared_faults(mixture: Mixture, kind: Kind, name: str, place: str) -> Iterator[Fault]:
    where, shared = f"{place}: shared_experts", mixture.shared_experts
    if shared and kind.shared == "none":
        others = [each.model_type for each in KINDS.values() if name in each.bases]
        fitting = [other for other in others if KINDS[other].shared != "none"]
        instead = f", or set architecture: {fitting[-1]}" if fitting else ""
        expected = f"none: {kind.model_type} has no shared experts"
        yield Fault(where, expected, shared[0].source_model, f"remove the key{instead}")
        return
    if kind.shared == "gated" and not shared:
        expected = f"an expert that every token passes, which {kind.model_type} has in every block"
        remedy = "add one, such as the base model with residual_scale: 0.1"
        yield Fault(where, expected, "none", remedy)
        return
    prompts = [each.positive_prompts or each.negative_prompts for each in shared or []]
    where = f"{where}[0].positive_prompts"
    if kind.shared == "gated" and mixture.gates_from_prompts and shared:
        if not shared[0].positive_prompts:
            expected = f"a prompt or more: a shared expert of {kind.model_type} has a gate"
            others = [each.model_type for each in KINDS.values() if name in each.bases]
            plain = "deepseek" in others and not mixture.architecture
            instead = ", or set architecture: deepseek, which has none" if plain else ""
            yield Fault(where, expected, "none", f"add one{instead}")
    if kind.shared == "plain" and any(prompts):
        expected = f"none: a shared expert of {kind.model_type} has no gate"
        remedy = "remove the prompts, or set architecture: qwen2_moe"
        yield Fault(where, expected, str(prompts[0])[:80], remedy)


def _within(donor: Checkpoint, canonical: str) -> str:
    """A canonical name relative to its block."""
    return canonical.removeprefix(donor.architecture.root + donor.architecture.block)


def _mlp(donor: Checkpoint, index: int) -> dict[str, str]:
    """The tensors of a block's MLP: names in the file by names within the MLP."""
    return {
        within.removeprefix("mlp."): name
        for canonical, name in tensor_names(donor, "block", index).items()
        if (within := _within(donor, canonical)).startswith("mlp.")
    }


def _expert_faults(
    donor: Checkpoint, base: Checkpoint, first: Checkpoint, where: str
) -> Iterator[Fault]:
    """Blocks, function and shapes of an expert that are not those of the others."""
    remedy = "use donors of one shape, such as fine-tunes of one model"
    if donor.quantisation:
        yield Fault(where, "plain weights", title(donor.quantisation), DEQUANTISE)
        return
    if donor.blocks != base.blocks:
        expected = f"{base.blocks} blocks, as {base.name} has"
        yield Fault(where, expected, f"{donor.blocks} in {donor.name}", remedy)
    functions = [_function(each) for each in (base, donor)]
    if functions[0] != functions[1]:
        expected = f"hidden_act {functions[0]}, as in {base.name}"
        yield Fault(where, expected, f"{functions[1]} in {donor.name}", remedy)
    width, inner = quantity(base.config, "width"), quantity(first.config, "inner")
    maps = {f"{name}.weight": (inner, width) for name in MLP[:2]} | {
        f"{MLP[2]}.weight": (width, inner)
    }
    names = _mlp(donor, 0)
    for name in names.keys() - maps.keys():
        yield Fault(f"{where}: {names[name]}", "an MLP without biases", "a bias", remedy)
    for name, shape in maps.items():
        found = donor.tensors[names[name]].shape if name in names else None
        if found != shape:
            of = f"the width of {base.name} and the inner width of {first.name}"
            tensor = names.get(name, f"mlp.{name}")
            given = f"shape {list(found)} in {donor.name}" if found else "no such tensor"
            yield Fault(f"{where}: {tensor}", f"shape {list(shape)}, {of}", given, remedy)


def _function(donor: Checkpoint) -> str:
    """The name of the function between an MLP's maps."""
    return str(donor.config.get("hidden_act", family(donor.config).defaults.get("hidden_act")))


def _type_faults(
    recipe: Recipe, donor: Checkpoint, base: Checkpoint, place: str
) -> Iterator[Fault]:
    if donor.quantisation:
        return
    if unfit := [dtype for dtype in donor.dtypes if dtype not in COMPUTED]:
        expected = "tensors of floating types"
        yield Fault(donor.name, expected, ", ".join(unfit), "use an unquantised donor")
    elif not recipe.dtype and set(donor.dtypes) != set(base.dtypes):
        types = [
            f"{each.name}: {', '.join(DTYPES[dtype].torch_name for dtype in each.dtypes)}"
            for each in (base, donor)
        ]
        expected, remedy = "donors of one floating type, or dtype", "set dtype"
        yield Fault(f"{place}: dtype", expected, "; ".join(types), remedy)


def _token_faults(donor: Checkpoint, base: Checkpoint, where: str) -> Iterator[Fault]:
    """An expert that was trained to read other tokens than the base."""
    if not (difference := _token_difference(donor, base)) or difference.share <= TOLERATED:
        return
    assert difference.example
    index, ours, theirs = difference.example
    expected = f"a donor that reads the tokens of {base.name}"
    found = (
        f"{difference.different:,} of {difference.shared:,} shared ids mean other tokens in "
        f"{donor.name} (id {index} is {ours!r} in {base.name} and {theirs!r} in {donor.name})"
    )
    yield Fault(where, expected, found, "use donors with one tokenizer")


def _token_difference(donor: Checkpoint, base: Checkpoint) -> TokenDifference | None:
    """How the tokens differ; None where they are the same or cannot be compared."""
    both = donor.has_tokenizer and base.has_tokenizer
    if not both or donor.tokenizer_hash == base.tokenizer_hash:
        return None
    try:
        return token_difference(base, donor)
    except FrankenmergeError:
        return None


def with_experts(splice: "Splice", recipe: Recipe, donors: Donors) -> "Splice":
    """The mixture of a recipe, from the splice of what it has besides experts.

    Args:
        splice: of the recipe without experts.
        recipe: a sound one, see `mixture_donor_faults`.
        donors: all of them.
    """
    assert recipe.mixture
    mixture, base = recipe.mixture, donors[recipe.base]
    kind = _kind(mixture, base)
    assert kind
    inner = quantity(donors[mixture.experts[0].source_model].config, "inner") or 0
    config = mixture_config(
        kind,
        splice.config,
        experts=len(mixture.experts),
        inner=inner,
        per_token=mixture.experts_per_token,
        shared=bool(mixture.shared_experts),
    )
    operations = tuple(_operations(splice, recipe, kind, donors))
    remarks = (*splice.remarks, *_remarks(mixture, base, donors))
    return replace(
        splice,
        recipe=recipe,
        donors=donors,
        config=config,
        operations=operations,
        remarks=remarks,
    )


def _operations(
    splice: "Splice", recipe: Recipe, kind: Kind, donors: Donors
) -> Iterator[Operation]:
    """The base's operations, each block's MLP replaced by gates and experts."""
    base, done = splice.base, set()
    for operation in splice.operations:
        role, index, canonical = base.architecture.role(operation.name)
        if role != "block" or not _within(base, canonical).startswith("mlp."):
            yield operation
        elif index not in done and index is not None:
            done.add(index)
            yield from _block_operations(splice, recipe, kind, donors, index)


def _block_operations(
    splice: "Splice", recipe: Recipe, kind: Kind, donors: Donors, index: int
) -> Iterator[Operation]:
    mixture, base = recipe.mixture, splice.base
    assert mixture
    prefix = (base.architecture.root + base.architecture.block).format(index)
    width = quantity(base.config, "width") or 0
    gates = {kind.gate: len(mixture.experts)}
    if kind.shared_gate:
        gates[kind.shared_gate] = 1
    for name, rows in gates.items():
        shared, seed = name == kind.shared_gate, tensor_seed(recipe, prefix + name)
        shape, mode = (rows, width), mixture.gate_mode
        yield Gate(prefix + name, splice.dtype, shape, index, mode, seed, shared)
    for number, expert in enumerate(mixture.experts):
        within = prefix + kind.expert.format(number)
        yield from _expert_operations(splice, recipe, kind, donors, expert, index, within)
    for expert in mixture.shared_experts or []:
        plain = replace(kind, names={name: name for name in MLP})
        within = prefix + kind.shared_expert
        yield from _expert_operations(splice, recipe, plain, donors, expert, index, within)


def _expert_operations(
    splice: "Splice",
    recipe: Recipe,
    kind: Kind,
    donors: Donors,
    expert: Expert,
    index: int,
    prefix: str,
) -> Iterator[Operation]:
    donor = donors[expert.source_model]
    names = _mlp(donor, index)
    for map_name, renamed in kind.names.items():
        source, name = names[f"{map_name}.weight"], f"{prefix}{renamed}.weight"
        tensor = donor.tensors[source]
        writes = map_name == MLP[-1] and expert.residual_scale is not None
        scale = expert.residual_scale if writes and expert.residual_scale is not None else 1.0
        given = Input(expert.source_model, source, tensor, {"scale": scale})
        if expert.noise_scale:
            seed = tensor_seed(recipe, name)
            given = given._replace(parameters={})
            yield Perturb(name, splice.dtype, given, expert.noise_scale, scale, seed)
        elif scale == 1.0 and tensor.dtype == splice.dtype:
            yield Copy(name, expert.source_model, source, tensor)
        else:
            shape = tensor.shape
            yield Combine(name, splice.dtype, shape, "passthrough", (given,), None, {}, 0)


class Maps(NamedTuple):
    """What makes the maps of one expert in one block, by their names in a dense MLP."""

    operations: Mapping[str, Operation]
    shared: bool


def expert_maps(splice: "Splice", index: int) -> list[Maps]:
    """The experts of a block of a mixture in their order, then the shared one."""
    kind, mixture = KINDS[splice.config["model_type"]], splice.recipe.mixture
    assert mixture
    architecture = splice.base.architecture
    prefix = (architecture.root + architecture.block).format(index)
    made = {operation.name: operation for operation in splice.operations}
    names = [
        ({name: kind.expert.format(number) + new for name, new in kind.names.items()}, False)
        for number in range(len(mixture.experts))
    ]
    names += [
        ({name: kind.shared_expert + name for name in MLP}, True)
        for _ in mixture.shared_experts or []
    ]
    return [
        Maps({name: made[f"{prefix}{within}.weight"] for name, within in maps.items()}, shared)
        for maps, shared in names
    ]


def _remarks(mixture: Mixture, base: Checkpoint, donors: Donors) -> Iterator[str]:
    """What is worth knowing about the experts."""
    for _, expert in _places(mixture):
        donor = donors[expert.source_model]
        if donor.config["model_type"] != base.config["model_type"]:
            kinds = f"{donor.config['model_type']} and {base.config['model_type']}"
            yield f"{donor.name} and {base.name} are of the families {kinds}, with the same MLPs"
        if difference := _token_difference(donor, base):
            counted = f"{difference.different:,} of {difference.shared:,} shared ids"
            names = f"{donor.name} and {base.name}"
            yield f"{names} have different tokenizers: {counted} mean other tokens"
    yield from _alike_remarks(mixture, donors)


def _alike_remarks(mixture: Mixture, donors: Donors) -> Iterator[str]:
    experts = [each for each in mixture.experts if not each.noise_scale]
    known = {each.source_model: donors[each.source_model] for each in experts}
    used = [each.source_model for each in experts]
    for name in dict.fromkeys(name for name in used if used.count(name) > 1):
        yield f"{used.count(name)} experts are {name}: equal until they are trained"
    files = {
        name: [
            [donor.tensors[tensor] for tensor in _mlp(donor, index).values()]
            for index in range(donor.blocks)
        ]
        for name, donor in known.items()
        if donor.whole
    }
    for one, other, difference in alike(files):
        yield (
            f"the MLPs of {one} and {other} differ by {difference:.2%} or less in every block "
            "(sampled): one of them is hardly worth its place"
        )
