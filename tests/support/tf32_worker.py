"""Run by test_tf32.py in processes of their own, each of which makes some settings of TF32."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hf_fused_head.functional import linear_cross_entropy

OPERATOR, BACKEND, GLOBAL = "operator", "backend", "global"


class Setting(NamedTuple):
    """A statement, the level at which torch holds its value, and that value."""

    statement: str
    level: str
    value: str


SETTINGS = [
    # The older API.
    Setting("torch.backends.cuda.matmul.allow_tf32 = True", OPERATOR, "tf32"),
    Setting("torch.backends.cuda.matmul.allow_tf32 = False", OPERATOR, "ieee"),
    Setting("torch.set_float32_matmul_precision('medium')", OPERATOR, "tf32"),
    Setting("torch.set_float32_matmul_precision('high')", OPERATOR, "tf32"),
    Setting("torch.set_float32_matmul_precision('highest')", OPERATOR, "ieee"),
    # The newer one.
    Setting("torch.backends.cuda.matmul.fp32_precision = 'tf32'", OPERATOR, "tf32"),
    Setting("torch.backends.cuda.matmul.fp32_precision = 'ieee'", OPERATOR, "ieee"),
    Setting("torch.backends.cuda.matmul.fp32_precision = 'none'", OPERATOR, "none"),
    Setting("torch.backends.cudnn.fp32_precision = 'tf32'", BACKEND, "tf32"),
    Setting("torch.backends.cudnn.fp32_precision = 'ieee'", BACKEND, "ieee"),
    Setting("torch.backends.fp32_precision = 'tf32'", GLOBAL, "tf32"),
    Setting("torch.backends.fp32_precision = 'ieee'", GLOBAL, "ieee"),
]


def expected(settings: Sequence[Setting]) -> bool:
    """Whether products may use TF32: the last value of the nearest level that has one."""
    held = {setting.level: setting.value for setting in settings}
    values = [held.get(level, "none") for level in (OPERATOR, BACKEND, GLOBAL)]
    return next((value for value in values if value != "none"), "ieee") == "tf32"


def step(device: str) -> None:
    """A loss and its gradients by every engine."""
    for impl in ("triton:tile", "triton:epilogue", "torch", "reference"):
        hidden, weight = (torch.ones(size, 4, device=device).requires_grad_() for size in (3, 5))
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        linear_cross_entropy(hidden, weight, labels, impl=impl).backward()  # type: ignore[arg-type]


def readings() -> list[object]:
    """Everything that can be read of the settings; None where reading raises."""
    questions: list[Callable[[], object]] = [
        lambda: torch.backends.fp32_precision,
        lambda: torch.backends.cudnn.fp32_precision,
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda: torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    found: list[object] = []
    for question in questions:
        try:
            found.append(question())
        except RuntimeError:
            found.append(None)
    return found


def runs(settings: Sequence[Setting]) -> None:
    """Every engine runs, whichever API holds the settings, and leaves each as it is."""
    before = readings()
    step("cpu")
    assert readings() == before
    # The older API says the same where it says something.
    assert before[3] in (None, expected(settings))


def computes(settings: Sequence[Setting]) -> None:
    """On a GPU: torch's products and the head's round their operands, or neither does."""
    before = readings()
    step("cuda")
    assert readings() == before
    # A bit below the last one that TF32 keeps, in logits that are all the same.
    size = 1024
    hidden = torch.full((size, size), 1 + 2.0**-12, device="cuda")
    weight = torch.zeros((size, size), device="cuda")
    weight[:, 0] = 64.0
    labels = torch.zeros(size, dtype=torch.int64, device="cuda")
    stock_rounds = not torch.equal(hidden @ weight.T, 64 * hidden)
    # The label's own logit is never rounded, so that the loss shows it if the others are.
    loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
    even = torch.tensor(float(size), device="cuda").log()
    assert stock_rounds == expected(settings)
    assert ((loss - even).abs() > 2.0**-7).item() == stock_rounds


def in_children(combinations: list[tuple[Setting, ...]]) -> int:
    """`runs` after each combination, in a process that has made no other; how many failed."""
    # What the first step imports takes seconds, which no child should repeat.
    step("cpu")
    failures = 0
    for settings in combinations:
        child = os.fork()
        if child == 0:
            try:
                make(settings)
                runs(settings)
            except BaseException:
                print("; ".join(setting.statement for setting in settings), file=sys.stderr)
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            os._exit(0)
        failures += os.waitpid(child, 0)[1] != 0
    return failures


def make(settings: Sequence[Setting]) -> None:
    for setting in settings:
        exec(setting.statement)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if sys.argv[1] == "runs":
        alone = [(), *itertools.permutations(SETTINGS, 1)]
        sys.exit(in_children([*alone, *itertools.permutations(SETTINGS, 2)]) > 0)
    chosen = [SETTINGS[int(index)] for index in sys.argv[2:]]
    make(chosen)
    computes(chosen)
