"""Joining a process group, in a process of its own."""

import socket
import subprocess
import sys

# A port that is free when it is asked for, and taken when the group is made: always, here.
ALONE = """
import sys
from fedex_scale.runtime import distributed
distributed.free_port = lambda: int(sys.argv[1])
distributed.join_group(required=True)
print(distributed.world_size(), distributed.sum_over_ranks(3.0))
distributed.leave(0)
"""


def test_one_process_needs_no_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-c", ALONE, str(taken.getsockname()[1])]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout) == (0, "1 [3.0]\n"), run.stderr
