"""LoRAs: low-rank changes to a donor's weights, folded in by peft and cached as a checkpoint.

The result has the base's files, names, shapes and types; changed weights are computed in float32
and rounded once.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from filecmp import cmp as equal
from importlib.metadata import PackageNotFoundError, version
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
    return Adapter(folder, tensors)


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
        "a LoRA in a model's name",
        "peft, which folds it in",
        "not installed",
        "install frankenmerge[lora]",
    )


def _merged(base: Checkpoint, adapter: Path) -> Any:
    """The base with the LoRA in its weights, in float32."""
    from transformers import GenerationConfig

    from frankenmerge.models.loading import load_model

    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise _no_peft() from error
    raise_all(_type_faults(base))
    model = load_model(base)
    # The base's is copied; saving would refuse some old ones.
    model.generation_config = GenerationConfig()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses deprecated names
            # Warnings of peft mean that the result is not what was trained: weights are missing or
            # tied.
            warnings.filterwarnings("error", category=UserWarning, module="peft")
            warnings.filterwarnings("error", category=RuntimeWarning, module="peft")
            config = PeftConfig.from_pretrained(str(adapter), local_files_only=True)
            config.inference_mode = True
            # PeftModel.from_pretrained does the same, but does not say which weights had no place.
            wrapped = PeftModel(model, config)  # pyright: ignore[reportArgumentType]
            loaded = wrapped.load_adapter(
                str(adapter), "default", torch_device="cpu", local_files_only=True
            )
            if odd := [*loaded.missing_keys, *loaded.unexpected_keys]:
                raise ValueError(
                    f"weights without a place, or places without weights: {', '.join(odd[:3])}"
                )
            return wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
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
            f"a LoRA that peft can fold into {base.name}",
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
