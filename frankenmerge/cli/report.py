"""`report`: one page, and figures, for everything in a run's folder."""

from pathlib import Path

import click

from frankenmerge.cli.console import (
    json_option,
    need_matplotlib,
    out,
    output_option,
    print_json,
    size,
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@output_option("Where the page goes, such as report.html.", required=False)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    help="A folder for the same figures as PNG and SVG (needs matplotlib).",
)
@json_option
def report(run: Path, output: Path | None, figures: Path | None, as_json: bool) -> None:
    """Make one HTML page of all that the commands left in the folder RUN.

    It holds everything in itself and asks nothing of any network. What is not in the folder is left
    out, and the page says which command would make it.
    """
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    if not (output or figures):
        raise click.UsageError("Say where it goes: -o report.html, --figures DIR, or both.")
    if figures:
        need_matplotlib("--figures")
    found = read_run(run)
    written = []
    if output:
        write_file(output, page(found).encode())
        written.append(output)
    if figures:
        from frankenmerge.reporting.figures import write_figures

        written += write_figures(found, figures)
    if as_json:
        told = {"written": [str(path) for path in written], "refused": found.refused}
        print_json({"run": str(run), **told})
        return
    for path in written:
        out().print(f"{path}: {size(path.stat().st_size)}", markup=False)
    for name, reason in found.refused.items():
        click.echo(f"frankenmerge: {name} is left out: {reason}", err=True)
