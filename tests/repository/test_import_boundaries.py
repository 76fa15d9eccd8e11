"""Imports go one way: the arrows that the architecture allows, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "hf_fused_head"

# For each part of the package, the parts that it may import. A part is a module or a folder; the
# longest name that fits a module is its part.
LEAVES = {
    *("version", "options", "records", "transforms", "autocast"),
    *("distributed.dtensor", "distributed.vocab_parallel"),
}
PLANNING = {"planning"}
ENGINE = {"engines.protocol", "objective", "options", "planning", "distributed.vocab_parallel"}
ALLOWED: dict[str, set[str]] = {
    "version": set(),
    "options": set(),
    "records": set(),
    "transforms": set(),
    "autocast": set(),
    "kl_objective": set(),
    "distributed.dtensor": set(),
    "distributed.vocab_parallel": set(),
    "distributed.sharded_checkpoint": {"distributed.dtensor"},
    "planning": set(),
    "objective": {"options"},
    "validation": {"options", "planning", "transforms"},
    "kernels": {"objective"},
    "engines.protocol": {"objective", "planning", "distributed.vocab_parallel"},
    "engines.reference": ENGINE,
    "engines.reference_divergence": ENGINE | {"engines.reference", "kl_objective"},
    "engines.torch_engine": ENGINE,
    "engines.triton_engine": ENGINE | {"kernels"},
    "engines.select": {
        *("engines.protocol", "engines.reference", "engines.torch_engine", "engines.triton_engine"),
        *("options", "planning"),
    },
    "run_record": {"engines.select", "planning"},
    "ops": LEAVES | PLANNING | {"objective", "engines.protocol", "engines.select", "run_record"},
    "flops": {"ops", "objective", "engines.protocol", "records"},
    "autograd": {"ops", "transforms"},
    "row_autograd": {
        *{"autograd", "ops", "flops", "objective", "engines.protocol", "records", "transforms"}
    },
    "functional": LEAVES
    | PLANNING
    | {"ops", "flops", "autograd", "row_autograd", "objective", "validation"},
    "candidates": LEAVES | {"autograd", "ops", "engines.protocol"},
    "log_probs": LEAVES
    | PLANNING
    | {"candidates", "ops", "row_autograd", "objective", "validation", "engines.protocol"},
    "divergence": LEAVES
    | PLANNING
    | {"autograd", "kl_objective", "run_record", "validation", "engines.protocol"}
    | {"engines.select", "engines.reference_divergence", "engines.torch_engine"},
    "nn": {"functional", "options"},
    "patches": LEAVES
    | PLANNING
    | {"functional", "log_probs", "nn", "engines.select", "run_record"},
    "callbacks": {"patches"},
    "trainer": LEAVES | {"callbacks", "functional", "patches", "distributed.sharded_checkpoint"},
    "benchmark": LEAVES | PLANNING | {"functional", "log_probs", "nn", "patches", "engines.select"},
    "commands": LEAVES | {"benchmark", "patches"},
    "cli": LEAVES | {"commands"},
}
# Third parties that only the named parts may import; the others do without, or ask one that may.
CONFINED = {
    "transformers": {"patches", "callbacks", "trainer"},
    "peft": {"patches", "trainer"},
    "accelerate": {"patches", "trainer"},
    "triton": {"kernels", "engines.triton_engine"},
    "typer": {"cli", "commands"},
    "matplotlib": {"benchmark"},
}


def modules() -> dict[str, Path]:
    """Every source file of the package by the name of its module."""
    found = {}
    for folder, package in ((ROOT / PACKAGE, PACKAGE), (ROOT / "patches", f"{PACKAGE}.patches")):
        for file in sorted(folder.rglob("*.py")):
            relative = file.relative_to(folder).with_suffix("")
            found[".".join((package, *relative.parts)).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def part_of(name: str) -> str:
    """The part that a dotted name of the package belongs to; "" for the package's own __init__."""
    inner = name.removeprefix(PACKAGE).lstrip(".")
    fitting = [part for part in ALLOWED if inner == part or inner.startswith(f"{part}.")]
    return max(fitting, key=len, default="")


def imports(name: str, file: Path) -> set[str]:
    """Absolute dotted names that a file imports, inside functions and as strings of modules too."""
    names: set[str] = set()
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            members = {f"{module}.{alias.name}" for alias in node.names}
            # `from package import module` asks nothing of the package itself.
            names |= members if members <= MODULES.keys() else {module, *members}
        elif isinstance(node, ast.Constant) and node.value in MODULES:
            # What `importlib` is given, wherever the string stands.
            names.add(node.value)
    return names


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_lies_below_it(name: str) -> None:
    part = part_of(name)
    if not part:
        return  # An __init__ above the parts names them lazily, or only describes them.
    for imported in imports(name, MODULES[name]):
        top = imported.split(".")[0]
        target = part_of(imported) if top == PACKAGE else ""
        if target:
            assert target in ALLOWED[part] | {part}, f"{name} must not import {imported}"
        if top in CONFINED:
            assert part in CONFINED[top], f"{name} must not import {imported}"


def test_every_module_belongs_to_a_part() -> None:
    without = {name for name, file in MODULES.items() if not part_of(name)}
    assert all(MODULES[name].name == "__init__.py" for name in without)


def test_no_modules_import_each_other_in_a_circle() -> None:
    arrows = {
        name: {target for target in imports(name, file) if target in MODULES and target != name}
        for name, file in MODULES.items()
        if name != PACKAGE
    }
    # Repeatedly drops what imports nothing that is left: circles remain, and what imports them.
    while done := {name for name, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {name: targets for name, targets in arrows.items() if name not in done}
    above = {name for name in arrows if not any(name in targets for targets in arrows.values())}
    assert not arrows, f"circular imports among {sorted(arrows.keys() - above)}"


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
