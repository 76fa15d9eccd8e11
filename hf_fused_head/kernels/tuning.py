"""The tile for a card and a dtype: committed data, so that no first step has to search for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class TileConfig(NamedTuple):
    """How the head's product is tiled.

    Attributes:
        block_t: Rows of a tile.
        block_v: Columns of a tile; every row of a tile has one row sum of each kind.
        block_h: Depth of one step of the product.
        group_t: Row tiles that share a weight tile while it is in the L2 cache.
        num_warps: Warps of a program.
        num_stages: Steps whose loads are in flight.
        num_programs: Programs of a persistent kernel, which loads through tensor descriptors; 0 for
            the pointer kernel, one program a tile.
        halves: Whether the descriptor kernel stores a tile in two halves, for less shared memory.
        flatten: Whether its loads of the next tile start before the tile is finished.
        cooperative: Whether two consumer warp groups share two of these tiles that lie side by side
            (`cooperative`, and `last_product` where the head's gradient is rounded).
        product_rows: Rows of the vendor library's product, at most, where the kernel has none of
            its own (`logits_tile`); 0 where it has. The fields of a product are then not used.
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
    cooperative: bool = False
    product_rows: int = 0


# Hopper, 16-bit operands. On an H100 the fastest of eight at hidden sizes 1024 and 4096, stored or
# not: 12.1 ms at 8192x4096x128256; without `flatten` 13.0 ms, with three stages 12.2, with tiles of
# 256x128 13.4 and with two programs of 128x128 on every multiprocessor 16.7.
HOPPER = TileConfig(128, 256, 64, 16, 8, 4, halves=True, flatten=True)
# Hopper with a supported Gluon: two tiles side by side for two consumer warp groups. In one run on
# an H100, 12.1 ms at 8192x4096x128256 with the exponents stored and 11.6 ms without, where cuBLAS
# took 11.8 ms for the bare product; 3.96, 3.72 and 3.76 ms at 8192x1024x151936. With an earlier
# version of the kernel, four stages with one store buffer took up to 3 % longer, two buffers of a
# quarter tile 1 to 2 %, 8, 32 or 64 row tiles a group up to 7 %, labels looked up after the first
# product up to 9 %, steps half as deep and twice as many up to 14 %, column tiles as groups up to
# 17 %; with this one, a second step of the next product before the last columns are finished up to
# 8 %. `num_warps` is the pointer kernel's, for matrices that no descriptor can address.
COOPERATIVE = TileConfig(128, 128, 64, 16, 8, 3, cooperative=True)
# Triton versions whose Gluon, an unstable interface, compiles the Hopper kernels: from, and below.
GLUON = ((3, 6), (3, 10))
# Any other card, 16-bit operands, where the kernel is asked for by name: every card since Ampere
# has the 64 KiB of shared memory.
PORTABLE = TileConfig(128, 128, 32, 8, 8, 4)
PORTABLE_HIP = TileConfig(128, 128, 32, 8, 8, 2)
# float32 products run on the plain arithmetic units, where a larger tile spills registers.
FLOAT32 = TileConfig(64, 64, 16, 8, 4, 2)
# Any card, the product by the vendor's library. On one H200 the fastest of nine blocks at hidden
# sizes 1024 and 4096 in one run, by up to 5 %, and equal to the next sizes within the noise in
# another; products of 2048 rows took as long, of 8192 up to 11 % longer.
LIBRARY = TileConfig(1, 2048, 0, 0, 4, 1, product_rows=4096)
# The interpreter's time grows with a tile's elements, and small tiles give small tests edges.
_INTERPRETER = TileConfig(16, 32, 16, 2, 4, 1)
_INTERPRETER_LIBRARY = TileConfig(16, 32, 0, 0, 4, 1, product_rows=32)

# Rows and columns of a tile of the kernel for overflowed rows, which seldom runs.
OVERFLOW_BLOCK = 64


def cdiv(size: int, step: int) -> int:
    """`size / step`, rounded up; `triton.cdiv` is made for kernels and takes 13 us on the host."""
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


def supports_gluon() -> bool:
    """Whether the Hopper kernels are tested with the Gluon of the installed Triton."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return GLUON[0] <= version < GLUON[1]


def tile_config(device: torch.device, dtype: torch.dtype, by_library: bool) -> TileConfig:
    """The tile for operands of `dtype` on `device`.

    Args:
        device: Where the kernels run.
        dtype: Of the operands.
        by_library: Whether the vendor's library makes the product.
    """
    if by_library:
        return _INTERPRETER_LIBRARY if interpreted() else LIBRARY
    if interpreted():
        return _INTERPRETER
    if dtype == torch.float32:
        return FLOAT32
    if torch.version.hip is not None:
        return PORTABLE_HIP
    properties = torch.cuda.get_device_properties(device)
    if properties.major == 9:
        tile = COOPERATIVE if supports_gluon() else HOPPER
        return tile._replace(num_programs=properties.multi_processor_count)
    return PORTABLE
