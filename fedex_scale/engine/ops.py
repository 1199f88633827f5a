"""DeepSpeed's compiled ops: what they need, and the lock that a killed build leaves for ever."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import cpp_extension

log = logging.getLogger(__name__)

PATIENCE_S = 30.0


@contextmanager
def naming_stale_locks(patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Say which lock a build may be waiting for, if one that was there before is not let go.

    torch makes such a file while it builds, and waits in silence where there is one; nothing in it
    says whose it is.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]
    if not locks:
        yield
        return
    done = threading.Event()

    def tell() -> None:
        if not done.wait(patience_s):
            for lock in filter(Path.exists, locks):
                log.warning(
                    "waiting for %s, which a build of DeepSpeed's ops holds, or left when it was "
                    "killed; if nothing on this machine is compiling, delete it",
                    lock,
                )

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def lacks_for_aio() -> str | None:
    """Return what the op for NVMe lacks; None where it can be built."""
    # Its builder asks nvcc for a version.
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        return "install the CUDA toolkit that torch was built with, and set CUDA_HOME to it"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return None if AsyncIOBuilder().is_compatible(verbose=False) else "apt-get install libaio-dev"
