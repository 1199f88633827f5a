"""What a run hands over: transformers and PEFT load it, and it does what the engine did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layer_oracles import product
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import logits
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from two_rounds import RANK, assert_same_logits, dense_model, load, two_rounds

from fedex_scale.federation.final import show_handed_over
from fedex_scale.files.adapters import Adapter
from fedex_scale.runtime.errors import UserError

CASES = [
    ("tiny_llama", "side", "float32"),
    ("tiny_llama", "carry", "float32"),
    ("tiny_llama", "round", "float32"),
    ("tiny_llama", "side", "bfloat16"),
    ("tiny_llama", "carry", "bfloat16"),
    ("tiny_llama", "round", "bfloat16"),
    ("tiny_gpt2", "side", "float32"),
    ("tiny_gpt2", "carry", "float32"),
    ("tiny_gpt2", "carry", "bfloat16"),
]


@pytest.mark.parametrize(("model", "fold", "dtype"), CASES)
def test_what_is_handed_over_does_what_the_engine_did(
    request, tmp_path: Path, model: str, fold: str, dtype: str
) -> None:
    base = request.getfixturevalue(model)
    settings = [f"aggregate.fold={fold}", f"model.dtype={dtype}"]
    if fold == "side":
        settings.append("federation.rounds=2")
    run = two_rounds(base, tmp_path, *settings)
    written = run.write_final()
    assert ("base" in written) == (fold != "side")
    final_base = written.get("base", base)
    if dtype == "float32":
        expected = dense_model(base, run.updates)
        assert_same_logits(run.engine.model, expected, 1e-5)
        assert_same_logits(load(final_base, written["adapter"]), expected, 1e-5)
        assert_same_logits(load(base, written["exact_adapter"]), expected, 1e-5)
        return
    handed_over = AutoModelForCausalLM.from_pretrained(final_base, dtype=torch.bfloat16)
    handed_over = PeftModel.from_pretrained(handed_over, written["adapter"])
    assert_same_logits(handed_over, run.engine.model, 0.02)
    show_handed_over(run.engine, run.directory, run.state)
    assert torch.equal(logits(handed_over), logits(run.engine.model)), "what is scored"
    exact = dense_model(base, run.updates)
    assert_same_logits(load(base, written["exact_adapter"]), exact, 1e-5)
    assert_same_logits(handed_over, exact, 0.05)


def test_a_small_side_adapter_and_the_exact_one(tiny_llama: Path, tmp_path: Path) -> None:
    run = two_rounds(tiny_llama, tmp_path, "aggregate.side_rank=2")
    written = run.write_final()
    assert set(written) == {"adapter", "exact_adapter"}
    assert Adapter(written["adapter"]).rank == RANK + 2
    assert_same_logits(load(tiny_llama, written["adapter"]), run.engine.model, 1e-5)
    expected = dense_model(tiny_llama, run.updates)
    assert_same_logits(load(tiny_llama, written["exact_adapter"]), expected, 1e-5)


def test_planes_hand_over_their_sum_in_float32(request, tmp_path: Path) -> None:
    for name in ("tiny_llama", "tiny_gpt2"):
        base = request.getfixturevalue(name)
        folder = tmp_path / name
        folder.mkdir()
        run = two_rounds(base, folder, "aggregate.fold=planes", "model.dtype=bfloat16")
        written = run.write_final()
        handed_over = load(written["base"], written["adapter"])
        assert handed_over.dtype == torch.float32
        merged, own = load(written["base"]).state_dict(), Adapter(written["adapter"])
        rounded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        for layer, update in run.updates.items():
            module = rounded.get_submodule(layer)
            change = merged[f"{layer}.weight"].double() - module.weight.double()
            change = change.T if isinstance(module, Conv1D) else change
            got = change + product(own.pair(layer), own.scaling)
            assert (got - update).norm() < 3e-3 * update.norm(), "a bf16 plane's rounding"
        assert_same_logits(run.engine.model, handed_over, 0.05)


@pytest.mark.parametrize("method", ["fedit", "flexlora", "lora_fair"])
def test_methods_that_leave_the_base_hand_over_their_adapter(
    tiny_llama: Path, tmp_path: Path, method: str
) -> None:
    run = two_rounds(tiny_llama, tmp_path, f"method.name={method}")
    written = run.write_final()
    assert set(written) == {"adapter", "exact_adapter"}
    for path in written.values():
        assert_same_logits(load(tiny_llama, path), run.engine.model, 1e-6)


def test_flora_hands_over_its_stack(tiny_llama: Path, tmp_path: Path) -> None:
    run = two_rounds(tiny_llama, tmp_path, "method.name=flora", "aggregate.side_rank=18")
    written = run.write_final()
    assert set(written) == {"adapter", "exact_adapter"}
    for path in written.values():
        assert_same_logits(load(tiny_llama, path), run.engine.model, 1e-5)


def test_the_base_keeps_its_files_and_all_other_weights(tiny_llama: Path, tmp_path: Path) -> None:
    run = two_rounds(tiny_llama, tmp_path, "aggregate.fold=round")
    base = run.write_final()["base"]
    assert {file.name for file in base.iterdir()} == {file.name for file in tiny_llama.iterdir()}
    changed = {f"{layer}.weight" for layer in run.engine.layers}
    for file in tiny_llama.glob("*.safetensors"):
        before, after = load_file(file), load_file(base / file.name)
        assert set(before) == set(after)
        for name, tensor in before.items():
            assert torch.equal(tensor, after[name]) == (name not in changed)
    assert len(AutoTokenizer.from_pretrained(base)) == len(
        AutoTokenizer.from_pretrained(tiny_llama)
    )


def test_the_base_is_written_in_the_dtype_that_the_run_had(
    tiny_llama: Path, tmp_path: Path
) -> None:
    run = two_rounds(tiny_llama, tmp_path, "aggregate.fold=carry", "model.dtype=bfloat16")
    base = run.write_final()["base"]
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    for file in base.glob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert load(base).dtype == torch.bfloat16


def test_a_checkpoint_of_the_bare_backbone(tiny_gpt2: Path, tmp_path: Path) -> None:
    """As gpt2 is on the hub: the names of its weights lack the `transformer.` of the model's."""
    bare = copy_with(tiny_gpt2, tmp_path / "bare", rename=lambda name: name.partition(".")[2])
    run = two_rounds(bare, tmp_path, "aggregate.fold=round")
    written = run.write_final()
    expected = dense_model(tiny_gpt2, run.updates)
    assert_same_logits(run.engine.model, expected, 1e-5)
    assert_same_logits(load(written["base"], written["adapter"]), expected, 1e-5)


def test_a_base_whose_weights_cannot_be_found_is_not_half_written(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    base = copy_with(tiny_gpt2, tmp_path / "base", rename=str)
    run = two_rounds(base, tmp_path, "aggregate.fold=round")
    (base / "model.safetensors").rename(base / "elsewhere.pt")
    with pytest.raises(UserError) as caught:
        run.write_final()
    assert "expected model.safetensors" in str(caught.value)
    assert "exact_adapter" in str(caught.value)
    assert not (run.directory.final / "base").exists()
    assert (run.directory.final / "exact_adapter" / "adapter_config.json").is_file()


def copy_with(source: Path, out: Path, *, rename) -> Path:
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
            continue
        with safe_open(file, framework="pt") as tensors:
            renamed = {rename(name): tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        save_file(renamed, out / file.name, metadata={"format": "pt"})
    return out
