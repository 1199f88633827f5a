"""Joining a process group, in a process of its own."""

import os
import socket
import subprocess
import sys

import pytest

# A port that is free when it is asked for, and taken when the group is made: always, here.
ALONE = """
import sys
from fedex_scale.runtime import distributed
distributed.free_port = lambda: int(sys.argv[1])
distributed.join_group(required=True)
print(distributed.world_size(), distributed.sum_over_ranks(3.0))
distributed.leave(0)
"""


@pytest.mark.parametrize("inherits", [False, True], ids=["plain", "child of another"])
def test_one_process_needs_no_port(inherits: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        plain = {k: v for k, v in os.environ.items() if k not in one}
        run = subprocess.run(
            [sys.executable, "-c", ALONE, port],
            env=plain | (one | {"MASTER_PORT": port} if inherits else {}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (run.returncode, run.stdout) == (0, "1 [3.0]\n"), run.stderr
