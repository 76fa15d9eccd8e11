"""Run by test_trl_parallel.py in two processes: TRL's trainers in DDP and in FSDP2."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate_on_cpu import engine, pretend_gpus
from torch import Tensor, nn
from trains_like import assert_gradients_close
from trl_cases import trainer
from trl_runs import run, weights_of

from hf_fused_head import apply_patch, patch_report, patch_trainer

ROWS = 2
Weights = dict[str, Tensor]


def whole_weights(name: str, folder: Path, prepare: Any, **settings: Any) -> Weights:
    """Those of a trained policy; patched already, or when its trainer has been made."""
    made = trainer(
        name,
        folder,
        (lambda model: model) if prepare is patch_trainer else prepare,
        per_device_train_batch_size=ROWS,
        **settings,
    )
    if prepare is patch_trainer:
        patch_trainer(made)
    run(made)
    fused = prepare in (apply_patch, patch_trainer)
    assert patch_report(made.model).last_loss == ("fused" if fused else "")
    if "use_cpu" not in settings:
        return {key: weight.clone() for key, weight in weights_of(made).items()}
    assert all(hasattr(weight, "placements") for weight in made.model_wrapped.parameters())
    return made.accelerator.get_state_dict(made.model_wrapped)


def main(folder: str, *in_ddp: str) -> None:
    """All trainers in DDP, and SFT in FSDP2 too.

    TRL's own head, in DDP, is the measure: under FSDP2 it reads a weight past its engine.
    """
    kept: dict[str, tuple[Weights, Weights]] = {}
    for name in in_ddp:
        trained = functools.partial(whole_weights, name, Path(folder))
        kept[name] = trained(lambda model: model), trained(nn.Module.double)
        for prepare in (apply_patch, patch_trainer):
            assert_gradients_close(trained(prepare), *kept[name])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    pretend_gpus()
    for prepare in (apply_patch, patch_trainer):
        with engine("fsdp2", 1, ROWS) as settings:
            found = whole_weights("sft", Path(folder), prepare, **settings)
        if dist.get_rank() == 0:
            names = kept["sft"][0].keys()
            assert_gradients_close({key: found[key] for key in names}, *kept["sft"])
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
