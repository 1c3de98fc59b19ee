"""One page for a run: self-contained, the same bytes for the same artefacts, nothing asked of any network."""

import base64
import hashlib
import json
import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import frankenmerge
from frankenmerge.reporting import charts, labels, sections
from frankenmerge.reporting.heatmaps import VIRIDIS, shortened, token
from frankenmerge.reporting.run import Run
from frankenmerge.splicing import diagram


def page(run: Run) -> str:
    """Return the report on a run as HTML."""
    css, script = _file("report.css") + diagram.STYLE, _file("report.js")
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
        "short": shortened,
        "token": token,
        "data": _data,
    }
    template = environment.get_template("report.html")
    policy = f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    return template.render(policy=policy, css=Markup(css), script=Markup(script), **_content(run))


def _content(run: Run) -> dict[str, Any]:
    found, known, told = sections.splices(run), sections.plans(run), sections.promises(run)
    plan = sections.chosen_plan(found, known)
    donors, tables = sections.features(run)
    present = {
        "recipes": run.recipes,
        "evidence": run.evidence,
        "alignments": run.alignments,
        "features": tables,
        "evaluations": run.evaluations,
        "merges": run.merges,
    }
    return {
        "run": run,
        "title": sections.title(run, found, plan),
        "facts": sections.facts(found, plan, told, run),
        "splices": found,
        "plan": plan,
        "plans": known,
        "maps": sections.maps(run, sections.seams(run, found, plan)),
        "scale": ["#" + bytes(colour).hex() for colour in VIRIDIS],
        "feature_donors": donors,
        "tables": tables,
        "promises": told,
        "missing": [labels.MISSING[part] for part, value in present.items() if not value],
        "version": frankenmerge.__version__,
        "sections": sections,
        "charts": charts,
        "labels": labels,
    }


def _file(name: str) -> str:
    return (files("frankenmerge.reporting") / "files" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _shown(value: Any) -> Any:
    """Make what is hidden in texts visible, line ends and tabs apart."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "\n".join(
        "\t".join(diagram.visible(cell) for cell in line.split("\t")) for line in value.split("\n")
    )


def number(value: float | None, places: int = 3) -> str:
    """A number for people; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return (
        ("∞" if value > 0 else "-∞")
        if math.isinf(value)
        else f"{round(value, places) + 0:,.{places}f}"
    )


def interval(ends: tuple[float, float] | None, places: int = 3) -> str:
    """Both ends of an interval, or nothing."""
    return "" if ends is None else f"{number(ends[0], places)} to {number(ends[1], places)}"


def _data(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))
