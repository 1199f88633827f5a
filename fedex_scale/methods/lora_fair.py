"""LoRA-FAIR (Bian et al., arXiv:2411.14961): B moves, so that the mean pair fits the ideal update.

    minimise f(dB) = 1 - cos(M, (B + dB) A) + lambda ||dB||,  M = ideal update / s,  A, B the means

The published server takes gradient steps on f. Here its minimum is found through one number. With
G = A A^T, N = M A^T, X = B + dB, m = ||M||, p = <N, X> and c^2 = <X G, X>, the cosine is p / (m c),
and its gradient (N - X G / nu) / (m c), where nu = c^2 / p. At the minimum it is parallel to dB and
as long as lambda, so that for some rho > 0

    dB = (nu N - B G) (rho + G)^-1    and    rho ||dB|| / (nu m c) = lambda.

Given rho, nu is the positive root of a quadratic equation, and the left side, here called the
slope, rises from 0 with rho: a bisection finds lambda on it. If even for rho to infinity, which is
dB = 0, the slope stays below lambda, then moving B does not pay.

To be exact for close clients too, everything is written in Z = (M - B A) A^T = N - B G, which comes
from the centred residual, and in delta = nu - 1.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import (
    Clients,
    Pair,
    ideal_update,
    mean_pair,
    norm_of_sum,
    residual,
)
from fedex_scale.methods.interface import LayerUpdate

TOLERANCE = 1e-6
"""Largest gradient of f at its minimum, relative to lambda."""


def update(
    clients: Clients, previous: Pair | None, config: MethodConfig, generator: torch.Generator
) -> LayerUpdate:
    """Return the mean A, and the mean B moved by dB; no base update."""
    mean = mean_pair(clients)
    Z_OR = torch.zeros_like(mean.B_OR)
    for piece in residual(clients, mean):
        Z_OR += piece.U_OP.double() @ (piece.V_PI.double() @ mean.A_RI.T) / clients.scaling
    m = norm_of_sum(ideal_update(clients)) / clients.scaling
    dB_OR, error = minimise(mean, Z_OR, m, config.fair_lambda)
    note = None
    if not error <= TOLERANCE:
        note = f"lora_fair has not converged: its gradient is {error:.1e} times fair_lambda"
    return LayerUpdate(Pair(mean.A_RI, mean.B_OR + dB_OR).float(), note=note)


def minimise(mean: Pair, Z_OR: Tensor, m: float, price: float) -> tuple[Tensor, float]:
    """Return the dB (O, R) that minimises f, and the gradient left there relative to lambda.

    Where the cosine is undefined at dB = 0, so is the task, and dB is 0. Where it is negative, the
    mean pair is no place to start from: dB is 0, and the gradient counts as infinite.

    Args:
        mean: A (R, I) and B (O, R), float64.
        Z_OR: (M - B A) A^T, float64.
        m: ||M||.
        price: lambda, above 0.
    """
    g_R, basis_RR = torch.linalg.eigh(mean.A_RI @ mean.A_RI.T)
    g_R = g_R.clamp(min=0)
    B_OR, Z_OR = mean.B_OR @ basis_RR, Z_OR @ basis_RR
    dB_OR = torch.zeros_like(B_OR)
    p = (B_OR * (B_OR * g_R + Z_OR)).sum()
    if p < 0:
        return dB_OR, math.inf
    if m > 0 and p > 0:
        # The search needs only lengths and angles: those of the columns' short coordinates.
        B_QR, Z_QR = torch.linalg.qr(torch.cat([B_OR, Z_OR], dim=1), mode="r").R.chunk(2, dim=1)
        low, high = (g_R.max().item() * factor for factor in (1e-12, 1e12))
        if _slope(B_QR, Z_QR, g_R, m, high) > price:
            while high > low * (1 + 1e-14):
                middle = math.sqrt(low * high)
                if _slope(B_QR, Z_QR, g_R, m, middle) > price:
                    high = middle
                else:
                    low = middle
            dB_OR, _ = _on_path(B_OR, Z_OR, g_R, high)
    error = _gradient_norm(B_OR, Z_OR, dB_OR, g_R, m, price) / price
    return dB_OR @ basis_RR.T, error


def _on_path(B_QR: Tensor, Z_QR: Tensor, g_R: Tensor, rho: float) -> tuple[Tensor, float]:
    """Return dB and nu for rho, in the eigenbasis of G with its eigenvalues g."""
    BB_R, BZ_R, ZZ_R = (B_QR * B_QR).sum(0), (B_QR * Z_QR).sum(0), (Z_QR * Z_QR).sum(0)
    NB_R = g_R * BB_R + BZ_R
    NN_R = g_R * (NB_R + BZ_R) + ZZ_R
    h_R = 1 / (rho + g_R)
    # nu p = c^2, divided by rho, is a delta^2 + b delta + k = 0; k vanishes with Z.
    a = (h_R * h_R * NN_R).sum().item()
    b = (h_R * h_R * (2 * NN_R + NB_R * (rho - g_R))).sum().item()
    k = (h_R * h_R * ZZ_R + h_R * BZ_R).sum().item()
    root = math.sqrt(max(0.0, b * b - 4 * a * k))
    delta = -2 * k / (b + root) if b > 0 else (root - b) / (2 * a)
    return h_R * (delta * g_R * B_QR + (1 + delta) * Z_QR), 1 + delta


def _slope(B_QR: Tensor, Z_QR: Tensor, g_R: Tensor, m: float, rho: float) -> float:
    dB_QR, nu = _on_path(B_QR, Z_QR, g_R, rho)
    c = ((B_QR + dB_QR).square() @ g_R).sum().sqrt().item()
    return rho * dB_QR.norm().item() / max(nu * m * c, sys.float_info.min)


def _gradient_norm(
    B_OR: Tensor, Z_OR: Tensor, dB_OR: Tensor, g_R: Tensor, m: float, price: float
) -> float:
    """Return the norm of f's gradient (at dB = 0, of its smallest subgradient)."""
    N_OR, X_OR = B_OR * g_R + Z_OR, B_OR + dB_OR
    c = (X_OR.square() @ g_R).sum().sqrt().item()
    if m == 0 or c == 0:
        return 0.0
    pull_OR = (N_OR - X_OR * g_R * (N_OR * X_OR).sum() / c**2) / (m * c)
    distance = dB_OR.norm().item()
    if distance == 0:
        return max(0.0, pull_OR.norm().item() - price)
    return (pull_OR - dB_OR * (price / distance)).norm().item()
