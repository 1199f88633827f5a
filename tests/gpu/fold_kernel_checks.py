"""The fold in one pass against torch's: run by tests/unit/aggregation/test_fold_kernel.py.

In Triton's interpreter, on a CPU: it computes tf32x3 products in float32, and so says nothing of
their error on a card.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from server_oracle import RANK, SCALING, SHAPES, make_clients, start
from torch import Tensor

from fedex_scale.aggregation import fold_kernel
from fedex_scale.aggregation.aggregator import Round, Sinks, aggregate
from fedex_scale.aggregation.weights import FoldStats, Target, as_stats, fold
from fedex_scale.config.federation import AggregateSection, MethodConfig
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import LowRank

BF16, FP16 = torch.bfloat16, torch.float16
SHARES_OF_TIES = {BF16: 5e-4, FP16: 3e-3}  # sums that two float32 orders round to either side
SIZES = [(130, 270), (64, 128), (3, 400), (200, 1), (1, 1)]


def make_weight(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return (0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(7))).to(dtype)


def make_pieces(shape: tuple[int, int], ranks: Sequence[int], seed: int = 0) -> list[LowRank]:
    """Return pieces for a matrix that is stored as (O, I), of a tenth of the weight's size."""
    draw, (num_out, num_in) = torch.Generator().manual_seed(seed), shape
    return [
        LowRank(
            3e-4 * torch.randn(num_out, rank, generator=draw),
            torch.randn(rank, num_in, generator=draw),
        )
        for rank in ranks
    ]


def make_carry(W: Tensor) -> Tensor:
    return 1e-6 * torch.randn(W.numel(), generator=torch.Generator().manual_seed(3))


def turned(pieces: Sequence[LowRank]) -> list[LowRank]:
    return [LowRank(V.T.contiguous(), U.T.contiguous()) for U, V in pieces]


def exact(pieces: Sequence[LowRank]) -> Tensor:
    return sum(U.double() @ V.double() for U, V in pieces)


def one_fold(
    W: Tensor,
    pieces: Sequence[LowRank],
    *,
    kernel: bool,
    transposed: bool = False,
    carry: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, FoldStats]:
    """Return the weight and the carry that a fold leaves, and what it found."""
    flat = W.clone().view(-1)
    kept = None if carry is None else carry.clone()
    target = Target(flat=flat, shape=tuple(W.shape), transposed=transposed, carry=kept)
    pieces = turned(pieces) if transposed else pieces
    (stats,) = as_stats(fold(target, pieces, carry=carry is not None, use_kernel=kernel))
    return flat.view_as(W), target.carry, stats


def steps_between(x: Tensor, y: Tensor) -> Tensor:
    """Return how many numbers of their dtype lie between two tensors' entries."""
    places = [bits.view(torch.int16).int() for bits in (x, y)]
    return (torch.where(places[0] < 0, -32768 - places[0], places[0])).sub_(
        torch.where(places[1] < 0, -32768 - places[1], places[1])
    )


@pytest.fixture
def kernel_runs() -> Iterator[Mock]:
    with patch.object(fold_kernel, "fold_into", wraps=fold_kernel.fold_into) as used:
        yield used


@pytest.mark.parametrize("carries", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("ranks", [(64,), (3, 45), (1,), (0,)], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_it_rounds_as_torch_does(
    shape, ranks, dtype, transposed, carries, kernel_runs: Mock
) -> None:
    W, pieces = make_weight(shape, dtype), make_pieces(shape, ranks)
    carry = make_carry(W) if carries else None
    options = {"transposed": transposed, "carry": carry}
    got, got_carry, stats = one_fold(W, pieces, kernel=True, **options)
    assert kernel_runs.call_count == 1
    expected, expected_carry, told = one_fold(W, pieces, kernel=False, **options)
    steps = steps_between(got, expected)
    assert steps.abs().max() <= 1
    assert steps.count_nonzero() <= max(1, SHARES_OF_TIES[dtype] * W.numel())
    change = got.double() - W.double()
    missed = (change - exact(pieces)).square().sum().item()
    assert stats.missed == pytest.approx(missed, rel=3e-4, abs=1e-13)  # of few entries
    assert stats.intended == pytest.approx(exact(pieces).square().sum().item(), rel=1e-6)
    assert stats.carried == told.carried == carries
    if carries:
        total = got.double().view(-1) + got_carry
        torch.testing.assert_close(
            total, expected.double().view(-1) + expected_carry, rtol=0, atol=1e-8
        )
        assert stats.unseen == pytest.approx(got_carry.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("carries", [False, True])
def test_its_squared_miss_is_torchs(carries: bool) -> None:
    """On enough entries that float32's rounding at the size of a weight averages out."""
    W, pieces = make_weight((500, 700), BF16), make_pieces((500, 700), (40, 24))
    carry = make_carry(W) if carries else None
    *_, stats = one_fold(W, pieces, kernel=True, carry=carry)
    *_, told = one_fold(W, pieces, kernel=False, carry=carry)
    assert stats[:3] == pytest.approx(told[:3], rel=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_carry_never_adds_up(transposed: bool) -> None:
    W, carry = make_weight((130, 270), BF16), torch.zeros(130 * 270)
    start_W, total = W.double(), torch.zeros(130, 270, dtype=torch.float64)
    for seed in range(5):
        pieces = make_pieces((130, 270), (20, 13), seed)
        total += exact(pieces)
        W, carry, _ = one_fold(W, pieces, kernel=True, transposed=transposed, carry=carry)
    lacks = W.double() + carry.view_as(W) - start_W - total
    assert lacks.norm() < 1e-6 * total.norm()
    assert torch.all(carry.view_as(W).abs() <= 2.0**-8 * W.double().abs() * 1.01 + 1e-9)


CUTS = [[270 * 64], [270 * 64 - 1, 270 * 64 + 1], [5, 6, 7], [1000, 20011], [130 * 270 - 1]]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_shards_get_the_same_bits_as_the_whole(cuts: list[int], transposed: bool) -> None:
    W = make_weight((130, 270), BF16)
    flat, whole = W.clone().view(-1), Target(flat=W.view(-1), shape=(130, 270))
    whole.transposed = transposed
    parts = [
        Target(flat=flat[begin:end], shape=(130, 270), start=begin, transposed=transposed)
        for begin, end in zip((0, *cuts), (*cuts, W.numel()), strict=True)
    ]
    for seed in range(2):
        pieces = make_pieces((130, 270), (7, 30), seed)
        pieces = turned(pieces) if transposed else pieces
        expected, *got = as_stats(*(fold(place, pieces, carry=True) for place in (whole, *parts)))
        for name in ("intended", "missed", "unseen"):
            sums = sum(getattr(stats, name) for stats in got)
            assert sums == pytest.approx(getattr(expected, name), rel=1e-6)
    assert torch.equal(flat, W.view(-1))
    assert torch.equal(torch.cat([part.carry for part in parts]), whole.carry)


def test_ties_go_to_the_even_number() -> None:
    half = 2.0**-8  # of bfloat16's step from 1 to 2
    W = torch.tensor([[1, 1 + 2 * half, 1 + 4 * half], [-1, -1 - 2 * half, 2 - 2 * half]]).to(BF16)
    pieces = [LowRank(torch.tensor([[half], [-half]]), torch.ones(1, 3))]
    got, *_ = one_fold(W, pieces, kernel=True)
    assert torch.equal(got, (W.double() + exact(pieces)).float().to(BF16))
    assert got[0].tolist() == [1, 1 + 4 * half, 1 + 4 * half]


def test_what_is_not_finite_stays_so_and_is_told() -> None:
    W = make_weight((3, 5), BF16)
    W[0, 0], W[0, 1], W[0, 2] = float("nan"), float("inf"), -float("inf")
    W[1, 0] = torch.finfo(BF16).max
    pieces = [LowRank(torch.full((3, 1), 3e38), torch.ones(1, 5))]
    got, _, stats = one_fold(W, pieces, kernel=True)
    expected, *_ = one_fold(W, pieces, kernel=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert got[0, 0].isnan()
    assert got[1, 0] == float("inf")
    assert stats.missed != stats.missed
    nans = torch.full((15,), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    got, *_ = one_fold(make_weight((3, 5), BF16), pieces, kernel=True, carry=nans)
    assert got.isnan().all(), "also one whose bits round up to another number's"


@pytest.mark.parametrize("uses", [True, False])
def test_a_key_switches_it_off(uses: bool, kernel_runs: Mock, tmp_path: Path) -> None:
    clients, _ = make_clients(tmp_path, start(), num_clients=3)
    targets = {
        layer: Target(flat=torch.ones(shape, dtype=BF16).view(-1), shape=shape)
        for layer, shape in SHAPES.items()
    }
    task = Round(
        clients=[Adapter(path) for path in clients],
        weights=[1 / 3] * 3,
        previous=None,
        rank=RANK,
        scaling=SCALING,
    )
    section = AggregateSection(fold="carry", fold_kernel=uses)
    aggregate(task, MethodConfig(), section, targets, Sinks(), seed=lambda layer: 0)
    assert kernel_runs.call_count == (len(SHAPES) if uses else 0)
