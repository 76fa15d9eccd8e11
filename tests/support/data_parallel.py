"""How each data parallel engine takes a model, and how its whole gradients and weights are read."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from places import settle
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)

LEARNING_RATE = 0.1
MICRO_BATCHES = 2
_WHOLE = StateDictOptions(full_state_dict=True)


class Engine:
    """A sharded model as all engines show it."""

    model: nn.Module

    @staticmethod
    def start() -> None:
        """Joins the processes."""
        torch.distributed.init_process_group(settle(int(os.environ["LOCAL_RANK"])))

    def run(self, **inputs: Any) -> Any:
        """A forward."""
        return self.model(**inputs)

    def backward(self, loss: Tensor) -> None:
        """The backward of a loss that the engine averages over the processes."""
        loss.backward()

    def accumulating(self) -> AbstractContextManager[Any]:
        """While it is open, backwards leave the sum over the processes for later."""
        return contextlib.nullcontext()

    def gradients(self) -> dict[str, Tensor | None]:
        """Of every parameter, whole, by its name in the stock model."""
        raise NotImplementedError

    def step(self) -> None:
        """Plain gradient descent."""
        descend(self.model)

    def save(self, folder: str) -> Any:
        """What `load` of another engine of the same kind takes; its weights are whole."""
        return get_model_state_dict(self.model, options=_WHOLE)

    def load(self, saved: Any) -> None:
        """Resumes from what `save` gave."""
        set_model_state_dict(self.model, saved, options=_WHOLE)


class Ddp(Engine):
    """Whole weights everywhere."""

    def __init__(self, model: nn.Module, head: str, half: bool) -> None:
        self.model = DistributedDataParallel(model)

    def accumulating(self) -> AbstractContextManager[Any]:
        return self.model.no_sync()

    def gradients(self) -> dict[str, Tensor | None]:
        return {name: p.grad for name, p in self.model.module.named_parameters()}


class Fsdp1(Engine):
    """Flat shards; `head` is "root", "own" or "parts", a unit for each layer of an adapter."""

    def __init__(self, model: nn.Module, head: str, half: bool) -> None:
        units = [*base_of(model).model.layers, *units_of_head(model, head)]
        self.model = FullyShardedDataParallel(
            model,
            auto_wrap_policy=CustomPolicy(lambda module: any(module is unit for unit in units)),
            use_orig_params=True,
            device_id=torch.get_default_device(),
        )

    def accumulating(self) -> AbstractContextManager[Any]:
        return self.model.no_sync()

    def gradients(self) -> dict[str, Tensor | None]:
        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            # Frozen weights that share a unit with trained ones get zeros.
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.grad.clone()
                if p.requires_grad
                else None
                for name, p in self.model.named_parameters()
            }


class Fsdp2(Engine):
    """Shards of every weight; `head` may also be "accelerate", which groups it with the norm."""

    def __init__(self, model: nn.Module, head: str, half: bool) -> None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None)
        if head == "accelerate":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                reshard_after_forward=True,
                mixed_precision_policy=policy,
                cpu_ram_efficient_loading=False,
            )
            # accelerate itself takes no FSDP on the CPU; this is the part of it that shards.
            accelerator: Any = SimpleNamespace(
                state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no"
            )
            self.model = fsdp2_prepare_model(accelerator, model)
            return
        for unit in (*base_of(model).model.layers, *units_of_head(model, head)):
            fully_shard(unit, mp_policy=policy, reshard_after_forward=True)
        self.model = fully_shard(model, mp_policy=policy)

    @contextlib.contextmanager
    def accumulating(self) -> Any:
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def gradients(self) -> dict[str, Tensor | None]:
        return {
            name: None if p.grad is None else p.grad.full_tensor()
            for name, p in self.model.named_parameters()
        }

    def load(self, saved: Any) -> None:
        # A forward leaves the weights of the last units whole, where nothing can be loaded.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        super().load(saved)


class DeepSpeed(Engine):
    """ZeRO; `head` is the stage, "zero2" or "zero3"."""

    @staticmethod
    def start() -> None:
        import deepspeed

        # A shared memory operator, compiled for minutes at its first use; gloo does without. The
        # attribute `deepspeed.comm.torch` is torch itself.
        backend: Any = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)

    def __init__(self, model: nn.Module, head: str, half: bool) -> None:
        import deepspeed

        trained = [p for p in model.parameters() if p.requires_grad]
        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(trained, lr=LEARNING_RATE),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": MICRO_BATCHES,
                # Weights of any size are partitioned.
                "zero_optimization": {
                    "stage": int(head[-1]),
                    "stage3_param_persistence_threshold": 0,
                    "overlap_comm": False,
                },
                "gradient_clipping": 0.0,
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
                "bf16": {"enabled": half},
            },
        )
        self._last = True

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed divides by the number of micro-batches.
        self.model.backward(loss * MICRO_BATCHES)
        if not self._last:
            self.model.step()

    @contextlib.contextmanager
    def accumulating(self) -> Any:
        self._last = False
        yield
        self._last = True

    def gradients(self) -> dict[str, Tensor | None]:
        from deepspeed.utils import safe_get_full_grad

        return {
            name: safe_get_full_grad(p).clone() if p.requires_grad else None
            for name, p in self.model.module.named_parameters()
        }

    def step(self) -> None:
        self.model.step()

    def save(self, folder: str) -> Any:
        self.model.save_checkpoint(folder)
        return folder

    def load(self, saved: Any) -> None:
        self.model.load_checkpoint(saved)


def descend(model: nn.Module) -> None:
    """A step down the gradients that the parameters hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None


def base_of(model: Any) -> Any:
    """The transformers model inside PEFT."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def units_of_head(model: nn.Module, head: str) -> list[nn.Module]:
    """The modules of the head that become units of their own."""
    module = base_of(model).get_output_embeddings()
    if head == "parts":
        return [module.base_layer, *module.lora_A.values(), *module.lora_B.values()]
    return [module] if head == "own" else []


ENGINES: dict[str, type[Any]] = {"ddp": Ddp, "fsdp1": Fsdp1, "fsdp2": Fsdp2, "deepspeed": DeepSpeed}
