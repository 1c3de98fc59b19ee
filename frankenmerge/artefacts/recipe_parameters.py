"""Parameters as recipes write them: scalars, gradients over depth, or either by tensor name."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Value = float | int | bool


def _number(value: Any) -> Value:
    """A finite number or a flag; YAML reads 1e-5 as text, where people mean a number."""
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, int | float) and math.isfinite(number):
            return number
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"a finite number, not {value!r:.60}")


def _plain(value: Any) -> Value | list[Value]:
    """A scalar, or a gradient: a list of numbers."""
    if not isinstance(value, list):
        return _number(value)
    if not value:
        raise ValueError("a gradient holds at least one number")
    if any(isinstance(entry, bool) for entry in value):
        raise ValueError("a gradient holds numbers, not true or false")
    return [_number(entry) for entry in value]


def setting(value: Any) -> Any:
    """Return a setting in one form: a scalar, a gradient, or a list of {filter, value}.

    Raises ValueError for anything else.
    """
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, list) or not any(isinstance(entry, Mapping) for entry in entries):
        return _plain(value)
    made: list[dict[str, Any]] = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ValueError(
                f"either numbers or entries of filter and value, not {entry!r:.60} among entries"
            )
        if unknown := [key for key in entry if key not in ("filter", "value")]:
            raise ValueError(f"an entry holds filter and value, not {unknown[0]!r:.60}")
        if "value" not in entry:
            raise ValueError("an entry with a filter holds a value")
        if not isinstance(entry.get("filter"), str | None) or entry.get("filter") == "":
            raise ValueError("a filter is a part of tensor names")
        if made and _takes_all(made[-1]):
            raise ValueError("no entry follows one without a filter, which takes all tensors")
        made.append({**entry, "value": _plain(entry["value"])})
    return made


def _takes_all(entry: Mapping[str, Any]) -> bool:
    return entry.get("filter") in (None, "*")


def evaluate(written: Any, tensor: str, t: float) -> Value | None:
    """The value of a setting for one tensor; None where no entry's filter selects it.

    Args:
        written: as `setting` returns it.
        tensor: the tensor's name; the first entry whose filter is a part of it counts.
        t: the depth within the slice, from 0 at its first block to 1 at its last. A gradient's
            numbers stand evenly spaced over [0, 1] and are interpolated linearly.
    """
    if not isinstance(written, list):
        return written
    if not isinstance(written[0], Mapping):
        position = t * (len(written) - 1)
        left = min(int(position), len(written) - 1)
        right = min(left + 1, len(written) - 1)
        return written[left] + (written[right] - written[left]) * (position - left)
    return next(
        (
            evaluate(entry["value"], tensor, t)
            for entry in written
            if _takes_all(entry) or entry["filter"] in tensor
        ),
        None,
    )


def resolve(
    name: str, levels: Iterable[Mapping[str, Any] | None], tensor: str, t: float
) -> Value | None:
    """The parameter `name` for one tensor: the narrowest level that gives it a value counts."""
    found = (evaluate(level[name], tensor, t) for level in levels if level and name in level)
    return next((value for value in found if value is not None), None)


def values(written: Any) -> Iterator[Value]:
    """Every number of a setting."""
    if isinstance(written, list):
        for entry in written:
            yield from values(entry["value"] if isinstance(entry, Mapping) else entry)
    else:
        yield written


def filters(written: Any) -> list[str]:
    """The parts of tensor names that a setting asks for."""
    return (
        [
            entry["filter"]
            for entry in written
            if isinstance(entry, Mapping) and not _takes_all(entry)
        ]
        if isinstance(written, list)
        else []
    )
