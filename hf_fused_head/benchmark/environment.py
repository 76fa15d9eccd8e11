"""Where a figure was measured: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from hf_fused_head.version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed version of each distribution, None where it is not installed; ours and Python's."""
    found: dict[str, str | None] = {
        "hf-fused-head": __version__,
        "python": platform.python_version(),
    }
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    # The distribution does not say which CUDA it was built for, the module does.
    found["torch"] = torch.__version__
    return found


def default_device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    return [
        torch.device("cpu"),
        *(torch.device("cuda", index) for index in range(torch.cuda.device_count())),
    ]


def device_named(name: str | None) -> torch.device:
    """The device that a caller means; None is the default one.

    Raises:
        ValueError: If there is no such device here.
    """
    if name is None:
        return default_device()
    here = devices()
    known = {str(device): device for device in here}
    if len(here) > 1:
        known["cuda"] = here[1]
    if name not in known:
        raise ValueError(f"`--device` must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def describe(device: torch.device) -> dict[str, object]:
    """Name and size of a device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": str(device),
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return {"device": str(device), "name": cpu_name(), "threads": torch.get_num_threads()}


def cpu_name() -> str:
    """The model of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this source tree, with `+changes` if files differ; None outside of one."""
    here = Path(__file__).resolve()
    # An installed copy may lie inside another repository.
    if _git(here, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("+changes" if _git(here, "status", "--porcelain", "-uno") else "")


def _git(file: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def header(device: torch.device, peers: tuple[str, ...], protocol: dict) -> dict[str, object]:
    """What stands above every table of results."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": describe(device),
        "cpu": cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "versions": versions((*PACKAGES, *peers)),
        "protocol": protocol,
    }
