"""What stands in a figure stands in it as a whole, and beside what else is there."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from fedex_scale.reporting import losses


def run(name: str, num_clients: int = 2) -> dict:
    steps = [
        {"round": round, "client": client, "step": step, "loss": 3.0 - step / 10, "lr": 1e-3}
        | {"tokens": 9}
        for round in (1, 2)
        for client in range(num_clients)
        for step in (1, 2, 3)
    ]
    return {"name": name, "steps": steps}


def width_of(figure: Figure) -> float:
    figure.draw_without_rendering()
    return figure.bbox.width


@pytest.mark.parametrize("letters", [1, 8, 17, 30, 60, 200])
def test_a_legend_of_any_names_lies_within_its_figure(letters: int) -> None:
    runs = [run(f"{number}" + "n" * (letters - 1)) for number in range(4)]
    figure = losses.losses_compared(runs).figure
    width = width_of(figure)
    box = figure.legends[0].get_window_extent()
    assert 0 <= box.x0 < box.x1 <= width


def test_the_first_rounds_name_is_not_written_over_the_axis() -> None:
    figure = losses.loss(run("x")).figure
    width_of(figure)
    (axes,) = figure.axes
    named = [text for text in axes.texts if "round" in text.get_text()]
    assert len(named) == 2
    assert all(text.get_window_extent().x0 >= axes.bbox.x0 for text in named)
