"""Means, ideal update and residual against dense float64; O != I != R, uneven weights."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracles import (
    WEIGHTS,
    OnDisk,
    dense,
    dense_ideal,
    dense_mean,
    dense_residual,
    make_clients,
    product,
    relative_error,
)

from fedex_scale.methods.algebra import (
    Clients,
    Pair,
    align,
    client_residual,
    ideal_update,
    lora_scaling,
    mean_pair,
    normalise_weights,
    residual,
)
from fedex_scale.runtime.errors import UserError

NAN, INF = math.nan, math.inf

RAW_WEIGHTS = st.lists(st.sampled_from([0, 1, 2, 7, 0.01]), min_size=1, max_size=5).filter(any)
LAYERS = st.builds(
    lambda weights, **options: make_clients(normalise_weights(weights), **options),
    RAW_WEIGHTS,
    num_out=st.integers(1, 20),
    num_in=st.integers(1, 20),
    rank=st.integers(1, 5),
    spread=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
    scaling=st.sampled_from([0.5, 2.0]),
    seed=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)


def size(clients: Clients) -> float:
    """Return the norm of the clients' updates, without the cancellation between them."""
    return sum(
        weight * product(pair, clients.scaling).norm().item()
        for pair, weight in zip(clients.pairs, clients.weight_K, strict=True)
    )


def test_scaling():
    assert lora_scaling(32, 16) == 0.5
    assert lora_scaling(16, 8, rslora=True) == 2.0


@pytest.mark.parametrize(("rank", "alpha"), [(0, 16), (8, 0), (8, -1), (8, NAN), (8, INF)])
def test_scaling_refuses(rank, alpha):
    with pytest.raises(UserError):
        lora_scaling(rank, alpha)


def test_weights_are_normalised():
    assert normalise_weights([1, 3, 0]) == [0.25, 0.75, 0.0]
    assert sum(normalise_weights([1e308, 1e308, 1e308])) == pytest.approx(1)


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [1, NAN], [INF, 1]])
def test_weights_refused(weights):
    with pytest.raises(UserError, match="weights"):
        normalise_weights(weights)


def test_align_keeps_the_product_of_another_rank_and_scaling():
    pair = make_clients([1.0], rank=3).pairs[0]
    aligned = align(pair, 2.0, rank=5, to_scaling=0.3)
    assert aligned.A_RI.shape == (5, 17)
    assert aligned.B_OR.shape == (23, 5)
    assert relative_error(product(aligned, 0.3), product(pair, 2.0)) < 1e-7
    same = align(pair, 0.3, rank=3, to_scaling=0.3)
    assert torch.equal(same.A_RI, pair.A_RI)
    assert torch.equal(same.B_OR, pair.B_OR)


def test_align_refuses_a_rank_above():
    with pytest.raises(UserError, match="at most 2, got 4"):
        align(make_clients([1.0]).pairs[0], 1.0, rank=2, to_scaling=1.0)


def test_clients_of_different_rank_and_alpha_aggregate_exactly():
    one, two = make_clients([1.0], rank=2).pairs[0], make_clients([1.0], rank=5, seed=1).pairs[0]
    aligned = [align(pair, s, rank=5, to_scaling=0.4) for pair, s in ((one, 8.0), (two, 0.4))]
    clients = Clients(aligned, [0.25, 0.75], 0.4)
    mean = mean_pair(clients)
    expected = 0.25 * product(one, 8.0) + 0.75 * product(two, 0.4)
    assert relative_error(product(mean, 0.4) + dense(residual(clients, mean)), expected) < 1e-6


@settings(max_examples=100)
@given(clients=LAYERS)
def test_mean_and_residual_sum_to_the_ideal_update(clients):
    mean, ideal = mean_pair(clients), dense_ideal(clients)
    expected = dense_mean(clients)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    assert (dense(ideal_update(clients)) - ideal).norm() <= 1e-6 * size(clients)
    whole = product(mean.float(), clients.scaling) + dense(residual(clients, mean))
    assert (whole - ideal).norm() <= 1e-6 * size(clients)
    for k, own in enumerate(clients.pairs):
        whole = product(own, clients.scaling) + dense(client_residual(clients, mean, k))
        assert (whole - ideal).norm() <= 1e-6 * size(clients)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("num_clients", [2, 3, 40])
def test_the_residual_itself_is_accurate_at_any_spread(spread, num_clients):
    weight_K = normalise_weights(range(1, num_clients + 1))
    clients = make_clients(weight_K, spread=spread)
    got = dense(residual(clients, mean_pair(clients)))
    assert relative_error(got, dense_residual(clients)) < 1e-6


@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_the_residual_of_a_client_is_accurate_at_any_spread(spread):
    clients = make_clients(spread=spread)
    for k, own in enumerate(clients.pairs):
        expected = dense_ideal(clients) - product(own, clients.scaling)
        got = dense(client_residual(clients, mean_pair(clients), k))
        assert relative_error(got, expected) < 1e-6


def test_residual_has_the_rank_of_all_clients_but_one():
    clients = make_clients(rank=4, num_out=30, num_in=29)
    (piece,) = residual(clients, mean_pair(clients))
    assert piece.U_OP.shape == (30, 2 * 4)
    assert piece.V_PI.shape == (2 * 4, 29)
    assert piece.U_OP.dtype == piece.V_PI.dtype == torch.float32
    assert torch.linalg.matrix_rank(dense_residual(clients)) == 2 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_K", [WEIGHTS, [0.1] * 10, [1 / 3] * 3])
def test_identical_clients_leave_exactly_nothing(weight_K, dtype):
    clients = make_clients(weight_K, spread=0.0, dtype=dtype)
    mean = mean_pair(clients)
    assert torch.equal(mean.A_RI, clients.pairs[0].A_RI.double())
    assert torch.equal(mean.B_OR, clients.pairs[0].B_OR.double())
    for piece in residual(clients, mean):
        assert not piece.U_OP.any()
        assert not piece.V_PI.any()


def test_clients_that_share_A_leave_exactly_nothing():
    clients = make_clients()
    shared = [Pair(clients.pairs[0].A_RI, pair.B_OR) for pair in clients.pairs]
    clients = clients._replace(pairs=shared)
    assert not dense(residual(clients, mean_pair(clients))).any()


def test_a_single_client_is_its_own_mean_and_leaves_one_empty_piece():
    clients = make_clients([1.0])
    mean = mean_pair(clients).float()
    assert torch.equal(mean.A_RI, clients.pairs[0].A_RI)
    assert torch.equal(mean.B_OR, clients.pairs[0].B_OR)
    (piece,) = residual(clients, mean_pair(clients))
    assert piece.U_OP.shape == (23, 0)
    assert piece.V_PI.shape == (0, 17)


def test_a_client_of_weight_zero_is_not_even_read():
    clients = make_clients([0.6, 0.0, 0.4])
    broken = [clients.pairs[0], None, clients.pairs[2]]
    without = Clients([clients.pairs[0], clients.pairs[2]], [0.6, 0.4], clients.scaling)
    clients = clients._replace(pairs=broken)
    mean = mean_pair(clients)
    torch.testing.assert_close(mean, mean_pair(without), rtol=0, atol=0)
    for function in (residual, lambda clients, _: ideal_update(clients)):
        torch.testing.assert_close(
            dense(function(clients, mean)), dense(function(without, mean)), rtol=0, atol=0
        )


@pytest.mark.parametrize("max_rank", [1, 4, 9, 12, 1000])
def test_pieces_are_bounded_and_sum_to_the_same(max_rank):
    clients = make_clients(normalise_weights([3, 1, 4, 1, 5, 9, 2]))
    mean = mean_pair(clients)
    for function in (residual, lambda c, _, **options: ideal_update(c, **options)):
        pieces = function(clients, mean, max_rank=max_rank)
        assert all(piece.U_OP.shape[1] <= max(4, max_rank) for piece in pieces)
        assert relative_error(dense(pieces), dense(function(clients, mean))) < 1e-12


def test_a_thousand_clients_are_streamed():
    num_clients = 1000
    pairs = OnDisk(num_clients, rank=2)
    clients = Clients(pairs, normalise_weights(range(1, num_clients + 1)), 0.5)
    mean = mean_pair(clients)
    assert pairs.loads == num_clients  # each client once
    pairs.loads = 0
    stream = iter(residual(clients, mean))
    num_pieces = 0
    while (piece := next(stream, None)) is not None:
        num_pieces += 1
        assert piece.U_OP.shape[1] <= 512
        alive = weakref.ref(piece.U_OP)
        del piece
        assert alive() is None  # the stream holds no piece of its own
    assert num_pieces == 8  # of half the width that is held at once
    assert pairs.loads == num_clients
    assert pairs.most_alive <= 2
    assert relative_error(dense(residual(clients, mean)), dense_residual(clients)) < 1e-6
