"""`hf-fused-head doctor`: versions, devices, a self-check, what `auto` chooses."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict
from typing import Annotated

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import DeviceOption, ForceOption, JsonOption


def doctor(
    device: DeviceOption = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Ignore kernels that Triton compiled before.")
    ] = False,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Check this machine: versions, every implementation against float64, what auto chooses."""
    common.refuse_overwriting(json_file, force=force)
    with tempfile.TemporaryDirectory() as empty:
        if cold:
            # Read when triton is imported, which nothing has done yet.
            os.environ["TRITON_CACHE_DIR"] = empty
        from hf_fused_head.benchmark import environment, self_check

        target = common.device_named(device)
        content = {
            "versions": environment.versions(),
            "devices": [environment.describe(found) for found in environment.devices()],
            "checked_device": str(target),
            "cold": cold,
            "auto": [asdict(choice) for choice in self_check.auto_choices(target)],
            "checks": [asdict(check) for check in self_check.self_checks(target)],
        }
    for line in self_check.lines(content):
        common.say(line)
    for table in self_check.tables(content):
        common.console().print(table)
    common.write_json(json_file, content)
    if any(check["status"] == "failed" for check in content["checks"]):
        raise typer.Exit(common.fail("a self-check failed", 1))
