"""A few rows of each test set's schema, of our own making."""

from __future__ import annotations

import json
from pathlib import Path

GSM8K = [
    {"question": "Mia has 1,200 beads and buys 34 more. How many?", "answer": "So.\n#### 1,234"},
    {"question": "It was 3 degrees and fell by 5. What is it now?", "answer": "3-5=-2\n#### -2"},
    {"question": "How many legs have two cats?", "answer": "2*4=<<2*4=8>>8\n#### 8"},
    {"question": "A row whose answer is lost?", "answer": "nothing"},
]
GSM8K_TRAIN = [
    {"question": f"Ann has {i} pens and buys {j}. How many?", "answer": f"{i}+{j}\n#### {i + j}"}
    for i, j in ((31, 4), (52, 7), (64, 3))
]
MATH = [
    {"problem": "What is half of one?", "solution": r"It is \boxed{\frac{1}{2}}."},
    {"problem": "Solve $x^2=2$, $x>0$.", "solution": r"$\fbox{1}$, no: $\boxed{\sqrt{2}}$"},
    {"problem": "A row whose answer is lost?", "solution": "It is 3."},
    {"problem": "How many days has a week?", "solution": r"It has $\boxed 7$."},
]
WORD_PROBLEMS = [
    {"query": "Tom has 12 apples and buys 7. How many?", "response": "19.\nThe answer is: 19"},
    {"query": "A box holds 6 pens. How many do 4 hold?", "response": "24.\nThe answer is: 24"},
    {"query": "Mia had 35 coins and lost 8. How many?", "response": "27.\nThe answer is: 27"},
    {"query": "What is 3 + 4?", "response": "7.\nThe answer is: 7"},
    {"query": "How many legs do 5 cats have?", "response": "20.\nThe answer is: 20"},
]
# By task: a row as the hub's dataset holds it, what follows `Please`, and the answer.
SUITES: dict[str, tuple[dict, str, str]] = {
    "boolq": (
        {"question": "is ice cold", "passage": "Ice is frozen water.", "answer": True},
        "answer the following question with true or false, question: is ice cold?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "Dry a cup", "sol1": "Use a towel.", "sol2": "Use a tap.", "label": 0},
        "choose the correct solution to the question: Dry a cup\n\n"
        "Solution1: Use a towel.\n\nSolution2: Use a tap.\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "siqa": (
        {
            "context": "Ada lent Ben a book.",
            "question": "Why did Ada do this?",
            "answerA": "to sell it",
            "answerB": "to be kind",
            "answerC": "to lose it",
            "label": "2",
        },
        "choose the correct answer to the question: Ada lent Ben a book. Why did Ada do this?\n\n"
        "Answer1: to sell it Answer2: to be kind Answer3: to lose it\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "hellaswag": (
        {
            "activity_label": "Baking",
            "ctx": "A man stirs dough. he",
            "endings": ["bakes it.", "flies it.", "sings it.", "reads it."],
            "label": "0",
        },
        "choose the correct ending to complete the given sentence: Baking: A man stirs dough. he"
        "\n\nEnding1: bakes it. Ending2: flies it. Ending3: sings it. Ending4: reads it.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {
            "sentence": "The cup did not fit the box as the _ was too big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        "choose the correct answer to fill in the blank to complete the given sentence: "
        "The cup did not fit the box as the _ was too big.\n\n"
        "Option1: cup Option2: box Answer format: option1/option2",
        "option1",
    ),
    "arc_easy": (
        {
            "question": "Which is a gas?",
            "choices": {"text": ["iron", "air", "salt"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "choose the correct answer to the question: Which is a gas?\n\n"
        "Answer1: iron Answer2: air Answer3: salt\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "arc_challenge": (
        {
            "question": "What melts ice?",
            "choices": {"text": ["heat", "snow", "shade", "frost"], "label": list("ABCD")},
            "answerKey": "A",
        },
        "choose the correct answer to the question: What melts ice?\n\n"
        "Answer1: heat Answer2: snow Answer3: shade Answer4: frost\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
    "openbookqa": (
        {
            "question_stem": "Plants need",
            "choices": {"text": ["light", "noise", "cars", "glass"], "label": list("ABCD")},
            "answerKey": "A",
        },
        "choose the correct answer to the question: Plants need\n\n"
        "Answer1: light Answer2: noise Answer3: cars Answer4: glass\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer1",
    ),
}
FOLDERS = {"siqa": "social_i_qa", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}


def write_data(directory: Path, *, hub: bool = False) -> Path:
    """Write every test set below a data directory, the suites in the hub's schema or ours."""
    for name, rows in {
        "gsm8k/test": GSM8K,
        "gsm8k/train": GSM8K_TRAIN,
        "math/test": MATH,
        "word_problems/heldout": WORD_PROBLEMS,
    }.items():
        _write(directory / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for suite, (row, instruction, answer) in SUITES.items():
        ours = {"instruction": f"Please {instruction}", "input": "", "answer": answer}
        ours["output"] = f"the correct answer is {answer}"
        path = directory / "commonsense" / FOLDERS.get(suite, suite) / "test.json"
        _write(path, json.dumps([row if hub else ours]))
    return directory


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
