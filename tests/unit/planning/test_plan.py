"""`fedex-scale plan`: bytes are those of formulas, and what does not fit is told with a remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from many_rounds import drifting, rounds_of
from resuming import write_config
from tiny import make_gpt2, make_llama
from transformers import AutoModelForCausalLM

from fedex_scale.cli import main
from fedex_scale.config.learning import LoraSection, ModelSection
from fedex_scale.config.load import load_config
from fedex_scale.config.settings import Config
from fedex_scale.engine.lora_model import SIDE
from fedex_scale.planning import choice, footprint, room
from fedex_scale.planning.machine import Machine, parse_size
from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[3]
GB = 10**9
MISTRAL = ROOT / "launch" / "mistral_7b_metamath.yaml"
# Weights of Mistral-7B, and of its adapters per rank: R (in + out) of the seven projections.
BASE = 7_241_732_096
PER_RANK = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def recipe(*overrides: str) -> Config:
    """Return the recipe with one example at a time, unless told otherwise."""
    return load_config(MISTRAL, ["train.micro_batch_tokens=null", *overrides])


def plan(config: Config, **machine: int | float | None) -> choice.Plan:
    return choice.make_plan(config, Machine(**{"gpu_memory": 80 * GB, **machine}))


@pytest.fixture(scope="module")
def on_80_gb() -> choice.Plan:
    return plan(recipe(), host_memory=256 * GB, nvme=1000 * GB)


def needs(estimate: choice.Estimate) -> dict:
    return {need.name: need for need in estimate.needs}


def test_components_are_those_counted_by_hand(on_80_gb: choice.Plan) -> None:
    found = needs(on_80_gb.chosen)
    client = 32 * PER_RANK
    assert found["base"].gpu == 2 * BASE
    # Float32 for the optimizer; the side adapter's first column waits for a second round.
    assert found["adapters"].gpu == 4 * client + 2 * PER_RANK
    scored = 4 * 3 * client - 2 * PER_RANK  # rank 32 + (3 - 1) 32, float32
    cache = 1024 * 2 * (32 * 2 * 8 * 128)  # of a prompt; keys and values of 8 heads a layer
    more = scored + cache - on_80_gb.work.peak_bytes - 8 * client  # moments are away
    assert found["adapter and KV cache of scoring"].gpu == more
    in_step = plan(recipe("engine.deepspeed=zero3"), gpus=2)
    more = scored / 2 + 16 * cache - in_step.work.peak_bytes - 8 * client / 2
    assert needs(in_step.chosen)["adapter and KV cache of scoring"].gpu == more, "16 prompts"
    assert found["gradients"].gpu == 4 * client
    assert found["optimizer"].gpu == 8 * client
    assert found["client adapters"].disk == 3 * 4 * client
    assert on_80_gb.chosen.fits
    assert on_80_gb.steps == 105


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_the_cache_of_generation_is_the_planned_one(make: Callable, tmp_path: Path) -> None:
    section = ModelSection(path=str(make(tmp_path / "model")), dtype="float32")
    shaped = footprint.shape_model(
        section, LoraSection(rank=2), dtype=torch.float32, trains=frozenset("AB"), side_rank=0
    )
    model = AutoModelForCausalLM.from_pretrained(section.path)
    done = model(torch.ones(3, 7, dtype=torch.int64), use_cache=True)
    kept = sum(
        x.numel() for layer in done.past_key_values.layers for x in (layer.keys, layer.values)
    )
    assert footprint.count_weights(shaped).cached == kept / 21


def test_the_side_adapter_grows_with_the_rounds() -> None:
    several = plan(recipe("federation.rounds=4", "evaluation.tasks=[]"))
    assert needs(several.chosen)["adapters"].gpu == (4 * 32 + 2 * 3 * 64) * PER_RANK
    assert "grows to 192 columns" in several.side
    assert "its 512 columns hold 8 of 20 rounds" in plan(recipe("federation.rounds=20")).side
    planes = plan(recipe("federation.rounds=20", "aggregate.fold=planes"))
    adapted = sum(o * i for o, i in planes.weights.shapes.values())
    assert needs(planes.chosen)["adapters"].gpu == 4 * 32 * PER_RANK + 2 * adapted
    assert needs(planes.chosen)["carry plane"].gpu == 4 * adapted
    assert planes.side is None


def test_the_side_adapter_takes_what_is_planned(tiny_llama: Path, tmp_path: Path) -> None:
    rounds = rounds_of(tiny_llama, tmp_path, "aggregate.side_tolerance=0", rounds=4)
    for number in range(1, 4):
        rounds.advance(drifting(rounds, "shared", number))
    layers = rounds.engine.layers.values()
    held = sum(x[SIDE].weight.nbytes for layer in layers for x in (layer.lora_A, layer.lora_B))
    planned = choice.Sizes(rounds.config, Machine()).weights.side
    assert held == 2 * planned, "in bf16"


def test_a_run_takes_the_columns_that_there_is_room_for(tiny_llama, tmp_path, monkeypatch) -> None:
    settings = ["federation.rounds=8", "lora.rank=32", "partition.num_clients=3"]
    config = load_config(write_config(tiny_llama, tmp_path), settings)
    assert room.side_rank_that_fits(config) == "auto", "room for all 512"
    tight = choice.Sizes(config, Machine()).estimate(config, with_work=False).total("host")
    small = Machine(host_memory=int(tight) - 1)
    monkeypatch.setattr(room, "this_machine", lambda: small)
    assert room.side_rank_that_fits(config) == 256


def test_tokens_at_once_are_those_that_fit() -> None:
    """Doubled until nine tenths of the card are filled; one example at least; a step's at most."""
    sizes, found = choice.Sizes(recipe(), Machine()), {}
    for memory in (10, 24, 28, 80):
        sizes.machine, most = Machine(gpu_memory=memory * GB), 0.9 * memory * GB
        filled = sizes.filled(recipe("train.micro_batch_tokens=auto")).train.micro_batch_tokens
        found[memory] = filled // 512

        def taken(examples: int) -> float:
            trial = recipe(f"train.micro_batch_tokens={512 * examples}")
            return sizes.estimate(trial).total("gpu")

        assert taken(found[memory]) <= most or found[memory] == 1
        assert taken(2 * found[memory]) > most or found[memory] == 32
    assert found[10] == 1 < found[24] <= found[28] < found[80] == 32, found


def test_every_deepspeed_file_has_its_row(on_80_gb: choice.Plan) -> None:
    rows = {other.name: other for other in on_80_gb.others}
    assert set(rows) == {"none", *(file.stem for file in (ROOT / "ds_configs").glob("*.json"))}
    assert rows["zero0"].refused
    assert needs(rows["zero3"])["base shard"].gpu == 2 * BASE
    assert needs(rows["zero3_offload"])["base shard"].host == 2 * BASE
    assert needs(rows["zero3_nvme"])["base shard"].nvme == 2 * BASE
    assert rows["none"].step_s < rows["zero3_offload"].step_s < rows["zero3_nvme"].step_s


def test_shards_shrink_with_the_ranks() -> None:
    zero3 = f"engine.deepspeed={ROOT / 'ds_configs' / 'zero3.json'}"
    eight = needs(plan(recipe(zero3), gpus=8).chosen)
    assert eight["base shard"].gpu == 2 * BASE / 8
    assert eight["optimizer"].gpu == 12 * 32 * PER_RANK / 8


def test_flops_are_those_of_the_textbook() -> None:
    model = footprint.shape_model(
        ModelSection(config="mistral-7b", random=True),
        LoraSection(rank=32),
        dtype=torch.bfloat16,
        trains=frozenset("AB"),
        side_rank=0,
    )
    work = footprint.run_shapes(model, examples=1, length=512, checkpointing=False)
    embedding = 32000 * 4096
    # 2 a weight forward, 2 for the gradient of its input, and 2 more of a trained weight. Attention
    # has two products of 512 x 512 x 4096 in each of 32 layers, and five backward.
    expected = 512 * (4 * (BASE - embedding) + 6 * 32 * PER_RANK) + 32 * 7 * 2 * 512**2 * 4096
    assert work.flops == pytest.approx(expected, rel=0.005)
    recomputed = footprint.run_shapes(model, examples=1, length=512, checkpointing=True)
    assert recomputed.flops == pytest.approx(1.5 * work.flops, rel=0.05)
    assert recomputed.kept_bytes < work.kept_bytes / 20
    assert work.logits_bytes == 512 * 32000 * 4


def test_what_training_keeps_is_what_autograd_keeps(tiny_llama: Path) -> None:
    """The count on shapes equals the bytes that autograd holds after a real forward pass."""
    from fedex_scale.engine import lora_model, models

    section, lora = ModelSection(path=str(tiny_llama), dtype="float32"), LoraSection(rank=4)
    trains = frozenset("AB")
    shapes = footprint.shape_model(section, lora, dtype=torch.float32, trains=trains, side_rank=0)
    counted = footprint.run_shapes(shapes, examples=2, length=32, checkpointing=False)
    base = models.load_model(section, torch.float32, torch.device("cpu"))
    model = lora_model.add_adapters(base, lora, trains=trains).train()
    held = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(5, 300, (2, 32))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens, use_cache=False)
    found = sum(size for place, size in kept.items() if place not in held)
    assert counted.kept_bytes + counted.logits_bytes == pytest.approx(found, rel=0.05)


def test_a_plan_that_cannot_fit_names_the_cheapest_change() -> None:
    short = plan(recipe("model.gradient_checkpointing=false"), gpu_memory=20 * GB)
    assert short.chosen.lacks == ("gpu",)
    assert short.remedy == "model.gradient_checkpointing=true"
    tight = plan(recipe(), gpu_memory=12 * GB, host_memory=64 * GB)
    assert tight.remedy == "engine.deepspeed=zero3_offload"
    assert plan(recipe(), gpu_memory=GB, host_memory=GB).remedy is None


def test_the_command_prints_it_and_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--config", str(MISTRAL), "--gpu-memory", "12GB", "--host-memory", "64GB"])
    out = capsys.readouterr().out
    assert ended.value.code == 1
    assert "base " in out
    assert "zero3_offload" in out
    assert "the cheapest change that does: engine.deepspeed=zero3_offload" in out
    assert "a client would send 335.5 MB and receive 1.0 GB a round" in out


@pytest.mark.parametrize("text", ["80", "80 gb", "GB", "-1GB", "1e999GB", ""])
def test_sizes_need_a_unit(text: str) -> None:
    with pytest.raises(UserError, match="--gpu-memory: expected a size with its unit"):
        parse_size(text, "--gpu-memory")


def test_sizes() -> None:
    assert parse_size("80GB", "") == 80 * GB
    assert parse_size("1.5TiB", "") == 3 * 2**39


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.deepspeed=nowhere.json"], "engine.deepspeed: cannot read nowhere.json"),
        (["engine.deepspeed=ds_configs/zero3_nvme.json"], "engine.nvme_path: expected a directory"),
        (
            [
                "engine.deepspeed=ds_configs/zero3_nvme.json",
                "engine.nvme_path=/proc",
            ],
            "engine.nvme_path: expected a file system for direct access",
        ),
        (["model={config: nobody, random: true}"], "model.config: expected a config.json or one"),
    ],
)
def test_what_cannot_be_planned_is_one_line(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message) as caught:
        plan(recipe(*overrides))
    assert "\n" not in str(caught.value)


def test_operations_that_need_more_than_shapes_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("unsupported scalarType.\nand a page of it")

    monkeypatch.setattr(footprint, "run_shapes", fail)
    with pytest.raises(UserError, match=": unsupported scalarType; plan cannot count"):
        plan(recipe())


def test_a_run_is_warned_of_before_it_loads(tiny_llama: Path, tmp_path: Path, monkeypatch) -> None:
    config = load_config(write_config(tiny_llama, tmp_path))
    assert choice.warning(config) is None
    monkeypatch.setattr(choice, "this_machine", lambda: Machine(host_memory=10**6))
    assert "this run needs at least 0.7 GB in host RAM" in choice.warning(config)
