"""8-bit optimizers, and bases that bitsandbytes packs: only the side adapter can change those."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from resuming import differing, write_config
from safetensors.torch import load_file

from fedex_scale.cli import main
from fedex_scale.engine.contents import fold_targets
from fedex_scale.federation.server import aggregate_round


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Path:
    return write_config(tiny_llama, tmp_path)


def run(config: Path, name: str, *overrides: str) -> Path:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(config), f"run.name={name}", *overrides])
    assert not ended.value.code
    return config.parent / "runs" / name


def rounds_of(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == "round"]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_optimizers_train_and_are_reset(config: Path, optimizer: str) -> None:
    pytest.importorskip("bitsandbytes")
    both = run(config, "both", f"train.optimizer={optimizer}")
    again = run(config, "again", f"train.optimizer={optimizer}")
    assert differing(both, again) == []
    plain = run(config, "plain")
    assert differing(plain, both) != []  # it is another optimizer
    losses = [json.loads(line) for line in (both / "metrics.jsonl").read_text().splitlines()]
    assert all(x["loss"] > 0 for x in losses if x["event"] == "step")


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_is_never_written_to(
    config: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    seen = []

    def watched(config, engine, targets, *args, **kwargs):
        assert not any(target.writable for target in fold_targets(engine).values())
        weights = [layer.get_base_layer().weight for layer in engine.layers.values()]
        before = [digest(weight) for weight in weights]
        result = aggregate_round(config, engine, targets, *args, **kwargs)
        seen.append(before == [digest(weight) for weight in weights])
        return result

    monkeypatch.setattr("fedex_scale.rounds.server.aggregate_round", watched)
    folder = run(config, quantization, f"model.quantization={quantization}")
    assert seen == [True, True]
    first, second = rounds_of(folder)
    assert [first["kept"], second["kept"]] == pytest.approx([1, 1], abs=1e-5)
    assert not second["base_changed"]
    assert not (folder / "final" / "base").exists()


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_score_does_not_change_what_is_trained(
    config: Path, quantization: str, tmp_path: Path
) -> None:
    """bitsandbytes lays 4-bit weights out anew in evaluation, where the CPU is made for it."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "prompts.txt").write_text("What is 2 + 2?\n")
    options = [f"model.quantization={quantization}", "federation.rounds=1"]
    unscored = run(config, f"{quantization}-unscored", *options)
    options += [f"evaluation.generate={tmp_path / 'prompts.txt'}", "evaluation.before=true"]
    scored = run(config, f"{quantization}-scored", *options)
    assert list(scored.glob("evaluations/round-0000/answers*"))
    for client in sorted((unscored / "clients").rglob("*.safetensors")):
        assert client.read_bytes() == (scored / client.relative_to(unscored)).read_bytes()


def test_what_a_packed_base_cannot_take_is_told(config: Path, capsys) -> None:
    pytest.importorskip("bitsandbytes")
    folder = run(config, "capped", "model.quantization=nf4", "aggregate.side_rank=8")
    first, second = rounds_of(folder)
    assert first["kept"] == pytest.approx(1, abs=1e-5)
    assert second["kept_of_all"] < 0.99
    out = capsys.readouterr().out
    assert "warning: the side adapter is full at 8 columns" in out
    assert "aggregate.side_rank=16 holds 2 rounds" in out
    assert "planes" not in out, "which such a base cannot have"
    side = load_file(folder / "server" / "round-0002" / "side" / "adapter_model.safetensors")
    assert all(torch.isfinite(x).all() for x in side.values())


def digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.data.cpu().numpy().tobytes()).hexdigest()
