"""Figures of what averaging the factors loses, and of what reached the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedex_scale.reporting.chart import MARKERS, SERIES, Chart, Record, legend

Lines = dict[str, list[tuple[int, float]]]
"""Points of each projection's line."""

PROJECTIONS = {
    "Q": ("q_proj", "query"),
    "K": ("k_proj", "key"),
    "V": ("v_proj", "value"),
    "O": ("o_proj", "attn.c_proj", "output.dense"),
    "QKV": ("c_attn", "qkv_proj"),
    "gate": ("gate_proj",),
    "up": ("up_proj", "c_fc"),
    "down": ("down_proj", "mlp.c_proj"),
}
MLP = ("gate", "up", "down")
_FIELDS = (
    "scaled residual_norm relative ideal_norm averaged_norm cosine norm_ratio drift effective_rank"
).split()


def by_depth(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw the scaled norm of the last round's residual over depth, a line a projection.

    Args:
        among: runs that are shown beside it, on the same scale.
    """
    lines = _over_depth(record)
    if not any(y for line in lines.values() for _, y in line):
        return None
    last = _measured(record)[-1]
    highest = max(
        y for run in (record, *among) for line in _over_depth(run).values() for _, y in line
    )
    groups = [
        {name: line for name, line in lines.items() if (name in MLP) == is_mlp}
        for is_mlp in (False, True)
    ]
    groups = [group for group in groups if group]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(groups), sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, group in zip(panels, groups, strict=True):
            _projection_lines(axes, group, highest)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        panels[-1].set_xlabel("layer")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))

    return Chart(
        name=f"{record['name']}-deviation-depth",
        title=f"Deviation by depth, round {last['round']}",
        caption="What averaging the factors loses: Frobenius norm of the residual over the root of "
        "the layer's size.",
        columns=("layer", "projection", "depth", *_FIELDS),
        rows=[
            (x["layer"], projection(x["layer"]), depth(x["layer"]), *(x[f] for f in _FIELDS))
            for x in last["deviation"]["layers"]
        ],
        draw=draw,
        height=1.0 + 1.6 * len(groups),
    )


def over_rounds(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw each projection's deviation, as a root mean square over depth, by round."""
    lines = _means_by_round(record)
    if len(_measured(record)) < 2 or not any(y for line in lines.values() for _, y in line):
        return None
    everything = [_means_by_round(run) for run in (record, *among)]
    highest = max(y for found in everything for line in found.values() for _, y in line)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _projection_lines(axes, lines, highest)
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, axes)

    return Chart(
        name=f"{record['name']}-deviation-rounds",
        title="Deviation over rounds",
        caption="The same measure, as a root mean square over the layers.",
        columns=("projection", "round", "scaled"),
        rows=[(name, *point) for name, line in lines.items() for point in line],
        draw=draw,
    )


def spectrum(record: Record, among: Sequence[Record] = ()) -> Chart | None:
    """Draw how fast the residual's singular values fall, a line a projection."""
    known = _measured(record)
    if not known:
        return None
    sums: dict[str, list[list[float]]] = {}
    for layer in known[-1]["deviation"]["layers"]:
        values = layer["singular_values"]
        if values and values[0] > 0:
            shares = [x / values[0] for x in values]
            sums.setdefault(projection(layer["layer"]), []).append(shares)
    lines = {
        name: [
            (i + 1, sum(column) / len(column)) for i, column in enumerate(zip(*found, strict=False))
        ]
        for name, found in sums.items()
    }
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _projection_lines(axes, lines, 1.0)
        axes.set_xlabel("singular value")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, axes)

    return Chart(
        name=f"{record['name']}-spectrum",
        title=f"Spectrum of the residual, round {known[-1]['round']}",
        caption="Singular values over the largest, mean over the layers: a steep fall means that "
        "a small svd_rank keeps most.",
        columns=("projection", "number", "share of the largest"),
        rows=[(name, *point) for name, line in lines.items() for point in line],
        draw=draw,
    )


def compared(records: Sequence[Record]) -> Chart | None:
    """Draw each run's residual as a share of what its clients changed, by round."""
    return _run_lines(
        records,
        lambda round: round["deviation"]["total"] and 100 * round["deviation"]["total"]["relative"],
        name="deviation-compared",
        title="Deviation of each run",
        caption="What averaging the factors would lose, as a share of the round's ideal change.",
    )


def kept(records: Sequence[Record]) -> Chart | None:
    """Draw the share of each round's residual that reached the forward pass."""
    if all(len(record["rounds"]) < 2 for record in records):
        return None
    return _run_lines(
        records,
        lambda round: 100 * round["kept"] if round["residual_norm"] else None,
        name="kept",
        title="Kept",
        caption="Share of the residual that the forward pass sees; 100% is exact.",
        top=100,
    )


def observations(record: Record) -> dict[str, float]:
    """Return the deviation of Q over V, of the deeper half over the other, and over rounds.

    Each is a quotient of root mean squares over layers: the first two in the last round.
    """
    rounds = [
        [(x["layer"], x["scaled"]) for x in r["deviation"]["layers"]] for r in _measured(record)
    ]
    if not rounds:
        return {}
    middle = max(depth(layer) for layer, _ in rounds[-1]) / 2
    parts = {
        "Q over V": [
            [y for layer, y in rounds[-1] if projection(layer) == name] for name in ("Q", "V")
        ],
        "deeper half over shallower half": [
            [y for layer, y in rounds[-1] if (depth(layer) > middle) == deep]
            for deep in (True, False)
        ],
        "last round over first": [[y for _, y in round] for round in (rounds[-1], rounds[0])],
    }
    if len(rounds) < 2:
        del parts["last round over first"]
    return {
        name: _root_mean_square(top) / _root_mean_square(bottom)
        for name, (top, bottom) in parts.items()
        if any(top) and any(bottom)
    }


def _root_mean_square(values: Sequence[float]) -> float:
    return (sum(x * x for x in values) / len(values)) ** 0.5


def projection(layer: str) -> str:
    """Return what a layer is called in figures: Q, K, V, O, gate, up, down, or its last name."""
    for name, endings in PROJECTIONS.items():
        if layer.endswith(endings):
            return name
    return layer.rsplit(".", 1)[-1]


def depth(layer: str) -> int:
    """Return the first number in a layer's name, 0 if there is none."""
    numbers = [part for part in layer.split(".") if part.isdecimal()]
    return int(numbers[0]) if numbers else 0


def _measured(record: Record) -> list[Record]:
    """Return the rounds whose deviation was measured."""
    return [round for round in record["rounds"] if round["deviation"]["layers"]]


def _over_depth(record: Record) -> Lines:
    lines: Lines = {}
    for round in _measured(record)[-1:]:
        for layer in round["deviation"]["layers"]:
            line = lines.setdefault(projection(layer["layer"]), [])
            line.append((depth(layer["layer"]), layer["scaled"]))
    return lines


def _means_by_round(record: Record) -> Lines:
    """Return the root mean square over the layers of each projection, by round."""
    lines: Lines = {}
    for round in _measured(record):
        sums: dict[str, list[float]] = {}
        for layer in round["deviation"]["layers"]:
            sums.setdefault(projection(layer["layer"]), []).append(layer["scaled"])
        for name, values in sums.items():
            lines.setdefault(name, []).append((round["round"], _root_mean_square(values)))
    return lines


def _projection_lines(axes: Axes, lines: Lines, highest: float) -> None:
    order = [*PROJECTIONS, *lines]
    for name in sorted(lines, key=order.index):
        i = list(PROJECTIONS).index(name) if name in PROJECTIONS else len(PROJECTIONS)
        x, y = zip(*sorted(lines[name]), strict=True)
        color, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
        every = max(1, len(x) // 12)
        axes.plot(x, y, color=color, marker=marker, markevery=every, label=name)
    axes.set_ylim(0, 1.06 * highest)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _run_lines(
    records: Sequence[Record],
    value: Callable[[Record], float | None],
    *,
    top: float | None = None,
    **about: str,
) -> Chart | None:
    """Return a line a run of a percentage by round; None if there is nothing to show."""
    lines = {
        record["name"]: [(r["round"], y) for r in record["rounds"] if (y := value(r)) is not None]
        for record in records
    }
    lines = {name: line for name, line in lines.items() if line}
    if not lines:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, record in enumerate(records):
            if record["name"] in lines:
                x, y = zip(*lines[record["name"]], strict=True)
                style = {"color": SERIES[i % 7], "marker": MARKERS[i % len(MARKERS)]}
                axes.plot(x, y, label=record["name"], **style)
        lowest = min(y for line in lines.values() for _, y in line)
        axes.set_ylim(min(lowest - 1, 99) if top and lowest > 0 else 0, top and top + 0.2)
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}%")
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend(figure, axes)

    rows = [(name, *point) for name, line in lines.items() for point in line]
    return Chart(columns=("run", "round", "percent"), rows=rows, draw=draw, **about)
