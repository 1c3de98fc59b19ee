"""The steps of a run as a table: what each took, beside its floor."""

from collections.abc import Mapping, Sequence

from evals.real.steps import Record, Step

HEAD = ("step", "wall s", "CPU s", "peak GB", "floor", "CPU s of the floor", "ratio")


def table(steps: Sequence[Step], records: Mapping[str, Record]) -> str:
    """The steps in Markdown. Ratios are of CPU time, which other processes change least."""
    lines = [HEAD, ("---", *("---:" for _ in HEAD[1:]))]
    lines += [_row(step, records) for step in steps if step.name in records]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(step: Step, records: Mapping[str, Record]) -> tuple[str, ...]:
    record = records[step.name]
    floor = records.get(step.floor or "")
    least = ("", "", "")
    if step.floor and floor:
        ratio = record.cpu_seconds / floor.cpu_seconds
        least = (step.floor, f"{floor.cpu_seconds:.1f}", f"{ratio:.2f}")
    return (
        step.name,
        f"{record.seconds:.1f}",
        f"{record.cpu_seconds:.1f}",
        f"{record.peak_bytes / 1e9:.2f}",
        *least,
    )
