"""Folds into stored matrices: whole or sharded, as (O, I) or (I, O), in float32 or bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracles import dense, make_clients, relative_error

from fedex_scale.aggregation import weights
from fedex_scale.aggregation.weights import Target, as_stats, fold
from fedex_scale.methods.algebra import LowRank, Pieces, mean_pair, residual

BF16, FLOAT32 = torch.bfloat16, torch.float32
BF16_HALF_ULP = 2.0**-8  # at most, relative


def make_pieces(
    ranks: Sequence[int] = (3, 1, 4),
    *,
    num_out: int = 300,
    num_in: int = 17,
    size: float = 1.0,
    seed: int = 0,
) -> list[LowRank]:
    draw = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            torch.randn(num_out, rank, generator=draw) * size,
            torch.randn(rank, num_in, generator=draw),
        )
        for rank in ranks
    ]


def make_weight(
    num_out: int = 300, num_in: int = 17, *, dtype: torch.dtype, transposed: bool = False
) -> torch.Tensor:
    """Return a matrix as it is stored: (I, O) if transposed."""
    draw = torch.Generator().manual_seed(99)
    W_OI = torch.randn(num_out, num_in, generator=draw).to(dtype)
    return W_OI.T.contiguous() if transposed else W_OI


def target_of(W: torch.Tensor, **options: object) -> Target:
    return Target(flat=W.view(-1), shape=tuple(W.shape), **options)


def stored_delta(pieces: Sequence[LowRank], transposed: bool) -> torch.Tensor:
    delta_OI = dense(pieces)
    return delta_OI.T if transposed else delta_OI


def streamed(pieces: Sequence[LowRank]) -> Pieces:
    return Pieces(lambda: iter(pieces))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["carry", "round"])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
def test_fold_adds_the_product(
    dtype: torch.dtype, mode: str, transposed: bool, stream: bool
) -> None:
    pieces = make_pieces()
    W = make_weight(dtype=dtype, transposed=transposed)
    expected = W.double() + stored_delta(pieces, transposed)
    target = target_of(W, transposed=transposed)
    fold(target, streamed(pieces) if stream else pieces, carry=mode == "carry")
    if dtype == FLOAT32:
        assert relative_error(W, expected) < 1e-6
        assert target.carry is None
    else:
        assert torch.all((W - expected).abs() <= BF16_HALF_ULP * expected.abs() * 1.001 + 1e-6)
    if target.carry is not None:
        assert relative_error(W.double() + target.carry.view_as(W), expected) < 1e-6
    assert (target.carry is not None) == (dtype == BF16 and mode == "carry")


@settings(max_examples=60)
@given(
    num_out=st.integers(1, 40),
    num_in=st.integers(1, 40),
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    transposed=st.booleans(),
    dtype=st.sampled_from([FLOAT32, BF16, torch.float16]),
)
def test_any_shape(num_out, num_in, ranks, transposed, dtype) -> None:
    pieces = make_pieces(ranks, num_out=num_out, num_in=num_in)
    W = make_weight(num_out, num_in, dtype=dtype, transposed=transposed)
    expected = W.double() + stored_delta(pieces, transposed)
    target = target_of(W, transposed=transposed)
    fold(target, pieces, carry=True)
    total = W.double() if target.carry is None else W.double() + target.carry.view_as(W)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def run_rounds(W: torch.Tensor, rounds: Sequence[list[LowRank]], *, carry: bool) -> Target:
    target = target_of(W)
    for pieces in rounds:
        fold(target, pieces, carry=carry)
    return target


@pytest.mark.parametrize("spread", [0.001, 0.003, 0.02])
def test_carry_never_adds_up_where_plain_rounding_loses_most(spread: float) -> None:
    """50 rounds, each with a residual of 4e-7, 4e-6 or 2e-4 of the weight."""
    rounds = [
        list(residual(clients, mean_pair(clients)))
        for seed in range(50)
        for clients in [make_clients(num_out=130, spread=spread, seed=seed)]
    ]
    W, rounded = (make_weight(130, dtype=BF16) for _ in range(2))
    total, one_round = sum(dense(pieces) for pieces in rounds), dense(rounds[0]).norm()
    expected = W.double() + total
    target = run_rounds(W, rounds, carry=True)
    missing = (W.double() + target.carry.view_as(W) - expected).norm()
    # The specification asks for 1%; summing at the size of the weight in float32 leaves 5%.
    assert missing <= 1e-4 * one_round
    assert torch.all(target.carry.view_as(W).abs() <= 1.001 * BF16_HALF_ULP * expected.abs())
    run_rounds(rounded, rounds, carry=False)
    lost = (rounded.double() - expected).norm()
    assert lost > 5 * one_round
    assert lost > 0.95 * total.norm()


def shards(numel: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    return zip((0, *cuts), (*cuts, numel), strict=True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize(
    "cuts",
    [
        [17 * 100],  # between two rows
        [17 * 100 + 5],  # within a row
        [17 * 128, 17 * 256],  # where blocks end
        [17 * 128 - 1, 17 * 128 + 1],  # one element before, one after
        [3, 4, 5],  # less than a row, and single elements
        [17 * 299 + 16],  # all but the last element
        [17 * 300],  # nothing for the last
        [1000, 1000, 4000],  # nothing in the middle
    ],
    ids=str,
)
def test_shards_get_the_same_bits_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, cuts, dtype, transposed: bool, stream: bool
) -> None:
    monkeypatch.setattr(weights, "STREAMED_ENTRIES", 4000)
    monkeypatch.setattr(weights, "BLOCK_SIDES", {"cpu": 8})
    whole = make_weight(dtype=dtype, transposed=transposed)
    pieces = [make_pieces(seed=seed, size=0.01) for seed in range(2)]
    if stream:
        pieces = [streamed(x) for x in pieces]
    flat = whole.clone().view(-1)
    one = target_of(whole, transposed=transposed)
    parts = [
        Target(flat=flat[start:end], shape=tuple(whole.shape), start=start, transposed=transposed)
        for start, end in shards(flat.numel(), cuts)
    ]
    for x in pieces:
        expected, *got = as_stats(*(fold(place, x, carry=True) for place in (one, *parts)))
        for name in ("intended", "missed"):
            total = sum(getattr(stats, name) for stats in got)
            assert total == pytest.approx(getattr(expected, name), rel=1e-5)
    assert torch.equal(flat.view_as(whole), whole)
    if dtype == BF16:
        carries = [part.carry for part in parts if part.carry is not None]
        assert torch.equal(torch.cat(carries), one.carry)


def test_a_shard_is_told_from_a_whole() -> None:
    W = make_weight(dtype=FLOAT32)
    assert target_of(W).is_whole
    assert not Target(flat=W.view(-1)[:-1], shape=tuple(W.shape)).is_whole


def test_lent_storage_is_written_where_it_was_lent_from() -> None:
    W, pieces = make_weight(dtype=BF16), make_pieces()
    expected = W.clone()
    target_in_memory = target_of(expected)
    events = []

    @contextmanager
    def lend() -> Iterator[torch.Tensor]:
        events.append("lent")
        copy = W.view(-1).clone()
        yield copy
        W.view(-1).copy_(copy)
        events.append("back")

    target = Target(lend=lend, shape=tuple(W.shape), numel=W.numel())
    for _ in range(2):
        lent, kept = (fold(x, pieces, carry=True) for x in (target, target_in_memory))
        assert torch.equal(lent, kept)
    assert torch.equal(W, expected)
    assert torch.equal(target.carry, target_in_memory.carry)
    assert events == ["lent", "back"] * 2
    fold(target, [], carry=True)
    assert len(events) == 4, "nothing to add, nothing to fetch"


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
def test_a_stream_gives_what_a_sequence_gives(dtype: torch.dtype) -> None:
    pieces = make_pieces()
    W_sequence, W_stream = make_weight(dtype=dtype), make_weight(dtype=dtype)
    sequence, stream = target_of(W_sequence), target_of(W_stream)
    fold(sequence, pieces, carry=True)
    fold(stream, streamed(pieces), carry=True)
    if dtype == FLOAT32:
        assert relative_error(W_stream, W_sequence) < 1e-6
    else:
        totals = [
            W.double() + target.carry.view_as(W)
            for W, target in ((W_stream, stream), (W_sequence, sequence))
        ]
        assert relative_error(*totals) < 1e-6


@pytest.mark.parametrize("mode", ["carry", "round"])
@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
def test_stats_are_what_was_meant_and_what_was_missed(
    dtype: torch.dtype, size: float, mode: str
) -> None:
    target = target_of(W := make_weight(dtype=dtype))
    for seed in range(3):
        pieces = make_pieces(size=size, seed=seed)
        before = W.double()
        (stats,) = as_stats(fold(target, pieces, carry=mode == "carry"))
        delta = dense(pieces)
        assert stats.intended == pytest.approx(delta.square().sum().item(), rel=1e-5)
        missed = (W.double() - before - delta).square().sum().item()
        noise = 1e-6 * (stats.intended + before.square().sum().item() * 1e-6)
        assert stats.missed == pytest.approx(missed, rel=1e-3, abs=noise)


@pytest.mark.parametrize("pieces", [[], ()])
def test_no_pieces_change_nothing(pieces: Sequence[LowRank]) -> None:
    before = make_weight(dtype=BF16)
    target = target_of(W := before.clone())
    (stats,) = as_stats(fold(target, pieces, carry=True))
    assert (stats.intended, stats.missed, stats.unseen) == (0, 0, 0)
    assert torch.equal(W, before)
    assert target.carry is None


@pytest.mark.parametrize("dtype", [FLOAT32, BF16])
@pytest.mark.parametrize("num_clients", [1, 3, 150])
def test_identical_clients_change_no_bit(num_clients: int, dtype: torch.dtype) -> None:
    clients = make_clients([1.0], seed=4)
    clients = clients._replace(
        pairs=clients.pairs * num_clients, weight_K=[1 / num_clients] * num_clients
    )
    pieces = residual(clients, mean_pair(clients))
    before = make_weight(23, dtype=dtype)
    target = target_of(W := before.clone())
    (stats,) = as_stats(fold(target, pieces, carry=True))
    assert (stats.intended, stats.missed, stats.unseen) == (0, 0, 0)
    assert torch.equal(W, before)
    assert target.carry is None or not target.carry.any()
