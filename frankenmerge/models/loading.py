"""Load models and tokenizers of checkpoints without changing the process's settings."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from frankenmerge.donors.architecture import Config
from frankenmerge.donors.checkpoint import Checkpoint
from frankenmerge.donors.images import UNREAD, is_vision, need_language
from frankenmerge.donors.shards import INDEX_NAME, SINGLE_NAME
from frankenmerge.errors import FrankenmergeError, fail
from frankenmerge.models.blank import build, config_object, model_class, unquantised
from frankenmerge.models.quiet import quiet
from frankenmerge.storage.dtypes import torch_dtype
from frankenmerge.storage.safetensors_header import read_json


@dataclass(frozen=True)
class Placement:
    """In which type models compute, and where."""

    dtype: str = "float32"
    """`float32`, `bfloat16` or `float16`."""
    device: str = "cpu"
    """A torch device, or `auto` to let accelerate spread a model over all that are available."""
    max_memory: Mapping[int | str, str] = field(default_factory=dict)
    """With `auto`, the most memory to use per device (`0`, `1`, ..., `cpu`), such as `20GiB`."""
    offload: Path | None = None
    """With `auto`, a folder for weights that fit on no device; they are read at every pass."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type as torch has it."""
        return torch_dtype(self.dtype)

    def check(self) -> None:
        """Raise FrankenmergeError for an unavailable device, or options that need `auto`."""
        if self.device == "auto":
            return
        one_device(self.device)
        if self.max_memory or self.offload:
            place, remedy = f"device {self.device}", "add --device auto"
            raise fail(place, "auto, where memory is limited or offloaded", self.device, remedy)


CPU = Placement()
"""float32 on the CPU."""


@contextmanager
def explained(place: str, what: str) -> Iterator[None]:
    """Turn whatever transformers, tokenizers or accelerate raise while loading into a fault.

    Args:
        place: the folder or file that is loaded.
        what: what it is expected to be.
    """
    try:
        yield
    except FrankenmergeError:
        raise
    except Exception as error:
        raise _loading_fault(place, what, error) from error


def _loading_fault(place: str, what: str, error: Exception) -> FrankenmergeError:
    message = " ".join(str(error).split())[:400]
    expected = f"{what} that transformers {transformers.__version__} can load"
    found = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return fail(place, expected, found, _remedy(error))


def _remedy(error: Exception) -> str:
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "use --dtype bfloat16, a device with more memory, or --device auto"
    if "Too many open files" in str(error):
        return "raise the limit of open files (ulimit -n)"
    if isinstance(error, ImportError) or "pip install" in str(error):
        return "install the package that it names"
    return "restore the file that it names; inspect, check and merge work without loading"


def load_model(
    checkpoint: Checkpoint, placement: Placement = CPU, *, untrained: int | None = None
) -> PreTrainedModel:
    """Load a checkpoint, ready to run.

    Args:
        checkpoint: what to load; only its safetensors are read and none of its code runs.
        placement: type and devices.
        untrained: use the config alone, with weights sampled by this seed (see `untrained_model`).

    Raises:
        FrankenmergeError: when the weights do not fill the model exactly, or do not fit.
    """
    check_family(checkpoint.config, str(checkpoint.path / "config.json"))
    placement.check()
    if untrained is not None:
        return untrained_model(checkpoint, untrained, placement)
    _check_index(checkpoint)
    unread, spare = checkpoint.architecture.unread, r"(?!)"
    if is_vision(checkpoint.config):
        unread, spare = f"{unread}|{UNREAD}", UNREAD
    kind = model_class(checkpoint.config)
    model = from_pretrained(kind, checkpoint.path, placement, unread=unread, spare=spare)
    if checkpoint.quantisation:
        _convert(model, placement.torch_dtype)
    return model


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert weights that transformers has dequantised, to a type of its choice.

    Those that are still quantised stay as they are.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.data = parameter.data.to(dtype)


def from_pretrained(
    auto_class: Any,
    source: Path | None,
    placement: Placement,
    *,
    unread: str = r"(?!)",
    spare: str = r"(?!)",
    **more: Any,
) -> PreTrainedModel:
    """Call `auto_class.from_pretrained` safely, and require weights that fill the model exactly.

    Args:
        auto_class: a class of transformers, automatic or not.
        source: a folder, or None where `config` and `state_dict` are among `more`.
        placement: type and devices.
        unread: pattern of the names of tensors that the model need not have, such as buffers.
        spare: pattern of the names of those that the file need not have, as no pass reads them.
        more: further arguments of `from_pretrained`.

    Raises:
        FrankenmergeError: for missing, unexpected or mismatched tensors, or too little memory.
    """
    place = str(source or "splice in memory")
    try:
        with quiet():
            model, info = auto_class.from_pretrained(
                source,
                dtype=placement.torch_dtype,
                device_map=placement.device,
                max_memory=dict(placement.max_memory) or None,
                offload_folder=placement.offload,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **more,
            )
    except Exception as error:
        if placement.max_memory and isinstance(error, ValueError | RuntimeError):
            expected, remedy = "available devices, such as 0=20GiB", "correct --max-memory"
            raise fail("memory per device", expected, str(error), remedy) from error
        raise _loading_fault(place, "a checkpoint", error) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, info[kind]))
        pattern = {"unexpected_keys": unread, "missing_keys": spare}.get(kind)
        names = [name for name in names if pattern is None or not re.search(pattern, name)]
        if names:
            found = f"{kind.replace('_', ' ')}: {', '.join(names[:5])}"
            expected, remedy = "weights that fill the model exactly", "use a complete checkpoint"
            raise fail(place, expected, found, remedy)
    if next(model.get_input_embeddings().parameters()).is_meta:
        expected = "memory for the embedding on a device"
        raise fail(place, expected, "less", "raise --max-memory")
    return model.eval()


def one_device(device: str) -> torch.device:
    """A device by its name; `auto` is an accelerator where there is one.

    Raises FrankenmergeError for a device that is not available.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        expected, remedy = "an available torch device, or auto", "choose another --device"
        raise fail(f"device {device}", expected, str(error), remedy) from error


def devices_of(device: str) -> int:
    """How many devices a model is spread over: with `auto` all accelerators there are."""
    return max(1, torch.accelerator.device_count()) if device == "auto" else 1


def untrained_model(
    checkpoint: Checkpoint, seed: int, placement: Placement = CPU
) -> PreTrainedModel:
    """A model of the checkpoint's config with random weights: the control for effects of training.

    Args:
        checkpoint: whose config to use; no weight is read.
        seed: of the weights; torch's own random state is left as it was.
        placement: type and device; weights are sampled in float32 and then rounded. `auto` is the
            CPU here.
    """
    check_family(checkpoint.config, str(checkpoint.path / "config.json"))
    device = "cpu" if placement.device == "auto" else placement.device
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)
        with explained(str(checkpoint.path / "config.json"), "a config"):
            kind = model_class(checkpoint.config)
            config = config_object(unquantised(checkpoint.config))
            model = build(kind, config, torch.float32)
    finally:
        torch.set_rng_state(state)
    return model.to(device, placement.torch_dtype).eval()


def _check_index(checkpoint: Checkpoint) -> None:
    """Refuse an index that transformers cannot read though this package can."""
    path = checkpoint.path / INDEX_NAME
    if (checkpoint.path / SINGLE_NAME).exists() or not path.exists():
        return
    if "metadata" not in read_json(path, "a safetensors index"):
        remedy = 'write "metadata": {} into it; inspect, check and merge work without'
        raise fail(str(path), "metadata, without which transformers loads no model", "none", remedy)


def check_family(config: Config, place: str) -> None:
    """Raise FrankenmergeError for a config whose family transformers does not have."""
    if (name := config["model_type"]) not in CONFIG_MAPPING:
        remedy = "install a transformers that has it; inspect, check and merge work without"
        raise fail(place, "a model_type that transformers can run", name, remedy)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer. Raises FrankenmergeError when there is none."""
    need_language(checkpoint)
    if not checkpoint.has_tokenizer:
        remedy = "put the donor's tokenizer.json there"
        raise fail(str(checkpoint.path), "a tokenizer", "none of its files", remedy)
    return tokenizer_in(checkpoint.path)


def tokenizer_in(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer whose files are in a folder.

    Raises FrankenmergeError for files that transformers cannot load, or not without sentencepiece.
    """
    if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
        if find_spec("sentencepiece") is None:
            expected = "tokenizer.json, or the package sentencepiece, which reads tokenizer.model"
            remedy = "install frankenmerge[sentencepiece], or save the tokenizer as tokenizer.json"
            raise fail(str(folder), expected, "neither", remedy)
    with quiet(), explained(str(folder), "a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
