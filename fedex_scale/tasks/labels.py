"""Scores of labels and of numbers, by scikit-learn and scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedex_scale.tasks.interface import Scores


def class_scores(name: str, got: np.ndarray, wanted: np.ndarray, labels: Sequence[str]) -> Scores:
    """Return accuracy, F1 and Matthews' correlation.

    F1 is that of the second label where there are two, as GLUE has it, and the labels' mean
    otherwise.
    """
    from sklearn.metrics import f1_score, matthews_corrcoef

    right = got == wanted
    of_two = {"average": "binary"} if len(labels) == 2 else {"average": "macro"}
    share = float(right.mean())
    values = {
        "accuracy": share,
        "accuracy_stderr": math.sqrt(share * (1 - share) / max(1, len(right) - 1)),
        "f1": float(f1_score(wanted, got, zero_division=0.0, **of_two)),
        "matthews": float(matthews_corrcoef(wanted, got)),
    }
    samples = [
        sample(name, i, labels[w], labels[g], {"accuracy": float(g == w)})
        for i, (g, w) in enumerate(zip(got, wanted, strict=True))
    ]
    return Scores(values={name: values}, counts={name: len(right)}, samples=samples)


def number_scores(name: str, got: np.ndarray, wanted: np.ndarray) -> Scores:
    """Return Pearson's and Spearman's correlation, and the mean squared error.

    A correlation with numbers that are all alike is 0.
    """
    from scipy.stats import pearsonr, spearmanr

    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    told = len(got) > 1 and np.ptp(got) > 0 and np.ptp(wanted) > 0
    values = {
        "pearson": float(pearsonr(got, wanted).statistic) if told else 0.0,
        "spearman": float(spearmanr(got, wanted).statistic) if told else 0.0,
        "mse": float(np.square(got - wanted).mean()),
    }
    samples = [
        sample(name, i, float(w), float(g), {"squared_error": float((g - w) ** 2)})
        for i, (g, w) in enumerate(zip(got, wanted, strict=True))
    ]
    return Scores(values={name: values}, counts={name: len(got)}, samples=samples)


def sample(name: str, index: int, target: object, answer: object, verdict: dict) -> dict:
    """Return a line of samples.jsonl."""
    return {
        "task": name,
        "filter": "none",
        "doc_id": index,
        "doc_hash": "",
        "answer": answer,
        "target": target,
        "verdict": verdict,
    }
