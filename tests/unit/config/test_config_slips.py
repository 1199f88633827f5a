"""What slips past a type, or means something else than it seems, is told with its remedy."""

from __future__ import annotations

import pytest

from fedex_scale.runtime.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.name=2024"], "expected text, got 2024; put it in quotes"),
        (["run.trackers=tensorboard"], "got 'tensorboard'; write [tensorboard]"),
        (
            ["evaluation.data_dir=" + 300 * "x"],
            "evaluation.data_dir: expected names of at most 255",
        ),
        (["run.dir=" + 300 * "x"], "run.dir: expected names of at most 255 bytes, got 300: 'xxx"),
        (["partition.files=[a, " + 300 * "x" + "]"], "partition.files: expected names of at most"),
        (["evaluation.data={a: " + 300 * "x" + "}"], "evaluation.data: expected names of at most"),
        (["partition.num_clients=1" + 400 * "0"], "from 1 to 1,000,000, got '1000"),
        (
            ["federation.min_clients=3", "partition.num_clients=2"],
            "min_clients: expected at most 2,",
        ),
        (["run.name=!x 3"], "override: 'run.name=!x 3': expected no tag, got '!x'; correct it"),
        (["train={batch_size: 4, batch_size: 5}"], "'batch_size' is there twice; keep one"),
    ],
)
def test_slips_are_told_with_their_remedy(load, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_clients_that_rows_count_are_not_counted_before(load) -> None:
    load("federation.min_clients=9", "partition.kind=natural", "partition.column=type")
    sites = ["partition.kind=sites", "partition.files=[here.jsonl]", "data.path="]
    load("federation.min_clients=9", *sites)
