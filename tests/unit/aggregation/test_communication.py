"""What travels: against the paper's table 8, and against the files that a run writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from resuming import write_config
from rich.console import Console

from fedex_scale.aggregation.communication import FULL, PAPER_MODELS, compare, size, table, traffic
from fedex_scale.config.federation import MethodConfig
from fedex_scale.files.adapters import Adapter
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError

SHAPES = {"q": (5, 3), "up": (11, 7)}
BOTH, OUT = 5 + 3 + 11 + 7, 5 + 11


@pytest.mark.parametrize("name", ["RoBERTa-large", "GPT-2"])
def test_ratios_of_the_paper(name: str) -> None:
    setting = PAPER_MODELS[name]
    known = {"rank": setting.rank, "initial": setting.initial, "head": setting.head}
    rows = compare(setting.shapes, num_clients=3, rounds=5, **known)
    ratios = {row.method: row.total / rows[-1].total for row in rows}
    assert ratios["fedit"] == pytest.approx(setting.paper["fedit"], abs=1.5e-3)
    assert ratios["ffa"] == pytest.approx(setting.paper["ffa"], abs=1.5e-3)
    assert ratios[FULL] == pytest.approx(setting.paper["full"], rel=5e-3)


def test_roberta_base_differs_from_the_paper_and_says_so() -> None:
    setting = PAPER_MODELS["RoBERTa-base"]
    known = {"rank": setting.rank, "initial": setting.initial, "head": setting.head}
    rows = compare(setting.shapes, num_clients=3, rounds=5, **known)
    assert rows[0].total / rows[-1].total == pytest.approx(10.254, abs=1e-3)
    assert "others here" in setting.note


@pytest.mark.parametrize(
    ("config", "up", "down"),
    [
        # q's base update travels as its 15 numbers where factors of two or three columns have more.
        ({"name": "fedit"}, BOTH, BOTH),
        ({"name": "ffa"}, OUT, OUT),
        ({"name": "flexlora"}, BOTH, BOTH),
        ({"name": "fedex"}, BOTH, BOTH + 15 + 2 * 18),
        ({"name": "fedex", "svd_rank": 1}, BOTH, BOTH + BOTH),
        ({"name": "fedex", "assign": "reinit"}, BOTH, 15 + 3 * 18),
        ({"name": "flora"}, BOTH, 15 + 3 * 18),
        ({"name": "centralized"}, 0, 0),
    ],
)
def test_counts_of_one_round(config: dict, up: int, down: int) -> None:
    found = traffic(SHAPES, rank=1, num_clients=3, method=MethodConfig(**config))
    assert (found.up, found.down) == (up, down)


def test_totals_hold_the_initial_model_and_the_head_apart() -> None:
    found = traffic(SHAPES, rank=1, num_clients=3, rounds=4, method="fedit", initial=1000, head=10)
    assert found.total == 1000 + 4 * (2 * BOTH + 20)
    assert found.total_bytes == 2 * 1000 + 4 * 4 * (2 * BOTH + 20)
    assert found.total_of_all == 3 * found.total
    full = traffic(SHAPES, rank=1, num_clients=3, rounds=4, method=FULL, initial=1000, head=10)
    assert full.total == 1000 + 4 * (2000 + 20)


def test_a_thousand_clients_receive_the_matrix_instead_of_wider_factors() -> None:
    assert traffic(SHAPES, rank=1, num_clients=1000).down_base == 5 * 3 + 11 * 7


def test_table_prints_a_line_a_method() -> None:
    console = Console(width=160)
    rows = compare(SHAPES, rank=1, num_clients=3)
    with console.capture() as captured:
        console.print(table(rows))
    assert len(captured.get().splitlines()) == 1 + len(rows)
    assert "fedex, K R as in the paper" in captured.get()


def test_sizes_are_readable() -> None:
    assert [size(x) for x in (12, 1234, 5.6e6, 2.5e9)] == ["12 B", "1.23 kB", "5.6 MB", "2.5 GB"]


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(UserError, match="clients: expected at least 1, got 0"):
        traffic(SHAPES, rank=1, num_clients=0)


@pytest.mark.parametrize("svd_rank", [None, 3])
def test_equals_what_a_run_writes(tiny_llama: Path, tmp_path: Path, svd_rank: int | None) -> None:
    method = {"name": "fedex", "svd_rank": svd_rank}
    path = write_config(tiny_llama, tmp_path, method=method, federation={"rounds": 1})
    run_config(path, [])
    run = tmp_path / "runs" / "run"
    rank = yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank"]
    client = Adapter(run / "clients" / "round-0001" / "client-0000")
    shapes = {layer: client.shapes(layer) for layer in client.layers}
    found = traffic(shapes, rank=rank, num_clients=3, method=MethodConfig(**method))
    server = run / "server" / "round-0001"
    assert found.round_bytes(found.up) == tensor_bytes(client.path)
    assert found.round_bytes(found.down_adapter) == tensor_bytes(server / "adapter")
    assert found.round_bytes(found.down_base) == tensor_bytes(server / "residual")


def tensor_bytes(adapter: Path) -> int:
    """Return the size of an adapter's file less its header, which names the tensors."""
    content = (adapter / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])
    return len(content) - 8 - length
