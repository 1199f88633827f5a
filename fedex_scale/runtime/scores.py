"""How a score is written, and which of several rounds' is the best."""

from __future__ import annotations

from collections.abc import Mapping

_NO_SHARES = ("nist", "cider", "mse", "squared_error")
_LOWER_IS_BETTER = ("mse", "perplexity")


def score_text(name: str, value: float) -> str:
    """Return a share in percent, and what is no share as it is.

    Args:
        name: of the score, as task/metric or metric alone.
    """
    return f"{value:.3f}" if name.rpartition("/")[2] in _NO_SHARES else f"{value:.1%}"


def best_round(name: str, by_round: Mapping[int, float]) -> int:
    """Return the round after which a score was best; of several, the first."""
    sign = -1 if any(word in name for word in _LOWER_IS_BETTER) else 1
    return max(by_round, key=lambda round: (sign * by_round[round], -round))
