"""One forward with labels: the head computes its loss, the loss function returns it, checked."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss, fixed_cross_entropy

from hf_fused_head.functional import LossStats
from hf_fused_head.options import LossOptions, item_count
from hf_fused_head.transforms import is_exporting

from . import wrappers
from .errors import LogitsUnavailableError, RowCountError, UnsupportedModelError
from .heads import HeadResult, run_head
from .lazy_logits import ReplicaLogits, UnavailableLogits, lazy_logits
from .logits_proxy import LogitsProxy, observed_facts, same_facts
from .loss_checks import WithValue, is_copy, same_values
from .origin import is_masked_loss
from .recompute_logits import RecomputedLogits
from .registry import Facts
from .running import LossArguments, LossForward, same
from .settings import LossSettings, Settings
from .state import FUSED, LastForward, PatchState

_UNKNOWN_KEYWORDS = frozenset(
    name
    for function in (ForCausalLMLoss, ForMaskedLMLoss, fixed_cross_entropy)
    # Anything else is a replacement, which is refused.
    if inspect.isfunction(function)
    for name, parameter in inspect.signature(function).parameters.items()
    if parameter.kind is not parameter.VAR_KEYWORD
) - {*LossArguments._fields, "logits", "vocab_size", "source", "target"}
"""What a later transformers may honour in its losses; every other keyword it takes and drops."""


class FusedForward(LossForward):
    """One forward with labels.

    Args:
        state: That of the patched model.
        head: The module that makes the logits in this forward.
        arguments: What the loss will be asked for.
        loss_function: The stock loss function of the model.
        facts: What the model is expected to do to its head's output.
        replica: The model is a replica of `DataParallel`.
        layer: Name of the layer that it was entered through.
    """

    def __init__(
        self,
        state: PatchState,
        head: nn.Module,
        arguments: LossArguments,
        loss_function: Callable[..., Any],
        facts: Facts,
        replica: bool,
        layer: str,
    ) -> None:
        super().__init__(layer, state.innermost())
        self.state = state
        self.head = head
        self.given = arguments
        self.arguments = arguments
        if facts.own_loss:
            # It ignores what `loss_function` would be given. The Trainer's smoothing, which takes
            # the place of the model's loss, counts items by itself.
            smoothed = state.options.label_smoothing > 0
            items = arguments.num_items_in_batch if smoothed else None
            self.arguments = LossArguments(arguments.labels, num_items_in_batch=items)
        if facts.unshifted and arguments.shift_labels is None:
            self.arguments = arguments._replace(shift_labels=arguments.labels)
        self.loss_function = loss_function
        self.facts = facts
        self.replica = replica
        self.head_has_run = False
        self.loss_returned = False
        self.vocab_size = 0
        self.loss: Tensor | None = None
        self.without_grad = False
        self.source: RecomputedLogits | None = None

    def finish(self, output: Any) -> Any:
        """The output, checked: the head has called `compute_loss`, the forward `return_loss`."""
        if not (self.loss_returned or self.delegated):
            raise UnsupportedModelError(
                "the model's forward must compute its loss from the output of "
                f"get_output_embeddings(), got {self._other_loss(output)}: leave this model stock "
                "(remove_patch)"
            )
        if self.outer is not None and not self.reentrant:
            # A layer above, itself inside ours, has left the loss to this one.
            self.outer.delegated = True
        self.state.ran = True
        self.state.last_loss = FUSED
        return self._settled(output)

    def _other_loss(self, output: Any) -> str:
        """What the forward has done in the place of that, for people."""
        first = output[0] if isinstance(output, (dict, tuple)) and output else output
        if isinstance(first, LogitsProxy):
            return "no loss at all, which it may compute if it gets more than `labels`"
        if not self.head_has_run:
            return "a loss from elsewhere, of logits that were made without a call of that module"
        return "a loss from elsewhere"

    def compute_loss(
        self, kind: str, stock_forward: Any, args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """The head's output: a proxy of the logits that carries the loss."""
        if self.head_has_run:
            raise UnsupportedModelError(
                "the head must run once a forward, got a second time: leave this model stock "
                "(remove_patch)"
            )
        self.head_has_run = True
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise UnsupportedModelError(
                f"the head must be called with the hidden states alone, got {len(args)} arguments "
                f"and keywords {sorted(kwargs)}: leave this model stock (remove_patch)"
            )
        hidden = args[0]
        target = self._target(hidden)
        settings, trials = self._settings(), self.state.trials
        result = run_head(kind, self.head, stock_forward, hidden, target, settings, trials)
        self._note(result)
        self.vocab_size = result.vocab_size
        shape = torch.Size((*hidden.shape[:-1], result.vocab_size))
        self.loss = wrappers.gathered_for_backward(self.head, self._differentiable(result))
        self.without_grad = not torch.is_grad_enabled()
        # Gathering the outputs of replicas would make the logits of every training step.
        unreadable = self.replica and torch.is_grad_enabled()
        if not torch.compiler.is_compiling() and not unreadable:
            self.source = RecomputedLogits(
                self.head, args[0], shape, hidden.device, self.state.suspended
            )
        return LogitsProxy(self.loss, self, shape, result.dtype, hidden.device)

    def _target(self, hidden: Tensor) -> Tensor:
        """The label that each hidden state predicts, on the device of the head."""
        target = self._shifted_labels()
        # `torch.Size.numel` would make a constant of a length that torch.export leaves open.
        rows = math.prod(hidden.shape[:-1])
        if target.numel() != rows:
            raise RowCountError(
                f"the head must get a hidden state for each label, got {rows} for "
                f"{target.numel()}: this model cuts or repeats tokens on the way, leave it stock "
                "(remove_patch)"
            )
        return target.to(hidden.device)

    def _shifted_labels(self) -> Tensor:
        """The labels as the stock loss function shifts them."""
        labels, shift_labels, _, ignore_index = self.arguments
        if self.facts.own_loss or is_masked_loss(self.loss_function):
            return labels
        if shift_labels is not None:
            return shift_labels
        return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()

    def _differentiable(self, result: HeadResult) -> Tensor:
        """What the proxy carries from the head to the loss function: the loss."""
        return cast(LossStats, result.values).loss

    def _settings(self) -> Settings:
        options = self.state.options
        loss_options = LossOptions(
            ignore_index=self.arguments.ignore_index,
            label_smoothing=options.label_smoothing,
            logit_scale=self.facts.logit_scale,
            softcap=self.facts.softcap,
            z_loss=options.z_loss,
        )
        return LossSettings(
            loss_options,
            item_count(self.arguments.num_items_in_batch),
            options.impl,
            options.memory_budget_mib,
            options.stats,
            self.facts.logit_bias,
        )

    def _note(self, result: HeadResult) -> None:
        """Leaves behind what `last_stats` and `patch_report` tell."""
        state, stats = self.state, result.values
        if not (state.options.stats and isinstance(stats, LossStats)):
            state.stats = None
        # Tensors of torch.export are no values.
        elif not is_exporting():
            # The stock forward may add to the loss in place, so the statistics keep their own.
            loss = stats.loss.detach().clone()
            # A plain tuple: before torch 2.13 the compiler cannot carry a named one out.
            state.stats = (loss, *stats[1:])
        if torch.compiler.is_compiling():
            state.last = None
            return
        state.last = LastForward(
            result.kind, result.ranks, state.options.impl, result.engine, result.ran
        )

    def return_loss(
        self,
        logits: Any,
        labels: Any = None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The finished loss, in the place of the stock loss function, once everything fits."""
        self._check_logits(logits)
        if self.facts.own_loss:
            raise UnsupportedModelError(
                "the model's class is known to call `cross_entropy` itself, got a call of its "
                "loss_function: leave this model stock (remove_patch)"
            )
        if shift_labels is not None:
            # The loss looks at no others then.
            labels = self.arguments.labels
        given = LossArguments(labels, shift_labels, num_items_in_batch, ignore_index)
        for name, expected, got in zip(given._fields, self.arguments, given, strict=True):
            if not same(expected, got):
                raise UnsupportedModelError(
                    f"the loss must get the `{name}` that the forward was called with, got another "
                    "one: this model changes it on the way, leave it stock (remove_patch)"
                )
        for name in kwargs:
            if name in _UNKNOWN_KEYWORDS and kwargs[name] is not None:
                raise UnsupportedModelError(
                    f"the loss must not get `{name}`, which the fused head does not know: leave "
                    "this model stock (remove_patch)"
                )
        if vocab_size is not None and vocab_size != self.vocab_size:
            raise UnsupportedModelError(
                f"the loss must cover the {self.vocab_size} rows of the head, got vocab_size="
                f"{vocab_size}: resize the head or the config, or leave the model stock"
            )
        self._check_facts(logits)
        self.loss_returned = True
        # The stock loss functions make the logits of a float64 model float32; gradients stay exact.
        return self._finished(logits).float()

    def return_own_loss(
        self,
        logits: LogitsProxy,
        target: Any,
        weight: Any = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The finished loss, in the place of `cross_entropy` that the forward calls itself."""
        self._check_logits(logits)
        if not self.facts.own_loss:
            raise UnsupportedModelError(
                "the model's forward must compute its loss with `self.loss_function`, got a call "
                "of `cross_entropy`: leave this model stock (remove_patch)"
            )
        plain = weight is None and size_average is None and reduce is None
        if not plain or (ignore_index, reduction, label_smoothing) != (-100, "mean", 0.0):
            raise UnsupportedModelError(
                "the model's forward must call `cross_entropy` with logits and labels alone, got "
                "other options: leave this model stock (remove_patch)"
            )
        if not same_values("`labels`", self.arguments.labels, target):
            raise UnsupportedModelError(
                "the loss must get the `labels` that the forward was called with, got other ones: "
                "this model changes them on the way, leave it stock (remove_patch)"
            )
        self._check_facts(logits)
        self.loss_returned = True
        loss = self._finished(logits)
        # Autocast runs `cross_entropy` in float32; else it keeps the dtype of the logits.
        autocast = torch.is_autocast_enabled(logits.device.type)
        return loss if autocast else loss.to(logits.dtype)

    def _check_logits(self, logits: Any) -> None:
        if not isinstance(logits, LogitsProxy) or logits.owner is not self:
            raise UnsupportedModelError(
                "the loss must be computed from the output of get_output_embeddings(), got logits "
                "from elsewhere: leave this model stock (remove_patch)"
            )
        if self.loss_returned:
            raise UnsupportedModelError(
                "the loss function must be called once a forward, got a second time: leave this "
                "model stock (remove_patch)"
            )

    def _check_facts(self, logits: LogitsProxy) -> None:
        observed = observed_facts(logits.steps)
        if not (same_facts(observed, self.facts) and self._is_known_bias(observed[2])):
            raise UnsupportedModelError(
                "the model's forward must do to the logits what is known of its class, "
                f"{_spell(self.facts)}, got {_spell(Facts(*observed))} by "
                f"{[step.name for step in logits.steps]}: leave this model stock (remove_patch)"
            )

    def _is_known_bias(self, bias: Tensor | None) -> bool:
        expected = self.facts.logit_bias
        if bias is None or expected is None:
            return bias is expected
        return same_values("bias", expected, bias)

    def _from_head(self, logits: LogitsProxy) -> Tensor:
        """What the head computed, as its own output has brought it here."""
        loss, made = logits.loss, cast(Tensor, self.loss)
        self._check_graph(loss, made)
        if loss.dtype != made.dtype:
            # FSDP casts a module's outputs: the value is known exactly, the path must stay.
            loss = cast(Tensor, WithValue.apply(loss, made.detach()))
        return loss

    def _finished(self, logits: LogitsProxy) -> Tensor:
        loss = self._from_head(logits)
        num_items = self.arguments.num_items_in_batch
        if isinstance(num_items, Tensor) and num_items.dim():
            return loss.reshape(num_items.shape)
        return loss

    def _check_graph(self, loss: Tensor, made: Tensor) -> None:
        """Whether `loss`, out of the head's output, is the one that the head made."""
        if torch.compiler.is_compiling():
            changed = loss is not made and (loss.dtype, loss.device) == (made.dtype, made.device)
        else:
            changed = loss is not made and not is_copy(loss, made)
        if changed:
            raise UnsupportedModelError(
                "the head's output must reach the loss as the head made it, got another one from a "
                "hook on the head: remove the hook or leave this model stock (remove_patch)"
            )
        if self.without_grad and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "the head must run with gradients where its loss is computed with them, got a head "
                "under no_grad, as reentrant checkpointing runs it: use use_reentrant=False or "
                "leave this model stock (remove_patch)"
            )

    def logits(self, proxy: LogitsProxy) -> Tensor:
        """Real logits in the place of the proxy; they can be read after the loss only."""
        if self.source is None:
            raise LogitsUnavailableError(
                "the logits of a compiled or replicated fused forward do not exist: call the model "
                "without labels or use remove_patch(model)"
            )
        logits = lazy_logits(self.source, proxy.steps, proxy.dtype)
        return logits if proxy.shape == self.source.shape else logits.reshape(proxy.shape)

    def _settled(self, output: Any) -> Any:
        """The stock output with readable logits in the place of the proxy."""
        if self.source is not None:
            self.source.settle()
        if isinstance(output, tuple):
            values = [self._readable(value) for value in output]
            return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
        if isinstance(output, dict):
            for name in list(output.keys()):
                if isinstance(output[name], LogitsProxy):
                    output[name] = self._readable(output[name])
        return output

    def _readable(self, value: Any) -> Any:
        if not isinstance(value, LogitsProxy):
            return value
        if self.source is not None:
            return self.logits(value)
        return ReplicaLogits() if self.replica else UnavailableLogits()


def _spell(facts: Facts) -> str:
    bias = "no bias" if facts.logit_bias is None else "a bias"
    return f"scale {facts.logit_scale:g}, softcap {facts.softcap} and {bias}"
