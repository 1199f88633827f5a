"""The documentation is a site without broken links, and what surrounds the code is sound."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import fedex_scale

ROOT = Path(__file__).parents[2]


def build(folder: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


def test_the_site_is_built_and_a_broken_link_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {file.stem for file in (tmp_path / "docs").glob("*.md")}
    assert {file.parent.name for file in (tmp_path / "site").glob("*/index.html")} >= pages - {
        "index"
    }
    with (tmp_path / "docs" / "report.md").open("a") as file:
        file.write("\n[nowhere](nowhere.md) and [no place](report.md#nowhere)\n")
    broken = build(tmp_path, tmp_path / "site2")
    assert broken.returncode != 0
    assert "nowhere.md" in broken.stderr
    assert "#nowhere" in broken.stderr


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in text


def test_files_that_the_texts_name_are_there() -> None:
    for text in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`(docs/[\w.]+)`", text.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{text.name} names {name}"


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == fedex_scale.__version__
    assert cited["license"] == "Apache-2.0"
    assert {"title", "authors", "message"} <= cited.keys()


def test_the_dockerfile_is_clean() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_s_steps_install_a_program_that_runs(tmp_path: Path) -> None:
    """What COPY leaves after .dockerignore is installed as RUN says, without its dependencies."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    names = [name.removeprefix("**/") for name in ignored]
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*names))
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    step = re.search(r"^RUN (pip install .*)$", text, re.MULTILINE)[1]
    here = f"--quiet --no-deps --no-build-isolation --target {tmp_path / 'installed'}"
    step = step.replace("pip install", f"{sys.executable} -m pip install {here}")
    subprocess.run(["bash", "-c", step], cwd=copy, check=True)
    program = "from fedex_scale.cli import main; main(['recipes'])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
    assert 'ENTRYPOINT ["fedex-scale"]' in text


def test_every_folder_of_tests_is_looked_into(pytestconfig: pytest.Config) -> None:
    left_out = pytestconfig.getini("norecursedirs")
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "tests").rglob("test_*.py")}
    names = {name for folder in folders for name in folder.parts}
    assert {"dist", "e2e", "unit"} <= names
    assert not [name for name in names if any(fnmatch(name, x) for x in left_out)]
