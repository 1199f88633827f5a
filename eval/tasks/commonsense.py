"""The eight commonsense suites as LLM-Adapters asks them: one instruction, one of a few words.

Rows of LLM-Adapters' files (instruction, answer) are taken as they are; rows of the hub's datasets
are turned into the same instructions. Source: arXiv:2304.01933.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset

from fedex_scale.data.prompts import COMMONSENSE_PROMPT

Row = dict[str, str]


def rows(dataset: Dataset) -> Dataset:
    """Return rows of LLM-Adapters' schema, whichever they have."""
    columns = dataset.column_names
    if "instruction" in columns:
        return dataset
    convert = next(convert for column, convert in SCHEMAS.items() if column in columns)
    return Dataset.from_list([convert(row) for row in dataset])


def prompt(row: Row) -> str:
    return COMMONSENSE_PROMPT.format(instruction=row["instruction"])


def score(row: Row, answers: list[str]) -> dict[str, float]:
    """An answer counts if it is the row's, which must be one of those that the row offers."""
    offered = row["instruction"].rpartition("Answer format: ")[2].split("/")
    readable = row["answer"] in offered
    return {
        "exact_match": float(readable and answers[0] == row["answer"]),
        "unparsed_gold": int(not readable),
    }


def boolq(row: dict) -> Row:
    text = f"Please answer the following question with true or false, question: {row['question']}?"
    return _row(text, "", ["true", "false"], "true" if row["answer"] else "false")


def piqa(row: dict) -> Row:
    text = f"Please choose the correct solution to the question: {row['goal']}"
    return _choose(text, "solution", [row["sol1"], row["sol2"]], int(row["label"]), between="\n\n")


def siqa(row: dict) -> Row:
    choices = [row["answerA"], row["answerB"], row["answerC"]]
    return _question(f"{row['context']} {row['question']}", choices, int(row["label"]) - 1)


def hellaswag(row: dict) -> Row:
    text = "Please choose the correct ending to complete the given sentence: "
    text += f"{row['activity_label']}: {row['ctx']}"
    return _choose(text, "ending", row["endings"], int(row["label"]))


def winogrande(row: dict) -> Row:
    text = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    choices, label = [row["option1"], row["option2"]], int(row["answer"]) - 1
    return _choose(text + row["sentence"], "option", choices, label, end=" ")


def arc(row: dict) -> Row:
    labels = list(row["choices"]["label"])
    return _question(row["question"], row["choices"]["text"], labels.index(row["answerKey"]))


def openbookqa(row: dict) -> Row:
    return arc({**row, "question": row["question_stem"]})


def _question(text: str, choices: Sequence[str], label: int) -> Row:
    return _choose(
        f"Please choose the correct answer to the question: {text}", "answer", choices, label
    )


def _choose(
    text: str,
    word: str,
    choices: Sequence[str],
    label: int,
    *,
    between: str = " ",
    end: str = "\n\n",
) -> Row:
    """Return a row that lists the choices as `Word1: ... Word2: ...`; `label` counts from 0."""
    listed = [f"{word.capitalize()}{i}: {choice}" for i, choice in enumerate(choices, 1)]
    names = [f"{word}{i}" for i in range(1, len(choices) + 1)]
    return _row(text, between.join(listed) + end, names, names[label])


def _row(text: str, listed: str, names: Sequence[str], answer: str) -> Row:
    instruction = f"{text}\n\n{listed}Answer format: {'/'.join(names)}"
    return {"instruction": instruction, "answer": answer}


SCHEMAS = {
    "passage": boolq,
    "goal": piqa,
    "answerA": siqa,
    "endings": hellaswag,
    "sentence": winogrande,
    "question_stem": openbookqa,
    "answerKey": arc,
}
"""By a column that only this dataset of the hub has; OpenBookQA has those of ARC besides."""
