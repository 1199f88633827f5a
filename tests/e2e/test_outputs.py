"""OUT is there whole or not at all, whoever is killed, and two never write to one place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fedex_scale.runtime import outputs
from fedex_scale.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
from pathlib import Path
from fedex_scale.runtime.outputs import building, lock
out = Path(sys.argv[1])
held = lock(out, str(out)) if sys.argv[2] == "lock" else building(out, num_bytes=0)
try:
    with held as scratch:
        if scratch is not None:
            (scratch / "half").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
except SystemExit as ended:
    print(ended.message, ended.code, flush=True)
"""


def make(out: Path) -> None:
    with outputs.building(out, num_bytes=0) as scratch:
        (scratch / "whole").write_text("whole")


@pytest.fixture
def begun(tmp_path: Path):
    """Start processes that are in the middle of making something."""
    started = []

    def begin(kind: str = "building") -> subprocess.Popen:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), kind]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(done)
        assert done.stdout.readline() == "ready\n"
        return done

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_what_a_killed_process_left_is_deleted_by_the_next(begun, tmp_path: Path) -> None:
    process = begun()
    with pytest.raises(UserError, match="another process is making it"):
        make(tmp_path / "out")
    process.kill()
    process.wait()
    assert len(list(tmp_path.iterdir())) == 1, "left by the killed one"
    make(tmp_path / "out")
    assert [x.name for x in tmp_path.iterdir()] == ["out"]
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["whole"]


@pytest.mark.parametrize("module", ["transformers", "matplotlib.pyplot"])
def test_ctrl_c_ends_a_command_that_imports(module: str, tmp_path: Path) -> None:
    code = f"""
import os, signal, sys, threading
from fedex_scale.runtime import process
class Slow:  # Ctrl-C comes while a module of a library is imported
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Slow())
def app(_):
    try:
        __import__({module!r})
    except BaseException as error:
        print("taken for a module that is missing:", repr(error))
process.main(app, [])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped by SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_cleans_up_and_says_so(number: signal.Signals, begun, tmp_path: Path) -> None:
    process = begun()
    process.send_signal(number)
    told, _ = process.communicate(timeout=20)
    assert f"stopped by {number.name}; nothing was left behind {128 + number}" in told
    assert list(tmp_path.iterdir()) == []


def test_a_lock_dies_with_its_process(begun, tmp_path: Path) -> None:
    process = begun("lock")
    refused = pytest.raises(UserError, match=f"run: process {process.pid} is at work there")
    with refused, outputs.lock(tmp_path / "out", "run"):
        pass
    process.kill()
    process.wait()
    with outputs.lock(tmp_path / "out", "run"):
        assert (tmp_path / "out").read_text() == f"{os.getpid()}\n"
    assert not (tmp_path / "out").exists()


def test_directories_of_others_stay(tmp_path: Path) -> None:
    """Names that are like those of scratch directories, and links."""
    mine, target = tmp_path / ".out.1234", tmp_path / "target"
    for folder in (mine, target):
        folder.mkdir()
        (folder / "mine").write_text("mine")
    link = tmp_path / f".out.fedex-scale-{'0' * 16}"
    link.symlink_to(target)
    with outputs.building(tmp_path / "out", num_bytes=0) as scratch:
        (scratch / "whole").write_text("whole")
    assert (mine / "mine").read_text() == (target / "mine").read_text() == "mine"


def test_files_take_their_places_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    (out / "page").symlink_to(out / "mine")
    with suppress(KeyError), outputs.adding(out) as scratch:
        (scratch / "page").write_text("new")
        raise KeyError
    assert (out / "page").read_text() == "mine"
    with outputs.adding(out) as scratch:
        (scratch / "plots").mkdir()
        (scratch / "plots" / "a").write_text("a")
        (scratch / "page").write_text("new")
    assert (out / "mine").read_text() == "mine"
    assert sorted(x.name for x in out.iterdir()) == ["mine", "page", "plots"]


def test_every_file_is_on_disk_before_its_name(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    real, rename = os.fsync, Path.rename

    def fsync(number: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        real(number)

    def renamed(path: Path, to: Path) -> Path:
        seen.append("rename")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    with outputs.building(tmp_path / "out", num_bytes=0) as scratch:
        (scratch / "a").mkdir()
        (scratch / "a" / "b").write_text("b")
        (scratch / "c").write_text("c")
        name = scratch.name
    assert seen.index("b") < seen.index("a") < seen.index(name) < seen.index("rename")
    assert seen.index("c") < seen.index(name)
    assert seen[-1] == tmp_path.name, "the directory that holds the name"


def test_two_runs_of_one_name(tmp_path: Path) -> None:
    from fedex_scale.federation.directory import held
    from fedex_scale.files.run_dir import RunDir

    run = RunDir(tmp_path / "runs" / "mine")
    refused = pytest.raises(UserError, match=f"process {os.getpid()} is at work there")
    with held(run), refused, held(run):
        pass
    run.path.mkdir()
    other = tmp_path / "other"
    other.symlink_to(run.path)
    refused = pytest.raises(UserError, match=f"process {os.getpid()} is at work there")
    with held(run), refused, held(RunDir(other)):
        pass
    run.path.rmdir()
    with held(run):
        assert [x.name for x in (tmp_path / "runs").iterdir()] == [".mine.lock"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_closed_pipe_does_not_end_the_work(tmp_path: Path) -> None:
    program = (
        "from fedex_scale.cli import main\nimport sys\n"
        "from fedex_scale.runtime import pipes\n"
        "pipes.make_lasting()\n"
        "for _ in range(20000): print('x' * 50)\n"
        "sys.stdout.flush()\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    assert "standard output was closed" in process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_pipe_that_was_closed_before_a_word_is_no_error(locale: str) -> None:
    """click writes past the stream that lasts where the locale is ASCII, and ends with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fedex_scale.cli", "config"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": locale, "PYTHONUTF8": "0"},
    )
    os.close(writing)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert "standard output was closed" in done.stderr


def test_a_stale_build_lock_is_named(tmp_path: Path, monkeypatch, caplog) -> None:
    from fedex_scale.engine.ops import naming_stale_locks

    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with naming_stale_locks(0.05):
        time.sleep(0.5)
    assert f"waiting for {lock}" in caplog.text
    caplog.clear()
    lock.unlink()
    with naming_stale_locks(0.05):
        time.sleep(0.2)
    assert not caplog.text
