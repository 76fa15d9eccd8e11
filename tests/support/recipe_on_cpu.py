"""The recipe, told of GPUs that are none: run by test_recipe_launches.py, launched."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate_on_cpu import pretend_gpus
from data_parallel import ENGINES
from whole_sequence_attention import head_and_tail, split_attention

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import finetune

if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_gpus()
    torch.cuda.device_count = lambda: 2
    zero = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    ENGINES["deepspeed" if zero else "ddp"].start()
    if os.environ.get("PARALLELISM_CONFIG_CP_SIZE") == "2":
        split_attention(head_and_tail(32))
    sys.exit(finetune.main(sys.argv[1:]))
