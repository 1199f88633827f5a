"""What `fedex-scale aggregate` writes, loaded by PEFT, against the clients' updates in float64.

Every method, fold and kind of base; sizes, ranks, weights and spreads are drawn, seeded by the
case. The report may not claim more than the loaded model has, and nothing else may have changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import SIZES, near, random_pairs, save_adapter
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fedex_scale.aggregation.aggregate_report import AggregateSection
from fedex_scale.aggregation.job import Job
from fedex_scale.aggregation.offline import aggregate_files
from fedex_scale.config.federation import MethodConfig
from fedex_scale.methods.algebra import Pair
from fedex_scale.runtime.errors import UserError

METHODS = "fedit fedex fedex-reinit fedex-svd fedex-keep flora flexlora lora_fair ffa".split()
KINDS = ("llama", "llama-tied", "gpt2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {"llama": ("q_proj", "down_proj", "lm_head"), "gpt2": ("c_attn", "c_fc", "lm_head")}
TOKENS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    folder, made = tmp_path_factory.mktemp("bases"), {}
    for kind in KINDS:
        config = LlamaConfig(
            **{**SIZES, "num_hidden_layers": 2}, tie_word_embeddings="tied" in kind
        )
        if kind == "gpt2":
            config = GPT2Config(vocab_size=97, n_embd=32, n_inner=48, n_layer=2, n_head=4)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = (GPT2LMHeadModel if kind == "gpt2" else LlamaForCausalLM)(config)
        for name, dtype in DTYPES.items():
            made[kind, name] = folder / f"{kind}-{name}"
            model.to(dtype).save_pretrained(made[kind, name])
            model.to(torch.float32)
    return made


@dataclass(frozen=True)
class Case:
    """Clients on disk, and what each adds to every layer, (O, I), float64."""

    paths: tuple[Path, ...]
    pairs: list[dict[str, Pair]]
    weights: tuple[float, ...]
    scalings: list[float]

    @property
    def rank(self) -> int:
        """Of the server: the highest of the clients'."""
        return max(next(iter(pairs.values())).A_RI.shape[0] for pairs in self.pairs)

    def ideal(self, layer: str) -> Tensor:
        shares = [w * s for w, s in zip(self.weights, self.scalings, strict=True)]
        return sum(
            share * x[layer].B_OR.double() @ x[layer].A_RI.double()
            for share, x in zip(shares, self.pairs, strict=True)
        )

    def means(self, layer: str) -> Tensor:
        """Return what the averaged factors do, of clients alike in rank and scaling."""
        A, B = (
            sum(w * x[layer][i].double() for w, x in zip(self.weights, self.pairs, strict=True))
            for i in (0, 1)
        )
        return self.scalings[0] * B @ A


def draw_case(
    draw: Random, folder: Path, base: PreTrainedModel, *, method: str, head: bool
) -> Case:
    """Write two to four clients; some bring a copy of the output layer, as PEFT saves it.

    Where a method does not average factors, they differ in rank and alpha.
    """
    targets = TARGETS[base.config.model_type][: 3 if head else 2]
    shapes = {
        name: tuple(module.weight.shape[:: -1 if isinstance(module, Conv1D) else 1])
        for name, module in base.named_modules()
        if name.endswith(targets)
    }
    ranks, alphas, spread = [1, 2, 3, 4], [1.0, 3.0, 16.0], draw.choice([1e-3, 0.03, 0.5])
    rank, alpha = draw.choice(ranks), draw.choice(alphas)
    start = random_pairs(shapes, rank=4, seed=draw.randrange(2**30), size=0.2)
    paths, pairs, scalings = [], [], []
    for k in range(draw.randint(2, 4)):
        own = near(start, spread=0.2 * spread, seed=draw.randrange(2**30))
        if method == "ffa":
            own = {layer: Pair(start[layer].A_RI, pair.B_OR) for layer, pair in own.items()}
        if method in ("flora", "fedex-reinit", "fedex-svd", "flexlora"):
            rank, alpha = draw.choice(ranks), draw.choice(alphas)
        own = {layer: Pair(A_RI[:rank], B_OR[:, :rank]) for layer, (A_RI, B_OR) in own.items()}
        paths.append(save_adapter(folder / str(k), own, alpha=alpha))
        pairs.append(own)
        scalings.append(alpha / rank)
        if head and draw.random() < 0.7:
            file = paths[-1] / "adapter_model.safetensors"
            copy = {"base_model.model.lm_head.base_layer.weight": base.lm_head.weight.detach()}
            save_file(load_file(file) | copy, file)
    shares = [draw.uniform(0.1, 1) for _ in paths]
    weights = tuple(share / sum(shares) for share in shares)
    return Case(tuple(paths), pairs, weights, scalings)


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def oracle(method: str, case: Case, layer: str, svd_rank: int | None) -> tuple[Tensor, Tensor]:
    """Return what a method should do to a layer, and what of it is no part of its new pair."""
    ideal = case.ideal(layer)
    best = truncated(ideal, case.rank)
    if method in ("fedit", "ffa", "lora_fair"):
        return case.means(layer), torch.zeros_like(ideal)
    if method == "flexlora":
        return best, torch.zeros_like(ideal)
    if method in ("flora", "fedex-reinit"):
        return ideal, ideal
    if method == "fedex-svd":
        return ideal, ideal - best
    means = case.means(layer)
    rest = ideal - means
    if svd_rank is not None:
        rest = truncated(rest, svd_rank)
    return means + rest, rest


def changes(model: PeftModel, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a loaded model adds to each adapted layer of the base, (O, I), float64.

    All other parameters must be the base's.
    """
    found = {}
    inner = model.get_base_model()
    for name, module in inner.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = module.base_layer.weight.double() - base[f"{name}.weight"].double()
        A, B = (x["default"].weight.double() for x in (module.lora_A, module.lora_B))
        stored = weight.T if isinstance(module.base_layer, Conv1D) else weight
        found[name] = stored + module.scaling["default"] * B @ A
    for name, parameter in inner.named_parameters():
        if ".lora_" not in name and ".base_layer.weight" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer.", ".")]), name
    return found


@torch.no_grad()
def assert_no_more_is_claimed(
    report: Mapping, got: Mapping[str, Tensor], base: Mapping[str, Tensor], expected: Mapping
) -> None:
    """Check what the report says was missed and kept against what the loaded model has."""
    missed_all = rest_all = margin_all = 0.0
    for told in report["layers"]:
        layer = told["layer"]
        wanted, rest = expected[layer]
        # Factors and sums are float32: 2^-24 of the update, and of the weight, some times over.
        margin = 2**-22 * wanted.norm().item() + 2**-24 * base[f"{layer}.weight"].norm().item()
        missed = (got[layer] - wanted).norm().item()
        assert missed <= told["missed_norm"] + margin, (layer, missed, told)
        assert abs(told["residual_norm"] - rest.norm().item()) <= margin
        missed_all, rest_all = missed_all + missed**2, rest_all + rest.norm().item() ** 2
        margin_all += margin**2
    if rest_all > margin_all:
        truly = 1 - (missed_all / rest_all) ** 0.5
        assert report["kept"] <= truly + 2 * (margin_all / rest_all) ** 0.5


@torch.no_grad()
def assert_logits(model: PeftModel, base: Path, expected: Mapping) -> None:
    """Check that what was loaded computes what the dense float64 model does."""
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    for layer, (wanted, _) in expected.items():
        module = dense.get_submodule(layer)
        change = wanted.T if isinstance(module, Conv1D) else wanted
        module.weight = torch.nn.Parameter(module.weight + change)
    wanted, got = dense.eval()(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits
    assert (got - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", ["side", "carry", "round"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_is_what_is_told(bases, tmp_path, method, fold, kind, dtype) -> None:
    draw = Random(f"{method} {fold} {kind} {dtype}")
    source = bases[kind, dtype]
    name, _, assign = method.partition("-")
    adds = name in ("fedex", "flora")
    side_rank = "auto"
    if fold == "side" and assign != "keep":
        side_rank = draw.choice(["auto", "auto", 1, 3])
    folds = adds and (fold != "side" or side_rank != "auto")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    head = kind == "llama" or not folds
    case = draw_case(draw, tmp_path, base, method=method, head=head)
    svd_rank = draw.choice([None, 1, 2]) if method == "fedex" else None
    job = Job(
        base=str(source),
        out=tmp_path / "out",
        clients=case.paths,
        weights=case.weights,
        method=MethodConfig(name=name, assign=assign or "average", svd_rank=svd_rank),
        section=AggregateSection(fold=fold, side_rank=side_rank),
        dtype=draw.choice([None, "float32"]),
        seed=draw.randrange(2**30),
    )
    if assign == "keep" and fold != "side":
        with pytest.raises(UserError, match="keep gives each client a base of its own"):
            aggregate_files(job)
        return
    report = aggregate_files(job)
    weights = base.state_dict()
    expected = {layer: oracle(method, case, layer, svd_rank) for layer in case.pairs[0]}
    used = job.out / "base" if report["base_changed"] else source
    for adapter in (job.out / "adapter", *job.out.glob("clients/*")):
        loaded = AutoModelForCausalLM.from_pretrained(used, dtype=torch.float32)
        model = PeftModel.from_pretrained(loaded, adapter)
        got = changes(model, weights)
        if method == "lora_fair":  # its B is where it likes, but nearer to the ideal than the mean
            for layer, change in got.items():
                ideal, means = case.ideal(layer), case.means(layer)
                assert (change - ideal).norm() <= (means - ideal).norm() * (1 + 1e-5) + 1e-6
            continue
        assert_no_more_is_claimed(report, got, weights, expected)
        if report["kept"] > 1 - 1e-5:
            assert_logits(model, source, expected)
