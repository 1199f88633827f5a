"""The four launchers start the same program: two gloo ranks, ZeRO-3 with offload."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from launching import start
from safetensors.torch import load_file

from fedex_scale.runtime.distributed import free_port

OFFLOAD = "engine.deepspeed=ds_configs/zero3_offload.json"
LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc-per-node=2"],
    "accelerate": ["accelerate", "launch", "--config_file", "launch/accelerate/cpu2.yaml"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
}


def command_of(name: str) -> list[str]:
    port = {"torchrun": "--master-port", "accelerate": "--main_process_port"}
    return [*LAUNCHERS[name], port.get(name, "--master_port"), str(free_port())]


def adapters_of(config: Path, name: str) -> dict[str, torch.Tensor]:
    run = Path(yaml.safe_load(config.read_text())["run"]["dir"]) / name
    return load_file(run / "final" / "exact_adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(tiny_config: Path) -> dict[str, torch.Tensor]:
    """The outcome under `python`, without DeepSpeed."""
    done = start([sys.executable], tiny_config, "run.name=python")
    assert done.returncode == 0, done.stderr[-3000:]
    return adapters_of(tiny_config, "python")


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_gives_what_plain_python_gives(
    name: str, tiny_config: Path, plain: dict[str, torch.Tensor]
) -> None:
    """Up to the order of sums over two ranks, which Adam's first steps amplify a little."""
    done = start(command_of(name), tiny_config, f"run.name={name}", OFFLOAD)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "zero3_offload, 2 x cpu" in done.stdout.replace("\n", " ")
    mine = adapters_of(tiny_config, name)
    assert mine.keys() == plain.keys()
    distance = sum(float((mine[key] - plain[key]).square().sum()) for key in plain) ** 0.5
    assert distance < 1e-2 * sum(float(x.square().sum()) for x in plain.values()) ** 0.5


def test_bad_input_stops_every_rank_with_one_line_and_code_2(tiny_config: Path) -> None:
    done = start(command_of("torchrun"), tiny_config, "data.path=nowhere.jsonl", "run.name=bad")
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "nowhere.jsonl" in lines[0]
    assert done.returncode != 0
    assert "exitcode  : 2" in done.stderr
    assert not (Path(yaml.safe_load(tiny_config.read_text())["run"]["dir"]) / "bad").exists()


def test_world_size_that_did_not_join_is_refused(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMI_SIZE", "2")
    done = start([sys.executable], tiny_config, "run.name=apart")
    assert done.returncode == 2
    assert "expected 2 processes in one group, got 1" in done.stderr


def test_metrics_have_a_line_per_event(tiny_config: Path, plain: dict[str, torch.Tensor]) -> None:
    run = Path(yaml.safe_load(tiny_config.read_text())["run"]["dir"]) / "python"
    events = [json.loads(line)["event"] for line in (run / "metrics.jsonl").open()]
    assert events.count("eval") == 2
    assert events.count("round") == 2
    assert events.count("client") == 6
