"""What was measured on a card, as data; a card that was not measured takes its type's record.

Times are given as tokens or columns of one pass (a product of all tokens with the whole head), so
that a number from one card is of use on another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

MIB = 2**20

# Compute capabilities for which Triton compiles and, with bfloat16, whose arithmetic has it.
OLDEST_CAPABILITY = {torch.float16: (7, 5), torch.bfloat16: (8, 0), torch.float32: (7, 5)}


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
        epilogue_dtypes: Of the operands for which the Triton engine takes its kernel with the loss
            in the epilogue of its product, since that was measured to be faster than the vendor's
            library with the loss in a pass behind it (in bfloat16, whose kernel float16 shares).
        verified: Whether the tests of the Triton engine have passed on such a card; on any other
            its first call checks itself.
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
    epilogue_dtypes: tuple[torch.dtype, ...] = ()
    verified: bool = False


# Two Zen 3 cores, 2048x576x49152 float32. Blocks that fit a cache gain nothing here, and on a busy
# machine every block is one more barrier: 8 MiB took 2.2 times as long as 200 MiB then, 24 MiB 1.3
# times as long.
# Triton's interpreter, which runs here for tests, takes the kernels that a test does not name.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU = Card(
    "cpu",
    "cpu",
    restart_tokens=50,
    block_bytes=48 * MIB,
    converts=True,
    epilogue_dtypes=_FLOATS,
)

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
    epilogue_dtypes=(torch.bfloat16, torch.float16),
    verified=True,
)

_UNKNOWN_GPU = replace(
    HOPPER, name="unknown GPU", capability=(0, 0), epilogue_dtypes=(), verified=False
)
_BY_TYPE = {"cpu": CPU, "cuda": _UNKNOWN_GPU}
_BY_CAPABILITY = {(9, 0): HOPPER}
# Cards that a plan can be asked for where they are not: compute capability and multiprocessors, as
# their vendors state them; AMD's have no capability of this kind.
_NAMED = {
    "NVIDIA T4": ((7, 5), 40),
    "NVIDIA A100": ((8, 0), 108),
    "NVIDIA A10": ((8, 6), 72),
    "NVIDIA GeForce RTX 3090": ((8, 6), 82),
    "NVIDIA L4": ((8, 9), 58),
    "NVIDIA L40S": ((8, 9), 142),
    "NVIDIA GeForce RTX 4090": ((8, 9), 128),
    "NVIDIA H100": ((9, 0), 132),
    "NVIDIA H200": ((9, 0), 132),
    "NVIDIA B200": ((10, 0), 148),
    "NVIDIA GeForce RTX 5090": ((12, 0), 170),
    "AMD Instinct MI250X": ((0, 0), 110),
    "AMD Instinct MI300X": ((0, 0), 304),
    "AMD Radeon RX 7900 XTX": ((0, 0), 96),
}


def too_old(card: Card, dtype: torch.dtype) -> str | None:
    """Why no kernel of the Triton engine runs on a card; None if they do.

    Args:
        card: A GPU; one without a compute capability counts as new.
        dtype: Of the operands, one of `OLDEST_CAPABILITY`.
    """
    if card.capability == (0, 0) or card.capability >= OLDEST_CAPABILITY[dtype]:
        return None
    needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY[dtype], card.capability))
    return f"with {dtype} they need compute capability {needed} or newer, {card.name} has {found}"


def card_of_type(device_type: str) -> Card:
    """The record for a type of device of which nothing more is known.

    Args:
        device_type: "cpu", "cuda", ...
    """
    return _BY_TYPE.get(device_type) or replace(_BY_TYPE["cuda"], device_type=device_type)


def card_named(name: str) -> Card:
    """The record of a card that need not be here.

    Args:
        name: One of those known, in any case, with or without the vendor.

    Raises:
        ValueError: If no such card is known.
    """
    found = [known for known in _NAMED if known.lower().endswith(name.lower())]
    if len(found) != 1:
        raise ValueError(
            f"`--card` must be one of {', '.join(_NAMED)}, got {name!r}: "
            "a plan for --device cuda is for a card of which nothing is known"
        )
    capability, multiprocessors = _NAMED[found[0]]
    return _with_properties(found[0], capability, multiprocessors)


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
    return _with_properties(properties.name, capability, properties.multi_processor_count)


def _with_properties(name: str, capability: tuple[int, int], multiprocessors: int) -> Card:
    card = _BY_CAPABILITY.get(capability, _UNKNOWN_GPU)
    return replace(card, name=name, capability=capability, multiprocessors=multiprocessors)
