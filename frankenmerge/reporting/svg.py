"""Drawings as SVG: one description of each chart, for the page, for files, and for PNG.

The elements of a drawing carry classes; `figures.css` gives them colours, as CSS variables that the
page sets for light and dark. A file has the light colours written into its style.
"""

import re
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from frankenmerge.errors import fail
from frankenmerge.storage.atomic import write_file

PNG_SCALE = 2
"""Pixels of a PNG per unit of the SVG."""
_GAP = 14
"""Between drawings that are combined."""


class Drawing(NamedTuple):
    """A chart, and what it shows in words."""

    style: str
    """The class of the elements in `figures.css`."""
    title: str
    description: str
    """For screen readers; may be empty."""
    width: float
    height: float
    elements: str


def text(x: float, y: float, content: str, style: str) -> str:
    """A text element; nothing for an empty text."""
    if not content:
        return ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def size(width: float, height: float) -> str:
    """The attributes for the size of an `svg` element."""
    return f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'


def inline(drawing: Drawing, name: str = "") -> str:
    """Return a drawing for a page.

    Args:
        drawing: what to show.
        name: begins the ids of title and description, which must be unique in the page. Without a
            name the drawing is hidden from screen readers: the page describes it elsewhere.
    """
    head = f'<svg class="{drawing.style}" {size(drawing.width, drawing.height)} '
    if not name:
        head += f'aria-hidden="true"><title>{escape(drawing.title)}</title>'
        return head + drawing.elements + "</svg>"
    return head + _described(drawing, name) + drawing.elements + "</svg>"


def standalone(drawing: Drawing) -> str:
    """Return a drawing as the text of an SVG file."""
    head = f'<svg class="{drawing.style}" {size(drawing.width, drawing.height)} '
    head += 'xmlns="http://www.w3.org/2000/svg" ' + _described(drawing, "figure")
    style = f"<style>{stylesheet()}</style>"
    return with_light_colours(head + style + drawing.elements + "</svg>\n")


def _described(drawing: Drawing, name: str) -> str:
    labels = f"{name}-t {name}-d" if drawing.description else f"{name}-t"
    described = f'role="img" aria-labelledby="{labels}"><title id="{name}-t">'
    described += f"{escape(drawing.title)}</title>"
    if drawing.description:
        described += f'<desc id="{name}-d">{escape(drawing.description)}</desc>'
    return described


def stylesheet() -> str:
    """Colours and rules for all drawings, light and dark."""
    folder = files("frankenmerge.reporting") / "files"
    return "".join(
        (folder / name).read_text(encoding="utf-8") for name in ("colours.css", "figures.css")
    )


def combined(drawings: Sequence[Sequence[Drawing]], title: str, description: str = "") -> Drawing:
    """Place drawings in rows under a common title."""
    elements, y = [], 36.0
    width = max(sum(each.width + _GAP for each in row) for row in drawings) + _GAP
    for row in drawings:
        x = float(_GAP)
        for each in row:
            place = f'x="{x:g}" y="{y:g}" {size(each.width, each.height)}'
            elements.append(f'<svg class="{each.style}" {place}>{each.elements}</svg>')
            x += each.width + _GAP
        y += max(each.height for each in row) + _GAP
    elements.insert(0, text(width / 2, 22, title, "headline"))
    return Drawing("figure", title, description, width, y, "".join(elements))


def titled(drawing: Drawing, subtitle: str = "") -> Drawing:
    """Write a drawing's title, and a line below it, above the drawing."""
    top = 40 if subtitle else 26
    head = text(drawing.width / 2, 16, drawing.title, "title")
    head += text(drawing.width / 2, 32, subtitle, "")
    body = f'<g transform="translate(0 {top})">{drawing.elements}</g>'
    return drawing._replace(height=drawing.height + top, elements=head + body)


def with_light_colours(svg: str) -> str:
    """Replace the CSS variables of an SVG file by their light colours, on a white ground.

    Programs that read SVG know few of CSS's features: variables and media queries are not among
    them.
    """
    start, style, end = re.split(r"(?<=<style>)(.*?)(?=</style>)", svg, maxsplit=1, flags=re.S)
    style = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*\s*\}", "", style)
    colours = dict(re.findall(r"--([\w-]+):([^;}]+)", style))
    style = re.sub(r"--[\w-]+:[^;}]+;?", "", style)
    style = re.sub(r"var\(--([\w-]+)\)", lambda use: colours[use[1]], style)
    ground = f'<rect width="100%" height="100%" fill="{colours["ground"]}"/>'
    style = re.sub(r"[^{}]+\{\s*\}", "", style)
    return start + style.strip() + end.replace(">", f">{ground}", 1)


def png(svg: str) -> bytes:
    """Return an SVG file as PNG, the same bytes for the same text.

    Characters that the font lacks are written as their codes.

    Raises:
        FrankenmergeError: if the extra `plots` is not installed.
    """
    try:
        from matplotlib import get_data_path
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise fail(
            "PNG figures",
            "the packages of the extra `plots`",
            str(error),
            "pip install 'frankenmerge[plots]', or write an SVG file",
        ) from error
    folder = Path(get_data_path()) / "fonts" / "ttf"
    fonts = [str(folder / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")]
    known = _characters(fonts[0])
    legible = "".join(
        letter if letter in known or letter.isspace() else letter.encode("unicode_escape").decode()
        for letter in svg
    )
    return bytes(
        svg_to_bytes(
            svg_string=legible,
            zoom=PNG_SCALE,
            skip_system_fonts=True,
            font_files=fonts,
            font_family="DejaVu Sans",
            sans_serif_family="DejaVu Sans",
        )
    )


@cache
def _characters(font: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(font).get_charmap()))


def save(svg: str, path: Path) -> None:
    """Write the text of an SVG file as SVG or PNG, by the ending of the path.

    Raises:
        FrankenmergeError: for another ending, for a file that cannot be written, and for PNG
            without the extra `plots`.
    """
    if path.suffix not in (".png", ".svg"):
        raise fail(
            str(path),
            "a file name that ends in .png or .svg",
            path.suffix or "no ending",
            "choose another name",
        )
    write_file(path, svg.encode() if path.suffix == ".svg" else png(svg))
