"""What a user gets wrong is one line, exit code 2, and no run directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants
from tiny import SIZES, VOCABULARY
from transformers import AutoConfig

from fedex_scale.cli import main
from fedex_scale.config.load import load_config
from fedex_scale.run import engine_for

CASES = {
    "train.learning_rat=1": "did you mean learning_rate",
    "model.path=./nowhere": "no config.json",
    "data.path=nowhere.jsonl": "found none",
    "lora.target_modules=[nonsense]": "match nothing",
    "lora.rank=0": "expected a whole number from 1 to 65,536, got 0",
    "partition.num_clients=31": "at most one per example (30), got 31",
    "run.dir=/proc/runs": "cannot write",
    "engine.deepspeed=nowhere.json": "choose one of zero0, zero2, zero3",
    "evaluation.tasks=[fedex_word_problem]": "did you mean fedex_word_problems",
    "run.trackers=[tensorbord]": "expected a list of any of tensorboard",
    "method.name=fedx": "fedex",
    "data.holdout=nowhere.jsonl": "data.holdout: expected a file, found none at nowhere.jsonl",
    "data.max_length=60": "which no row fits; data.max_length=",
    "data.template=chat": "set data.chat_template to chatml or zephyr (any model)",
    "evaluation.generate=nowhere.txt": "expected a text file, found none at nowhere.txt",
    "evaluation.include_path=nowhere": "expected a directory with tasks, found none at nowhere",
    "evaluation.tasks=[my/task.yaml]": "its directory in evaluation.include_path",
    "partition={kind: sites, files: nowhere}": "data.path: expected left out with partition.files",
    "no_equals_sign": "expected section.key=value",
    "model.attention=flash_attention_2": "FlashAttention2",
    "--train.learning_rate=1e-4": "settings are given without dashes: train.learning_rate=VALUE",
}


@pytest.mark.parametrize("override", CASES)
def test_one_line_and_code_2(
    override: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", override])
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert CASES[override] in lines[0]
    assert not (runs_of(tiny_config) / "bad").exists()


def test_a_config_without_its_option_is_hinted_at(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(tiny_config)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: run: expected --config {tiny_config}, got {tiny_config}; add it\n"
    )


@pytest.mark.parametrize(
    ("harm", "reason"),
    [("truncated", "its weights are damaged"), ("tokenizer", "no tokenizer.json is there")],
)
def test_a_model_that_lacks_something_is_one_line(
    harm: str,
    reason: str,
    tiny_config: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    if harm == "truncated":
        for file in model.glob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-100])
    else:
        for file in model.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", f"model.path={model}"])
    assert ended.value.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert reason in line
    assert not (runs_of(tiny_config) / "bad").exists()


def test_a_hub_that_does_not_answer_is_asked_once(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(self: HfApi, *_: object, **__: object) -> None:
        asked.append(1)
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", refuse)
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", "model.path=org/none"])
    assert ended.value.code == 2
    assert "org/none is neither a directory nor in the hub's cache" in capsys.readouterr().err
    assert asked == [1]


def test_another_models_tokenizer_is_one_line(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path)
    model = f"model={{config: {tmp_path}, random: true}}"
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", model, "evaluation.tasks=[]"])
    assert ended.value.code == 2
    assert "expected tokens below its vocabulary's size, 97, got token" in capsys.readouterr().err
    assert not (runs_of(tiny_config) / "bad").exists()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_hidden_layers": 100_000}, "expected a config.json of at most 2,000 layers, got 100"),
        ({"max_position_embeddings": 0}, "with more positions than the 64 tokens of an answer"),
        ({"num_attention_heads": 0}, "model.config: cannot read"),
    ],
)
def test_a_model_of_sizes_that_cannot_be_is_one_line(
    sizes: dict, message: str, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"model_type": "llama", **SIZES, "vocab_size": VOCABULARY, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = [f"model={{config: {tmp_path}, random: true}}"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", *options])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(("model", "most"), [("gpt2", 32), ("roberta", 29)])
def test_examples_that_a_model_has_no_positions_for_are_one_line(
    model: str, most: int, tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """RoBERTa counts from its pad token on, the third here."""
    sizes = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 2}
    AutoConfig.for_model(model, **sizes).save_pretrained(tmp_path)
    options = [f"model={{config: {tmp_path}, random: true}}", "evaluation.tasks=[]"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), "run.name=bad", *options])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"expected examples of at most {most} tokens, the positions of" in told
    assert f"set data.max_length={most}" in told


@pytest.mark.parametrize("method", ["{name: fedex}", "{name: flora}", "{name: fedex, assign: svd}"])
@pytest.mark.parametrize("fold", ["planes", "carry", "round"])
def test_a_layer_that_is_the_embedding_too_is_one_line(
    method: str, fold: str, tiny_config: Path, tiny_gpt2: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fold into the output layer would change the embedding of a tied model."""
    changed = ["lora.target_modules=[c_attn, lm_head]", f"method={method}"]
    changed += [f"model.path={tiny_gpt2}", f"aggregate.fold={fold}", "run.name=bad"]
    with pytest.raises(SystemExit) as ended:
        main(["run", "--config", str(tiny_config), *changed])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "layer lm_head: its weight is the embedding's too" in error
    assert [line for line in error.splitlines() if line.startswith("error: ")] == [
        error.splitlines()[-1]
    ]
    assert not (runs_of(tiny_config) / "bad").exists()


@pytest.mark.parametrize("option", ["method.name=fedit", "aggregate.fold=side"])
def test_a_tied_layer_may_be_adapted_where_the_base_stays_as_it_is(
    option: str, tiny_config: Path, tiny_gpt2: Path
) -> None:
    changed = ["lora.target_modules=[c_attn, lm_head]", option]
    config = load_config(tiny_config, [*changed, f"model.path={tiny_gpt2}"])
    assert "lm_head" in engine_for(config, 3).layers


def test_existing_run_is_left_alone(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = runs_of(tiny_config) / "kept" / "config.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    arguments = ["--config", str(tiny_config), "run.name=kept", "run.overwrite=false"]
    with pytest.raises(SystemExit) as ended:
        main(["run", *arguments])
    assert ended.value.code == 2
    assert "run.overwrite=true" in capsys.readouterr().err
    assert kept.read_text() == "mine"


def runs_of(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"]["dir"])
