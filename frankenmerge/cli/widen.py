"""`widen`: a donor in the shape of a wider one."""

from pathlib import Path

import click

from frankenmerge.cli.console import (
    download_option,
    json_option,
    out,
    pickle_option,
    print_json,
    size,
)


@click.command()
@click.argument("narrow")
@click.argument("wide")
@click.argument("output", type=click.Path(path_type=Path))
@download_option
@pickle_option
@json_option
def widen(
    narrow: str, wide: str, output: Path, download: bool, allow_pickle: bool, as_json: bool
) -> None:
    """Write the donor NARROW in the shape of the donor WIDE to the new folder OUTPUT.

    It computes the same as before: everything that WIDE has more of is zeros. Then the two can be
    spliced, and a gauge can rotate either into the other's basis.
    """
    from frankenmerge.merging.widen import widen as widened
    from frankenmerge.splicing.opening import open_donor

    opening = {"download": download, "allow_pickle": allow_pickle}
    widened(open_donor(narrow, **opening), open_donor(wide, **opening), output)
    made = open_donor(str(output))
    count, total = made.parameters, made.bytes
    if as_json:
        sizes = {"tensors": len(made.tensors), "bytes": total, "parameters": count}
        print_json({"output": str(output)} | sizes)
        return
    shape = f"{narrow} in the shape of {wide}"
    out().print(f"{output}: {shape}, {count:,} parameters, {size(total)}", markup=False)
