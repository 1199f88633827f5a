from __future__ import annotations

import json
import random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fedex_scale.config.federation import PartitionConfig
from fedex_scale.data.partition import describe, split
from fedex_scale.runtime.errors import UserError


def make_rows(n: int, num_types: int = 4) -> Dataset:
    return Dataset.from_dict(
        {"text": [f"row {i}" for i in range(n)], "type": [f"t{i % num_types}" for i in range(n)]}
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["iid", "contiguous", "dirichlet", "dirichlet_per_client"]),
    n=st.integers(20, 200),
    num_clients=st.integers(1, 6),
    alpha=st.sampled_from([1e-300, 1.0, 1e9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_row_has_one_client(kind: str, n: int, num_clients: int, alpha: float, seed: int):
    alpha = 1.0 if kind == "dirichlet" else alpha
    config = PartitionConfig(kind=kind, num_clients=num_clients, column="type", alpha=alpha)
    parts = split(make_rows(n), config, seed)
    assert len(parts) == num_clients
    assert sorted(i for part in parts for i in part) == list(range(n))
    assert min(map(len, parts)) >= 1
    if kind != "dirichlet":
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "dirichlet_per_client"])
def test_a_split_depends_on_its_seed_alone(kind: str):
    rows, config = make_rows(50), PartitionConfig(kind=kind, column="type")
    before = split(rows, config, 7)
    np.random.seed(1)
    random.seed(1)
    assert split(rows, config, 7) == before
    assert split(rows, config, 8) != before


def test_a_known_split_stays():
    """Runs are reproducible across releases only as long as this holds."""
    assert split(make_rows(8), PartitionConfig(num_clients=3), 0) == [[2, 4, 3], [6, 5, 0], [1, 7]]
    by_type = PartitionConfig(kind="dirichlet", column="type")
    assert split(make_rows(8), by_type, 0) == [[0], [4, 5, 1, 6, 3, 7], [2]]


def test_contiguous_keeps_the_order():
    parts = split(make_rows(7), PartitionConfig(kind="contiguous"), 0)
    assert parts == [[0, 1, 2], [3, 4], [5, 6]]


def test_natural_has_a_client_per_value():
    rows = make_rows(10, num_types=3)
    parts = split(rows, PartitionConfig(kind="natural", column="type"), 0)
    assert parts == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]


@pytest.mark.parametrize("kind", ["dirichlet", "dirichlet_per_client"])
def test_a_small_alpha_gives_clients_of_few_kinds(kind: str):
    rows = make_rows(4000)

    def largest_share(alpha: float) -> float:
        config = PartitionConfig(kind=kind, column="type", alpha=alpha)
        clients = describe(split(rows, config, 0), rows, "type")["clients"]
        return np.mean([max(c["counts"].values()) / c["num_examples"] for c in clients])

    assert largest_share(1000) < 0.3 < 0.5 < largest_share(0.1)


def test_a_mix_per_client_is_dirichlet_around_the_shares_of_all():
    """A share's mean is that of all rows, m; its variance m (1 - m) / (alpha + 1).

    Drawing `size` rows by it adds a multinomial's variance.
    """
    alpha, size, shares = 3.0, 100, np.array([0.5, 0.3, 0.2])
    rows = Dataset.from_dict({"type": [*"a" * 20_000, *"b" * 12_000, *"c" * 8_000]})
    config = PartitionConfig(
        kind="dirichlet_per_client", column="type", alpha=alpha, num_clients=400
    )
    clients = describe(split(rows, config, 0), rows, "type")["clients"]
    assert {c["num_examples"] for c in clients} == {size}
    early = clients[:200]  # values run out towards the end
    mixes = np.array([[c["counts"].get(t, 0) / size for t in "abc"] for c in early])
    variance = shares * (1 - shares) * (1 + alpha / size) / (alpha + 1)
    assert np.allclose(mixes.mean(0), shares, atol=0.06)
    assert np.allclose(mixes.var(0), variance, rtol=0.25)


def test_dirichlet_redraws_for_the_smallest_client_and_gives_up():
    rows = make_rows(60)
    config = PartitionConfig(kind="dirichlet", column="type", alpha=0.5, min_examples=15)
    assert min(map(len, split(rows, config, 0))) >= 15
    hopeless = PartitionConfig(kind="dirichlet", column="type", alpha=1e-8, num_clients=30)
    with pytest.raises(UserError, match=r"raise partition.alpha"):
        split(rows, hopeless, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_clients": 11}, r"at most one per example \(10\), got 11"),
        ({"kind": "natural", "column": "type"}, r"\(2\), got 3; set partition.num_clients=2"),
        ({"kind": "dirichlet", "column": "kind"}, "expected one of text, type, got kind"),
        ({"column": "kind"}, "expected one of text, type, got kind"),
        ({"kind": "dirichlet"}, "splits by a column, got none"),
        ({"num_clients": 0}, "expected a whole number from 1 to 1,000,000, got 0"),
        ({"min_examples": 0}, "expected a whole number from 1 to 1,000,000,000"),
        ({"alpha": 0.0}, "above 0 and at most 1,000,000,000, got 0"),
        ({"alpha": float("nan")}, "above 0 and at most 1,000,000,000, got nan"),
    ],
)
def test_bad_input_is_told_in_one_line(fields: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        split(make_rows(10, num_types=2), PartitionConfig(**fields), 0)
    assert "\n" not in str(caught.value)


def test_the_description_counts_and_hashes_contents_in_order():
    rows = make_rows(6, num_types=2)
    described = describe([[0, 1, 2], [3], [2, 1, 0]], rows, "type")["clients"]
    assert [c["num_examples"] for c in described] == [3, 1, 3]
    assert described[0]["counts"] == {"t0": 2, "t1": 1}
    assert described[0]["sha256"] != described[2]["sha256"]
    moved = rows.select([5, 0, 1, 2])
    assert describe([[1, 2, 3]], moved)["clients"][0] == {
        "client": 0,
        "num_examples": 3,
        "sha256": described[0]["sha256"],
    }
    json.dumps(described)


def test_a_column_with_gaps_can_be_counted():
    rows = Dataset.from_dict({"type": ["a", None, "a", "b"]})
    parts = split(rows, PartitionConfig(kind="natural", column="type"), 0)
    assert describe(parts, rows, "type")["clients"][1]["counts"] == {"None": 1}
