"""Scoring a model in memory: what is refused, what is left alone, what is written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from rows import GSM8K, GSM8K_TRAIN, write_data
from tiny import make_metaspace_tokenizer
from transformers import AutoTokenizer

from fedex_scale.config.learning import DataConfig, EngineSection, LoraSection, ModelSection
from fedex_scale.config.section import replace
from fedex_scale.config.settings import Config, EvaluationSection
from fedex_scale.engine.lora_model import add_adapters
from fedex_scale.engine.models import load_model
from fedex_scale.run import check_evaluation
from fedex_scale.runtime import distributed
from fedex_scale.runtime.errors import UserError
from fedex_scale.scoring import evaluation
from fedex_scale.scoring.evaluation import check_tasks, evaluate

ROOT = Path(__file__).parents[3]
TASKS = ("fedex_word_problems", "fedex_boolq")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("rows") / "data"))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> torch.nn.Module:
    base = load_model(ModelSection(path=str(tiny_llama)), torch.float32, torch.device("cpu"))
    return add_adapters(base, LoraSection(rank=2), trains=frozenset("AB"))


@pytest.fixture(scope="module")
def results(model: torch.nn.Module, tiny_llama: Path, data_dir: str) -> dict:
    section = EvaluationSection(tasks=TASKS, data_dir=data_dir, batch_size=2)
    return evaluate(model, AutoTokenizer.from_pretrained(tiny_llama), section)


def test_ready_data_pass(data_dir: str) -> None:
    check_tasks(
        EvaluationSection(tasks=("fedex_math_suite", "fedex_commonsense"), data_dir=data_dir)
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tasks": ("fedex_gsm8",)}, "unknown task fedex_gsm8; did you mean fedex_gsm8k?"),
        ({"tasks": ("fedex_gsm8k",)}, "task fedex_gsm8k: data: cannot load openai/gsm8k"),
        ({"tasks": ("fedex_math_suite",)}, "task fedex_gsm8k: data: cannot load openai/gsm8k"),
        ({"tasks": TASKS, "data": {"fedex_boolq": "none.json"}}, "no file none.json"),
        ({"tasks": TASKS, "data": {"fedex_piqa": __file__}}, "not among evaluation.tasks"),
        ({"tasks": ("fedex_gsm8k", "fedex_math_suite")}, "fedex_gsm8k is there twice"),
        ({"tasks": TASKS, "data_dir": "nowhere"}, "no directory nowhere"),
        ({"tasks": TASKS, "limit": 0}, "limit: expected a whole number from 1 to 1,000,000,000"),
        (
            {"tasks": TASKS, "batch_size": 0},
            "batch_size: expected a whole number from 1 to 1,000,000,000",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_told_in_one_line(section: dict, message: str, data_dir: str) -> None:
    if "cannot load" not in message:
        section = {"data_dir": data_dir, **section}
    with pytest.raises(UserError) as told:
        check_tasks(EvaluationSection(**section))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_model_of_fewer_positions_than_an_answers_tokens_is_refused(data_dir: str) -> None:
    section = EvaluationSection(tasks=("fedex_gsm8k",), data_dir=data_dir)
    check_tasks(section, 257)
    with pytest.raises(UserError, match="more positions than the 256 tokens of an answer, got 256"):
        check_tasks(section, 256)


def test_auto_under_zero3_on_several_ranks_is_refused_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, data_dir: str, tiny_llama: Path
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = Config(
        data=DataConfig(path="none"),
        model=ModelSection(path=str(tiny_llama)),
        evaluation=EvaluationSection(tasks=TASKS, data_dir=data_dir, batch_size="auto"),
    )
    check_evaluation(config)
    file = str(ROOT / "ds_configs" / "zero3_offload.json")
    with pytest.raises(UserError, match="auto cannot be tried out under ZeRO-3"):
        check_evaluation(replace(config, engine=EngineSection(deepspeed=file)))


def prompts_of(section: EvaluationSection, model: torch.nn.Module, directory: Path) -> list[str]:
    """Return what each row of GSM8K is asked with, by a stock task."""
    check_tasks(section)
    results = evaluate(model, AutoTokenizer.from_pretrained(directory), section)
    samples = {x["doc_id"]: x for x in results["samples"]["gsm8k"]}
    assert [samples[i]["doc"]["question"] for i in range(len(GSM8K))] == [
        row["question"] for row in GSM8K
    ]
    return [samples[i]["arguments"][0][0] for i in range(len(GSM8K))]


@pytest.mark.parametrize("named", [False, True])
def test_a_stock_tasks_examples_come_from_the_train_file(
    model: torch.nn.Module, tiny_llama: Path, data_dir: str, tmp_path: Path, named: bool
) -> None:
    where = {"data_dir": data_dir}
    if named:
        files = {split: f"{data_dir}/gsm8k/{split}.jsonl" for split in ("train", "test")}
        where = {"data": {"gsm8k": files}, "data_dir": str(tmp_path)}
    section = EvaluationSection(tasks=("gsm8k",), num_fewshot=2, **where)
    for prompt, row in zip(prompts_of(section, model, tiny_llama), GSM8K, strict=True):
        asked = prompt.removesuffix(f"Question: {row['question']}\nAnswer:")
        shown = [x for x in GSM8K_TRAIN if f"{x['question']}\nAnswer: {x['answer']}" in asked]
        assert asked.count("Question: ") == len(shown) == 2


def test_without_examples_a_stock_task_needs_the_scored_file_only(
    model: torch.nn.Module, tiny_llama: Path, data_dir: str, tmp_path: Path
) -> None:
    section = EvaluationSection(
        tasks=("gsm8k",),
        data={"gsm8k": f"{data_dir}/gsm8k/test.jsonl"},
        data_dir=str(tmp_path),
        num_fewshot=0,
    )
    asked = [f"Question: {row['question']}\nAnswer:" for row in GSM8K]
    assert prompts_of(section, model, tiny_llama) == asked


def test_files_that_a_stock_task_lacks_are_told(data_dir: str) -> None:
    def told(**fields: object) -> str:
        with pytest.raises(UserError) as caught:
            check_tasks(EvaluationSection(**fields))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    test = f"{data_dir}/gsm8k/test.jsonl"
    message = "expected a file for train, from which its 5 examples come, got one for test; give"
    assert message in told(tasks=("gsm8k",), data={"gsm8k": test})
    assert "for test, which is scored" in told(tasks=("gsm8k",), data={"gsm8k": {"train": test}})
    files = {"test": test, "train": f"{data_dir}/gsm8k/train.jsonl"}
    few = told(tasks=("gsm8k",), data={"gsm8k": files})
    assert "at least 5 rows to take examples from, got 3; set evaluation.num_fewshot" in few
    assert "a mapping of names to text or" in told(tasks=("gsm8k",), data={"gsm8k": ["a"]})
    files = {"test": test, "train": "none.jsonl"}
    assert "no file none.jsonl" in told(tasks=("gsm8k",), data={"gsm8k": files})
    ours = {"tasks": ("fedex_gsm8k",), "data_dir": data_dir}
    assert "expected one file" in told(**ours, data={"fedex_gsm8k": files})
    assert "this project's have no examples, got 2" in told(**ours, num_fewshot=2)
    assert "at least 0 or null, got -1" in told(**ours, num_fewshot=-1)


def test_state_is_left_as_it_was(model: torch.nn.Module, tiny_llama: Path, data_dir: str) -> None:
    def state() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    model.train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = state()
    section = EvaluationSection(tasks=("fedex_boolq",), data_dir=data_dir)
    evaluate(model, AutoTokenizer.from_pretrained(tiny_llama), section)
    assert state() == before
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_results_have_means_and_standard_errors(results: dict) -> None:
    assert results["results"]["fedex_word_problems"]["exact_match_stderr,none"] == 0.0
    assert evaluation.scores(results) == {
        "fedex_word_problems/exact_match": 0.0,
        "fedex_boolq/exact_match": 0.0,
    }
    assert evaluation.warnings(results) == []


def test_two_filters_are_two_scores_and_an_unread_answer_is_a_warning() -> None:
    metrics = {"exact_match,paper": 0.5, "exact_match,correct": 0.25, "unparsed_gold,paper": 1}
    results = {"results": {"t": metrics}, "configs": {"t": {}}}
    assert evaluation.scores(results) == {
        "t/exact_match/paper": 0.5,
        "t/exact_match/correct": 0.25,
    }
    (warning,) = evaluation.warnings(results)
    assert warning == "t: the answers of 1 rows cannot be read; they count as wrong"


def test_samples_say_what_was_asked_written_read_and_judged(results: dict, tmp_path: Path) -> None:
    evaluation.write_results(dict(results), tmp_path)
    assert "fedex_boolq" in json.loads((tmp_path / "results.json").read_text())["results"]
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").open()]
    assert len(samples) == 5 + 1
    sample = next(sample for sample in samples if sample["task"] == "fedex_boolq")
    assert sample["prompt"].endswith("Answer format: true/false\n\n### Response:\n")
    assert isinstance(sample["output"][0], str)
    assert sample["answer"] == ["[invalid]"]
    assert sample["target"] == "true"
    assert sample["verdict"] == {"exact_match": 0.0, "unparsed_gold": 0}


@pytest.mark.parametrize("prepend", ["first", "never"])
def test_a_prompt_is_tokenized_as_one_text(
    model: torch.nn.Module, data_dir: str, monkeypatch: pytest.MonkeyPatch, prepend: str
) -> None:
    """With the words that the published evaluation puts after `### Response:`."""
    asked, generate = [], model.generate

    def listening(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        asked.append(input_ids[0].tolist())
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", listening)
    tokenizer = make_metaspace_tokenizer(prepend)
    section = EvaluationSection(tasks=("fedex_gsm8k",), data_dir=data_dir, batch_size=1)
    results = evaluate(model, tokenizer, section)
    prompts = [x["arguments"][0][0] for x in results["samples"]["fedex_gsm8k"]]
    assert all(x.endswith("\n\n### Response: Let's think step by step.") for x in prompts)
    assert sorted(asked) == sorted(tokenizer(x)["input_ids"] for x in {*prompts})


@pytest.mark.parametrize(("batch_size", "tried"), [("auto", [5, 5, 4, 2, 2, 1]), (4, [4, 2, 2, 1])])
def test_batches_shrink_until_they_fit(
    batch_size: int | str,
    tried: list[int],
    model: torch.nn.Module,
    tiny_llama: Path,
    data_dir: str,
    results: dict,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes, generate = [], model.generate

    def with_little_memory(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError
        return generate(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", with_little_memory)
    section = EvaluationSection(
        tasks=("fedex_word_problems",), data_dir=data_dir, batch_size=batch_size
    )
    again = evaluate(model, AutoTokenizer.from_pretrained(tiny_llama), section)
    assert sizes == tried
    written = [
        [sample["resps"] for sample in found["samples"]["fedex_word_problems"]]
        for found in (again, results)
    ]
    assert written[0] == written[1]


def test_gemma_gets_its_begin_token() -> None:
    for kind, wanted in {"gemma2": True, "llama": None}.items():
        model = torch.nn.Module()
        model.config = type("Config", (), {"model_type": kind})
        assert evaluation._wants_bos(model) is wanted


def test_a_directory_of_tasks_that_is_not_there_is_refused_also_where_none_is_scored():
    with pytest.raises(
        UserError, match="include_path: expected a directory with tasks, found none"
    ):
        check_tasks(EvaluationSection(tasks=(), include_path="/nope"))
