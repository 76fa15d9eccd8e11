"""Compiles Hopper's Gluon kernels for such a card on a machine without one; prints what it takes.

One line a variant: its name, bytes of shared memory, bytes of stack a thread.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from hf_fused_head.kernels import head, last_product, pingpong
from hf_fused_head.kernels.operands import Head, RowGradient, RowSums
from hf_fused_head.kernels.tuning import PINGPONG

TOKENS, HIDDEN, VOCAB, RANK = 256, 128, 512, 16
OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiling:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._compile, grid=grid)

    def _compile(self, *args: Any, **options: Any) -> None:
        self.compiled = self.kernel.warmup(*args, **options)


def stack_bytes(binary: bytes) -> int:
    """What a thread spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        usage = subprocess.check_output([OBJDUMP, "-res-usage", file.name], text=True)
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: target,
        )
    )
    kernel = Compiling(pingpong._head_pingpong_kernel)
    pingpong._head_pingpong_kernel = kernel

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16)

    hidden, weight, store = matrix(TOKENS, HIDDEN), matrix(VOCAB, HIDDEN), matrix(TOKENS, VOCAB)
    row, labels = torch.empty(TOKENS), torch.empty(TOKENS, dtype=torch.int64)
    sums = torch.empty(VOCAB // PINGPONG.block_v, TOKENS)
    plain = Head(hidden, weight, None, None, None, None, 1.0, None)
    low = (
        matrix(TOKENS, RANK),
        matrix(VOCAB, RANK),
        weight[:, 0].contiguous(),
        row.new_empty(VOCAB),
    )
    everything = Head(hidden, weight, *low, 2.0, 30.0)
    config = PINGPONG._replace(num_programs=132)
    skip = torch.empty(1, dtype=torch.int32)
    for name, of, parts in (
        ("stored", plain, RowSums(sums, None, None, None, None)),
        ("statistics", plain, RowSums(sums, sums, None, sums, row)),
        ("everything", everything, RowSums(sums, sums, sums, sums, row)),
        ("gradient", everything, RowGradient(row, row, row, row, row, row)),
    ):
        if isinstance(parts, RowSums):
            head.launch_exponents(of, labels, 0, row, parts, store, config, False, skip)
        else:
            head.launch_gradient(of, labels, 0, parts, store, config, False)
        compiled = kernel.compiled
        print(name, compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]))
    kernel = Compiling(last_product._last_product_kernel)
    last_product._last_product_kernel = kernel
    total = torch.empty(VOCAB, HIDDEN)
    last_product.launch_last_product(store, hidden, total, weight, config)
    compiled = kernel.compiled
    print("last_product", compiled.metadata.shared, stack_bytes(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
