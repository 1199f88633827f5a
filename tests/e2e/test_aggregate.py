"""`fedex-scale aggregate` on files: exact, loaded by PEFT and transformers, never half done."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import logits, near, random_pairs, save_adapter
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fedex_scale.cli import main
from fedex_scale.methods.algebra import Pair

SHAPES = {
    "tiny_llama": {
        f"model.layers.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "self_attn.q_proj": (64, 48),
            "self_attn.v_proj": (32, 48),
            "mlp.down_proj": (48, 112),
        }.items()
    },
    "tiny_gpt2": {
        f"transformer.h.{i}.{name}": shape
        for i in range(2)
        for name, shape in {"attn.c_attn": (144, 48), "attn.c_proj": (48, 48)}.items()
    },
}
WEIGHTS = [0.5, 0.2, 0.3]
RANK, ALPHA = 4, 2.0


def make_clients(
    tmp_path: Path, model: str = "tiny_llama", *, spread: float = 0.05, **options
) -> tuple[list[Path], list[Mapping[str, torch.Tensor]]]:
    """Write three clients; return them, and what each adds to each layer, as (O, I), float64."""
    start = random_pairs(SHAPES[model], rank=RANK, seed=0, size=0.2)
    paths, updates = [], []
    for k in range(len(WEIGHTS)):
        pairs = near(start, spread=spread, seed=k + 1)
        paths.append(save_adapter(tmp_path / f"client-{k}", pairs, alpha=ALPHA, **options))
        updates.append({layer: product(pair, ALPHA / RANK) for layer, pair in pairs.items()})
    return paths, updates


def product(pair: Pair, scaling: float) -> torch.Tensor:
    return scaling * pair.B_OR.double() @ pair.A_RI.double()


def run(*arguments: object) -> int:
    """Run `fedex-scale aggregate`; return its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["aggregate", *map(str, arguments)])
    return caught.value.code


def aggregate(base: Path, out: Path, clients: Sequence[Path], *options: object) -> dict:
    given = ("--weights", ",".join(map(str, WEIGHTS)), *options)
    assert run("--base", base, "--out", out, *given, *clients) == 0
    return json.loads((out / "report.json").read_text())


def ideal_of(updates: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {
        layer: sum(w * update[layer] for w, update in zip(WEIGHTS, updates, strict=True))
        for layer in updates[0]
    }


def dense_model(base: Path, ideal: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Return the base with every update added, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for layer, delta_OI in ideal.items():
        module = model.get_submodule(layer)
        module.weight.data += delta_OI.T if isinstance(module, Conv1D) else delta_OI
    return model


def assert_exact(base: Path, adapter: Path, original: Path, ideal: Mapping) -> None:
    """Check that PEFT's model of base and adapter gives the oracle's logits, to 1e-5."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    got = logits(PeftModel.from_pretrained(model, adapter))
    expected = logits(dense_model(original, ideal))
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - logits(dense_model(original, {}))).norm() > 1e-2 * expected.norm()


def snapshot(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        ("--fold", "side"),
        ("--fold", "side", "--side-rank", "3"),
        ("--fold", "round"),
        ("--fold", "carry"),
        ("--assign", "reinit"),
        ("--assign", "svd"),
        ("--assign", "svd", "--fold", "round"),
        ("--method", "flora"),
    ],
    ids=" ".join,
)
def test_exact_methods_give_the_ideal_model(request, tmp_path, model, options) -> None:
    base = request.getfixturevalue(model)
    before = snapshot(base)
    clients, updates = make_clients(tmp_path, model)
    out = tmp_path / "out"
    report = aggregate(base, out, clients, *options)
    folded = "round" in options or "carry" in options or "--side-rank" in options
    assert report["base_changed"] == (out / "base").exists() == folded
    used = out / "base" if folded else base
    assert_exact(used, out / "adapter", base, ideal_of(updates))
    assert report["kept"] > 1 - 1e-5
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]) == used.resolve()
    assert snapshot(base) == before
    assert set(os.listdir(tmp_path)) == {"out", *(path.name for path in clients)}


def test_keep_gives_every_client_the_same_model(tiny_llama, tmp_path) -> None:
    clients, updates = make_clients(tmp_path)
    out = tmp_path / "out"
    aggregate(tiny_llama, out, clients, "--assign", "keep")
    adapters = [out / "adapter", *sorted((out / "clients").iterdir())]
    assert len(adapters) == 4
    for adapter in adapters:
        assert_exact(tiny_llama, adapter, tiny_llama, ideal_of(updates))


def test_the_changed_base_has_the_same_files_and_only_folded_weights_differ(
    tiny_llama, tmp_path
) -> None:
    clients, updates = make_clients(tmp_path)
    out = tmp_path / "out"
    aggregate(tiny_llama, out, clients, "--fold", "round")
    assert set(os.listdir(out / "base")) == set(os.listdir(tiny_llama))
    changed = {f"{layer}.weight" for layer in updates[0]}
    for name in os.listdir(tiny_llama):
        before, after = tiny_llama / name, out / "base" / name
        if not name.endswith(".safetensors"):
            assert before.read_bytes() == after.read_bytes()
            continue
        old, new = load_file(before), load_file(after)
        assert list(old) == list(new)
        for key in old:
            assert torch.equal(old[key], new[key]) == (key not in changed)


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_bf16_base_rounds_or_becomes_float32(tiny_llama, tmp_path, dtype) -> None:
    base = to_bf16(tiny_llama, tmp_path / "bf16")
    clients, updates = make_clients(tmp_path, spread=0.01)
    out = tmp_path / "out"
    options = ("--fold", "round", *(("--dtype", dtype) if dtype else ()))
    report = aggregate(base, out, clients, *options)
    stored = {
        tensor.dtype
        for file in (out / "base").glob("*.safetensors")
        for tensor in load_file(file).values()
    }
    assert stored == {torch.float32 if dtype else torch.bfloat16}
    if dtype:
        assert_exact(out / "base", out / "adapter", base, ideal_of(updates))
        assert AutoModelForCausalLM.from_pretrained(out / "base").dtype == torch.float32
    else:
        assert report["kept"] < 0.9
        assert "rounds away most" in report["notes"][0] or report["kept"] >= 0.5


def test_side_on_a_bf16_base_is_exact(tiny_llama, tmp_path) -> None:
    base = to_bf16(tiny_llama, tmp_path / "bf16")
    clients, updates = make_clients(tmp_path, spread=1e-4)
    aggregate(base, tmp_path / "out", clients)
    assert_exact(base, tmp_path / "out" / "adapter", base, ideal_of(updates))


@pytest.mark.parametrize("fold", ["side", "round"])
def test_identical_clients_change_no_weight(tiny_llama, tmp_path, fold) -> None:
    clients, _ = make_clients(tmp_path)
    same = [clients[0]] * 3
    report = aggregate(tiny_llama, tmp_path / "out", same, "--fold", fold)
    assert report["residual_norm"] == 0
    assert report["kept"] == 1
    assert not (tmp_path / "out" / "base").exists()


def test_clients_of_any_rank_alpha_and_pattern(tiny_llama, tmp_path) -> None:
    """Each of them has its own rank, alpha, rsLoRA or patterns by layer."""
    shapes = SHAPES["tiny_llama"]
    lower = {layer: 2 if "q_proj" in layer else 3 for layer in shapes}
    alphas = {layer: 5.0 if "layers.1.mlp" in layer else 1.5 for layer in shapes}
    plain = [random_pairs(shapes, rank=r, seed=r, size=0.2) for r in (5, 2)]
    third = {
        layer: random_pairs({layer: shape}, rank=lower[layer], seed=9, size=0.2)[layer]
        for layer, shape in shapes.items()
    }
    clients = [
        save_adapter(tmp_path / "a", plain[0], alpha=3),
        save_adapter(tmp_path / "b", plain[1], alpha=7, use_rslora=True),
        save_adapter(
            tmp_path / "c",
            third,
            alpha=1.5,
            r=3,
            rank_pattern={"q_proj": 2},
            alpha_pattern={r".*\.1\.mlp\.down_proj": 5.0},
        ),
    ]
    updates = [
        {layer: product(pair, 3 / 5) for layer, pair in plain[0].items()},
        {layer: product(pair, 7 / 2**0.5) for layer, pair in plain[1].items()},
        {layer: product(pair, alphas[layer] / lower[layer]) for layer, pair in third.items()},
    ]
    for fold in ("side", "round"):
        out = tmp_path / fold
        aggregate(tiny_llama, out, clients, "--fold", fold)
        base = out / "base" if fold == "round" else tiny_llama
        assert_exact(base, out / "adapter", tiny_llama, ideal_of(updates))


def test_a_checkpoint_without_the_models_prefix(tiny_gpt2, tmp_path) -> None:
    base = tmp_path / "bare"
    shutil.copytree(tiny_gpt2, base)
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    clients, updates = make_clients(tmp_path, "tiny_gpt2")
    aggregate(base, tmp_path / "out", clients, "--fold", "round")
    out = tmp_path / "out"
    assert_exact(out / "base", out / "adapter", tiny_gpt2, ideal_of(updates))
    assert set(load_file(out / "base" / "model.safetensors")) == set(bare)


def test_a_tied_head_is_refused_for_a_fold_and_exact_in_the_side(
    tiny_gpt2, tmp_path, capsys
) -> None:
    shapes = {"lm_head": (400, 48), **SHAPES["tiny_gpt2"]}
    start = random_pairs(shapes, rank=RANK, seed=0, size=0.2)
    pairs = [near(start, spread=0.05, seed=k) for k in range(3)]
    clients = [save_adapter(tmp_path / str(k), x, alpha=ALPHA) for k, x in enumerate(pairs)]
    where = ("--base", tiny_gpt2, "--out", tmp_path / "out")
    assert run(*where, "--fold", "round", *clients) == 2
    assert "layer lm_head: its weight is the embedding's too" in capsys.readouterr().err
    aggregate(tiny_gpt2, tmp_path / "out", clients)
    ideal = ideal_of([{n: product(p, ALPHA / RANK) for n, p in x.items()} for x in pairs])
    model = dense_model(tiny_gpt2, {})
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for layer, delta_OI in ideal.items():
        module = model.get_submodule(layer)
        module.weight.data += delta_OI.T if isinstance(module, Conv1D) else delta_OI
    base = AutoModelForCausalLM.from_pretrained(tiny_gpt2, dtype=torch.float32)
    got = logits(PeftModel.from_pretrained(base, tmp_path / "out" / "adapter"))
    assert (got - logits(model)).norm() <= 1e-5 * got.norm()


def test_a_whole_weight_that_comes_along_is_averaged(tiny_llama, tmp_path) -> None:
    clients, _ = make_clients(tmp_path, modules_to_save=["lm_head"])
    heads = [torch.randn(400, 48, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    for client, head in zip(clients, heads, strict=True):
        file = client / "adapter_model.safetensors"
        tensors = load_file(file) | {"base_model.model.lm_head.weight": head}
        save_file(tensors, file, metadata={"format": "pt"})
    aggregate(tiny_llama, tmp_path / "out", clients)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "out" / "adapter")
    got = model.base_model.model.lm_head.modules_to_save["default"].weight
    expected = sum(w * head.double() for w, head in zip(WEIGHTS, heads, strict=True))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-7)


def to_bf16(source: Path, out: Path) -> Path:
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return out
