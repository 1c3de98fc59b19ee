"""`report`: one HTML page, and figures, of everything in a run's folder."""

from pathlib import Path

import click

from frankenmerge.cli.console import (
    json_option,
    need_png,
    out,
    output_option,
    print_json,
    size,
)


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@output_option("File for the page, such as report.html.", required=False)
@click.option(
    "--figures",
    type=click.Path(path_type=Path),
    help="Folder for the figures as PNG and SVG (needs frankenmerge[plots]).",
)
@json_option
def report(run: Path, output: Path | None, figures: Path | None, as_json: bool) -> None:
    """Write one HTML page of all results in the folder RUN.

    The page is self-contained and loads nothing from the network. Results that are missing from the
    folder are omitted, and the page says which command makes them.
    """
    from frankenmerge.reporting.page import page
    from frankenmerge.reporting.run import read_run
    from frankenmerge.storage.atomic import write_file

    if not (output or figures):
        raise click.UsageError("Add an output: -o report.html, --figures DIR, or both.")
    if figures:
        need_png("--figures")
    results = read_run(run)
    written = []
    if output:
        write_file(output, page(results).encode())
        written.append(output)
    if figures:
        from frankenmerge.reporting.figures import write_figures

        written += write_figures(results, figures)
    if as_json:
        paths = [str(path) for path in written]
        print_json({"run": str(run), "written": paths, "refused": results.refused})
        return
    for path in written:
        out().print(f"{path}: {size(path.stat().st_size)}", markup=False)
    for name, reason in results.refused.items():
        click.echo(f"frankenmerge: {name} is omitted: {reason}", err=True)
