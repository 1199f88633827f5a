"""The task files of eval/tasks, as lm-eval reads them: rows, prompts, answers, scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from rows import SUITES, write_data

from fedex_scale.data.suites import load_test_rows
from fedex_scale.runtime.errors import UserError

TASKS_DIR = Path(__file__).parents[3] / "eval" / "tasks"
TASKS = ["fedex_gsm8k", "fedex_math", "fedex_word_problems", *(f"fedex_{s}" for s in SUITES)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The tasks on LLM-Adapters' rows, and on the hub's as `hub`."""
    loaded = {}
    for hub in (False, True):
        data = write_data(tmp_path_factory.mktemp("data") / "rows", hub=hub)
        manager = TaskManager(
            include_path=str(TASKS_DIR), include_defaults=False, metadata={"data_dir": str(data)}
        )
        loaded[hub] = manager.load(TASKS)["tasks"]
    return loaded


def judge(task, index: int, output: str) -> dict[str, dict]:
    """Return what each filter reads out of an output, and the scores."""
    row, results = task.eval_docs[index], {}
    for ensemble in task._filters:
        answers = [[output]]
        for component in ensemble.filters:
            answers = list(component().apply(answers, [row]))
        results[ensemble.name] = {"read": answers[0], **task.process_results(row, answers)}
    return results


@pytest.mark.parametrize("suite", SUITES)
def test_both_schemas_give_the_instruction_of_llm_adapters(tasks: dict, suite: str) -> None:
    _, instruction, answer = SUITES[suite]
    for hub in (False, True):
        task = tasks[hub][f"fedex_{suite}"]
        row = task.eval_docs[0]
        assert task.doc_to_text(row) == (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\nPlease {instruction}\n\n### Response:\n"
        )
        assert task.doc_to_target(row) == answer
        assert task.config.generation_kwargs["max_gen_toks"] == 32


@pytest.mark.parametrize(
    ("suite", "output", "read"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("piqa", "the correct answer is solution2", "solution2"),
        ("siqa", "the correct answer is answer3", "answer3"),
        ("arc_challenge", "the correct answer is answer5", "answer5"),
        ("openbookqa", "answer6 or answer1", "answer1"),
        ("hellaswag", "the correct answer is ending4", "ending4"),
        ("winogrande", "option2 option1", "option2"),
        ("arc_easy", "the correct answer is answer", "[invalid]"),
        ("boolq", "", "[invalid]"),
    ],
)
def test_the_first_choice_that_is_named_counts(
    tasks: dict, suite: str, output: str, read: str
) -> None:
    judged = judge(tasks[False][f"fedex_{suite}"], 0, output)["none"]
    right = read == SUITES[suite][2]
    assert judged == {"read": read, "exact_match": float(right), "unparsed_gold": 0}


@pytest.mark.parametrize(
    ("index", "answer", "paper", "correct"),
    [
        (0, "1,234", 1.0, 1.0),
        (0, "1,234,567", 1.0, 0.0),
        (1, "-2", 1.0, 1.0),
        (1, "2", 0.0, 0.0),
        (2, "8.2", 1.0, 0.0),
        (2, "16/2", 1.0, 1.0),
        (2, "8/0", 1.0, 0.0),
        (2, r"\frac{8}{3}", 1.0, 0.0),
        (2, "3 + 5 = 8", 0.0, 1.0),
        (2, "lost", 0.0, 0.0),
    ],
)
def test_gsm8k_by_two_rules(
    tasks: dict, index: int, answer: str, paper: float, correct: float
) -> None:
    judged = judge(tasks[False]["fedex_gsm8k"], index, f"So.\nThe answer is: {answer}")
    assert [judged[name]["exact_match"] for name in ("paper", "correct")] == [paper, correct]


@pytest.mark.parametrize(
    ("index", "answer", "hendrycks", "symbolic"),
    [
        (0, "0.5.", 1.0, 1.0),
        (0, r"\frac{2}{4}", 0.0, 1.0),
        (0, "50%", 0.0, 1.0),
        (1, r"\sqrt2", 1.0, 1.0),
        (3, "7", 0.0, 1.0),
    ],
)
def test_math_by_two_rules(
    tasks: dict, index: int, answer: str, hendrycks: float, symbolic: float
) -> None:
    judged = judge(tasks[False]["fedex_math"], index, f"So.\nThe answer is: {answer}")["none"]
    assert (judged["exact_match"], judged["math_verify"]) == (hendrycks, symbolic)


@pytest.mark.parametrize(("task", "index"), [("fedex_gsm8k", 3), ("fedex_math", 2)])
def test_a_gold_answer_that_cannot_be_read_is_counted_and_wrong(
    tasks: dict, task: str, index: int
) -> None:
    for judged in judge(tasks[False][task], index, "The answer is: 3").values():
        assert (judged["exact_match"], judged["unparsed_gold"]) == (0.0, 1)


def test_math_prompt(tasks: dict) -> None:
    task = tasks[False]["fedex_gsm8k"]
    text = task.doc_to_text(task.eval_docs[2])
    assert text.endswith("two cats?\n\n### Response: Let's think step by step.")
    assert task.doc_to_target(task.eval_docs[2]) == "8"
    stops = ["Instruction:", "Instruction", "Response:", "Response"]
    assert task.config.generation_kwargs["until"] == stops
    assert tasks[False]["fedex_math"].config.generation_kwargs["max_gen_toks"] == 512


def test_groups_hold_the_tables_of_the_paper() -> None:
    index = TaskManager(include_path=str(TASKS_DIR), include_defaults=False).task_index
    assert index["fedex_math_suite"].cfg["task"] == ["fedex_gsm8k", "fedex_math"]
    assert index["fedex_commonsense"].cfg["task"] == [f"fedex_{suite}" for suite in SUITES]


def test_data_that_cannot_be_had_names_the_task(tmp_path: Path) -> None:
    wanted = {"task": "t", "local": "t/test.jsonl", "columns": [["question"]]}
    with pytest.raises(UserError, match=r"task t: data: cannot load no/such .*t/test\.jsonl"):
        load_test_rows(**wanted, hub="no/such", data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"task t: no file .*name one in evaluation\.data"):
        load_test_rows(**wanted, data_dir=str(tmp_path))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test.jsonl").write_text("")
    with pytest.raises(UserError, match=r"task t: .*expected at least one row, got none"):
        load_test_rows(**wanted, data_dir=str(tmp_path))
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"task t: expected columns question in .*got text"):
        load_test_rows(**wanted, data={"t": str(tmp_path / "other.jsonl")})


def test_a_variable_names_the_data_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "t.jsonl").write_text('{"question": "a"}\n')
    monkeypatch.setenv("FEDEX_SCALE_DATA", str(tmp_path))
    rows = load_test_rows(task="t", local="t.jsonl", columns=[["question"]])["test"]
    assert rows[0] == {"question": "a"}
