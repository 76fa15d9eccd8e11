"""What was measured on a card, as data; a card that was not measured takes its type's record.

Times are given as tokens or columns of one pass (a product of all tokens with the whole head), so
that a number from one card is of use on another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """The constants of one kind of device.

    Attributes:
        name: As the driver spells it; the device type where nothing more is known.
        device_type: "cpu", "cuda", ...
        capability: Compute capability of an NVIDIA card; (0, 0) elsewhere.
        multiprocessors: Of a GPU; 0 where there are none.
        restart_tokens: What one more chunk or window costs, in tokens or columns of a pass.
        accumulate_tokens: What one more chunk costs beyond that where the head's gradient is
            summed in float32, in tokens of a pass: reading and writing the sum.
        block_bytes: Size of the blocks in which the torch engine works on a tile, so that what
            lies beside the tile is no second one.
        largest_chunk: Tokens of a chunk of the Triton engine, at most; None for any number.
        wave_tile: Rows and columns of a tile of the vendor's product; 0 where nothing is lost to
            an incomplete last wave.
        wave_loss: Share of the last wave's idleness that such a product takes longer.
        converts: Whether 16-bit operands are converted to float32 before a product.
        launch_bound_product: Multiplications of a product below which the device waits for the
            host to launch it.
    """

    name: str
    device_type: str
    capability: tuple[int, int] = (0, 0)
    multiprocessors: int = 0
    restart_tokens: int = 128
    accumulate_tokens: int = 0
    block_bytes: int = 128 * MIB
    largest_chunk: int | None = None
    wave_tile: int = 0
    wave_loss: float = 0.0
    converts: bool = False
    launch_bound_product: int = 0


# Two Zen 3 cores, 2048x576x49152 float32. Blocks that fit a cache gain nothing here, and on a busy
# machine every block is one more barrier: 8 MiB took 2.2 times as long as 200 MiB then, 24 MiB 1.3
# times as long.
CPU = Card("cpu", "cpu", restart_tokens=50, block_bytes=48 * MIB, converts=True)

# One H100, bfloat16. Restart: 8192x4096x128256. Accumulation: 590 tokens there, 970 at
# 16384x1024x151936. Chunks: 32768x4096x128256 in three of 11008 tokens took 150.1 ms, in four of
# 8192 147.3 (one H200: 154.3 and 150.8). Waves: products of 1024 to 16384 rows at hidden sizes 576
# to 4096, most within 5 % since cuBLAS has other tiles to choose from; it compares chunks and is
# too coarse to compare schedules. Launches: windows of 256 columns took 4.6 to 7.7 times the bare
# products at 8192x2304x256000 and 16384x1024x151936.
HOPPER = Card(
    "NVIDIA Hopper",
    "cuda",
    capability=(9, 0),
    multiprocessors=132,
    restart_tokens=128,
    accumulate_tokens=600,
    largest_chunk=8192,
    wave_tile=128,
    wave_loss=0.25,
    launch_bound_product=2**34,
)

_BY_TYPE = {"cpu": CPU, "cuda": replace(HOPPER, name="NVIDIA GPU", capability=(0, 0))}
_BY_CAPABILITY = {(9, 0): HOPPER}


def card_of_type(device_type: str) -> Card:
    """The record for a type of device of which nothing more is known.

    Args:
        device_type: "cpu", "cuda", ...
    """
    return _BY_TYPE.get(device_type) or replace(_BY_TYPE["cuda"], device_type=device_type)


@lru_cache(maxsize=64)
def card_of(device: torch.device) -> Card:
    """The record for a device that is here, with what its driver says of it.

    Args:
        device: Any device of torch.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return card_of_type(device.type)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor) if torch.version.hip is None else (0, 0)
    card = _BY_CAPABILITY.get(capability, card_of_type("cuda"))
    return replace(
        card,
        name=properties.name,
        capability=capability,
        multiprocessors=properties.multi_processor_count,
    )
