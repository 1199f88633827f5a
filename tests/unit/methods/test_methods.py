"""Every method against its dense definition in float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_oracles import (
    best_of_rank,
    dense,
    dense_ideal,
    dense_mean,
    dense_residual,
    make_clients,
    product,
    relative_error,
)

from fedex_scale.config.federation import MethodConfig, MethodName
from fedex_scale.methods.algebra import Clients, Pair, normalise_weights
from fedex_scale.methods.all import METHODS
from fedex_scale.methods.interface import LayerUpdate, fresh_pair
from fedex_scale.runtime.errors import UserError

EXACT = [
    {"name": "fedex"},
    {"name": "fedex", "assign": "keep"},
    {"name": "fedex", "assign": "reinit"},
    {"name": "fedex", "assign": "svd"},
    {"name": "flora"},
]
EVERY = [*EXACT, *({"name": name} for name in METHODS), {"name": "fedex", "svd_rank": 2}]


def run(clients: Clients, previous: Pair | None = None, *, seed: int = 0, **config) -> LayerUpdate:
    config = MethodConfig(**config)
    generator = torch.Generator().manual_seed(seed)
    return METHODS[config.name].update(clients, previous, config, generator)


def total(update: LayerUpdate, clients: Clients) -> torch.Tensor:
    """Return what the pair and the base update add to W together."""
    return product(update.pair, clients.scaling) + dense(update.base_update)


def sharing_A(clients: Clients) -> Clients:
    A_RI = clients.pairs[0].A_RI
    return clients._replace(pairs=[Pair(A_RI, pair.B_OR) for pair in clients.pairs])


def assert_rounded_mean(pair: Pair, clients: Clients) -> None:
    torch.testing.assert_close(pair, dense_mean(clients).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", EXACT, ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("num_clients", [1, 3, 150])
def test_exact_methods_add_the_ideal_update(config, spread, num_clients):
    weight_K = normalise_weights(range(1, num_clients + 1))
    clients = make_clients(weight_K, spread=spread)  # 150 clients at rank 4 take several pieces
    update = run(clients, **config)
    assert relative_error(total(update, clients), dense_ideal(clients)) < 1e-6
    assert {factor.dtype for factor in update.pair} == {torch.float32}


@settings(max_examples=40)
@given(
    config=st.sampled_from(EXACT),
    weights=st.lists(st.sampled_from([0, 1, 3, 0.01]), min_size=1, max_size=4).filter(any),
    num_out=st.integers(1, 15),
    num_in=st.integers(1, 15),
    rank=st.integers(1, 5),
    seed=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_exact_methods_are_exact_for_any_shape(config, weights, dtype, **shape):
    clients = make_clients(normalise_weights(weights), dtype=dtype, **shape)
    error = total(run(clients, **config), clients) - dense_ideal(clients)
    assert error.norm() < 1e-6 * sum(product(pair).norm() for pair in clients.pairs)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_updates_are_pure_and_repeatable(config):
    clients = sharing_A(make_clients())
    before = [Pair(pair.A_RI.clone(), pair.B_OR.clone()) for pair in clients.pairs]
    one, other = run(clients, **config), run(clients, **config)
    torch.testing.assert_close(one.pair, other.pair, rtol=0, atol=0)
    for pieces in (one.base_update, other.base_update, one.base_update):
        torch.testing.assert_close(list(pieces), list(one.base_update), rtol=0, atol=0)
    torch.testing.assert_close(clients.pairs, before, rtol=0, atol=0)


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_a_zero_update_gives_no_nan(config):
    clients = make_clients()
    zero = [Pair(clients.pairs[0].A_RI, torch.zeros(23, 4)) for _ in clients.pairs]
    clients = clients._replace(pairs=zero)
    update = run(clients, **config)
    assert all(factor.isfinite().all() for factor in update.pair)
    assert not torch.as_tensor(total(update, clients)).any()
    assert update.note is None


@pytest.mark.parametrize("name", ["fedit", "centralized"])
def test_fedit_is_the_mean(name):
    update = run(make_clients(), name=name)
    assert_rounded_mean(update.pair, make_clients())
    assert update.base_update == ()


def test_centralized_returns_its_client_untouched():
    clients = make_clients([1.0])
    torch.testing.assert_close(
        run(clients, name="centralized").pair, clients.pairs[0], rtol=0, atol=0
    )
    assert METHODS["centralized"].one_client


def test_fedex_is_the_mean_and_the_residual():
    clients = make_clients(spread=1e-4)
    update = run(clients)
    assert_rounded_mean(update.pair, clients)
    assert relative_error(dense(update.base_update), dense_residual(clients)) < 1e-6
    assert update.client_update is None
    assert not update.replaces


@pytest.mark.parametrize("num_clients", [3, 150])
@pytest.mark.parametrize("svd_rank", [1, 5])
def test_svd_rank_sends_the_best_part_of_the_residual(num_clients, svd_rank):
    clients = make_clients(normalise_weights(range(1, num_clients + 1)))
    update = run(clients, svd_rank=svd_rank)
    assert_rounded_mean(update.pair, clients)
    (piece,) = update.base_update
    assert piece.U_OP.shape == (23, svd_rank)
    expected = best_of_rank(dense_residual(clients), svd_rank)
    assert relative_error(dense([piece]), expected) < 1e-5


def test_a_large_svd_rank_sends_the_residual_as_it_is():
    clients = make_clients()
    (piece,) = run(clients, svd_rank=99).base_update
    assert piece.U_OP.shape[1] == 2 * 4


def test_reinit_is_flora():
    clients = make_clients()
    one, other = run(clients, assign="reinit"), run(clients, name="flora")
    torch.testing.assert_close(one.pair, other.pair, rtol=0, atol=0)
    assert not one.pair.B_OR.any()
    assert relative_error(dense(one.base_update), dense_ideal(clients)) < 1e-6


def test_keep_gives_each_client_what_its_own_pair_lacks():
    clients = make_clients()
    update = run(clients, assign="keep")
    for k, own in enumerate(clients.pairs):
        whole = product(own, clients.scaling) + dense(update.client_update(k))
        assert relative_error(whole, dense_ideal(clients)) < 1e-6


def test_keep_replaces_its_base_update_round_by_round():
    """Effective weights averaged densely, over rounds in which all go on from their own pair."""
    clients = make_clients(spread=0.5)
    W_OI = start = torch.randn(23, 17, generator=torch.Generator().manual_seed(9)).double()
    effective = [W_OI + product(pair, clients.scaling) for pair in clients.pairs]
    for round_ in range(1, 4):
        W_OI = sum(w * each for w, each in zip(clients.weight_K, effective, strict=True))
        update = run(clients, assign="keep")
        assert update.replaces
        assert relative_error(start + total(update, clients), W_OI) < 1e-6
        base = [start + dense(update.client_update(k)) for k in range(3)]
        trained = [
            Pair(pair.A_RI + 0.1 * step.A_RI, pair.B_OR + 0.1 * step.B_OR)
            for pair, step in zip(clients.pairs, make_clients(seed=round_).pairs, strict=True)
        ]
        clients = clients._replace(pairs=trained)
        effective = [
            own + product(pair, clients.scaling) for own, pair in zip(base, trained, strict=True)
        ]


@pytest.mark.parametrize("num_clients", [3, 150])
@pytest.mark.parametrize("config", [{"name": "flexlora"}, {"assign": "svd"}], ids=str)
def test_the_pair_is_the_truncated_svd_of_the_ideal_update(config, num_clients):
    weight_K = normalise_weights(range(1, num_clients + 1))
    clients = make_clients(weight_K, num_out=130, num_in=110)
    update = run(clients, **config)
    expected = best_of_rank(dense_ideal(clients), 4)
    assert relative_error(product(update.pair, clients.scaling), expected) < 1e-6
    A_RI, B_OR = update.pair.double()
    torch.testing.assert_close(B_OR.T @ B_OR, A_RI @ A_RI.T, rtol=1e-5, atol=1e-5)
    assert (update.base_update == ()) == (config == {"name": "flexlora"})


@pytest.mark.parametrize("config", [{"name": "flexlora"}, {"assign": "svd"}], ids=str)
def test_spare_rows_of_A_are_fresh_so_that_they_can_train(config):
    clients = make_clients()
    one_column = torch.tensor([1.0, 0.0, 0.0, 0.0])
    flat = [Pair(clients.pairs[0].A_RI, pair.B_OR * one_column) for pair in clients.pairs]
    A_RI, B_OR = run(clients._replace(pairs=flat), seed=3, **config).pair
    fresh = fresh_pair(clients.pairs[0], torch.Generator().manual_seed(3))
    assert torch.equal(A_RI[1:], fresh.A_RI[1:])
    assert not B_OR[:, 1:].any()
    assert B_OR[:, 0].any()


def test_ffa_keeps_A_bit_for_bit_and_is_exact():
    clients = sharing_A(make_clients())
    previous = Pair(clients.pairs[0].A_RI, torch.zeros(23, 4))
    for update in (run(clients, previous, name="ffa"), run(clients, name="ffa")):
        assert torch.equal(update.pair.A_RI, previous.A_RI)
        assert relative_error(product(update.pair, 0.5), dense_ideal(clients)) < 1e-6
        assert update.base_update == ()
    assert METHODS["ffa"].trains == {"B"}


def test_ffa_takes_a_frozen_A_that_a_client_stored_in_bf16():
    clients = sharing_A(make_clients())
    A_RI = clients.pairs[0].A_RI
    stored = [Pair(A_RI.bfloat16(), pair.B_OR.bfloat16()) for pair in clients.pairs]
    update = run(clients._replace(pairs=stored), Pair(A_RI, torch.zeros(23, 4)), name="ffa")
    assert torch.equal(update.pair.A_RI, A_RI)


def test_ffa_refuses_a_client_that_trained_A():
    clients = sharing_A(make_clients())
    clients.pairs[2] = Pair(clients.pairs[2].A_RI * 1.02, clients.pairs[2].B_OR)
    with pytest.raises(UserError, match=r"client 2: .* 2\.0%"):
        run(clients, name="ffa")


def test_identical_clients_change_no_weight():
    clients = make_clients(spread=0.0)
    for config in ({}, {"svd_rank": 2}, {"assign": "svd"}):
        update = run(clients, **config)
        assert all(not piece.U_OP.any() for piece in update.base_update)
    for name in ("fedit", "fedex", "ffa", "lora_fair"):
        torch.testing.assert_close(run(clients, name=name).pair, clients.pairs[0], rtol=0, atol=0)


def test_fresh_pair_is_drawn_as_peft_draws_it():
    like = Pair(torch.empty(32, 400), torch.empty(50, 32))
    A_RI, B_OR = fresh_pair(like, torch.Generator().manual_seed(0))
    assert A_RI.abs().max() <= 1 / math.sqrt(400)
    assert A_RI.std().item() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)
    assert B_OR.shape == (50, 32)
    assert not B_OR.any()
    again, _ = fresh_pair(like, torch.Generator().manual_seed(0))
    assert torch.equal(A_RI, again)


def test_every_method_has_its_name():
    assert tuple(METHODS) == get_args(MethodName)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "fedx"}, r"method\.name: .* did you mean fedex\?"),
        ({"name": "qwerty"}, r"got .qwerty.; the default is"),
        ({"assign": "averag"}, r"method\.assign: .* did you mean average\?"),
        ({"name": "flora", "assign": "svd"}, r"method\.assign: svd needs method\.name fedex"),
        ({"name": "fedit", "svd_rank": 4}, r"method\.svd_rank: needs"),
        ({"assign": "keep", "svd_rank": 4}, r"method\.svd_rank: needs"),
        ({"svd_rank": 0}, r"method\.svd_rank: expected a whole number from 1 to 1,000,000,000"),
        ({"fair_lambda": 0.0}, r"method\.fair_lambda: expected a number above 0"),
        ({"fair_lambda": math.nan}, r"method\.fair_lambda: expected a number above 0"),
    ],
)
def test_config_refuses(config, words):
    with pytest.raises(UserError, match=words):
        MethodConfig(**config)
