"""FSDP, context and tensor parallelism and DeepSpeed of accelerate where there is no GPU.

accelerate lets them run on GPUs alone, though torch and DeepSpeed themselves have no such need.
Here it is told of GPUs that are CPU processes over gloo; what it does to models is its own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import ParallelismConfig, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedSequenceParallelConfig, DistributedType

_FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


def pretend_gpus() -> None:
    """From now on CPU processes count as GPUs."""

    def set_device(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda self, *args: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device


@contextlib.contextmanager
def engine(name: str, micro_batches: int, batch_size: int) -> Iterator[dict[str, Any]]:
    """Settings for `TrainingArguments`; the environment is as a launcher would set it.

    Args:
        name: "fsdp2", "cp", "zero2", "zero3", "ulysses"; or "tp" and "fsdp2_at_load", whose models
            are cut already.
        micro_batches: A step, for DeepSpeed, which wants to know.
        batch_size: Rows of each.
    """
    plain = {"fsdp2": _FSDP2, "cp": _FSDP2, "tp": {}, "fsdp2_at_load": {}}
    environment = plain.get(name, _DEEPSPEED)
    os.environ.update(environment)
    settings: dict[str, Any] = {"use_cpu": False}
    if environment is _DEEPSPEED:
        settings["deepspeed"] = {
            "zero_optimization": {
                "stage": 3 if name == "zero3" else 2,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
                "overlap_comm": False,
            },
            "gradient_clipping": 0.0,
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": micro_batches,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    if name == "cp":
        settings["parallelism_config"] = ParallelismConfig(cp_size=2)
    if name == "ulysses":
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        )
        settings["parallelism_config"] = ParallelismConfig(
            sp_size=2, sp_backend="deepspeed", sp_handler=handler
        )
    yield settings
    for key in environment:
        os.environ.pop(key, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
