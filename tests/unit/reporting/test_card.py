"""The model card has metadata that the hub reads, and tells how to load what lies beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel
from resuming import write_config
from tiny import make_gpt2
from transformers import AutoModelForCausalLM

import fedex_scale
from fedex_scale.reporting.card import base_name
from fedex_scale.run import run_config
from fedex_scale.runtime.errors import UserError


@pytest.fixture(scope="module")
def card(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    scoring = {
        "tasks": ["fedex_word_problems"],
        "data": {"fedex_word_problems": str(folder / "heldout.jsonl")},
        "batch_size": 4,
    }
    path = write_config(tiny_llama, folder, evaluation=scoring, federation={"rounds": 1})
    run_config(path, [])
    return folder / "runs" / "run" / "final" / "README.md"


def test_metadata_is_what_the_hub_reads(card: Path) -> None:
    data = ModelCard.load(card).data
    assert data.base_model == "llama"
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert {"lora", "federated-learning", "fedex"} <= set(data.tags)
    assert [result.metric_type for result in data.eval_results] == ["exact_match"]
    assert isinstance(data.eval_results[0].metric_value, float)


def test_what_it_says_to_load_loads(card: Path, tiny_llama: Path) -> None:
    text = card.read_text(encoding="utf-8")
    adapter = re.search(r'PeftModel.from_pretrained\(base, "(.*)"\)', text)[1]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = PeftModel.from_pretrained(base, card.parent / adapter)
    rank = model.peft_config["default"].r
    assert rank == 4 + 2 * 4
    allowed = int(re.search(r"--max-lora-rank (\d+)", text)[1])
    assert rank <= allowed == 16
    for folder in re.findall(r"^- `(\w+)`:", text, flags=re.MULTILINE):
        assert (card.parent / folder).is_dir()


def test_it_tells_the_score_and_no_path_of_this_machine(card: Path) -> None:
    text = card.read_text(encoding="utf-8")
    assert re.search(r"\| fedex_word_problems \| exact_match \| 4 \| [\d.]+% ± [\d.]+ \|", text)
    assert str(card.parents[3]) not in text
    assert not re.search(r"\n{4,}|{{|}}", text)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1"),
        ("/models/x", "x"),
        ("a/b/c", "c"),
    ],
)
def test_base_is_a_hub_id_or_a_name(path: str, name: str) -> None:
    assert base_name(path) == name


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "lm_head"]])
def test_only_what_can_be_merged_is_told_to_be(
    targets: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2's output layer is its embedding: no file holds one of them changed alone."""
    model = make_gpt2(tmp_path / "gpt2")
    path = write_config(model, tmp_path, lora={"target_modules": targets})
    done = run_config(path, ["federation.rounds=1", "run.name=run"])
    told = [capsys.readouterr().out, (done / "final" / "README.md").read_text("utf-8")]
    if "lm_head" not in targets:
        assert all("--merged --dtype float32" in text for text in told)
        return
    assert not any("--merged" in text for text in told)
    assert "serve it: vllm serve" in told[0]
    with pytest.raises(UserError, match="expected the weight of layer lm_head"):
        fedex_scale.export(done, tmp_path / "merged", merged=True)
