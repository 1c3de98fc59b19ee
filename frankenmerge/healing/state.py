"""The state of an unfinished training: one file, replaced as a whole."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from frankenmerge.storage.atomic import replacing_file


@dataclass
class State:
    """Where a training is, but for its tensors."""

    identity: str
    """Of everything that the result depends on."""
    rate: float
    """Found by the range test."""
    step: int = 0
    kept: int = 0
    """The step of the kept weights."""
    since: int = 0
    """Checks without a better loss."""
    curve: list[tuple[int, float]] = field(default_factory=list)
    """Steps and losses on the tokens that decide when to stop."""
    finished: bool = False


def save_state(path: Path, state: State, tensors: Mapping[str, Tensor]) -> None:
    """Write a state, completely or not at all. Raises FrankenmergeError on failure."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as partial:
        save_file(content, partial, {"state": json.dumps(asdict(state))})


def load_state(path: Path, identity: str) -> tuple[State, dict[str, Tensor]] | None:
    """Read the state of the training of this identity; None where there is none."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as handle:
        found = json.loads((handle.metadata() or {}).get("state", "{}"))
        if found.get("identity") != identity:
            return None
        found["curve"] = [tuple(each) for each in found["curve"]]
        return State(**found), {name: handle.get_tensor(name) for name in handle.keys()}
