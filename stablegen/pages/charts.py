"""Charts as inline SVG that scales: coloured by the page's variables, distinguished by shape, named for screen readers.

Every function returns one chart with its legend. ``title`` names it to a screen reader, ``describe`` says in words
what it shows; neither is drawn. Colours are classes of ``style.css``: ``c1`` to ``c8``, or ``v-`` and a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log10

from markupsafe import Markup

from stablegen.pages.render import number, one_line, raised

WIDTH = 380
"""Usual width of a chart in its own units; its text is 12.5 units high, legible on a phone too."""
_LETTER = 6.6
"""Mean width of a letter in those units."""
_DASHES = ("", "7 4", "2 4", "9 3 2 3", "1 3", "12 4", "5 2 1 2 1 2", "3 3")
_PLOT_RIGHT = 14.0
_MARKED = 24
"""The most points of a line that are drawn with markers."""
Form = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A line: its points (x, y) and, where they were measured, a range (low, high) for each."""

    name: str
    points: Sequence[tuple[float, float]]
    ranges: Sequence[tuple[float, float]] = ()
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A predicted probability, the observed share with its bounds, and what they rest on."""

    predicted: float
    observed: float
    low: float
    high: float
    note: str = ""


def bars(
    title: str,
    categories: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    stacked: bool = False,
    colours: Sequence[str] = (),
    each: Sequence[str] = (),
    form: Form = number,
    width: int = WIDTH,
    describe: str = "",
) -> Markup:
    """Return horizontal bars, a group or one stack of segments for each category, with their values.

    ``colours``: a class for each series; ``each``: one for each category, if there is a single series.
    """
    names = list(series)
    chosen = [_colour(colours, index) for index in range(len(names))]
    rows = [[series[name][place] for name in names] for place in range(len(categories))]
    longest = max([sum(row) if stacked else max(row, default=0.0) for row in rows], default=0.0) or 1.0
    thick = 16.0 if stacked or len(names) == 1 else 11.0
    reserve = 0.0 if stacked or len(names) == 1 else 8 + _LETTER * max(len(form(x)) for row in rows for x in row or [0])
    parts: list[Markup] = []
    y = 0.0
    for place, (category, row) in enumerate(zip(categories, rows, strict=True)):
        alone = stacked or len(names) == 1
        whole = form(sum(row)) if alone else ""
        label = _clipped(one_line(category), width - 16 - _LETTER * len(whole))
        tip = _tip(category) if label != category else ""
        parts.append(Markup('<text class="strong" x="0" y="{}">{}{}</text>').format(_at(y + 12), label, tip))
        if whole:
            parts.append(Markup('<text class="end" x="{}" y="{}">{}</text>').format(width, _at(y + 12), whole))
        y += 18
        if alone:
            parts.append(_box("track", 0, y, width, thick, 3))
        x = 0.0
        for index, value in enumerate(row):
            size = value / longest * (width - reserve)
            colour = each[place] if each and len(names) == 1 else chosen[index]
            words = f"{category}: {form(value)}" if len(names) == 1 else f"{category}, {names[index]}: {form(value)}"
            if value > 0:
                parts.append(_box(f"fill {colour}", x, y, max(size, 1.5), thick, 3, words, gap=stacked))
            if stacked:
                x += size
            elif not alone:
                parts.append(
                    Markup('<text x="{}" y="{}">{}</text>').format(_at(size + 6), _at(y + thick - 1), form(value))
                )
                y += thick + 3
        y += (thick if alone else 0) + 12
    keys = [] if len(names) < 2 else [(name, colour, "box") for name, colour in zip(names, chosen, strict=True)]
    described = describe or "; ".join(
        f"{category}: " + ", ".join(f"{name} {form(value)}" for name, value in zip(names, row, strict=True))
        for category, row in zip(categories, rows, strict=True)
    )
    return _chart(title, described, width, max(y - 8, 20.0), parts) + _legend(keys)


def histogram(
    title: str,
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    x_label: str,
    y_label: str,
    below: str = "",
    mark: tuple[float, str] | None = None,
    colour: str = "c1",
    height: int = 240,
    width: int = WIDTH,
    describe: str = "",
) -> Markup:
    """Return a histogram over a logarithmic axis; ``counts`` has one for each gap of ``edges``.

    ``below`` names one more bin, the first, of values below the first edge, zero included. ``mark``: a value and its
    name.
    """
    bins = list(pairwise(edges))
    lead = 1 if below else 0
    assert len(counts) == len(bins) + lead
    top = max(counts, default=0) or 1
    ys = _ticks(0, top, 4, whole=True)
    top = max(top, ys[-1])
    left, bottom, start = 10 + _LETTER * max(len(number(y)) for y in ys), height - 42.0, 22.0
    gap = (width - left - _PLOT_RIGHT) / (len(bins) + lead * 1.6)
    at_first = left + lead * 1.6 * gap
    low, high = log10(edges[0]), log10(edges[-1])

    def across(value: float) -> float:
        return at_first + (log10(value) - low) / (high - low) * (width - _PLOT_RIGHT - at_first)

    def up(value: float) -> float:
        return bottom - value / top * (bottom - start)

    parts = [*_rows(ys, up, left, width, number), _text(y_label, 0, 10)]
    for index, count in enumerate(counts):
        if index < lead:
            x, words = left, f"{below}: {number(count)}"
        else:
            one = bins[index - lead]
            x, words = across(one[0]), f"{number(one[0])} to {number(one[1])}: {number(count)}"
        if count:
            parts.append(_box(f"fill {colour}", x + 0.75, up(count), gap - 1.5, bottom - up(count), 2, words))
    parts.append(_rule("axis", left, bottom, width - _PLOT_RIGHT, bottom))
    if below:
        parts.append(_text(below, left + gap / 2, bottom + 16, "middle"))
    parts += [
        _text(_power(value), across(value), bottom + 16, "middle")
        for value in _decades(edges[0], edges[-1], 7)
        if across(value) - at_first > 8 or not below
    ]
    if mark is not None and edges[0] < mark[0] < edges[-1]:
        parts.append(_rule("guide", across(mark[0]), start - 4, across(mark[0]), bottom))
        end = across(mark[0]) > width * 0.6
        parts.append(_text(mark[1], across(mark[0]) + (-5 if end else 5), start + 4, "end" if end else "strong"))
    parts.append(_text(x_label, (left + width - _PLOT_RIGHT) / 2, height - 5, "middle"))
    described = describe or f"{number(sum(counts))} in all" + "".join(
        f"; {number(low)} to {number(high)}: {number(count)}"
        for (low, high), count in zip(bins, counts[lead:], strict=True)
        if count
    )
    return _chart(title, described, width, height, parts)


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    x_log: bool = False,
    y_log: bool = False,
    x_form: Form = number,
    y_form: Form = number,
    x_span: tuple[float, float] | None = None,
    y_span: tuple[float, float] | None = None,
    x_ticks: Sequence[float] = (),
    y_ticks: Sequence[float] = (),
    height: int = 280,
    width: int = WIDTH,
    describe: str = "",
) -> Markup:
    """Return lines over linear or logarithmic axes; points have their values as tool tips.

    A logarithmic axis leaves out values up to 0. Lines of many points have no markers. ``x_span``, ``y_span``: the ends
    of the axes, taken from the data if None. ``x_ticks``, ``y_ticks``: the ticks, chosen to fit if empty.
    """
    drawn = [_positive(one, x_log, y_log) for one in series]
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points] + [y for one in drawn for pair in one.ranges for y in pair]
    x_axis = _Axis.over(xs, x_log, x_span, 6, x_ticks)
    y_axis = _Axis.over(ys, y_log, y_span, 5, y_ticks)
    left, bottom, start = 10 + _LETTER * max(len(y_form(y)) for y in y_axis.ticks), height - 42.0, 24.0

    def across(value: float) -> float:
        return left + 6 + x_axis.share(value) * (width - _PLOT_RIGHT - left - 6)

    def up(value: float) -> float:
        return bottom - y_axis.share(value) * (bottom - start)

    parts = [*_rows(y_axis.ticks, up, left, width, y_form), _text(y_label, 0, 10)]
    parts.append(_rule("axis", left, bottom, width - _PLOT_RIGHT, bottom))
    parts += [_text(x_form(x), across(x), bottom + 17, "middle") for x in x_axis.ticks]
    parts.append(_text(x_label, (left + width - _PLOT_RIGHT) / 2, height - 5, "middle"))
    keys = []
    for index, one in enumerate(drawn):
        colour = one.colour or f"c{index % 8 + 1}"
        path = "M" + "L".join(f"{_at(across(x))} {_at(up(y))}" for x, y in one.points)
        group = []
        if len(one.points) > 1:
            group.append(
                Markup('<path class="line" d="{}" stroke-dasharray="{}"/>').format(path, _DASHES[index % len(_DASHES)])
            )
        for (x, _), (low, high) in zip(one.points, one.ranges, strict=False):
            group.append(_rule("range", across(x), up(low), across(x), up(high)))
        for place, (x, y) in enumerate(one.points if len(one.points) <= _MARKED else ()):
            spread = f" ({y_form(one.ranges[place][0])} to {y_form(one.ranges[place][1])})" if one.ranges else ""
            group.append(_mark(index, across(x), up(y), f"{one.name}, {x_form(x)}: {y_form(y)}{spread}"))
        parts.append(Markup('<g class="{}">{}</g>').format(colour, Markup("").join(group)))
        keys.append((one.name, colour, f"line {index}"))
    described = describe or "; ".join(
        f"{one.name}: " + ", ".join(f"{x_form(x)} {y_form(y)}" for x, y in one.points) for one in drawn
    )
    return _chart(title, described, width, height, parts) + _legend(keys if len(keys) > 1 else [])


def reliability(
    title: str, points: Sequence[Point], *, height: int = 330, width: int = WIDTH, describe: str = ""
) -> Markup:
    """Return observed shares over predicted probabilities, with error bars and the diagonal of a perfect guard."""
    bottom, start, left = height - 42.0, 24.0, 44.0
    form = _whole_percent

    def across(value: float) -> float:
        return left + 8 + value * (width - _PLOT_RIGHT - 8 - left - 8)

    def up(value: float) -> float:
        return bottom - value * (bottom - start)

    shares = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    parts = [*_rows(shares, up, left, width, form), _text("observed", 0, 10)]
    parts.append(_rule("axis", left, bottom, width - _PLOT_RIGHT, bottom))
    parts += [_text(form(x), across(x), bottom + 17, "middle") for x in shares]
    parts.append(_text("predicted", (left + width - _PLOT_RIGHT) / 2, height - 5, "middle"))
    parts.append(_rule("guide", across(0), up(0), across(1), up(1)))
    group = []
    for one in points:
        x = across(one.predicted)
        group.append(_rule("range", x, up(one.low), x, up(one.high)))
        group += [_rule("range", x - 4, up(end), x + 4, up(end)) for end in (one.low, one.high)]
        words = f"predicted {one.predicted:.1%}, observed {one.observed:.1%} ({one.low:.1%} to {one.high:.1%})"
        group.append(_mark(0, x, up(one.observed), words + (f"; {one.note}" if one.note else "")))
    parts.append(Markup('<g class="c1">{}</g>').format(Markup("").join(group)))
    described = describe or "; ".join(f"predicted {one.predicted:.1%}, observed {one.observed:.1%}" for one in points)
    return _chart(title, described, width, height, parts)


@dataclass(frozen=True, slots=True)
class _Axis:
    """The ends of an axis, whether it is logarithmic, and its ticks."""

    low: float
    high: float
    log: bool
    ticks: Sequence[float]

    @classmethod
    def over(
        cls,
        values: Sequence[float],
        log: bool,
        span: tuple[float, float] | None,
        count: int,
        wanted: Sequence[float] = (),
    ) -> _Axis:
        low, high = span or (min(values, default=1.0), max(values, default=1.0))
        if log:
            if span is None:
                room = (high / low) ** 0.06 if high > low else 2.0
                low, high = low / room, high * room
            ticks = list(wanted) or _log_ticks(low, high, count)
            return cls(low, high, log, [tick for tick in ticks if low <= tick <= high] or [low, high])
        if span is None:
            low = min(0.0, low)
            high = high if high > low else low + 1.0
        ticks = list(wanted) or _ticks(low, high, count)
        high = high if span else max(high, ticks[-1])
        return cls(low, high, log, [tick for tick in ticks if low <= tick <= high])

    def share(self, value: float) -> float:
        if self.log:
            return (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        return (value - self.low) / (self.high - self.low)


def _positive(one: Series, x_log: bool, y_log: bool) -> Series:
    """Return a series without the points that its axes cannot show."""
    kept = [
        place
        for place, (x, y) in enumerate(one.points)
        if isfinite(x) and isfinite(y) and (x > 0 or not x_log) and (y > 0 or not y_log)
    ]
    floor_at = min((one.points[place][1] for place in kept), default=1.0)
    ranges = [one.ranges[place] for place in kept] if one.ranges else []
    if y_log:
        ranges = [(low if low > 0 else floor_at, high) for low, high in ranges]
    return Series(one.name, [one.points[place] for place in kept], ranges, one.colour)


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return about ``count`` round numbers that cover low to high."""
    rough = (high - low) / count or 1.0
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    step = max(1.0, ceil(step)) if whole else step
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _decades(low: float, high: float, most: int) -> list[float]:
    """Return at most ``most`` powers of ten between low and high."""
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    step = max(1, ceil((last - first + 1) / most))
    return [10.0**power for power in range(first, last + 1) if power % step == 0]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between low and high for a logarithmic axis."""
    decades = _decades(low, high, most)
    if len(decades) >= 3:
        return decades
    for factors in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        powers = range(floor(log10(low)), ceil(log10(high)) + 1)
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [tick for tick in found if low * 0.999 <= tick <= high * 1.001]
        if len(found) >= 3:
            return found
    return [low, high]


def _power(value: float) -> str:
    """Return a power of ten as a label."""
    exponent = round(log10(value))
    return f"{value:g}" if -3 <= exponent <= 3 else f"10{raised(exponent)}"


def _whole_percent(value: float) -> str:
    return f"{value:.0%}"


def _colour(colours: Sequence[str], index: int) -> str:
    return colours[index] if index < len(colours) else f"c{index % 8 + 1}"


def _clipped(text: str, room: float) -> str:
    most = max(8, int(room / _LETTER))
    return text if len(text) <= most else text[: most - 1] + "…"


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _tip(words: str) -> Markup:
    return Markup("<title>{}</title>").format(one_line(words))


def _text(words: str, x: float, y: float, kind: str = "") -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, _at(x), _at(y), one_line(words))


def _rule(kind: str, x: float, y: float, to_x: float, to_y: float) -> Markup:
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(kind, *map(_at, (x, y, to_x, to_y)))


def _rows(ticks: Sequence[float], up: Callable[[float], float], left: float, width: float, form: Form) -> list[Markup]:
    """Return the horizontal lines of a grid and their labels."""
    found = []
    for tick in ticks:
        found.append(_rule("grid-line", left, up(tick), width - _PLOT_RIGHT, up(tick)))
        found.append(_text(form(tick), left - 6, up(tick) + 4, "end"))
    return found


def _box(
    kind: str, x: float, y: float, width: float, height: float, radius: float, words: str = "", *, gap: bool = False
) -> Markup:
    width = max(width - 1.5, 1.0) if gap else width
    tip = _tip(words) if words else ""
    sizes = map(_at, (x, y, width, height, min(radius, width / 2)))
    return Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="{}">{}</rect>').format(kind, *sizes, tip)


def _mark(index: int, x: float, y: float, words: str = "") -> Markup:
    """Return a marker whose shape distinguishes series without colour."""
    tip = _tip(words) if words else ""
    kind = index % 4
    if kind == 0:
        return Markup('<circle class="mark" cx="{}" cy="{}" r="4.2">{}</circle>').format(_at(x), _at(y), tip)
    corners = {
        1: ((-4, -4), (4, -4), (4, 4), (-4, 4)),
        2: ((0, -5.2), (5.2, 0), (0, 5.2), (-5.2, 0)),
        3: ((0, -5), (5, 4), (-5, 4)),
    }[kind]
    points = " ".join(f"{_at(x + dx)},{_at(y + dy)}" for dx, dy in corners)
    return Markup('<polygon class="mark" points="{}">{}</polygon>').format(points, tip)


def _legend(keys: Sequence[tuple[str, str, str]]) -> Markup:
    """Return the legend of series: name, colour, and either a box or the line with an index."""
    if not keys:
        return Markup("")
    items = []
    for name, colour, kind in keys:
        if kind == "box":
            sample = Markup('<rect class="fill" x="5" y="1" width="12" height="11" rx="3"/>')
        else:
            index = int(kind.removeprefix("line "))
            dash = _DASHES[index % len(_DASHES)]
            sample = Markup('<path class="line" d="M0 6.5H24" stroke-dasharray="{}"/>').format(dash) + _mark(
                index, 12, 6.5
            )
        items.append(
            Markup('<li><svg class="chart-key {}" viewBox="0 0 24 13" aria-hidden="true">{}</svg>{}</li>').format(
                colour, sample, one_line(name)
            )
        )
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _chart(title: str, describe: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    inside = Markup("\n").join(parts)
    return Markup(
        '<svg class="chart" viewBox="0 0 {} {}" style="max-width: {}rem" role="img" aria-label="{}">'
        "<title>{}</title><desc>{}</desc>{}</svg>"
    ).format(width, _at(height), _at(width * 1.25 / 16), *map(one_line, (title, title, describe)), inside)
