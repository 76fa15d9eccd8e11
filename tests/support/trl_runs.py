"""Runs of TRL's trainers side by side: with its own head, with ours, and in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_close_as_torch
from torch import nn
from trains_like import assert_gradients_close

from hf_fused_head import patch_report
from hf_fused_head.patches import heads

# Of no run twice the same, or counts, which are compared for equality.
_TIMES = ("runtime", "per_second", "time")
_COUNTS = ("num_tokens", "total_flos", "epoch", "step", "learning_rate", "completions/")


class HeadCalls:
    """How often a head computed values per token: TRL's and ours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ours = self.trls = 0
        utils = pytest.importorskip("trl.trainer.utils")
        own, function = heads.operand_log_probs, utils._ChunkedLogProbFunction

        class Counted:
            @staticmethod
            def apply(*args: Any) -> Any:
                self.trls += 1
                return function.apply(*args)

        @functools.wraps(own)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.ours += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Counted)
        monkeypatch.setattr(heads, "operand_log_probs", counted)

    def take(self) -> tuple[int, int]:
        """TRL's and ours since the last time."""
        found = self.trls, self.ours
        self.trls = self.ours = 0
        return found


def run(made: Any) -> Any:
    """The trainer after its training, from the same random state."""
    torch.manual_seed(0)
    made.train()
    return made


def change_models(made: Any, change: Callable[[nn.Module], nn.Module]) -> Any:
    """The trainer, with something done to its policy and to its reference model."""
    change(made.model)
    if getattr(made, "ref_model", None) is not None:
        change(made.ref_model)
    return made


def assert_trains_as_trl(ours: Any, stock: Any, truth: Any) -> None:
    """Fails unless logs and weights are as near to those of `truth` as TRL's own."""
    logs = [_logs(made) for made in (ours, stock, truth)]
    assert logs[0].keys() == logs[1].keys() == logs[2].keys()
    counts = [name for name in logs[0] if name.partition(" ")[2].startswith(_COUNTS)]
    assert [logs[0][name] for name in counts] == [logs[1][name] for name in counts]
    # One vector: the differences of large log-probabilities have the rounding of these.
    names = [name for name in logs[0] if name not in counts]
    found = [torch.tensor([log[name] for name in names]).double() for log in logs]
    assert_close_as_torch(f"logs {names}", *found, arithmetic=torch.float32)
    assert_gradients_close(*map(weights_of, (ours, stock, truth)))


def assert_same_run(ours: Any, stock: Any) -> None:
    """Every number in the logs but the times, and every weight, bit for bit."""
    assert _logs(ours) == _logs(stock)
    for (name, found), wanted in zip(
        ours.model.named_parameters(), stock.model.parameters(), strict=True
    ):
        assert torch.equal(found, wanted), name


def assert_was_fused(made: Any, calls: tuple[int, int], stock_calls: tuple[int, int]) -> None:
    """Fails unless our head ran as often as TRL's in the stock run, and TRL's never."""
    assert stock_calls[0] > 0 and stock_calls[1] == 0
    assert calls == (0, stock_calls[0])
    report = patch_report(made.model)
    assert report.fused and report.last_loss == "fused", str(report)


def _logs(made: Any) -> dict[str, float]:
    """Every number in the logs but times, by the index of its entry and its name."""
    return {
        f"{index} {name}": float(value)
        for index, entry in enumerate(made.state.log_history)
        for name, value in entry.items()
        if not any(part in name for part in _TIMES)
    }


def weights_of(made: Any) -> dict[str, Any]:
    """Those of the policy, by name."""
    return {name: weight.detach() for name, weight in made.model.named_parameters()}
