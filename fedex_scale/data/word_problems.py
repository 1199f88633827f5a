"""A seeded generator of small arithmetic word problems, in MetaMathQA's schema.

    python -m fedex_scale.data.word_problems --out DIR --seed 0 --train 336 --heldout 64

writes DIR/train.jsonl and DIR/heldout.jsonl: rows of `query`, `response` (short working, then
`The answer is: X`) and `type`, the family of the problem. No query is in both files. The numbers
are as large as a model of 135M parameters learns to handle in some fifteen optimizer steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from random import Random

from fedex_scale.runtime.errors import UserError

NAMES = (
    "Ada Amir Anna Ben Carla Chen Dana Elif Emil Fatima Goran Hana Ines Ivan Jamal June Kofi Lena "
    "Liam Lucia Malik Maya Mina Nadia Noah Olga Omar Paul Priya Quinn Rosa Ravi Sami Sara Tariq "
    "Tess Uma Vera Yusuf Zoe"
).split()
ITEMS = (
    "apples beads books buttons candles cards cherries coins cookies crayons eggs flowers lemons "
    "marbles oranges pears pencils plums shells stamps stickers stones tickets toys walnuts"
).split()
PACKS = "bags baskets bowls boxes crates jars packets trays".split()

MAX_DRAWS = 1000  # in vain for one row; then the family has next to no new problems left

Problem = tuple[str, str]  # the query; the working, which ends in the answer


def gain(draw: Random) -> Problem:
    name, item = draw.choice(NAMES), draw.choice(ITEMS)
    had, found = draw.randint(5, 30), draw.randint(2, 9)
    query = f"{name} has {had} {item} and finds {found} more. How many {item} does {name} have now?"
    return query, f"{had} + {found} = {had + found}"


def lose(draw: Random) -> Problem:
    name, item = draw.choice(NAMES), draw.choice(ITEMS)
    lost, left = draw.randint(2, 6), draw.randint(2, 9)
    query = f"{name} had {lost + left} {item} but lost {lost} of them. How many {item} are left?"
    return query, f"{lost + left} - {lost} = {left}"


def packs(draw: Random) -> Problem:
    item, pack = draw.choice(ITEMS), draw.choice(PACKS)
    count, size = draw.randint(2, 9), draw.randint(2, 9)
    query = (
        f"There are {count} {pack} on a table with {size} {item} in each of them. "
        f"How many {item} are on the table?"
    )
    return query, f"{count} * {size} = {count * size}"


def packs_and_more(draw: Random) -> Problem:
    name, item, pack = draw.choice(NAMES), draw.choice(ITEMS), draw.choice(PACKS)
    count, size, more = (draw.randint(2, 9) for _ in range(3))
    query = (
        f"{name} buys {count} {pack} of {size} {item} and then {more} {item} more. "
        f"How many {item} does {name} buy in all?"
    )
    packed = count * size
    return query, f"{count} * {size} + {more} = {packed} + {more} = {packed + more}"


def price(draw: Random) -> Problem:
    name, item = draw.choice(NAMES), draw.choice(ITEMS)
    count, dollars = draw.randint(2, 9), draw.randint(2, 9)
    query = (
        f"{name} buys {count} {item} for {dollars} dollars each. How many dollars does {name} pay?"
    )
    return query, f"{count} * {dollars} = {count * dollars}"


def share(draw: Random) -> Problem:
    name, item = draw.choice(NAMES), draw.choice(ITEMS)
    friends, each = draw.randint(2, 9), draw.randint(2, 9)
    query = (
        f"{name} shares {friends * each} {item} equally among {friends} friends. "
        f"How many {item} does each friend get?"
    )
    return query, f"{friends * each} / {friends} = {each}"


FAMILIES: tuple[Callable[[Random], Problem], ...] = (
    gain,
    lose,
    packs,
    packs_and_more,
    price,
    share,
)


def generate(seed: int, *, train: int, heldout: int) -> tuple[list[dict], list[dict]]:
    """Return training and held-out rows; the families take turns, so that each has its share.

    More rows of one kind leave the first ones as they were; the held-out rows depend on `seed`
    alone.

    Raises:
        UserError: more rows are asked for than there are problems.
    """
    if train < 1 or heldout < 1:
        raise UserError(f"word problems: expected at least 1 row of each, got {train}, {heldout}")
    heldout_rows = _rows(Random(f"{seed} heldout"), heldout, taken=())
    taken = [row["query"] for row in heldout_rows]
    return _rows(Random(f"{seed} train"), train, taken=taken), heldout_rows


def write_jsonl(rows: Sequence[dict], path: Path) -> None:
    """Write rows so that `path` is either absent or whole."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(f"{path}: cannot write ({error.strerror}); choose another --out") from None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write train.jsonl and heldout.jsonl.")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=336, help="training rows")
    parser.add_argument("--heldout", type=int, default=64, help="held-out rows")
    args = parser.parse_args(argv)
    try:
        train, heldout = generate(args.seed, train=args.train, heldout=args.heldout)
        write_jsonl(train, args.out / "train.jsonl")
        write_jsonl(heldout, args.out / "heldout.jsonl")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(train)} training and {len(heldout)} held-out problems")
    return 0


def _rows(draw: Random, count: int, *, taken: Collection[str]) -> list[dict]:
    seen, rows = set(taken), []
    for index in range(count):
        family = FAMILIES[index % len(FAMILIES)]
        query, working = _new_problem(draw, family, seen)
        seen.add(query)
        response = f"{working}.\nThe answer is: {working.rsplit(' ', 1)[1]}"
        rows.append({"query": query, "response": response, "type": family.__name__})
    return rows


def _new_problem(draw: Random, family: Callable[[Random], Problem], seen: set[str]) -> Problem:
    for _ in range(MAX_DRAWS):
        query, working = family(draw)
        if query not in seen:
            return query, working
    raise UserError(
        f"word problems: found no new problem of the kind {family.__name__} after "
        f"{len(seen)} rows; ask for fewer"
    )


if __name__ == "__main__":
    raise SystemExit(main())
