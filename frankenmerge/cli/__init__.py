"""The command line: parse, call, print."""

import sys
from collections.abc import Sequence
from io import TextIOWrapper

import click

from frankenmerge import __version__
from frankenmerge.cli.align import align
from frankenmerge.cli.console import quiet_option
from frankenmerge.cli.demo import demo
from frankenmerge.cli.donors import analyze, inspect
from frankenmerge.cli.evaluate import evaluate
from frankenmerge.cli.features import features
from frankenmerge.cli.heal import heal
from frankenmerge.cli.lora import extract_lora
from frankenmerge.cli.merge import check, merge
from frankenmerge.cli.moe import moe
from frankenmerge.cli.plan import plan
from frankenmerge.cli.report import report
from frankenmerge.cli.transplant import transplant_tokenizer
from frankenmerge.cli.tune import tune
from frankenmerge.cli.widen import widen
from frankenmerge.errors import Fault, FrankenmergeError

MISTAKE, INTERRUPTED = 2, 130
"""Exit status of a mistake in the input, and of an interruption."""

HELP = """\
Find out which blocks of which models fit together, then splice them.

\b
From donors to a report:
  frankenmerge inspect A B                 can they be spliced?
  frankenmerge align A B -o RUN/ab.alignment.safetensors
  frankenmerge plan RUN/ab.alignment.safetensors -o RUN/recipe.yaml
  frankenmerge evaluate RUN/recipe.yaml --text held-out.txt
  frankenmerge merge RUN/recipe.yaml RUN/merged
  frankenmerge report RUN -o report.html

`frankenmerge demo` runs the whole pipeline on the bundled donors.

\b
Exit status: 0 success, 1 unexpected error, 2 mistake in the input,
3 a comparison failed (evaluate --compare), 130 interrupted.
"""


@click.group(help=HELP)
@click.version_option(__version__)
def cli() -> None:
    """Hold the commands."""


for command in (
    inspect,
    features,
    analyze,
    align,
    plan,
    tune,
    check,
    merge,
    moe,
    heal,
    transplant_tokenizer,
    widen,
    extract_lora,
    evaluate,
    report,
    demo,
):
    command.params.append(quiet_option)
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status, see `HELP`."""
    given = None if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may lack characters of tokens and names
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(args=given, prog_name="frankenmerge", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        click.echo(f"frankenmerge: {_fault(error)}", err=True)
        sys.exit(MISTAKE)
    except FrankenmergeError as error:
        click.echo(f"frankenmerge: {error}", err=True)
        sys.exit(MISTAKE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("frankenmerge: interrupted; no incomplete output was left behind", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(0)


def _fault(error: click.ClickException) -> Fault:
    """A mistake that click found, in the form of all others."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "frankenmerge"
    hint = error.param.get_error_hint(context) if getattr(error, "param", None) else ""  # pyright: ignore[reportAttributeAccessIssue]
    place = f"{path} {hint}".strip()
    return Fault(place, "valid arguments", error.format_message(), f"see `{path} --help`")
