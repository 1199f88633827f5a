"""Low-rank linear algebra against dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracles import best_of_rank, dense, relative_error

from fedex_scale.methods.lowrank import (
    LowRank,
    Pieces,
    compress,
    compress_pieces,
    inner,
    norm,
    norm_of_sum,
    singular_values,
    stack,
)


def make(num_out: int, num_in: int, rank: int, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(num_out, rank, generator=draw), torch.randn(rank, num_in, generator=draw)
    )


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 14))


@settings(max_examples=60)
@given(shape=SHAPES, rank=st.integers(1, 10))
def test_compress_is_the_truncated_svd_and_loses_nothing(shape, rank):
    x = make(*shape)
    best, rest = compress(x, rank)
    W_OI = dense([x])
    assert best.U_OP.shape[1] == best.V_PI.shape[0] == rank
    assert rest.U_OP.shape[1] == rest.V_PI.shape[0] == max(0, min(shape) - rank)
    assert {factor.dtype for factor in (*best, *rest)} == {torch.float32}
    scale = 1e-6 * (1 + W_OI.norm())
    assert (dense([best]) - best_of_rank(W_OI, rank)).norm() < scale
    assert (dense([best, rest]) - W_OI).norm() < scale


def test_compress_shares_singular_values_evenly_and_sorts_them():
    x = make(9, 14, 5)
    best, _ = compress(x, 5)
    gram_PP = best.U_OP.double().T @ best.U_OP.double()
    expected = torch.diag(torch.linalg.svdvals(dense([x]))[:5])
    torch.testing.assert_close(gram_PP, expected, rtol=1e-5, atol=1e-5)
    gram_PP = best.V_PI.double() @ best.V_PI.double().T
    torch.testing.assert_close(gram_PP, expected, rtol=1e-5, atol=1e-5)


def test_compress_has_one_sign_whatever_the_signs_of_the_factors():
    U_OP, V_PI = make(9, 14, 3)
    best, _ = compress(LowRank(U_OP, V_PI), 3)
    other, _ = compress(LowRank(-U_OP, -V_PI), 3)
    torch.testing.assert_close(best, other)
    assert (best.U_OP.gather(0, best.U_OP.abs().argmax(0, keepdim=True)) > 0).all()


def test_compress_leaves_exact_zeros_where_the_rank_is_lower():
    x = make(9, 14, 3)
    twice = LowRank(torch.cat([x.U_OP] * 2, 1), torch.cat([x.V_PI] * 2, 0))
    best, rest = compress(twice, 4)
    assert not best.U_OP[:, 3].any()
    assert not best.V_PI[3].any()
    assert not rest.U_OP.any()
    assert not rest.V_PI.any()


def test_compress_of_nothing_is_zero():
    best, rest = compress(make(9, 14, 0), 2)
    assert best.U_OP.shape == (9, 2)
    assert not best.U_OP.any()
    assert not best.V_PI.any()
    assert rest.U_OP.shape == (9, 0)


@pytest.mark.parametrize("num_pieces", [1, 2, 5])
def test_compress_pieces_is_the_truncated_svd_of_the_sum(num_pieces):
    pieces = Pieces(lambda: (make(160, 140, 30, seed) for seed in range(num_pieces)))
    best, rest = compress_pieces(pieces, 3)  # Gaussian: no gap, the slowest case
    W_OI = dense(pieces)
    optimum = (W_OI - best_of_rank(W_OI, 3)).norm()
    assert (W_OI - dense([best])).norm() <= optimum * (1 + 1e-6)
    assert relative_error(dense([best]) + dense(rest), W_OI) < 1e-6
    torch.testing.assert_close(dense(rest), dense(rest), rtol=0, atol=0)  # again and again


def test_compress_pieces_gives_the_same_bits_every_time():
    pieces = [make(40, 30, 6, seed) for seed in range(3)]
    for one, other in zip(
        compress_pieces(pieces, 4)[0], compress_pieces(pieces, 4)[0], strict=True
    ):
        assert torch.equal(one, other)


def test_compress_pieces_of_zeros_is_zero():
    zero = LowRank(torch.zeros(9, 3), torch.zeros(3, 14))
    best, _ = compress_pieces([zero, zero], 2)
    assert not best.U_OP.any()
    assert not best.V_PI.any()


@settings(max_examples=40)
@given(shape=SHAPES, other_rank=st.integers(1, 9))
def test_inner_norm_and_singular_values(shape, other_rank):
    x, y = make(*shape), make(shape[0], shape[1], other_rank, seed=1)
    X_OI, Y_OI = dense([x]), dense([y])
    assert inner(x, y) == pytest.approx((X_OI * Y_OI).sum().item(), rel=1e-9, abs=1e-9)
    assert norm(x) == pytest.approx(X_OI.norm().item(), rel=1e-9)
    expected = torch.linalg.svdvals(X_OI)[: min(shape)]
    torch.testing.assert_close(singular_values(x), expected, rtol=1e-9, atol=1e-9)


def test_stack_is_the_sum():
    x, y = make(9, 14, 3), make(9, 14, 2, seed=1)
    torch.testing.assert_close(dense([stack(x, y)]), dense([x, y]))


def test_norm_is_accurate_where_columns_cancel():
    x = make(9, 14, 3)
    nearly = LowRank(-x.U_OP * (1 + 1e-5), x.V_PI)
    assert norm(stack(x, nearly)) == pytest.approx(dense([x, nearly]).norm().item(), rel=1e-8)
    assert norm(stack(x, LowRank(-x.U_OP, x.V_PI))) < 1e-13 * norm(x)


@pytest.mark.parametrize("max_entries", [1, 40, 10**6])
def test_norm_of_sum_in_any_blocks(max_entries):
    pieces = [make(9, 14, 3, seed) for seed in range(4)]
    got = norm_of_sum(pieces, max_entries=max_entries)
    assert got == pytest.approx(dense(pieces).norm().item(), rel=1e-9)
    assert norm_of_sum(pieces[:1]) == pytest.approx(norm(pieces[0]))
