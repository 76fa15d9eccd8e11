"""Settings of the whole suite: Triton on the CPU where there is no GPU, skips with a reason."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

# Read when triton is imported, so it must stand before anything that imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

BACKENDS = ["inductor", pytest.param("aot_eager", marks=pytest.mark.slow)]

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hf_fused_head.patches  # noqa: F401
except ImportError as error:
    raise pytest.UsageError(f"run pip install -e '.[test]' first: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the long sweeps unless `-m` is given; skips what the machine has no device for."""
    if not config.getoption("-m"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    devices = torch.cuda.device_count()
    for item in items:
        for marker, count in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and devices < count:
                reason = f"needs {count} CUDA device(s), this machine has {devices}"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """The precision that accelerate keeps for a process is not the next test's."""
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state()


@pytest.fixture(autouse=True)
def own_tf32() -> Iterator[None]:
    """A Trainer with `tf32` or `torch_compile` turns TF32 on for a process: not for other tests."""
    holders = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [holder.fp32_precision for holder in holders]
    yield
    for holder, precision in zip(holders, before, strict=True):
        if holder.fp32_precision != precision:
            holder.fp32_precision = precision


@pytest.fixture(autouse=True)
def own_compilers() -> Iterator[None]:
    """PEFT's BOFT leaves CXX=gcc where its extension does not build: no C++ of inductor's links."""
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whatever ran before it on the same worker."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code of another test, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A compiler; the default one, which alone rewrites the graph, in every run."""
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test computes; with `-m gpu` on a GPU."""
    return request.param
