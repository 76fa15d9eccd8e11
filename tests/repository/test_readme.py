"""The README is true: its code runs, its tables are what the commands print, its paths exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def generated(command: str) -> str:
    section = re.search(
        rf"<!-- begin: {re.escape(command)} -->\n(.*?)<!-- end -->", README, flags=re.DOTALL
    )
    if section is None:
        raise AssertionError(f"README.md has no section made by `{command}`")
    return section.group(1)


def test_the_first_example_runs_and_is_fused() -> None:
    first = code_blocks("python")[0]
    result = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "fused" in result.stdout


def test_the_loss_example_runs() -> None:
    program = next(block for block in code_blocks("python") if "linear_cross_entropy(" in block)
    before = (
        "import torch\nhead = torch.nn.Linear(8, 50, bias=False)\n"
        "hidden, labels = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))\n"
    )
    after = "assert torch.isfinite(loss)\n"
    subprocess.run([sys.executable, "-c", before + program + after], check=True)


def test_the_log_probability_example_runs() -> None:
    program = next(block for block in code_blocks("python") if "token_log_probs(" in block)
    before = (
        "import torch\nhead, advantages = torch.nn.Linear(8, 50), torch.randn(2, 5)\n"
        "hidden, labels = torch.randn(2, 5, 8), torch.randint(0, 50, (2, 5))\n"
    )
    after = "assert torch.isfinite(loss)\n"
    subprocess.run([sys.executable, "-c", before + program + after], check=True)


def test_the_distillation_example_runs() -> None:
    program = next(block for block in code_blocks("python") if "linear_kl_div(" in block)
    before = (
        "import torch\nhead, teacher_head = torch.nn.Linear(8, 50), torch.nn.Linear(12, 50)\n"
        "hidden, teacher_hidden = torch.randn(2, 5, 8), torch.randn(2, 5, 12)\n"
        "labels = torch.randint(0, 50, (2, 5))\n"
    )
    after = "assert torch.isfinite(loss)\n"
    subprocess.run([sys.executable, "-c", before + program + after], check=True)


def test_every_keyword_shown_for_apply_patch_exists() -> None:
    import inspect

    from hf_fused_head import apply_patch

    block = next(block for block in code_blocks("python") if "strict=True" in block)
    shown = set(re.findall(r"^    (\w+)=", block, flags=re.MULTILINE))
    assert shown == set(inspect.signature(apply_patch).parameters) - {"model"}


def generated_commands() -> list[str]:
    return re.findall(r"<!-- begin: (hf-fused-head .*?) -->", README)


@pytest.mark.parametrize("command", generated_commands())
def test_a_table_is_what_its_command_prints(command: str) -> None:
    program = [sys.executable, "-m", "hf_fused_head.cli", *command.split()[1:]]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert generated(command).strip() == result.stdout.strip()


def test_the_readme_has_tables_from_commands() -> None:
    assert any("models" in command for command in generated_commands())
    assert any("--from-json" in command for command in generated_commands())


def test_links_and_repository_map_name_what_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    for link in links:
        if "://" not in link:
            assert (ROOT / link).exists(), link
    table = README.split("## The repository", 1)[1]
    for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE):
        for path in re.findall(r"`([^`]+)`", row):
            places = (ROOT / path, ROOT / "hf_fused_head" / path)
            assert any(place.exists() for place in places), path
