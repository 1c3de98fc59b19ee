"""The command line: thin commands around the stages."""

import sys
from collections.abc import Sequence

import click

from frankenmerge import __version__
from frankenmerge.cli.align import align
from frankenmerge.cli.console import quiet_option
from frankenmerge.cli.demo import demo
from frankenmerge.cli.donors import analyze, inspect
from frankenmerge.cli.evaluate import evaluate
from frankenmerge.cli.features import features
from frankenmerge.cli.merge import check, merge, widen
from frankenmerge.cli.plan import plan
from frankenmerge.cli.report import report
from frankenmerge.errors import FrankenmergeError

WAY = """\
The way from donors to a report:

\b
  frankenmerge inspect A B                 can they be spliced?
  frankenmerge align A B -o RUN/ab.alignment.safetensors
  frankenmerge plan RUN/ab.alignment.safetensors -o RUN/recipe.yaml
  frankenmerge evaluate RUN/recipe.yaml --text held-out.txt
  frankenmerge merge RUN/recipe.yaml RUN/merged
  frankenmerge report RUN -o report.html

`frankenmerge demo` goes all of it with the donors in the package.
"""


@click.group(help=f"Find out which blocks of which models fit together, then splice them.\n\n{WAY}")
@click.version_option(__version__)
def cli() -> None:
    """Hold the commands."""


for command in (
    inspect,
    features,
    analyze,
    align,
    plan,
    check,
    merge,
    widen,
    evaluate,
    report,
    demo,
):
    command.params.append(quiet_option)
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0, 1 for a user's mistake, 130 when interrupted."""
    try:
        cli.main(
            args=None if arguments is None else list(arguments),
            prog_name="frankenmerge",
            standalone_mode=False,
        )
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        error.show()
        sys.exit(1)
    except FrankenmergeError as error:
        click.echo(f"frankenmerge: {error}", err=True)
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        click.echo("frankenmerge: interrupted; nothing that looks finished was left", err=True)
        sys.exit(130)
    sys.exit(0)
