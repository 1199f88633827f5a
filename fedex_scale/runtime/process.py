"""The process around the command line: what it says, how it ends, and what libraries may say."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fedex_scale.runtime import launched, pipes
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import PLAIN_HANDLERS
from fedex_scale.runtime.text import ReadableFormatter


def main(app: Callable[[list[str] | None], None], arguments: Sequence[str] | None) -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    pipes.make_lasting()
    set_up_libraries()
    before = _end_at_ctrl_c()
    try:
        code = _run(app, None if arguments is None else list(arguments))
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)
    if "torch" not in sys.modules:
        sys.exit(code)
    from fedex_scale.runtime import distributed

    distributed.leave(code or 0)


def tell(line: str) -> None:
    """Print a line for the user once, whatever the number of ranks."""
    if launched.is_first():
        print(line, file=sys.stderr)


def set_up_libraries() -> None:
    """Before they are imported: show errors only, and let idle threads sleep."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(ReadableFormatter("%(message)s"))
    logging.getLogger("fedex_scale").setLevel(logging.INFO)
    # DeepSpeed compiles its ops with the ninja that is installed beside this Python.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Threads that wait long before they sleep make a shared machine ten times slower, and those
    # that sleep at once lose a third of the time in small operations.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for name in ("bitsandbytes", "transformers", "DeepSpeed", "lm_eval", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # DeepSpeed sets its level anew when it is imported; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    for category in (FutureWarning, UserWarning, DeprecationWarning, RuntimeWarning):
        warnings.simplefilter("ignore", category)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Bars of others would break the display; downloads from the hub ask for theirs by themselves.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # a host asked even for local files
    _pin_as_much_as_asked()
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _pin_as_much_as_asked() -> None:
    """Keep torch from rounding pinned memory up to powers of two: 5 GB more of Gemma-2's 18."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if any(name in os.environ for name in names):
        return
    found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("torch"))
    if found and tuple(map(int, found.groups())) >= (2, 13):  # which knows the setting
        os.environ["PYTORCH_ALLOC_CONF"] = "pinned_max_round_threshold_mb:1"


class _Interrupted(SystemExit):
    """Ctrl-C where no run is under way, which would end it at a place to go on from."""

    message = "stopped by SIGINT"


def _run(app: Callable[[list[str] | None], None], arguments: list[str] | None) -> int | None:
    """Run the command line and return its exit code."""
    try:
        _hint(sys.argv[1:] if arguments is None else arguments)
        app(arguments)
    except SystemExit as ended:
        if hasattr(ended, "message"):  # a signal, perhaps as another rank is gone
            gone = None
            if "torch" in sys.modules:
                from fedex_scale.runtime import faults

                gone = faults.died_first()
            _tell_of_fault(gone) if gone else tell(ended.message)
        return ended.code
    except UserError as error:
        tell(f"error: {error}")
        return 2
    except (OSError, RuntimeError, MemoryError) as error:
        from fedex_scale.runtime import faults

        reason = faults.explain(error)
        if reason is None:
            raise
        _tell_of_fault(reason)
        return 1
    return 0


def _hint(given: Sequence[str]) -> None:
    """Raise a UserError for what others' programs take, and this one says otherwise."""
    if not given or given[0] not in ("run", "plan", "doctor"):
        return
    has_config = any(x in ("-c", "--config") or x.startswith("--config=") for x in given)
    for argument in given[1:]:
        name = argument.removeprefix("--").partition("=")[0]
        if argument.startswith("--") and "." in name:
            raise UserError(
                f"{argument}: settings are given without dashes: {name}=VALUE, such as "
                "train.learning_rate=1e-4"
            )
        if not has_config and Path(argument).suffix in (".yaml", ".yml"):
            raise UserError(f"{given[0]}: expected --config {argument}, got {argument}; add it")


def _tell_of_fault(reason: str) -> None:
    """Print a line once, whichever rank is left to do so."""
    from fedex_scale.runtime import distributed, faults

    if faults.is_speaker():
        print(f"error: {reason}", file=sys.stderr, flush=True)
    if distributed.world_size() > 1:
        time.sleep(1)  # stay while the others look who is left


def _end_at_ctrl_c() -> Any:
    """Let Ctrl-C end a command with a line and code 130; return what it did before."""
    if threading.current_thread() is not threading.main_thread():
        return None

    return signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # Libraries take an exception for a module that is missing; and nothing is begun yet.
            tell(_Interrupted.message)
            os._exit(128 + number)
        frame = frame.f_back
    raise _Interrupted(128 + number)


PLAIN_HANDLERS.append(_end)
