"""Run the whole pipeline on real models; what is done already is not done again."""

from pathlib import Path

import click

from evals.real.evidence import evidence
from evals.real.pipeline import pipeline
from evals.real.steps import run
from evals.real.table import table


@click.command()
@click.option(
    "--cache",
    default="build/real",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where everything is kept.",
)
@click.option(
    "--data",
    default="../shared/data",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where text/wikitext2-valid.txt and tasks/piqa-valid-400.jsonl may be.",
)
@click.option("--evidence", "more", is_flag=True, help="Also run the steps of docs/real.md.")
@click.option("--only", multiple=True, help="Run no other step than this. May be repeated.")
def main(cache: Path, data: Path, more: bool, only: tuple[str, ...]) -> None:
    """Fetch, convert, fine-tune, align, plan, merge and evaluate real models."""
    steps = [*pipeline(cache, data), *(evidence(cache, data) if more else [])]
    chosen = [step for step in steps if not only or step.name in only]
    records = run(chosen, cache / "steps")
    found = table(chosen, records)
    (cache / "steps.md").write_text(found, "utf-8")
    click.echo(found)
    click.echo(f"The report: {cache / 'report.html'}")


if __name__ == "__main__":
    main()
