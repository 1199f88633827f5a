"""The interface from Python: what it takes, what it refuses, and that nothing gets in its way."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedex_scale
from fedex_scale import api
from fedex_scale.methods.all import METHODS

K, R, O, I = 3, 2, 7, 5  # noqa: E741
WEIGHTS = (0.5, 0.3, 0.2)
FUNCTIONS = [getattr(api, name) for name in api.__all__ if name != "UserError"]


def clients(dtype: torch.dtype = torch.float32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(R, I, generator=draw).to(dtype),
            torch.randn(O, R, generator=draw).to(dtype),
        )
        for _ in range(K)
    ]


def test_the_interface_is_there_and_nothing_else_pretends_to_be() -> None:
    assert set(api.__all__) == set(fedex_scale.__all__) <= set(dir(fedex_scale))
    assert issubclass(fedex_scale.UserError, ValueError)
    with pytest.raises(AttributeError, match="has no attribute 'rum'"):
        _ = fedex_scale.rum
    assert not hasattr(fedex_scale, "Sequence")


def test_a_module_does_not_take_the_place_of_a_function_of_its_name() -> None:
    program = (
        "import fedex_scale.run; from fedex_scale.run import run_config; import fedex_scale; "
        "assert callable(fedex_scale.run) and callable(run_config)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    for found in pkgutil.walk_packages(fedex_scale.__path__, "fedex_scale."):
        if not found.name.startswith("fedex_scale.flower."):  # is for an environment of its own
            importlib.import_module(found.name)
    for name in fedex_scale.__all__:
        assert getattr(fedex_scale, name) is getattr(api, name)
    assert fedex_scale.methods.all.METHODS is METHODS


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstrings_tell_of_every_argument(function) -> None:
    text = inspect.getdoc(function)
    assert "Raises:\n    UserError:" in text
    told = re.search(r"Args:\n(.*?)\n\n", text, flags=re.DOTALL)[1]
    named = re.findall(r"^    ([\w, ]+):", told, flags=re.MULTILINE)
    assert re.split(", ", ", ".join(named)) == list(inspect.signature(function).parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "settings", [{}, {"assign": "svd"}, {"assign": "reinit"}, {"name": "flora"}], ids=str
)
def test_an_exact_method_s_layer_is_the_mean_of_the_clients(settings, dtype) -> None:
    pairs = clients(dtype)
    update = api.aggregate_layer(iter(pairs), scaling=0.7, weights=iter(WEIGHTS), **settings)
    A_RI, B_OR = update.pair
    got_OI = 0.7 * B_OR @ A_RI + sum(U_OP @ V_PI for U_OP, V_PI in update.base_update)
    ideal_OI = 0.7 * sum(
        w * B_OR.double() @ A_RI.double() for w, (A_RI, B_OR) in zip(WEIGHTS, pairs, strict=True)
    )
    assert got_OI.dtype == torch.float32
    torch.testing.assert_close(got_OI.double(), ideal_OI, atol=1e-5, rtol=0)


def test_keep_gives_each_client_what_it_lacks() -> None:
    pairs = clients()
    update = api.aggregate_layer(pairs, scaling=1.0, assign="keep")
    ideal_OI = sum(B_OR @ A_RI for A_RI, B_OR in pairs) / K
    for k, (A_RI, B_OR) in enumerate(pairs):
        got_OI = B_OR @ A_RI + sum(U_OP @ V_PI for U_OP, V_PI in update.client_update(k))
        torch.testing.assert_close(got_OI, ideal_OI, atol=1e-5, rtol=0)


def test_a_trainer_s_parameters_are_read_and_left_alone() -> None:
    pairs = [tuple(torch.nn.Parameter(x) for x in pair) for pair in clients()]
    update = api.aggregate_layer(pairs, scaling=1.0)
    tensors = [*update.pair, *(x for piece in update.base_update for x in piece)]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert all(x.grad is None for pair in pairs for x in pair)


def test_ffa_goes_by_the_server_s_pair() -> None:
    (A_RI, B_OR), *_ = clients()
    same = [(A_RI, k * B_OR) for k in (1, 3)]
    update = api.aggregate_layer(same, scaling=1.0, name="ffa", previous=(A_RI, B_OR))
    torch.testing.assert_close(update.pair.A_RI, A_RI)
    torch.testing.assert_close(update.pair.B_OR, 2 * B_OR)
    with pytest.raises(fedex_scale.UserError, match="which ffa freezes"):
        api.aggregate_layer(same, scaling=1.0, name="ffa", previous=(-A_RI, B_OR))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pairs": []}, "pairs: expected at least one"),
        ({"pairs": [(torch.ones(R, I).numpy(), torch.ones(O, R))]}, "client 0: .* two tensors"),
        ({"pairs": [(torch.ones(R, I).cfloat(), torch.ones(O, R))]}, "client 0: .* float dtype"),
        ({"weights": [1, 2, None]}, "weights: expected numbers"),
        ({"seed": 10**30}, "seed: expected a whole number from 0"),
        ({"seed": "x"}, "seed: expected a whole number from 0"),
        ({"scaling": "1"}, "scaling: expected a number above 0"),
        ({"pairs": None}, "pairs: expected a list, got None"),
        ({"weights": [1, 2, 10**400]}, "weights: expected numbers"),
        ({"pairs": [(torch.ones(R, I, device="meta"), torch.ones(O, R))]}, "client 0: .* dense"),
        ({"name": "full"}, "method.name: full aggregates no adapters"),
        ({"name": "centralized"}, "method.name: centralized aggregates no adapters"),
        ({"pairs": [(torch.ones(R, I), torch.ones(O, R + 1))]}, r"client 0: expected A \(R, I\)"),
        ({"pairs": [(torch.ones(R), torch.ones(O, R))]}, r"client 0: expected A \(R, I\)"),
        ({"pairs": [*clients(), (torch.ones(1, I), torch.ones(O, 1))]}, "client 3: .* with zeros"),
        ({"pairs": [(torch.full((R, I), torch.inf), torch.ones(O, R))]}, "client 0: .* NaN or Inf"),
        ({"pairs": [(torch.ones(R, I), torch.full((O, R), torch.nan))]}, "client 0: .* NaN or Inf"),
        ({"previous": (torch.ones(R, O), torch.ones(I, R))}, "previous: expected A and B of"),
        ({"weights": [1, 2]}, r"weights: expected one a client \(3\), got 2"),
        ({"weights": [0, 0, 0]}, "weights: expected at least one above 0"),
        ({"weights": [1, 1, -1]}, "weights: client 2"),
        ({"scaling": 0.0}, "scaling: expected a number above 0"),
        ({"scaling": float("nan")}, "scaling: expected a number above 0"),
        ({"name": "fedx"}, "did you mean fedex"),
        ({"svd_rnak": 2}, "did you mean svd_rank"),
        ({"name": "fedit", "svd_rank": 2}, "svd_rank: needs method.name fedex"),
    ],
)
def test_what_cannot_be_aggregated_is_told(change: dict, told: str) -> None:
    with pytest.raises(fedex_scale.UserError, match=told):
        api.aggregate_layer(**{"pairs": clients(), "scaling": 1.0, **change})


def test_factors_of_eight_bits_are_aggregated_in_float32() -> None:
    small = [tuple(x.to(torch.float8_e4m3fn) for x in pair) for pair in clients()]
    large = [tuple(x.float() for x in pair) for pair in small]
    pairs = [api.aggregate_layer(x, scaling=1.0).pair for x in (small, large)]
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: api.run(None), "config: expected a path, a recipe's name or a mapping, got null"),
        (lambda: api.plan(3), "config: expected a path"),
        (lambda: api.plan("quickstart", 5), "overrides: expected a list or a mapping, got 5"),
        (lambda: api.plan("quickstart", [1]), "override: expected section.key=value, got 1"),
        (lambda: api.evaluate("nowhere", suite=3), "suite: expected a list, got 3"),
        (lambda: api.aggregate(None, base="x", out="y"), "clients: expected a list, got None"),
        (lambda: api.aggregate([], base="x", out="y", weights=0.5), "weights: expected a list"),
        (lambda: api.plan("quickstart", "lora.rnak=3"), "did you mean rank"),
        (lambda: api.plan("quickstart", gpus=1.5), "--gpus: expected a number above 0, got 1.5"),
        (lambda: api.plan("quickstart", gpu_memory=24), "--gpu-memory: expected a size"),
        (lambda: api.evaluate("nowhere"), r"--suite: .* got none \(nowhere is no run\)"),
        (lambda: api.evaluate(None), "model: expected a path, got None"),
        (lambda: api.export("nowhere", "x", rank=2.5), "rank: expected a whole number"),
        (lambda: api.aggregate([3], base="x", out="y"), "clients: expected a path, got 3"),
    ],
)
def test_what_callers_get_wrong_is_one_line(call: Callable[[], object], told: str) -> None:
    with pytest.raises(fedex_scale.UserError, match=told):
        call()


def test_one_alone_is_as_good_as_a_list_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(fedex_scale.UserError, match="unknown task fedex_piq; did you mean"):
        api.evaluate(tiny_llama, suite="fedex_piq")
    with pytest.raises(fedex_scale.UserError, match="nowhere: expected a PEFT adapter"):
        api.aggregate("nowhere", base=tiny_llama, out=tmp_path / "out")
