"""Which of a client's examples are held out, to see the loss on what nobody trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedex_scale.config.settings import Config
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.seeds import derive_seed

AUTO_SHARE = 50
"""By default one in so many of the examples that a client trains on in a round. Looking at an
example costs less than half of training on it, so that once before and once after a round are 2% of
the round."""
AUTO_MOST = 200  # of a client: the mean of as many is known well enough


def hold_out(
    parts: Sequence[Sequence[int]], names: Sequence[str], config: Config
) -> tuple[list[list[int]], list[list[int]]]:
    """Return of each client what it trains on, in its order, and what is held out, ascending.

    Drawn by (seed, client) from the client's own examples; a site's, by its number.

    Raises:
        UserError: a client has nothing left to train on.
    """
    trained, held = [], []
    for client, (part, name) in enumerate(zip(parts, names, strict=True)):
        count = _count(len(part), name, config)
        number = client if config.site.number is None else config.site.number
        draw = np.random.Generator(np.random.PCG64(derive_seed(config.run.seed, "held", number)))
        chosen = set(draw.choice(len(part), size=count, replace=False).tolist())
        trained.append([index for at, index in enumerate(part) if at not in chosen])
        held.append(sorted(index for at, index in enumerate(part) if at in chosen))
    return trained, held


def by_default(config: Config) -> bool:
    """Tell whether rows are held out where the clients have enough of them."""
    return config.data.holdout == "auto" and not config.evaluation.tasks


def _count(num_examples: int, name: str, config: Config) -> int:
    share, train = config.data.holdout, config.train
    if isinstance(share, str):
        if not by_default(config):
            return 0
        in_a_round = num_examples * train.local_epochs
        if train.max_steps is not None:
            in_a_round = min(in_a_round, train.max_steps * train.batch_size)
        return min(num_examples // AUTO_SHARE, in_a_round // AUTO_SHARE, AUTO_MOST)
    if not share:
        return 0
    count = max(1, int(share * num_examples + 0.5))
    if count >= num_examples:
        raise UserError(
            f"data.holdout: {name} has {num_examples} examples, and holding out {share:g} of them "
            "leaves none to train on; use fewer clients, more data, or a file of held-out rows"
        )
    return count
