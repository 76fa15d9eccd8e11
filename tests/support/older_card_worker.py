"""Run by test_cards.py on a GPU: the engine with kernels compiled for an older card.

A card runs the PTX of any older one. So Triton is told that the older one is here, and the driver
is given the PTX in place of the binary that only the older card could run.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from head_cases import CASES, check_backward, check_forward_backward, fixed_schedule, operands_of
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver

from hf_fused_head.engines.triton_engine import engine

SIZES = (300, 200, 1300)
SCHEDULES = [
    fixed_schedule("gradient_in_forward", product_bytes=2**20),
    fixed_schedule("gradient_in_forward", chunk_tokens=256, product_bytes=2**20),
    fixed_schedule("recompute", vocab_window=512, product_bytes=2**20),
    fixed_schedule("hybrid", vocab_window=512, kept_share=0.6, product_bytes=2**20),
]
NAMES = ("plain", "everything", "overflow", "softcap_smooth")


def main(card: str) -> None:
    target = GPUTarget("cuda", int(card.removeprefix("sm_")), 32)
    active: Any = driver.active
    active.get_current_target = lambda: target
    loaded: set[str] = set()
    load = CompiledKernel._init_handles

    def load_ptx(kernel: Any) -> None:
        if kernel.module is None:
            ptx = kernel.asm["ptx"]
            if f".target {card}" not in ptx:
                raise AssertionError(f"{kernel.name} was compiled for another card")
            kernel.kernel = ptx.encode() + b"\0"
            loaded.add(kernel.name)
        load(kernel)

    CompiledKernel._init_handles = load_ptx  # type: ignore[method-assign]
    for name in NAMES:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            torch.manual_seed(0)
            operands, labels = operands_of(CASES[name], *SIZES, dtype, "cuda")
            for schedule in SCHEDULES:
                check_forward_backward(engine, CASES[name], operands, labels, schedule)
                check_backward(engine, CASES[name], operands, labels, schedule)
    labels = torch.randint(1301, (301,), device="cuda")
    launch = engine.speculate(labels, -100, 1301, lambda: None)
    if not torch.equal(launch.labels, labels):
        raise AssertionError("labels changed")
    factor = torch.full((1,), 2.0, device="cuda")
    if not torch.equal(
        engine.multiply_(torch.ones(9, device="cuda"), factor), 2 * factor.repeat(9)
    ):
        raise AssertionError("a product by a scalar is wrong")
    print(f"tile: {len(loaded)} kernels", *sorted(loaded))


if __name__ == "__main__":
    main(sys.argv[1])
