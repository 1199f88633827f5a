"""LoRA-FAIR's closed form against a dense minimiser in float64."""

from __future__ import annotations

import pytest
import torch
from layer_oracles import dense_ideal, dense_mean, make_clients, product
from torch import Tensor

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Clients, Pair, normalise_weights
from fedex_scale.methods.all import METHODS
from fedex_scale.methods.lora_fair import minimise


def objective(clients: Clients, dB_OR: Tensor, price: float) -> Tensor:
    mean, M_OI = dense_mean(clients), dense_ideal(clients)
    X_OI = (mean.B_OR + dB_OR) @ mean.A_RI
    return 1 - (M_OI * X_OI).sum() / (M_OI.norm() * X_OI.norm()) + price * dB_OR.norm()


def lowest_by_lbfgs(clients: Clients, price: float) -> float:
    """Return the lowest value that L-BFGS reaches from several starts."""
    mean = dense_mean(clients)
    lowest = objective(clients, torch.zeros_like(mean.B_OR), price).item()
    for seed, size in enumerate((1e-3, 1e-2, 1e-1)):
        draw = torch.Generator().manual_seed(seed)
        dB_OR = size * torch.randn(mean.B_OR.shape, generator=draw).double() * mean.B_OR.std()
        dB_OR.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [dB_OR], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure(dB_OR=dB_OR, optimizer=optimizer):
            optimizer.zero_grad()
            value = objective(clients, dB_OR, price)
            value.backward()
            return value

        optimizer.step(closure)
        lowest = min(lowest, objective(clients, dB_OR.detach(), price).item())
    return lowest


def change(clients: Clients, price: float) -> tuple[Tensor, str | None]:
    update = METHODS["lora_fair"].update(
        clients, None, MethodConfig(name="lora_fair", fair_lambda=price), torch.Generator()
    )
    mean = dense_mean(clients)
    torch.testing.assert_close(update.pair.A_RI, mean.A_RI.float())
    assert update.base_update == ()
    return update.pair.B_OR.double() - mean.B_OR, update.note


@pytest.mark.parametrize("price", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("spread", [0.1, 0.5, 2.0])
def test_no_change_of_B_is_better(spread, price):
    clients = make_clients(spread=spread, num_out=11, num_in=9, rank=3)
    dB_OR, note = change(clients, price)
    assert note is None
    value = objective(clients, dB_OR, price).item()
    assert value <= lowest_by_lbfgs(clients, price) + 1e-7  # float32 rounding of B


def test_many_clients_at_once():
    clients = make_clients(
        normalise_weights(range(1, 201)), spread=2.0, num_out=11, num_in=9, rank=3
    )
    dB_OR, note = change(clients, 1e-3)
    assert note is None
    assert dB_OR.any()
    assert objective(clients, dB_OR, 1e-3).item() <= lowest_by_lbfgs(clients, 1e-3) + 1e-7


def test_B_stays_where_lambda_outweighs_the_gain():
    dB_OR, note = change(make_clients(spread=1e-3), 0.01)
    assert note is None
    assert dB_OR.abs().max() < 1e-6


def test_B_moves_for_close_clients_if_lambda_is_small_enough():
    """The cosine is 1 to 14 digits here: only the centred residual shows where to go."""
    clients = make_clients(spread=1e-4)
    mean = dense_mean(clients)
    M_OI = dense_ideal(clients) / clients.scaling
    residual_OI = sum(
        weight * (pair.B_OR.double() - mean.B_OR) @ (pair.A_RI.double() - mean.A_RI)
        for pair, weight in zip(clients.pairs, clients.weight_K, strict=True)
    )
    dB_OR, error = minimise(mean, residual_OI @ mean.A_RI.T, M_OI.norm().item(), 1e-12)
    assert error < 1e-3
    # Almost free, dB is the least-squares fit: (B + dB) A is M projected on the rows of A.
    fit_OR = residual_OI @ torch.linalg.pinv(mean.A_RI)
    best = (residual_OI - fit_OR @ mean.A_RI).norm()
    left = (residual_OI - dB_OR @ mean.A_RI).norm()
    assert left < best * 1.01


def test_the_scale_of_the_updates_does_not_matter_to_the_cosine():
    clients = make_clients(spread=0.5)
    one, _ = change(clients, 0.01)
    other, _ = change(clients._replace(scaling=7.0), 0.01)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_mean_that_points_away_is_left_alone_and_told():
    A_RI, B_OR = torch.eye(2, 5), torch.eye(6, 2)
    clients = Clients([Pair(A_RI, B_OR), Pair(-3 * A_RI, -0.9 * B_OR)], [0.5, 0.5], 1.0)
    assert (dense_ideal(clients) * product(dense_mean(clients))).sum() < 0
    dB_OR, note = change(clients, 0.01)
    assert dB_OR.abs().max() < 1e-6
    assert "not converged" in note


def test_clients_that_cancel_give_no_nan():
    clients = make_clients([0.5, 0.5], spread=0.0)
    pair = clients.pairs[0]
    opposed = Clients([pair, Pair(pair.A_RI, -pair.B_OR)], [0.5, 0.5], 0.5)
    dB_OR, note = change(opposed, 0.01)
    assert not dB_OR.any()
    assert note is None
