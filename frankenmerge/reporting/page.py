"""The report on a run as one HTML page: self-contained, same bytes for the same artefacts."""

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import frankenmerge
from frankenmerge.artefacts.scores import NULLS
from frankenmerge.reporting import figures, fronts, labels, sections, svg, windows
from frankenmerge.reporting.heatmaps import scale
from frankenmerge.reporting.run import Run
from frankenmerge.splicing import diagram


def page(run: Run) -> str:
    """Return the report on a run as HTML."""
    css = svg.stylesheet() + _file("report.css") + diagram.STYLE
    script = _file("report.js")
    environment = Environment(
        loader=PackageLoader("frankenmerge.reporting", "files"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "interval": interval,
        "short": labels.shortened,
        "token": labels.token,
        "data": _data,
        "drawing": _drawing,
    }
    template = environment.get_template("report.html")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return template.render(policy=policy, css=Markup(css), script=Markup(script), **_content(run))


def _content(run: Run) -> dict[str, Any]:
    splices, plans = sections.splices(run), sections.plans(run)
    checks = sections.prediction_checks(run)
    plan = sections.chosen_plan(run, splices)
    donors, tables = sections.features(run)
    explained = sections.explained_plan(run, splices, plan)
    present = {
        "recipes": run.recipes,
        "evidence": run.evidence,
        "alignments": run.alignments,
        "features": tables or run.searched or run.pictures,
        "evaluations": run.evaluations,
        "merges": run.merges,
    }
    return {
        "run": run,
        "title": sections.title(run, splices, plan),
        "facts": sections.facts(splices, plan, checks, run),
        "splices": splices,
        "plan": plan,
        "explained": explained,
        "plans": plans,
        "alignments": sections.alignment_views(run, sections.seams_of(run, splices, explained)),
        "scale": scale(),
        "feature_donors": donors,
        "tables": tables,
        "checks": checks,
        "missing": [labels.MISSING[part] for part, value in present.items() if not value],
        "version": frankenmerge.__version__,
        "nulls": list(NULLS.values()),
        "sections": sections,
        "figures": figures,
        "windows": windows,
        "fronts": fronts,
        "labels": labels,
    }


def _file(name: str) -> str:
    return (files("frankenmerge.reporting") / "files" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _drawing(drawing: svg.Drawing, name: str = "") -> Markup:
    """A drawing within the page; see `svg.inline`."""
    return Markup(svg.inline(drawing, name))


def _shown(value: Any) -> Any:
    """Make hidden characters in texts visible, except line ends and tabs."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(
        "\t".join(diagram.visible(cell) for cell in line.split("\t")) for line in value.split("\n")
    )


def number(value: float | None, places: int = 3) -> str:
    """A number for readers; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "–"
    return (
        ("∞" if value > 0 else "-∞")
        if math.isinf(value)
        else f"{round(value, places) + 0:,.{places}f}"
    )


def interval(ends: tuple[float, float] | None, places: int = 3) -> str:
    """The ends of an interval; empty for None."""
    return "" if ends is None else f"{number(ends[0], places)} to {number(ends[1], places)}"


def _data(value: Any) -> Markup:
    """JSON that cannot end the script element around it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
