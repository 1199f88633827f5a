"""Clients that PEFT itself wraps, draws and saves, and the dense float64 model of their mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from fedex_scale.aggregation.aggregate_report import AggregateSection
from fedex_scale.aggregation.job import Job
from fedex_scale.aggregation.offline import aggregate_files
from fedex_scale.config.federation import MethodConfig

WEIGHTS = (0.5, 0.2, 0.3)
TOKENS = {"input_ids": torch.arange(3, 43).view(2, 20)}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)}
BERT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BERT |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
Updates = list[dict[str, torch.Tensor]]


def make_base(
    cls: type[PreTrainedModel], config: object, path: Path, dtype: torch.dtype = torch.float32
) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cls(config).to(dtype).save_pretrained(path)
    return path


def make_clients(
    cls: type[PreTrainedModel],
    base: Path,
    out: Path,
    *,
    seed: int = 0,
    change: Callable[[nn.Module, int], object] = lambda model, k: None,
    save: Mapping[str, object] | None = None,
    **options: object,
) -> tuple[list[Path], Updates]:
    """Let PEFT save three clients; return them, and what each adds to every layer, (O, I)."""
    draw = torch.Generator().manual_seed(seed)
    paths, updates = [], []
    start: dict[str, torch.Tensor] = {}
    for k in range(len(WEIGHTS)):
        model = get_peft_model(cls.from_pretrained(base), LoraConfig(**{"r": 3, **options}))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                first = torch.randn(parameter.shape, generator=draw) * 0.15
                noise = torch.randn(parameter.shape, generator=draw) * 0.05
                parameter.data = start.setdefault(name, first) + noise
        change(model, k)
        model.save_pretrained(out / f"client-{k}", **(save or {}))
        paths.append(out / f"client-{k}")
        updates.append(
            {
                name.removeprefix("base_model.model."): layer.get_delta_weight("default").double()
                for name, layer in model.named_modules()
                if isinstance(layer, LoraLayer)
            }
        )
    return paths, updates


def aggregate(
    base: Path,
    out: Path,
    clients: Sequence[Path],
    weights: tuple[float, ...] = WEIGHTS,
    **options: str,
) -> dict:
    method = {k: options.pop(k) for k in ("name", "assign") if k in options}
    return aggregate_files(
        Job(
            base=str(base),
            out=out,
            clients=tuple(clients),
            weights=weights,
            method=MethodConfig(**method),
            section=AggregateSection(**options),
        )
    )


def dense(cls: type[PreTrainedModel], base: Path, updates: Updates) -> PreTrainedModel:
    """Return the base with every update added, float64; a tied output layer gets its own weight."""
    model = cls.from_pretrained(base, dtype=torch.float64)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")  # the usual one knows no float64
    for layer in updates[0]:
        delta = sum(w * update[layer] for w, update in zip(WEIGHTS, updates, strict=True))
        module = model.get_submodule(layer)
        module.weight = nn.Parameter(module.weight.detach() + delta)
    return model


def outputs(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**inputs, return_dict=True)[0].double()


def assert_exact(
    cls: type[PreTrainedModel],
    base: Path,
    out: Path,
    updates: Updates,
    inputs: Mapping = TOKENS,
    adapter: str = "adapter",
) -> None:
    used = out / "base" if (out / "base").exists() else base
    model = PeftModel.from_pretrained(cls.from_pretrained(used), out / adapter)
    got, plain = outputs(model, inputs), outputs(cls.from_pretrained(base), inputs)
    doubles = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}
    expected = outputs(dense(cls, base, updates), doubles)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert (expected - plain).norm() > 1e-2 * expected.norm()


def keys(directory: Path) -> set[str]:
    return set(load_file(directory / "adapter_model.safetensors"))


def edit(client: Path, change: Callable[[dict], object]) -> None:
    file = client / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
