"""Donors whose weights are PyTorch pickles: converted to safetensors, without executing them."""

import hashlib
import json
import pickle
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from frankenmerge.errors import fail
from frankenmerge.storage.atomic import cache_folder, new_folder

if TYPE_CHECKING:
    import torch

PICKLES = "pytorch_model*.bin"
_SINGLE = "pytorch_model.bin"
_REMEDY = "do not use this donor, or ask its authors for safetensors"


def pickles(folder: Path) -> list[Path]:
    """The files of pickled weights in a folder: the single file, else all shards."""
    return [folder / _SINGLE] if (folder / _SINGLE).is_file() else sorted(folder.glob(PICKLES))


def converted(folder: Path, others: Iterable[Path]) -> Path:
    """Convert a donor's pickled weights to safetensors and return the folder, which is cached.

    Args:
        folder: the donor's.
        others: its other files, such as the config; they are copied.

    Raises:
        FrankenmergeError: for a pickle with anything but tensors by name; no pickled code is
            executed.
    """
    files, weights = sorted(others), pickles(folder)
    # Hashing the weights would take as long as converting them, so a file is identified by its
    # path, size and time of modification.
    stats = [
        (str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in [*files, *weights]
    ]
    path = (
        cache_folder() / "converted" / hashlib.sha256(json.dumps(stats).encode()).hexdigest()[:32]
    )
    if path.is_dir():
        return path
    with new_folder(path) as partial:
        for file in files:
            shutil.copyfile(file, partial / file.name)
        index = {"metadata": {}, "weight_map": {}}
        for number, file in enumerate(weights, 1):
            shard = f"model-{number:05}.safetensors"
            index["weight_map"] |= dict.fromkeys(_convert(file, partial / shard), shard)
        (partial / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def _convert(file: Path, target: Path) -> list[str]:
    """Convert one file to safetensors and return the names of its tensors."""
    from safetensors.torch import save_file

    tensors = _tensors(file)
    addresses = {name: tensor.untyped_storage().data_ptr() for name, tensor in tensors.items()}
    users = Counter(addresses.values())
    # A tied head shares the embedding's memory, which safetensors cannot express.
    separate = {
        name: (tensor.clone() if users[addresses[name]] > 1 else tensor).contiguous()
        for name, tensor in tensors.items()
    }
    try:
        save_file(separate, target, {"format": "pt"})
    except (KeyError, ValueError) as error:
        raise fail(str(file), "tensors that safetensors supports", str(error), _REMEDY) from error
    return list(tensors)


def _tensors(file: Path) -> "dict[str, torch.Tensor]":
    import torch

    try:
        # Files from before PyTorch 1.6 are not archives, and cannot be mapped.
        loaded = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except (
        pickle.UnpicklingError,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:
        found = str(error)[:300] or type(error).__name__
        raise fail(str(file), "pickled tensors without code to execute", found, _REMEDY) from error
    named = isinstance(loaded, dict) and all(isinstance(name, str) for name in loaded)
    if not named or not all(
        isinstance(value, torch.Tensor) and value.layout == torch.strided
        for value in loaded.values()
    ):
        raise fail(str(file), "dense tensors by name", "something else", _REMEDY)
    return loaded
