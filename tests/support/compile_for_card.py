"""Compiles kernels for a card on a machine without one; prints what each takes.

One line for each variant: its name, bytes of shared memory, bytes that a thread spills. The first
argument says which kernels: "gluon" and "triton" for those of a Hopper card, "any" for those that
run on the card that the second argument names, for example "sm_80" or "gfx942".
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from hf_fused_head.kernels import head, logits_tile, overflow, rows, statistics, tuning
from hf_fused_head.kernels.operands import Head, RowFactors, RowOutputs, RowSums
from hf_fused_head.kernels.tuning import TileConfig
from hf_fused_head.objective import RowWeights

TOKENS, HIDDEN, VOCAB, RANK = 256, 128, 512, 16
OBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Compiling:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, module: ModuleType, name: str) -> None:
        self.kernel = getattr(module, name)
        self.compiled: Any = None
        setattr(module, name, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self._compile, grid=grid)

    def _compile(self, *args: Any, **options: Any) -> None:
        self.compiled = self.kernel.warmup(*args, **options)


def spilled_bytes(compiled: Any) -> int:
    """What a thread keeps in memory for want of registers."""
    if "amdgcn" in compiled.asm:
        return int(re.findall(r"\.private_segment_fixed_size: (\d+)", compiled.asm["amdgcn"])[-1])
    binary = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        usage = subprocess.check_output([OBJDUMP, "-res-usage", file.name], text=True)
    return int(re.findall(r"STACK:(\d+)", usage)[-1])


def dtype_for(card: str) -> torch.dtype:
    """The 16-bit dtype of training on a card; Turing has no bfloat16."""
    return torch.float16 if card == "sm_75" else torch.bfloat16


CARD = (sys.argv[2:] or ["sm_90"])[0]
DTYPE = dtype_for(CARD)


def matrix(num_rows: int, num_columns: int) -> Tensor:
    return torch.empty(num_rows, num_columns, dtype=DTYPE)


HIDDEN_STATES, WEIGHT, STORE = matrix(TOKENS, HIDDEN), matrix(VOCAB, HIDDEN), matrix(TOKENS, VOCAB)
ROW, LABELS = torch.empty(TOKENS), torch.empty(TOKENS, dtype=torch.int64)
SUMS = torch.empty(VOCAB, TOKENS)
SKIP = torch.empty(1, dtype=torch.int32)
PLAIN = Head(HIDDEN_STATES, WEIGHT, None, None, None, None, 1.0, None)
EVERYTHING = Head(
    HIDDEN_STATES,
    WEIGHT,
    matrix(TOKENS, RANK),
    matrix(VOCAB, RANK),
    WEIGHT[:, 0].contiguous(),
    torch.empty(VOCAB),
    2.0,
    30.0,
    ROW,
)
ALL_SUMS = RowSums(SUMS, SUMS, SUMS, SUMS, SUMS, ROW)
ALL_FACTORS = RowFactors(ROW, ROW, ROW, ROW, ROW, ROW)


def head_kernels(kernel: Compiling, config: TileConfig) -> Iterator[tuple[str, Any]]:
    """The variants of a kernel around the head's product; other sizes must not add one."""
    kinds = (("stored", PLAIN, RowSums(SUMS, None, None, None, None, None)),)
    kinds += (("statistics", PLAIN, RowSums(SUMS, SUMS, None, SUMS, None, ROW)),)
    kinds += (("everything", EVERYTHING, ALL_SUMS),)
    for name, of, sums in kinds:
        head.launch_exponents(of, LABELS, 0, ROW, sums, STORE, config, SKIP)
        yield name, kernel.compiled
        part, window = of.rows(slice(0, 31)).window(slice(0, 383)), STORE[:31, :383]
        first, kernel.compiled = kernel.compiled, None
        head.launch_exponents(part, LABELS, 1, ROW, sums, window, config, SKIP)
        if kernel.compiled.hash != first.hash:
            raise RuntimeError(f"{name}: other sizes compile another kernel")
    head.launch_gradient(EVERYTHING, LABELS, 0, ALL_FACTORS, STORE, config)
    yield "gradient", kernel.compiled


def row_kernels() -> Iterator[tuple[str, Any]]:
    """The kernels that start from rows, without and with every option."""
    anchor = Compiling(rows, "_anchor_kernel")
    finish = Compiling(statistics, "_finish_kernel")
    again = Compiling(overflow, "_overflow_kernel")
    marks = torch.empty(TOKENS, dtype=torch.int32)
    correct = torch.empty(TOKENS, dtype=torch.bool)
    few = RowOutputs(ROW, ROW, None, None, None, None, None, None, marks)
    every = RowOutputs(ROW, ROW, ROW, ROW, correct, ROW, ROW, ROW, marks)
    weights = RowWeights(ROW, ROW, ROW)
    for name, of, outputs, rest in (
        ("loss", PLAIN, few, (None, None, few, None)),
        ("everything", EVERYTHING, every, (ROW, weights, every, STORE)),
    ):
        slope = None if of.softcap is None else ROW
        sums = ALL_SUMS if outputs is every else RowSums(SUMS, None, None, None, None, None)
        rows.launch_anchor(of, LABELS, ROW, slope, SKIP)
        yield f"anchor_{name}", anchor.compiled
        statistics.launch_finish(of, LABELS, ROW, ROW, slope, sums, VOCAB, *rest, 128)
        yield f"finish_{name}", finish.compiled
        overflow.launch_overflow(of, LABELS, ROW, slope, *rest)
        yield f"overflow_{name}", again.compiled


def gluon_kernels() -> Iterator[tuple[str, Any]]:
    """The cooperative kernels."""
    from hf_fused_head.kernels import cooperative, last_product

    config = tuning.COOPERATIVE._replace(num_programs=132)
    yield from head_kernels(Compiling(cooperative, "_head_cooperative_kernel"), config)
    kernel = Compiling(last_product, "_last_product_kernel")
    total = torch.empty(VOCAB, HIDDEN)
    last_product.launch_last_product(STORE, HIDDEN_STATES, total, WEIGHT, config)
    yield "last_product", kernel.compiled


def triton_kernels() -> Iterator[tuple[str, Any]]:
    """The others, which every supported Triton compiles."""
    config = tuning.HOPPER._replace(num_programs=132)
    for name, compiled in head_kernels(Compiling(head, "_head_descriptor_kernel"), config):
        yield f"descriptor_{name}", compiled
    for name, compiled in head_kernels(Compiling(head, "_head_pointer_kernel"), tuning.PORTABLE):
        yield f"pointer_{name}", compiled
    yield from row_kernels()


def any_kernels() -> Iterator[tuple[str, Any]]:
    """What runs on a card without kernels of its own."""
    tile, config = Compiling(logits_tile, "_logits_tile_kernel"), tuning.LIBRARY
    product = torch.empty(TOKENS, VOCAB)
    few = RowSums(SUMS, None, None, None, None, None)
    nothing = head.NO_GRADIENT
    exact = PLAIN._replace(hidden=HIDDEN_STATES.float(), weight=WEIGHT.float())
    for name, of, sums, factors, store in (
        ("loss", PLAIN, few, nothing, None),
        ("stored", PLAIN, few, nothing, STORE),
        ("float32", exact, few, nothing, STORE.float()),
        ("everything", EVERYTHING, ALL_SUMS, nothing, STORE),
        ("gradient", EVERYTHING, head.NO_SUMS, ALL_FACTORS, STORE),
    ):
        anchor = ROW if factors is nothing else None
        rest = (anchor, sums, factors)
        logits_tile.TilePass(of, LABELS, 0, *rest, store, config, SKIP).launch(product, 0, 0)
        yield f"tile_{name}", tile.compiled
        first, tile.compiled = tile.compiled, None
        part, window = of.rows(slice(0, 31)).window(slice(0, 383)), None
        if store is not None:
            window = store[:31, :383]
        tiles = logits_tile.TilePass(part, LABELS, 1, *rest, window, config, SKIP)
        tiles.launch(product[:15, :127], 16, 256)
        if tile.compiled.hash != first.hash:
            raise RuntimeError(f"{name}: other sizes compile another kernel")
    yield from row_kernels()
    for name, launch in (
        ("count", lambda: rows.launch_count(LABELS, -100, VOCAB)),
        ("scale_rows", lambda: rows.launch_scale_rows(HIDDEN_STATES, HIDDEN_STATES, ROW)),
        ("multiply", lambda: rows.launch_multiply(HIDDEN_STATES, ROW)),
    ):
        kernel = Compiling(rows, f"_{name}_kernel")
        launch()
        yield name, kernel.compiled


def target_of(card: str) -> GPUTarget:
    """What Triton compiles for; AMD's compute cards run 64 threads together, their others 32."""
    if card.startswith("sm_"):
        return GPUTarget("cuda", int(card.removeprefix("sm_")), 32)
    return GPUTarget("hip", card, 64 if card.startswith("gfx9") else 32)


def main() -> None:
    target = target_of(CARD)
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_current_target=lambda: target,
        )
    )
    kernels = {"gluon": gluon_kernels, "triton": triton_kernels, "any": any_kernels}[sys.argv[1]]
    for name, compiled in kernels():
        print(name, compiled.metadata.shared, spilled_bytes(compiled))


if __name__ == "__main__":
    main()
