"""Exact over rounds: what the forward pass sees of all residuals, against their dense sum.

Clients are written as if they had been trained elsewhere; everything behind them is the real thing.
The oracle reads their files and forms the residuals by definition, in float64.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from many_rounds import RANK, assert_told, drifting, rounds_of
from peft import PeftModel
from resuming import files
from safetensors.torch import load_file
from tiny import logits, make_llama
from transformers import AutoModelForCausalLM

from fedex_scale.engine.lora_model import SIDE
from fedex_scale.federation.final import show_handed_over, write_final
from fedex_scale.files.adapters import Adapter
from fedex_scale.methods.algebra import Pair


@pytest.mark.parametrize("init", ["shared", "per_client"])
@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
def test_eight_rounds_in_bf16(request, tmp_path: Path, model: str, init: str) -> None:
    rounds = rounds_of(request.getfixturevalue(model), tmp_path)
    for number in range(1, 9):
        report, kept = rounds.advance(drifting(rounds, init, number))
        assert kept["round"] >= 0.98, number
        assert kept["all"] >= 0.995, number
        assert_told(report, kept)
    assert not rounds.state.base_changed


def test_twenty_rounds_in_two_planes(tiny_llama: Path, tmp_path: Path) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, "aggregate.fold=planes", rounds=20)
    for number in range(1, 21):
        report, kept = rounds.advance(drifting(rounds, "shared", number))
        assert kept["all"] >= 0.995, number
        assert_told(report, kept)
    for layer in rounds.engine.layers.values():
        assert layer.lora_B[SIDE].weight.shape == (layer.out_features, layer.in_features)


@pytest.mark.parametrize("fold", ["side", "planes"])
def test_resumed_at_rounds_3_and_7_to_the_same_bits(tiny_llama: Path, tmp_path, fold: str) -> None:
    left = []
    for name, stops in (("whole", ()), ("parts", (3, 7))):
        (tmp_path / name).mkdir()
        rounds = rounds_of(tiny_llama, tmp_path / name, f"aggregate.fold={fold}")
        for number in range(1, 9):
            if number in stops:
                rounds = rounds.resumed()
            _, kept = rounds.advance(drifting(rounds, "shared", number))
            assert kept["all"] >= 0.995
        write_final(rounds.config, rounds.engine, rounds.run, rounds.state)
        left.append(files(rounds.run.path))
    assert left[0] == left[1]


def test_a_packed_base_keeps_all_in_the_side_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    rounds = rounds_of(tiny_llama, tmp_path, "model.quantization=nf4")
    for number in range(1, 9):
        report, kept = rounds.advance(drifting(rounds, "per_client", number))
        assert kept["round"] >= 0.98
        assert kept["all"] >= 0.995
        assert_told(report, kept)


def test_rounds_leave_the_embedding_of_a_tied_output_layer(tiny_gpt2: Path, tmp_path: Path) -> None:
    rounds = rounds_of(tiny_gpt2, tmp_path, "lora.target_modules=[c_attn, lm_head]", rounds=3)
    embedding = rounds.engine.model.get_input_embeddings().weight
    before = embedding.detach().clone()
    for number in range(1, 4):
        _, kept = rounds.advance(drifting(rounds, "shared", number))
        assert kept["round"] >= 0.98
    assert torch.equal(embedding, before)
    written = write_final(rounds.config, rounds.engine, rounds.run, rounds.state)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(loaded, written["adapter"])
    show_handed_over(rounds.engine, rounds.run, rounds.state)
    assert torch.equal(logits(loaded), logits(rounds.engine.model))


@pytest.mark.parametrize("fold", ["side", "planes", "carry", "round"])
def test_eight_rounds_in_float32(tiny_llama: Path, tmp_path: Path, fold: str) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, f"aggregate.fold={fold}", "model.dtype=float32")
    for number in range(1, 9):
        report, kept = rounds.advance(drifting(rounds, "per_client", number))
        assert kept["all"] >= 0.99999
        assert report["kept_of_all"] <= kept["all"] + 1e-6
        assert report["kept"] == pytest.approx(kept["round"], abs=1e-4)


@pytest.mark.parametrize("fold", ["carry", "round"])
def test_what_bf16_weights_keep_is_not_overstated(
    tiny_llama: Path, tmp_path: Path, fold: str
) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, f"aggregate.fold={fold}")
    for number in range(1, 5):
        report, kept = rounds.advance(drifting(rounds, "shared", number))
        assert report["kept"] == pytest.approx(kept["round"], abs=1e-3)
        assert (report["kept_of_all"] or 0) <= kept["all"] + 1e-3
        if fold == "carry":
            assert report["kept_of_all"] == pytest.approx(kept["all"], abs=1e-3)


def test_what_a_cap_keeps_out_is_offered_again(tiny_llama: Path, tmp_path: Path) -> None:
    """Once there is nothing new, all that fits of the whole sum is seen."""
    rounds = rounds_of(tiny_llama, tmp_path, "aggregate.side_rank=24")
    for number in range(1, 5):
        report, kept = rounds.advance(drifting(rounds, "shared", number))
        assert_told(report, kept)
        assert report["side_rank"] <= 24
    best = 0.0
    for total in rounds.sums.values():
        best += torch.linalg.svdvals(total)[24:].square().sum().item()
    unseen = sum(
        (rounds.before[layer] - total).norm().item() ** 2 for layer, total in rounds.sums.items()
    )
    assert unseen**0.5 == pytest.approx(best**0.5, rel=0.01), "the best of the exact sum"


def test_a_tolerance_saves_columns_and_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, "aggregate.side_tolerance=0.1")
    for number in range(1, 5):
        clients = drifting(rounds, "shared", number)
        fade = torch.logspace(0, -3, RANK)  # as trained adapters' spectra do
        for pairs in clients:
            for layer, pair in pairs.items():
                start = Adapter(rounds.run.adapter(number - 1)).pair(layer).float()
                A = start.A_RI + fade[:, None] * (pair.A_RI - start.A_RI)
                pairs[layer] = Pair(A, start.B_OR + fade * (pair.B_OR - start.B_OR))
        report, kept = rounds.advance(clients)
        assert kept["round"] > 0.89
        assert_told(report, kept)
        columns = number * 2 * RANK
        assert all(layer["side_rank"] < 0.7 * columns for layer in report["layers"])


@pytest.mark.parametrize("init", ["shared", "per_client"])
def test_eight_rounds_of_really_trained_factors(tmp_path: Path, init: str) -> None:
    """One layer of a run of SmolLM2-135M on word problems; see data/README.md."""
    tensors = load_file(Path(__file__).parents[2] / "data" / f"factors_{init}.safetensors")
    layer = "model.layers.0.self_attn.k_proj"
    base = make_llama(tmp_path / "base", width=576, inner=16, heads=9, kv_heads=3, head_dim=64)
    rounds = rounds_of(base, tmp_path, "lora.target_modules=[k_proj]")
    for number in range(1, 9):
        clients = [
            {
                name: Pair(*(tensors[f"{number}.{k}.{x}"].float() for x in "AB"))
                if name == layer
                else Pair(torch.zeros(RANK, 576), torch.zeros(192, RANK))
                for name in rounds.engine.layers
            }
            for k in range(3)
        ]
        report, kept = rounds.advance(clients)
        assert kept["round"] >= 0.98, number
        assert kept["all"] >= 0.995, number
        assert_told(report, kept)
