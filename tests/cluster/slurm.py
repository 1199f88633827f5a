"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd of Debian."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from fedex_scale.runtime.distributed import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "srun")
WAIT_S = 60.0
_SETTINGS = """\
ClusterName=loopback
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
NodeName=left NodeHostname={host} NodeAddr={address} Port={left} CPUs=1
NodeName=right NodeHostname={host} NodeAddr={address} Port={right} CPUs=1
PartitionName=all Nodes=left,right Default=YES MaxTime=INFINITE State=UP
"""


def program(name: str) -> str | None:
    """Return where a program lies; daemons' directories are not on every PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """The daemons, which end with the `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        (folder / "state").mkdir(parents=True)
        folder.chmod(0o755)
        settings = _SETTINGS.format(
            host=host,
            address="127.0.0.1",
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            folder=folder,
            port=free_port(),
            left=free_port(),
            right=free_port(),
        )
        (folder / "slurm.conf").write_text(settings)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Slurm:
        munge = [f"--{x}={self.folder}/munge.{x}" for x in ("socket",)]
        munge += [f"--key-file={self.folder}/munge.key", f"--pid-file={self.folder}/munge.pid"]
        munge += [f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed"]
        self._start("munged", "--foreground", "--force", *munge)
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D")
        for node in ("left", "right"):
            self._start("slurmd", "-D", "-N", node)
        self._wait(lambda: self.call("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", "Slurm")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.call("scancel", "--full", "--user", str(os.getuid()))
            time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, name: str, *arguments: str, cwd: Path | None = None) -> str:
        return subprocess.run(
            [program(name), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            cwd=cwd,
        ).stdout

    def state(self, job: str) -> str:
        """Return a job's state, such as RUNNING."""
        told = self.call("scontrol", "show", "job", job)
        return told.partition("JobState=")[2].split()[0]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def _start(self, name: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [program(name), *arguments], stdout=out, stderr=out, env=self.environment
                )
            )

    def _wait(self, condition, what: str) -> None:
        end = time.monotonic() + WAIT_S
        while time.monotonic() < end:
            with contextlib.suppress(subprocess.CalledProcessError):
                if condition():
                    return
            time.sleep(0.5)
        logs = "\n".join(path.read_text()[-800:] for path in self.folder.glob("*.[lo][ou][gt]"))
        raise RuntimeError(f"{what} did not start: {logs}")
