"""`fedex-scale federate`: an app that `flwr run` takes, and keys to try a federation with."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from fedex_scale.config.section import to_dict
from fedex_scale.config.settings import Config
from fedex_scale.config.words import shown
from fedex_scale.runtime.errors import UserError
from fedex_scale.runtime.outputs import building, check_out

APP = Path(__file__).parents[1] / "flower"
MODULE = "fedex_flower"
DAYS = 365
_PROJECT = """\
# flwr run . --stream
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedex-flower"
version = "1.0.0"
description = "Federated LoRA with exact aggregation, between real sites"
license = "Apache-2.0"
dependencies = ["flwr>=1.42,<1.43"]

[tool.flwr.app]
publisher = "fedex-scale"

[tool.flwr.app.components]
serverapp = "{module}.app:server"
clientapp = "{module}.app:client"

# Of the server. A site's settings are its SuperNode's --node-config.
[tool.flwr.app.config]
command = {command}  # how fedex-scale starts at the server
config = {config}
run = {run}
deadline-s = {deadline_s}  # of a round
"""
_CONNECTION = """\
[superlink]
default = "federation"

[superlink.federation]
address = {address}
root-certificates = {certificate}
"""
_SITE = """\
# One site of the federation: fill in site.number, model.path and data, and start its SuperNode with
#   --node-config 'command="fedex-scale" config="/path/of/this.yaml" folder="/path/for/exchange"'
"""
_SERVERS = """\
basicConstraints=critical,CA:FALSE
keyUsage=critical,digitalSignature
extendedKeyUsage=serverAuth
authorityKeyIdentifier=keyid
"""
_SITE_SECTIONS = ("model", "lora", "method", "train", "engine")


def write_app(
    out: Path,
    config: Config,
    config_file: Path,
    *,
    run: Path,
    address: str,
    certificate: Path,
    command: str,
    deadline_s: int,
) -> None:
    """Write an app's directory: pyproject.toml, the app, how `flwr` finds the SuperLink, site.yaml.

    Args:
        config: the federation's settings, as they lie in `config_file`.
        run: the directory that the server keeps the federation in.
        address: host:port of the SuperLink.
        certificate: of the authority that signed the SuperLink's.
        command: how fedex-scale starts at the server.
        deadline_s: of a round.
    """
    check_out(out)
    if not config_file.is_file():
        raise UserError(f"--config: expected a file of the server, got {config_file}; name one")
    host, _, port = address.rpartition(":")
    if not (_is_host(host.strip("[]")) and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--address: expected HOST:PORT, got {shown(address)}; correct it")
    if not certificate.is_file():
        raise UserError(
            f"--certificate: expected a PEM file, found none at {certificate}; federate keys makes "
            "ca.pem"
        )
    values = {"command": command, "config": config_file.resolve(), "run": run.resolve()}
    connection = {"address": address, "certificate": certificate.resolve()}
    with building(out, num_bytes=2**16) as scratch:
        project = _PROJECT.format(module=MODULE, deadline_s=deadline_s, **_quoted(values))
        (scratch / "pyproject.toml").write_text(project, encoding="utf-8")
        shutil.copytree(APP, scratch / MODULE, ignore=shutil.ignore_patterns("__pycache__"))
        (scratch / ".flwr").mkdir()
        text = _CONNECTION.format(**_quoted(connection))
        (scratch / ".flwr" / "config.toml").write_text(text, encoding="utf-8")
        tree = {
            name: section for name, section in to_dict(config).items() if name in _SITE_SECTIONS
        }
        tree |= {"run": {"name": "site", "seed": config.run.seed}, "site": {"number": 0}}
        # As a simulation with these settings holds rows out.
        share = config.data.holdout
        if isinstance(share, str) and (share != "auto" or config.evaluation.tasks):
            share = 0
        tree |= {"data": {"path": "data.jsonl", "holdout": share}}
        text = _SITE + yaml.safe_dump(tree, sort_keys=False)
        (scratch / "site.yaml").write_text(text, encoding="utf-8")


def write_keys(out: Path, hosts: Sequence[str], sites: int) -> None:
    """Make a certificate authority, the SuperLink's certificate, and a key pair a site.

    Raises:
        UserError: openssl or ssh-keygen is missing, or refuses.
    """
    check_out(out)
    for host in hosts:
        if not _is_host(host):
            raise UserError(f"--host: expected a name or an address, got {shown(host)}; correct it")
    for program in ("openssl", "ssh-keygen"):
        if shutil.which(program) is None:
            raise UserError(
                f"{program}: expected it on PATH, found none; install openssl and openssh-client"
            )
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes"]
    names = ",".join(f"{'IP' if _is_address(host) else 'DNS'}:{host}" for host in hosts)
    with _private(), building(out, num_bytes=2**16) as folder:
        _do(folder, "openssl", "req", "-x509", *curve, "-days", str(DAYS), "-keyout", "ca.key",
            "-out", "ca.pem", "-subj", "/CN=fedex-scale federation", "-addext",
            "keyUsage=critical,keyCertSign,cRLSign")  # fmt: skip
        _do(folder, "openssl", "req", *curve, "-keyout", "server.key", "-out", "server.csr",
            "-subj", "/CN=fedex-scale server")  # fmt: skip
        (folder / "names").write_text(f"{_SERVERS}subjectAltName={names}\n", encoding="utf-8")
        _do(folder, "openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey",
            "ca.key", "-CAcreateserial", "-out", "server.pem", "-days", str(DAYS),
            "-extfile", "names")  # fmt: skip
        for name in ("server.csr", "names", "ca.srl"):
            (folder / name).unlink(missing_ok=True)
        for k in range(sites):
            name = f"site-{k}"
            _do(folder, "ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", name,
                "-f", name)  # fmt: skip


def _do(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"{command[0]}: ended with exit code {done.returncode}: {said[:200]}")


@contextmanager
def _private() -> Iterator[None]:
    """Let files be readable by nobody else."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _is_host(text: str) -> bool:
    name = re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", text)
    return bool(name) or _is_address(text)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _quoted(values: dict[str, object]) -> dict[str, str]:
    return {name: json.dumps(str(value), ensure_ascii=False) for name, value in values.items()}
