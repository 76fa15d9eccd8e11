"""The loss as a module, for code that keeps its criterion in one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from hf_fused_head.functional import linear_cross_entropy
from hf_fused_head.options import Impl, LossOptions, Reduction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its options fixed; the head's matrix comes with every call.

    Takes the keywords of `linear_cross_entropy`; `weight`, [vocab], becomes a buffer that follows
    `.to()` and is saved with the module, as in `torch.nn.CrossEntropyLoss`. A copy of the module
    shares its `process_group`; a module that has one cannot be pickled.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        reduction: Reduction = "mean",
        ignore_index: int | None = -100,
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        impl: Impl = "auto",
        memory_budget_mib: float | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        values: Any = reduction, ignore_index, label_smoothing, logit_scale, softcap, z_loss
        self.options = LossOptions(*values)
        self.impl: Impl = impl
        self.memory_budget_mib = memory_budget_mib
        self._shared = None if process_group is None else _SharedGroup(process_group)
        self.register_buffer("weight", weight)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the head."""
        return None if self._shared is None else self._shared.group

    def forward(
        self,
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Tensor:
        """The loss; arguments as in `linear_cross_entropy`."""
        options = self.options
        return linear_cross_entropy(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=options.reduction,
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            logit_scale=options.logit_scale,
            softcap=options.softcap,
            z_loss=options.z_loss,
            num_items=num_items,
            impl=self.impl,
            memory_budget_mib=self.memory_budget_mib,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults."""
        default = LossOptions()
        changed = [
            f"{name}={value!r}"
            for name, value in vars(self.options).items()
            if value != getattr(default, name)
        ]
        return ", ".join(changed)


class _SharedGroup:
    """A process group inside a module: live connections of this process, not data to copy."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedGroup:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"`process_group` must be None in a LinearCrossEntropyLoss that is pickled, got "
            f"{self.group!r}: groups live in one process; save the state_dict and make the module "
            "anew with the group of the process that loads it"
        )
