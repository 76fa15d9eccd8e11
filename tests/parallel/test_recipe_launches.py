"""The recipe under `accelerate launch`: its configs load, run, and mistakes cost one line."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from data_parallel import needs_deepspeed
from peft import AutoPeftModelForCausalLM
from places import SUPPORT, environment
from transformers import AutoModelForCausalLM, LlamaConfig

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "accelerate").glob("*.yaml"))
SMALL = ["--max-steps", "3", "--seq-len", "32", "--batch-size", "2"]
TWO = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
CUT = {**TWO, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`recipes/finetune.py` as a module, run from an empty folder."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("finetune")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_configs_load_and_fit_their_processes(config: Path) -> None:
    """No key is unknown to accelerate, and the sizes multiply to the number of processes."""
    loaded = load_config_from_file(str(config))
    sizes = {k: v for k, v in loaded.parallelism_config.items() if k.endswith("_size")}
    product = 1
    for size in sizes.values():
        product *= size
    assert product == (loaded.num_processes if sizes else 1)
    kind = {"fsdp2": "FSDP", "cp": "FSDP", "zero3": "DEEPSPEED", "single": "NO"}
    assert loaded.distributed_type.value == kind.get(config.stem, "MULTI_GPU")


def test_the_readme_launches_every_config() -> None:
    """Each file stands in recipes/README.md, and no other."""
    named = re.findall(
        r"--config_file recipes/accelerate/(\S+)", (RECIPES / "README.md").read_text()
    )
    assert sorted(set(named)) == [config.name for config in CONFIGS]


@pytest.fixture
def folder(recipe: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model "tiny" and its tokenizer, saved."""
    saved = tmp_path_factory.mktemp("model")
    texts = list(recipe.load_texts("python-docs", "text"))
    for part in recipe.load_model("tiny", texts, 32)[::-1]:
        part.save_pretrained(saved)
    return saved


ON_CPU = SUPPORT / "recipe_on_cpu.py"
SCRIPTS = {"ddp": RECIPES / "finetune.py", "single": RECIPES / "finetune.py"}
WITH_OPTIONS = {
    "fsdp2": ["--full"],
    "zero3": ["--full"],
    "tp": ["--full", "--lr", "1e-3", "--model"],
}


@pytest.mark.parametrize(
    "name",
    [
        "ddp",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("single", "fsdp2", "cp", "tp")),
        pytest.param("zero3", marks=[pytest.mark.slow, needs_deepspeed]),
    ],
)
def test_launched(name: str, tmp_path: Path, folder: Path) -> None:
    """On the CPU: the loss falls, one process prints and writes, the result loads again."""
    launch = ["-m", "accelerate.commands.launch", "--config_file"]
    options = WITH_OPTIONS.get(name, []) + ([str(folder)] if name == "tp" else [])
    done = subprocess.run(
        [
            *(sys.executable, *launch, str(RECIPES / "accelerate" / f"{name}.yaml")),
            *(str(SCRIPTS.get(name, ON_CPU)), *SMALL, *options),
            *("--output-dir", str(tmp_path / "run")),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            **environment("cpu"),
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert sum("words; " in line for line in lines) == 1
    assert sum(line.startswith("The head never made its logits") for line in lines) == 1
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    if not options:
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run").num_parameters() > 0
        return
    saved, before = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "run", folder))
    shapes = {key: value.shape for key, value in before.state_dict().items()}
    assert {key: value.shape for key, value in saved.state_dict().items()} == shapes


SIZES = "PARALLELISM_CONFIG_{}_SIZE"
MISTAKES = {
    "fsdp without GPUs": (
        0,
        {**TWO, "ACCELERATE_USE_FSDP": "true"},
        "",
        "fsdp needs CUDA devices in accelerate, this machine has none",
    ),
    "tp without GPUs": (0, {**CUT, SIZES.format("TP"): "2"}, "", "tp needs CUDA devices"),
    "fewer GPUs than processes": (1, TWO, "", "it has 1: --num_processes 1"),
    "sizes and processes": (
        4,
        {**CUT, SIZES.format("CP"): "2", "WORLD_SIZE": "3"},
        "",
        "3 processes cannot be cut into cp 2: --num_processes 2",
    ),
    "pieces of a sequence": (
        2,
        {**CUT, SIZES.format("CP"): "2"},
        "--seq-len 30",
        "--seq-len 30 cannot be cut into 4 equal pieces for cp 2: --seq-len 32",
    ),
    "no deepspeed": (
        2,
        {**TWO, "ACCELERATE_USE_DEEPSPEED": "true"},
        "",
        "deepspeed, which is not installed: pip install deepspeed",
    ),
    "comparison of two": (2, TWO, "--compare", "--compare measures one process, got 2"),
    "tp of adapters": (2, {**CUT, SIZES.format("TP"): "2"}, "", "LoRA adds whole ones: --full"),
    "tp of a model in memory": (
        2,
        {**CUT, SIZES.format("TP"): "2"},
        "--full",
        "--model tiny is made in memory",
    ),
    "tp of three heads": (
        2,
        {**CUT, SIZES.format("TP"): "2"},
        "--full --model three",
        "its num_attention_heads, 3, cannot be cut into tp 2 equal parts",
    ),
}


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_the_model_loads(
    name: str,
    rank: str,
    recipe: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One line by the main process, exit code 2, nothing loaded, nothing written."""
    devices, environment, options, message = MISTAKES[name]
    LlamaConfig(hidden_size=12, num_attention_heads=3).save_pretrained("three")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda key, *a: None if key == "deepspeed" else find_spec(key)
    )
    for key, value in {**environment, "RANK": rank}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(recipe, "load_model", None)
    monkeypatch.setattr(recipe, "load_texts", None)
    before = sorted(tmp_path.rglob("*"))
    assert recipe.main([*SMALL, *options.split()]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and sorted(tmp_path.rglob("*")) == before
    if rank == "1":
        assert shown.err == ""
    else:
        assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
        assert message in shown.err
