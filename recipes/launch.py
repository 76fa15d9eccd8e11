"""What `accelerate launch` or `torchrun` has started, and whether that can work.

Both tell the processes through environment variables. Everything that would fail after the model is
loaded, in the middle of a library, is looked for here before it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sources import UserError
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and how the work is cut over them.

    Attributes:
        processes: How many there are.
        local_processes: How many of them are on this machine.
        rank: The number of this one.
        engine: "fsdp", "deepspeed", or "" for whole weights on every process.
        sizes: Of the named ways to cut: dp_replicate, dp_shard, tp, cp, sp; empty if none is asked.
        bf16: Products run in bfloat16; DeepSpeed wants to hear it from the Trainer as well.
    """

    processes: int
    local_processes: int
    rank: int
    engine: str
    sizes: Mapping[str, int]
    bf16: bool

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Launch:
        """What the launcher's variables say; one process where there was none."""

        def number(name: str) -> int:
            return int(environment.get(name, "1"))

        def is_on(name: str) -> bool:
            return environment.get(name, "false").lower() == "true"

        engines = [
            name for name in ("fsdp", "deepspeed") if is_on(f"ACCELERATE_USE_{name.upper()}")
        ]
        ways = ("dp_replicate", "dp_shard", "tp", "cp", "sp")
        asked = is_on("ACCELERATE_USE_PARALLELISM_CONFIG")
        return cls(
            number("WORLD_SIZE"),
            number("LOCAL_WORLD_SIZE"),
            int(environment.get("RANK", "0")),
            engines[0] if engines else "",
            {way: number(f"PARALLELISM_CONFIG_{way.upper()}_SIZE") for way in ways if asked},
            environment.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        )

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def size(self, way: str) -> int:
        """Over how many processes something is cut this way."""
        return self.sizes.get(way, 1)

    def check(self, seq_len: int, compare: bool, full: bool) -> None:
        """Whether machine, processes and options fit together.

        Raises:
            UserError: If they do not; the text says what to change.
        """
        self._check_machine()
        self._check_sizes(seq_len)
        if compare and self.processes > 1:
            raise UserError(
                f"--compare measures one process, got {self.processes}: leave it out, or run "
                "without a launcher"
            )
        if self.size("tp") > 1 and not full:
            raise UserError("tensor parallelism cuts every weight and LoRA adds whole ones: --full")

    def _check_machine(self) -> None:
        devices = torch.cuda.device_count()
        cut = self.engine or next((w for w in ("tp", "cp", "sp") if self.size(w) > 1), "")
        if cut and devices == 0:
            raise UserError(
                f"{cut} needs CUDA devices in accelerate, this machine has none: take "
                "recipes/accelerate/ddp.yaml, which runs on CPUs too"
            )
        if 0 < devices < self.local_processes:
            raise UserError(
                f"{self.local_processes} processes on this machine need as many CUDA devices, it "
                f"has {devices}: --num_processes {devices}"
            )
        if self.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
            raise UserError("ZeRO needs deepspeed, which is not installed: pip install deepspeed")

    def _check_sizes(self, seq_len: int) -> None:
        product = 1
        for size in self.sizes.values():
            product *= size
        if self.sizes and product != self.processes:
            spelled = " x ".join(f"{way} {size}" for way, size in self.sizes.items() if size > 1)
            raise UserError(
                f"{self.processes} processes cannot be cut into {spelled or 'one'}: "
                f"--num_processes {product}, or other sizes in parallelism_config"
            )
        # The ring cuts a sequence into two pieces for each process, from both ends inwards.
        for way, pieces in (("cp", 2 * self.size("cp")), ("sp", self.size("sp"))):
            if self.size(way) > 1 and seq_len % pieces:
                raise UserError(
                    f"--seq-len {seq_len} cannot be cut into {pieces} equal pieces for {way} "
                    f"{self.size(way)}: --seq-len {-(-seq_len // pieces) * pieces}"
                )

    def check_model(self, name: str, config: PretrainedConfig | None) -> None:
        """Whether a model can be cut as wanted.

        Args:
            name: As the user gave it.
            config: None for a model that is not loaded from a folder or hub.

        Raises:
            UserError: If it cannot.
        """
        tp = self.size("tp")
        if tp == 1:
            return
        if config is None:
            raise UserError(
                f"--model {name} is made in memory, tensor parallelism reads its share of each "
                "weight from a file: name a folder or a model of the hub"
            )
        text = config.get_text_config()
        for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            value = getattr(text, field, None)
            if isinstance(value, int) and value % tp:
                raise UserError(
                    f"--model {name}: its {field}, {value}, cannot be cut into tp {tp} equal "
                    "parts: choose a parallelism_config_tp_size that divides it"
                )
