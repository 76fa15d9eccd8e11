"""What is built is what the tree holds: no forgotten subpackage, no second copy of `patches`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_in_tree() -> set[str]:
    found = {"hf_fused_head", "hf_fused_head.patches"}
    for folder, name in ((ROOT / "hf_fused_head", "hf_fused_head"), (ROOT / "patches", None)):
        prefix = name or "hf_fused_head.patches"
        for init in folder.rglob("*/__init__.py"):
            found.add(".".join((prefix, *init.parent.relative_to(folder).parts)))
    return found


def test_every_subpackage_is_listed_and_every_listed_one_exists() -> None:
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == packages_in_tree()


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in (ROOT / "hf_fused_head", ROOT / "patches"):
        for module in folder.rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module} is in no package"


@pytest.mark.slow
def test_the_wheel_holds_every_module(tmp_path: Path) -> None:
    import zipfile

    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    places = {"hf_fused_head": "hf_fused_head", "patches": "hf_fused_head/patches"}
    for folder, prefix in places.items():
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".json", ".typed") and "__pycache__" not in file.parts:
                assert f"{prefix}/{file.relative_to(ROOT / folder)}" in names


def test_importing_the_patches_folder_by_its_own_name_is_refused() -> None:
    result = subprocess.run(
        [sys.executable, "-c", "import patches"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "must be imported as `hf_fused_head.patches`" in result.stderr


def test_console_script_and_version_are_those_of_the_distribution() -> None:
    import hf_fused_head

    distribution = importlib.metadata.distribution("hf-fused-head")
    assert distribution.version == hf_fused_head.__version__
    scripts = {entry.name: entry.value for entry in distribution.entry_points}
    assert scripts == {"hf-fused-head": "hf_fused_head.cli:main"}
