"""Pareto fronts of activation against cross-entropy as charts: data in, a drawing out."""

from frankenmerge.artefacts.features import FeatureRecord
from frankenmerge.reporting.charts import WIDTH, axis_scale, short_number
from frankenmerge.reporting.labels import token
from frankenmerge.reporting.svg import Drawing, text

_LEFT, _RIGHT, _TOP, _HEIGHT = 44, 14, 12, 190
_LINE, _LETTER = 15, 6.5
"""Distance of labels, and the width of a letter."""


def front_chart(feature: FeatureRecord) -> Drawing:
    """The front of a feature: every point is an input, some with their tokens."""
    points = sorted((each.cross_entropy, each.activation, each) for each in feature.front or [])
    low_x, high_x, ticks_x = axis_scale([x for x, _, _ in points])
    low_y, high_y, ticks_y = axis_scale([y for _, y, _ in points])
    bottom = _TOP + _HEIGHT

    def x(value: float) -> float:
        return _LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return bottom - (value - low_y) / (high_y - low_y) * _HEIGHT

    elements = [
        f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{WIDTH - _RIGHT}"/>' for tick in ticks_y
    ]
    elements += [
        text(_LEFT - 6, y(tick) + 4, short_number(tick), "finish soft") for tick in ticks_y
    ]
    elements += [text(x(tick), bottom + 16, short_number(tick), "soft") for tick in ticks_x]
    # No input is known between two points: the front is a staircase.
    stairs = "".join(f"H{x(nats):.1f}V{y(value):.1f}" for nats, value, _ in points[1:])
    elements.append(
        f'<path class="line l0" d="M{x(points[0][0]):.1f} {y(points[0][1]):.1f}{stairs}"/>'
    )
    elements += [
        f'<circle class="dot" cx="{x(nats):.1f}" cy="{y(value):.1f}" r="4"/>'
        for nats, value, _ in points
    ]
    free = float("-inf")
    for nats, value, each in reversed(points):  # the highest first; labels below one another
        if y(value) < free:
            continue
        free = y(value) + _LINE
        words = "".join(map(token, each.texts))
        left = len(words) * _LETTER < x(nats) - _LEFT
        elements.append(
            text(x(nats) + (-8 if left else 8), y(value) + 4, words, "finish" if left else "start")
        )
    axis = "cross-entropy of the input, nats per token"
    elements.append(text((_LEFT + WIDTH) / 2, bottom + 34, axis, "soft"))
    (least, lowest, _), (most, highest, _) = points[0], points[-1]
    described = (
        f"activation {short_number(lowest)} at {short_number(least)} nats per token, up to "
        f"{short_number(highest)} at {short_number(most)}"
    )
    title = f"Activation of {feature.name}, against fluency"
    return Drawing("chart", title, described, WIDTH, bottom + 42, "".join(elements))
