"""A client that stands out is named; clients that differ as clients do are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_llama, random_pairs, save_adapter

import fedex_scale
from fedex_scale.aggregation.outliers import Likeness
from fedex_scale.files.basefiles import BaseFiles
from fedex_scale.methods.algebra import Clients, Pair

SHAPES = [(640, 700), (40, 30), (512, 1024)]


def pairs(num_clients: int, spread: float = 0.5, seed: int = 0) -> list[list[Pair]]:
    """Return clients, layer by layer, that share a direction and each have one of their own."""
    draw = torch.Generator().manual_seed(seed)

    def factors(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw)

    layers = []
    for rows, columns in SHAPES:
        A_RI, B_OR = factors(4, columns), factors(rows, 4)
        layers.append([Pair(A_RI, B_OR + spread * factors(rows, 4)) for _ in range(num_clients)])
    return layers


def likeness(layers: list[list[Pair]], *, few: bool = True) -> Likeness:
    seen = Likeness()
    for clients in layers:
        seen.add(Clients(clients, [1 / len(clients)] * len(clients), 0.5), few=few)
    return seen


def changed(layers: list[list[Pair]], k: int, factor: float) -> list[list[Pair]]:
    return [
        [Pair(x.A_RI, x.B_OR * (factor if j == k else 1)) for j, x in enumerate(clients)]
        for clients in layers
    ]


@pytest.mark.parametrize("few", [True, False])
def test_norms_and_cosines_are_those_of_the_products(few: bool) -> None:
    layers = pairs(3)
    found = likeness(layers, few=few).clients()
    flat = [
        torch.cat([(0.5 * clients[k].B_OR @ clients[k].A_RI).flatten() for clients in layers])
        for k in range(3)
    ]
    for k in range(3):
        others = sum(x for j, x in enumerate(flat) if j != k)
        cosine = torch.nn.functional.cosine_similarity(flat[k], others, dim=0)
        assert found[k]["norm"] == pytest.approx(float(flat[k].norm()), rel=0.15)
        assert found[k]["cosine"] == pytest.approx(float(cosine), abs=0.1)


@pytest.mark.parametrize("num_clients", [2, 3, 8])
def test_clients_that_differ_as_clients_do_are_not_told_of(num_clients: int) -> None:
    found = likeness(pairs(num_clients, spread=1.0))
    assert found.notes(range(num_clients)) == []


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("factor", [1e34, 1e6, 0.001])
def test_a_norm_that_stands_out(factor: float, few: bool) -> None:
    found = likeness(changed(pairs(3), 1, factor), few=few)
    (note,) = [x for x in found.notes(["a", "b", "c"]) if x.startswith("b: its norm")]
    assert note.endswith(" times the median")
    assert float(note.split()[4]) == pytest.approx(factor, rel=0.15)


def test_of_many_clients_a_smaller_difference_stands_out() -> None:
    found = likeness(changed(pairs(8), 5, 4.0))
    (note,) = found.notes(range(8))
    assert note.startswith("5: its norm is")
    assert "robust standard deviations" in note


def test_a_direction_that_stands_out() -> None:
    found = likeness(changed(pairs(3), 2, -1.0))
    assert any(x.startswith("c: it points against") for x in found.notes(["a", "b", "c"]))


def test_one_of_many_that_trained_nothing() -> None:
    layers = pairs(4)
    for k in (0, 1, 2):
        layers = changed(layers, k, 0.0)
    (note,) = likeness(layers).notes("abcd")
    assert note.startswith("d: its norm is")
    assert note.endswith("where most have 0")


@pytest.mark.parametrize("few", [True, False])
def test_an_update_that_is_another_ones_however_it_is_written(few: bool) -> None:
    layers = pairs(3)
    order = torch.tensor([2, 0, 3, 1])
    for clients in layers:
        A_RI, B_OR = clients[0]
        clients[2] = Pair(4 * A_RI[order], B_OR[:, order] / 4)
    (note,) = likeness(layers, few=few).notes("abc")
    assert note == "c: the same update as a, which then counts twice"


@pytest.mark.parametrize("size", [50, 300_000])
@pytest.mark.parametrize(
    ("factor", "told"),
    [(1e8, "times the median"), (-1.0, "points against"), (1.0, "same update as a")],
)
def test_a_weight_that_is_trained_whole(size: int, factor: float, told: str) -> None:
    draw = torch.Generator().manual_seed(0)
    own, other = (1 + 0.1 * torch.randn(size, generator=draw) for _ in range(2))
    seen = Likeness()
    seen.add_whole([own, other, factor * own])
    found = seen.notes("abc")
    assert any(x.startswith("c: ") and told in x for x in found)
    assert not any(x.startswith(("a: ", "b: ")) for x in found)


def test_a_poisoned_federation_is_told_of(tmp_path: Path) -> None:
    base = make_llama(tmp_path / "base")
    files = BaseFiles(base)
    shapes = {
        name.removesuffix(".weight"): files.shape(name)
        for name in files.names
        if name.endswith("q_proj.weight")
    }
    usual = random_pairs(shapes, rank=2, seed=0)
    big = {layer: Pair(x.A_RI, x.B_OR * 1e5) for layer, x in usual.items()}
    a = save_adapter(tmp_path / "a", usual, alpha=4)
    b = save_adapter(tmp_path / "b", big, alpha=4)
    report = fedex_scale.aggregate([a, a, b], base=base, out=tmp_path / "out")
    told = "\n".join(report["notes"])
    assert "is listed 2 times" in told
    assert "b: its norm is 1e+05 times the median" in told
