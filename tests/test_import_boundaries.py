"""Imports go one way: the arrows that the architecture allows, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# For each part of the package, the parts of the package that it may import.
BASE = {"version", "options", "schedule", "workspace", "distributed", "run_record"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "distributed": set(),
    "options": {"distributed"},
    "workspace": set(),
    "schedule": {"workspace"},
    "run_record": {"options", "schedule"},
    "kernels": {"kernels", "distributed"},
    "reference": BASE,
    "tiles": BASE,
    "products": BASE,
    "bounded": BASE | {"tiles", "products"},
    "fused": BASE | {"kernels"},
    "transforms": set(),
    "ops": BASE | {"reference", "bounded", "fused", "transforms"},
    "autograd": BASE | {"ops", "transforms"},
    "arguments": BASE | {"transforms"},
    "functional": BASE | {"ops", "autograd", "arguments", "transforms"},
    "nn": BASE | {"functional"},
    "patches": BASE | {"functional", "nn", "patches", "transforms"},
    "cut_checkpoints": {"patches"},
    "trainer": BASE | {"functional", "nn", "patches", "cut_checkpoints"},
    "benchmark": BASE | {"functional", "nn", "patches", "benchmark", "ops"},
    "doctor": BASE | {"functional", "nn", "patches", "benchmark", "ops"},
    "cli": BASE | {"functional", "nn", "patches", "benchmark", "doctor", "ops"},
}
# Third parties that only the named parts may import; the others do without, or ask one that may.
CONFINED = {
    "transformers": {"patches", "trainer"},
    "peft": {"patches", "trainer"},
    "accelerate": {"patches", "trainer"},
    "triton": {"kernels", "fused"},
    "typer": {"cli"},
    "matplotlib": {"benchmark"},
}


def modules() -> list[tuple[str, str, Path]]:
    """(part, module name, file) of every source file of the package."""
    found = []
    for folder, package in (
        (ROOT / "hf_fused_head", "hf_fused_head"),
        (ROOT / "patches", "hf_fused_head.patches"),
    ):
        for file in sorted(folder.rglob("*.py")):
            relative = file.relative_to(folder).with_suffix("")
            name = ".".join((package, *relative.parts)).removesuffix(".__init__")
            parts = name.split(".")
            found.append((parts[1] if len(parts) > 1 else "", name, file))
    return found


def imports(name: str, file: Path) -> set[str]:
    """Absolute dotted names imported anywhere in the file, inside functions too."""
    names: set[str] = set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize(("part", "name", "file"), modules(), ids=lambda value: str(value))
def test_a_module_imports_only_what_lies_below_it(part: str, name: str, file: Path) -> None:
    if part == "":
        return  # The package's own __init__ names everything, lazily: the cold import holds it.
    for imported in imports(name, file):
        top, *rest = imported.split(".")
        if top == "hf_fused_head" and rest:
            target = rest[0]
            if target in ALLOWED:
                assert target in ALLOWED[part] | {part}, f"{name} must not import {imported}"
        if top in CONFINED:
            assert part in CONFINED[top], f"{name} must not import {imported}"


def test_every_part_is_named_here() -> None:
    assert {part for part, _, _ in modules()} - {""} <= set(ALLOWED)


def test_the_package_imports_with_torch_alone() -> None:
    blocked = ("transformers", "triton", "peft", "accelerate", "datasets", "typer", "rich")
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {blocked!r} and 'torch' not in str(path):\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import torch, hf_fused_head as f\n"
        "x, w = torch.randn(3, 4), torch.randn(5, 4)\n"
        "print(f.linear_cross_entropy(x, w, torch.tensor([0, 1, 4]), impl='torch').item())\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) > 0


def test_the_package_import_loads_no_optional_package() -> None:
    program = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import hf_fused_head\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new & {'transformers', 'triton', 'peft', 'accelerate', 'typer', 'rich'}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
