"""One forward with values per token: log-probabilities of the labels, entropies, ..., for TRL.

The stock forward runs with the labels, as for a loss. The head computes the values in the place of
logits, and what has a gradient travels to the loss function in one tensor, as the loss would.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_fused_head.log_probs import TokenLogProbs
from hf_fused_head.options import LossOptions

from .errors import UnsupportedModelError
from .fused_forward import FusedForward
from .heads import HeadResult
from .logits_proxy import LogitsProxy
from .registry import Facts
from .running import LossArguments
from .settings import Settings, TokenSettings
from .state import PatchState
from .trl import TokenRequest

_DIFFERENTIABLE = ("log_probs", "entropy")


class TokenForward(FusedForward):
    """A forward whose caller asked for values per token.

    Args:
        request: What is asked for.
        model: The patched model.
        state: Its state.
        head: As for `FusedForward`; `loss_function`, `facts`, `replica` and `layer` too.
    """

    def __init__(
        self,
        request: TokenRequest,
        model: Any,
        state: PatchState,
        head: nn.Module,
        loss_function: Any,
        facts: Facts,
        replica: bool,
        layer: str,
    ) -> None:
        arguments = LossArguments(request.labels)
        super().__init__(state, head, arguments, loss_function, facts, replica, layer)
        self.request = request
        self.model = model
        self.target: Tensor | None = None
        self.values: dict[str, Tensor | None] = {}
        self.packed: Tensor | None = None  # [2, batch, tokens], log-probabilities and entropies

    def compute_loss(
        self, kind: str, stock_forward: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The head's output: a proxy of the logits that carries the values with a gradient."""
        if not self.request.head.cast_to_float32:
            return super().compute_loss(kind, stock_forward, args, kwargs)
        args = tuple(x.float() if isinstance(x, Tensor) else x for x in args)
        with torch.autocast(args[0].device.type, enabled=False):
            return super().compute_loss(kind, stock_forward, args, kwargs)

    def _target(self, hidden: Tensor) -> Tensor:
        self.target = super()._target(hidden)
        return self.target

    def _shifted_labels(self) -> Tensor:
        return self.request.target()

    def _settings(self) -> Settings:
        options = self.state.options
        for name in ("label_smoothing", "z_loss"):
            if getattr(options, name):
                raise UnsupportedModelError(
                    f"`{name}` must be 0 where TRL makes the loss from log-probabilities, got "
                    f"{getattr(options, name)!r}: leave it out of apply_patch"
                )
        loss_options = LossOptions(
            logit_scale=self.facts.logit_scale,
            softcap=self.facts.softcap,
        )
        outputs = tuple({"log_probs": None, **dict.fromkeys(self.request.head.outputs)})
        return TokenSettings(
            loss_options,
            self.request.head.temperature,
            outputs,
            options.impl,
            options.memory_budget_mib,
            self.facts.logit_bias,
            in_float32=self.request.head.cast_to_float32,
        )

    def _differentiable(self, result: HeadResult) -> Tensor:
        values = cast(TokenLogProbs, result.values)._asdict()
        self.values = values
        packed = [values[name] for name in _DIFFERENTIABLE if values[name] is not None]
        return torch.stack(packed)

    def _finished(self, logits: LogitsProxy) -> Tensor:
        self.packed = self._from_head(logits)
        # The model adds its auxiliary loss to this, which nobody reads.
        return self.packed.sum() * 0.0

    def _settled(self, output: Any) -> Any:
        """TRL's output in the place of the stock one."""
        if self.packed is None:
            raise UnsupportedModelError(
                "the model's forward must give its labels to the loss of transformers under their "
                "own name, got other ones: leave this model stock (remove_patch)"
            )
        found = iter(self.packed)
        values = {
            name: next(found) if value is not None and name in _DIFFERENTIABLE else value
            for name, value in self.values.items()
        }
        aux_loss = output.get("aux_loss") if isinstance(output, dict) else None
        if aux_loss is None and self.request.needs_aux_loss:
            raise UnsupportedModelError(
                "the model's forward must return `aux_loss` with output_router_logits=True, got "
                f"{type(output).__name__} without: leave this model stock (remove_patch)"
            )
        config = self.model.config.get_text_config()
        coef = getattr(config, "router_aux_loss_coef", 0.0)
        return self.request.output(values, cast(Tensor, self.target), aux_loss, coef)
