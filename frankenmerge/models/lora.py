"""LoRAs: low-rank changes to a donor's weights, folded in by peft and cached as a checkpoint.

The result has the base's files, names, shapes and types; changed weights are computed in float32
and rounded once.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from filecmp import cmp as equal
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from frankenmerge import __version__
from frankenmerge.donors.checkpoint import TOKENIZER_FILES, Checkpoint, open_checkpoint
from frankenmerge.donors.shards import link_faults, tensors_in
from frankenmerge.errors import Fault, FrankenmergeError, fail, raise_all
from frankenmerge.storage.atomic import cache_folder, new_folder
from frankenmerge.storage.dtypes import EXACT_IN_FLOAT32, torch_dtype
from frankenmerge.storage.hub import repository_of, resolve
from frankenmerge.storage.safetensors_header import Tensor, read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_REMEDY = (
    "name the model that the LoRA was trained on, or fold it in with peft's merge_and_unload and "
    "name the result"
)


class Adapter(NamedTuple):
    """A LoRA whose config and header have been read."""

    path: Path
    tensors: dict[str, Tensor]
    base: str | None = None
    """The model that it was trained on, as its config names it: `path` or `path@revision`."""
    replication: tuple[tuple[int, int], ...] = ()
    """Ranges of the base's blocks, half-open: the model that it changes has these, one after the
    other (peft's `layer_replication`). Empty where it has the base's.
    """


def find_adapter(name: str, *, download: bool = False, weights: bool = True) -> Adapter:
    """Find a LoRA from its config and header alone.

    Without `weights`, no more than these are fetched from the hub. Raises FrankenmergeError for a
    folder without either, for pickled weights, and for adapters of another kind.
    """
    repository = repository_of(name, weights)
    patterns = (CONFIG_NAME, *TOKENIZER_FILES, *((WEIGHTS_NAME,) if weights else ()))
    folder = resolve(name, patterns, download)
    raise_all(link_faults(folder))
    config = read_json(folder / CONFIG_NAME, "an adapter's adapter_config.json")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise fail(f"{folder / CONFIG_NAME}: peft_type", "LORA", repr(kind), "name a LoRA")
    tensors = tensors_in(folder / WEIGHTS_NAME, repository, download)
    if tensors is None:
        others = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        remedy = "load the adapter with peft and save it again, which writes safetensors"
        raise fail(
            str(folder),
            WEIGHTS_NAME,
            f"only pickle files ({others})" if others else "no safetensors",
            remedy,
        )
    return Adapter(folder, tensors, _base_of(config), _replication(folder / CONFIG_NAME, config))


def is_adapter(name: str, *, download: bool = False) -> bool:
    """Whether a name is that of a LoRA alone: it has an adapter's config, and no model's."""
    try:
        folder = resolve(name, (CONFIG_NAME, "config.json"), download)
    except FrankenmergeError:
        return False  # whoever opens it as a model says what is missing
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def _base_of(config: Mapping[str, Any]) -> str | None:
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{name}@{revision}" if name and revision else name or None


def _replication(path: Path, config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    found = config.get("layer_replication")
    if found is None:
        return ()
    if not isinstance(found, list) or not all(map(_is_range, found)):
        expected = "ranges of blocks, such as [[0, 4], [2, 6]]"
        place, remedy = f"{path}: layer_replication", "correct the adapter's config"
        raise fail(place, expected, json.dumps(found), remedy)
    return tuple((start, stop) for start, stop in found)


def _is_range(value: Any) -> bool:
    whole = isinstance(value, list) and [type(each) for each in value] == [int, int]
    return whole and 0 <= value[0] < value[1]


def check_unrepeated(adapter: Adapter, base: str) -> None:
    """Raise FrankenmergeError for a LoRA of a model that repeats or leaves out blocks of `base`."""
    if adapter.replication:
        remedy = (
            f"merge a recipe with these ranges of {base} as slices, and name its result and a copy "
            "of this LoRA without layer_replication; evaluate reads it as it is"
        )
        place = f"{adapter.path / CONFIG_NAME}: layer_replication"
        found = json.dumps(adapter.replication)
        raise fail(place, f"none: a LoRA of the blocks of {base}", found, remedy)


def check_fit(base: Checkpoint, adapter: Adapter) -> None:
    """Raise FrankenmergeError for a LoRA that does not fit the base, by headers alone.

    The error names the first matrix without a place, or of another shape, and how many there are.
    """
    if faults := list(_fit_faults(base, adapter)):
        first, count = faults[0], len(faults)
        others = f", and {count - 1} more that do not fit" if count > 1 else ""
        raise FrankenmergeError(first._replace(found=first.found + others))


def _fit_faults(base: Checkpoint, adapter: Adapter) -> Iterator[Fault]:
    """Experts may have other names in memory, and heads may be tied: theirs are left to peft."""
    shapes = {
        canonical.format(index): base.tensors[name].shape
        for (_, index), names in base.by_role.items()
        for canonical, name in names.items()
    }
    axes = {".lora_A.": -1, ".lora_B.": 0}
    for name, tensor in adapter.tensors.items():
        part = next((part for part in axes if part in name), None)
        if part is None or re.search(r"experts|lm_head|embed", name) or len(tensor.shape) != 2:
            continue
        target = name.removeprefix("base_model.model.").partition(part)[0] + ".weight"
        place = f"{adapter.path}: {name}"
        if (shape := shapes.get(target)) is None:
            expected = f"a weight of {base.name} that it changes"
            yield Fault(place, expected, f"no {target} there", _REMEDY)
            continue
        size = tensor.shape[axes[part]]
        fits = {shape[axes[part]], shape[-1 - axes[part]]}  # GPT-2 stores its maps transposed
        if size not in (fits if _transposed(base) else {shape[axes[part]]}):
            expected = f"a LoRA of a weight of shape {list(shape)}, {target} of {base.name}"
            yield Fault(place, expected, f"shape {list(tensor.shape)}", _REMEDY)


def _transposed(base: Checkpoint) -> bool:
    stream = base.architecture.stream
    return stream is not None and stream.transposed


def adapter_remarks(base: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    """The files of a tokenizer that a LoRA has and that are not the base's: they are not used."""
    own = [
        name
        for name in TOKENIZER_FILES
        if (file := adapter.path / name).is_file()
        and not ((base.path / name).is_file() and equal(file, base.path / name, shallow=False))
    ]
    if not own:
        return ()
    used = f"the tokenizer and chat template of {base.name} are used; to have the others, copy them"
    return (f"the LoRA {adapter.path} has its own {', '.join(own)}, which are not used: {used}",)


def folded(base: Checkpoint, adapter: Path) -> Checkpoint:
    """Return `base` with the LoRA in the folder `adapter` folded in, cached.

    Raises FrankenmergeError if peft is not installed, or cannot fold this LoRA into this base.
    """
    files = [
        file
        for file in sorted(base.path.iterdir())
        if file.suffix in (".json", ".model", ".txt", ".jinja")
    ]
    try:
        versions = {"frankenmerge": __version__} | {
            name: version(name) for name in ("peft", "torch", "transformers")
        }
    except PackageNotFoundError as error:
        raise _no_peft() from error
    contents = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in [*files, adapter / CONFIG_NAME, adapter / WEIGHTS_NAME]
    ]
    key = hashlib.sha256(
        json.dumps([base.fingerprint, contents, versions], sort_keys=True).encode()
    ).hexdigest()
    path = cache_folder() / "folded" / key[:32]
    if not path.is_dir():
        model = _merged(base, adapter)
        with new_folder(path) as folder:
            for file in [*files, *{tensor.file for tensor in base.tensors.values()}]:
                shutil.copyfile(file, folder / file.name)
            with TemporaryDirectory(dir=folder) as saved:
                model.save_pretrained(saved)
                _overwrite(folder, base, open_checkpoint(saved))
    return open_checkpoint(str(path))


def _no_peft() -> Exception:
    return fail(
        "a LoRA",
        "peft, which reads and writes it",
        "not installed",
        "install frankenmerge[lora]",
    )


def _merged(base: Checkpoint, adapter: Path) -> Any:
    """The base with the LoRA in its weights, in float32."""
    from transformers import GenerationConfig

    from frankenmerge.models.loading import load_model

    check_peft()
    raise_all(_type_faults(base))
    model = load_model(base)
    # The base's is copied; saving would refuse some old ones.
    model.generation_config = GenerationConfig()
    with _explained(adapter, base.name):
        return _with_lora(model, adapter).merge_and_unload(safe_merge=True)


def attach(model: Any, adapter: Path, name: str) -> None:
    """Add a LoRA to a model that has all blocks that it was trained on, repeated ones too.

    The model's own weights do not change.

    Args:
        model: a model of transformers, in memory.
        adapter: the folder of the LoRA.
        name: of the model, for faults.

    Raises:
        FrankenmergeError: if peft is not installed, or the LoRA does not fit.
    """
    check_peft()
    with _explained(adapter, name):
        _with_lora(model, adapter)


def check_peft() -> None:
    """Raise FrankenmergeError if peft is not installed."""
    if find_spec("peft") is None:
        raise _no_peft()


def _with_lora(model: Any, adapter: Path) -> Any:
    """Peft's model around one that has all blocks that the LoRA changes."""
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(adapter), local_files_only=True)
    config.inference_mode = True
    config.layer_replication = None
    # PeftModel.from_pretrained does the same, but does not say which weights had no place.
    wrapped = PeftModel(model, config)
    loaded = wrapped.load_adapter(
        str(adapter), "default", torch_device="cpu", local_files_only=True
    )
    if odd := [*loaded.missing_keys, *loaded.unexpected_keys]:
        raise ValueError(
            f"weights without a place, or places without weights: {', '.join(odd[:3])}"
        )
    return wrapped


@contextmanager
def _explained(adapter: Path, name: str) -> Iterator[None]:
    """Turn whatever peft raises or warns of into a fault of the adapter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names
            # Warnings of peft mean that the result is not what was trained: weights are missing or
            # tied.
            warnings.filterwarnings("error", category=UserWarning, module="peft")
            warnings.filterwarnings("error", category=RuntimeWarning, module="peft")
            yield
    except (
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        NotImplementedError,
        ImportError,
        Warning,
    ) as error:
        raise fail(
            str(adapter),
            f"a LoRA that peft can fold into {name}",
            " ".join(str(error).split())[:400],
            _REMEDY,
        ) from error


def _type_faults(base: Checkpoint) -> Iterator[Fault]:
    for (role, _), names in base.by_role.items():
        for name in names.values():
            if role != "ignored" and (dtype := base.tensors[name].dtype) not in EXACT_IN_FLOAT32:
                yield Fault(
                    f"{base.path}: {name}",
                    f"one of {', '.join(EXACT_IN_FLOAT32)}, to fold a LoRA into",
                    dtype,
                    "use a plain donor",
                )


def _overwrite(folder: Path, base: Checkpoint, saved: Checkpoint) -> None:
    """Overwrite the tensors of the base in `folder` with those of `saved`, in the base's types."""
    import torch
    from safetensors import safe_open

    names = {
        (key, canonical): name
        for key, found in saved.by_role.items()
        for canonical, name in found.items()
    }
    for key, found in base.by_role.items():
        for canonical, name in found.items():
            tensor, ours = base.tensors[name], names.pop((key, canonical), None)
            if ours is None and key[0] in ("ignored", "head"):
                continue  # a buffer, or a tied head that is stored nevertheless
            if ours is None or saved.tensors[ours].shape != tensor.shape:
                raise fail(
                    f"{base.path}: {name}",
                    "the same tensor with the LoRA folded in",
                    "missing, or of another shape",
                    _REMEDY,
                )
            with safe_open(saved.tensors[ours].file, "pt") as handle:
                value = handle.get_tensor(ours).to(torch_dtype(tensor.dtype)).contiguous()
            with (folder / tensor.file.name).open("r+b") as file:
                file.seek(tensor.start)
                file.write(value.view(torch.uint8).numpy().tobytes())
    if names:
        raise fail(
            str(base.path),
            "only the base's tensors",
            f"others: {', '.join(list(names.values())[:3])}",
            _REMEDY,
        )
