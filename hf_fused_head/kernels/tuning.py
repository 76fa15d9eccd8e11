"""Which tile a card and a dtype get: committed data, so that nobody's first step tunes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class TileConfig(NamedTuple):
    """How the head's product is tiled.

    Attributes:
        block_t: Rows of a tile.
        block_v: Columns of a tile; the row sums come one a row and tile.
        block_h: Depth of one step of the product.
        group_t: Row tiles that share a weight tile while it is in the L2 cache.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        num_programs: Programs of the persistent kernel, which loads through tensor descriptors;
            0 for the pointer kernel, one program a tile.
        halves: Whether the persistent kernel stores a tile in two halves, for less shared memory.
        flatten: Whether its loads run ahead across tiles.
        pingpong: Whether two groups of warps share two tiles that lie side by side (`pingpong`,
            and `last_product` where the head's gradient is rounded).
    """

    block_t: int
    block_v: int
    block_h: int
    group_t: int
    num_warps: int
    num_stages: int
    num_programs: int = 0
    halves: bool = False
    flatten: bool = False
    pingpong: bool = False


# Hopper, 16-bit operands. On an H100 the fastest of eight at hidden sizes 1024 and 4096, stored or
# not: 12.1 ms at 8192x4096x128256, where loads that stop between tiles take 13.0 ms, three stages
# 12.2, tiles of 256x128 13.4 and two programs of 128x128 a multiprocessor 16.7.
HOPPER = TileConfig(128, 256, 64, 16, 8, 4, halves=True, flatten=True)
# Hopper where Gluon is known: two tiles side by side for two groups of warps. In one run on an
# H100, 12.1 ms at 8192x4096x128256 with the exponents stored and 11.6 ms without, where cuBLAS took
# 11.8 ms for the bare product; 3.96, 3.72 and 3.76 ms at 8192x1024x151936. With an earlier kernel,
# four stages with one store buffer took up to 3 % longer, two buffers of a quarter tile 1 to 2 %,
# 8, 32 or 64 row tiles a group up to 7 %, labels looked for behind the first product up to 9 %,
# steps half as deep and twice as many up to 14 %, column tiles as groups up to 17 %; with this one,
# a second step of the next product before the last columns are finished up to 8 %.
# The number of warps is the pointer kernel's, which takes matrices that no descriptor can address.
PINGPONG = TileConfig(128, 128, 64, 16, 8, 3, pingpong=True)
# Triton versions whose Gluon, which promises nothing, compiles Hopper's kernels: from, and below.
GLUON = ((3, 6), (3, 10))
# Everything else with 16-bit operands: 64 KiB of shared memory fit every card since Ampere.
PORTABLE = TileConfig(128, 128, 32, 8, 8, 4)
PORTABLE_HIP = TileConfig(128, 128, 32, 8, 8, 2)
# float32 products run on the plain arithmetic units, where a larger tile only spills.
FLOAT32 = TileConfig(64, 64, 16, 8, 4, 2)
# The interpreter pays by the tile's element; small tiles make small tests have edges.
_INTERPRETER = TileConfig(16, 32, 16, 2, 4, 1)

# Rows and columns of a tile of the rare kernel for overflowed rows.
OVERFLOW_BLOCK = 64


def cdiv(size: int, step: int) -> int:
    """`size / step`, rounded up; triton's own is made for kernels and takes 13 us on the host."""
    return -(-size // step)


def power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(size - 1, 0).bit_length()


def low_rank_block(rank: int) -> int:
    """Block of the low-rank product: at least the tensor core's depth, at most 64."""
    return min(64, max(16, power_of_2(rank)))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def knows_gluon() -> bool:
    """Whether this Triton's Gluon is one that Hopper's kernels were written for."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return GLUON[0] <= version < GLUON[1]


def product_precision(allow_tf32: bool) -> str:
    """How `tl.dot` multiplies float32 operands.

    A single TF32 product missed the error budget of stock's in the tests on one H200; three of them
    keep more digits. Their time has not been measured. They are asked for on NVIDIA cards alone.
    """
    return "tf32x3" if allow_tf32 and torch.version.hip is None else "ieee"


def allows_tf32(device: torch.device) -> bool:
    """Whether float32 products on `device` may round their operands to TF32, as torch's own may.

    `fp32_precision` is what torch's products follow: the setting of the operator, else that of the
    backend, else the global one. The older `allow_tf32` and `set_float32_matmul_precision` write it
    too; reading those instead raises once both kinds were used.
    """
    return device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"


def tile_config(device: torch.device, dtype: torch.dtype) -> TileConfig:
    """The tile for operands of `dtype` on `device`."""
    if interpreted():
        return _INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    if torch.version.hip is not None:
        return PORTABLE_HIP
    properties = torch.cuda.get_device_properties(device)
    if properties.major == 9:
        tile = PINGPONG if knows_gluon() else HOPPER
        return tile._replace(num_programs=properties.multi_processor_count)
    return PORTABLE
