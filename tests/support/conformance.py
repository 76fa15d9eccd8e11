"""The conformance sweep: every class with an LM head, tiny and patched, against its stock self.

`python tests/support/conformance.py --write` runs it over the mappings of `PARTS` and writes the
verdicts to patches/conformance.json; `python tests/support/conformance.py NAME ...` prints those of
some classes. test_conformance.py runs a share of it and compares the file with it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from oracle import assert_close_as_torch, farthest
from tiny_classes import VARIANTS, batch, build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from hf_fused_head import UnsupportedModelError, apply_patch, patch_report
from hf_fused_head.patches.eligibility import shifts_labels
from hf_fused_head.patches.registry import facts_of, family_of
from hf_fused_head.patches.support import spell_shift

RESULT = Path(__file__).parents[2] / "patches" / "conformance.json"
SAMPLES = 8
PARTS: dict[str, tuple[dict[str, Any], ...]] = {
    "classes": (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,),
    # Their text path is swept.
    "multimodal": (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ),
    "seq2seq": (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ),
    "masked": (MODEL_FOR_MASKED_LM_MAPPING_NAMES,),
    "pretraining": (MODEL_FOR_PRETRAINING_MAPPING_NAMES,),
}
"""The parts of the result file, and the mappings of transformers whose classes they hold."""


def class_names(part: str) -> list[str]:
    """The classes of a part, in the order of its mappings; none of those of a part before it."""
    seen: dict[str, None] = {}
    for name, mappings in PARTS.items():
        found = dict.fromkeys(cls for mapping in mappings for cls in _classes(mapping))
        if name == "pretraining":
            # Others predict no tokens.
            found = [cls for cls in found if getattr(transformers, cls)._tied_weights_keys]
        if name == part:
            return [cls for cls in found if cls not in seen]
        seen |= dict.fromkeys(found)
    raise ValueError(f"`part` must be one of {list(PARTS)}, got {part!r}: see PARTS")


def _classes(mapping: dict[str, Any]) -> list[str]:
    names: list[str] = []
    for value in mapping.values():
        names += [value] if isinstance(value, str) else list(value)
    return list(dict.fromkeys(names))


class Scenario(NamedTuple):
    """One way to call the forward; `truth` names the one whose float64 result judges it."""

    name: str
    inputs: Callable[[Any], dict[str, Any]]
    truth: str
    config: dict[str, Any] = {}  # noqa: RUF012
    autocast: bool = False
    evaluation: bool = False


def _shifted(model: Any) -> dict[str, Any]:
    inputs = batch(model)
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
    # Other values than the labels' own shift, so that ignoring them is seen.
    shifted = torch.where(shifted >= 0, (shifted + 1) % 7, shifted)
    return inputs | {"shift_labels": shifted.contiguous()}


SCENARIOS = (
    Scenario("plain", batch, "plain"),
    Scenario("num_items int", lambda m: batch(m) | {"num_items_in_batch": 37}, "num_items int"),
    Scenario(
        "num_items tensor",
        lambda m: batch(m) | {"num_items_in_batch": torch.tensor(37)},
        "num_items int",
    ),
    Scenario("shift_labels", _shifted, "shift_labels"),
    Scenario(
        "router loss by keyword", lambda m: batch(m) | {"output_router_logits": True}, "router"
    ),
    Scenario("router loss by config", batch, "router", {"output_router_logits": True}),
    Scenario("autocast", batch, "plain", autocast=True),
    Scenario("return_dict=False", lambda m: batch(m) | {"return_dict": False}, "plain"),
    Scenario("evaluation", batch, "evaluation", evaluation=True),
)


SCENARIO = {scenario.name: scenario for scenario in SCENARIOS}


class InDouble(TorchFunctionMode):
    """Runs code in float64 that casts to float32 on its way."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """New tensors and casts are float64."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(former)


class Result(NamedTuple):
    """What a forward and its backward gave."""

    loss: Tensor
    values: dict[str, Tensor | None]
    layout: tuple[str, ...]


def run(model: Any, scenario: Scenario) -> Result:
    """Loss and gradients, or loss and logits in evaluation."""
    inputs = scenario.inputs(model)
    for name, value in scenario.config.items():
        setattr(model.config.get_text_config(), name, value)
    model.zero_grad(set_to_none=True)
    model.train(not scenario.evaluation)
    torch.manual_seed(0)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=scenario.autocast)
    try:
        with torch.set_grad_enabled(not scenario.evaluation), autocast:
            output = model(**inputs)
    finally:
        for name in scenario.config:
            setattr(model.config.get_text_config(), name, False)
    loss = output[0]
    layout = tuple(output) if isinstance(output, dict) else (str(len(output)),)
    if scenario.evaluation:
        logits = output.logits if "logits" in output else output.prediction_logits
        return Result(loss, {"logits": logits * 1}, layout)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Result(loss.detach(), gradients, layout)


class Outcome(NamedTuple):
    """How a scenario went: equal, refused, mismatch, crash, or stock fails; and why."""

    status: str
    why: str = ""


class Judge:
    """One class under every scenario: the stock model, its float64 copy, and the fused one.

    Each forward gets a fresh copy: some models keep states from one forward to the next.
    """

    def __init__(self, stock: Any) -> None:
        self.stock = stock
        self.truths: dict[str, Result] = {}
        self.truth_dtype = "float64"

    def outcome(self, scenario: Scenario) -> Outcome:
        """How the fused model does against the stock one."""
        if not applies(scenario, self.stock):
            return Outcome("not applicable")
        fused = copy.deepcopy(self.stock)
        try:
            apply_patch(fused)
        except UnsupportedModelError as error:
            return Outcome("refused", _one_line(error))
        try:
            expected = run(copy.deepcopy(self.stock), scenario)
        except Exception as error:
            return Outcome("stock fails", _one_line(error))
        try:
            got = run(fused, scenario)
        except UnsupportedModelError as error:
            if type(fused) is not type(self.stock) or patch_report(fused).fused:
                return Outcome("mismatch", "refused, but not stock again")
            return Outcome("refused", _one_line(error))
        except Exception as error:
            return Outcome("crash", _one_line(error) + _where(error))
        report = patch_report(fused)
        if not (report.fused and report.schedule):
            return Outcome("mismatch", f"not fused, silently: {report.reason}")
        return self.compared(scenario, got, expected)

    def compared(self, scenario: Scenario, got: Result, expected: Result) -> Outcome:
        """The float64 judgement; stock's rounding is sampled more often where one sample fails."""
        truth = self.truth(scenario, expected)
        try:
            compare(got, [expected], truth, scenario.autocast)
        except AssertionError:
            samples = [expected, *(self.sample(scenario, seed) for seed in range(SAMPLES))]
            try:
                compare(got, samples, truth, scenario.autocast)
            except AssertionError as error:
                return Outcome("mismatch", _one_line(error))
        return Outcome("equal")

    def sample(self, scenario: Scenario, seed: int) -> Result:
        """Stock on weights that were changed within their rounding: as right, rounded otherwise."""
        dtype = torch.bfloat16 if scenario.autocast else torch.float32
        return run(within_rounding(self.stock, seed, dtype), scenario)

    def truth(self, scenario: Scenario, expected: Result) -> Result:
        """The float64 result, made once for the scenarios that share it."""
        if scenario.truth not in self.truths:
            try:
                model = copy.deepcopy(self.stock).double()
                with in_double():
                    self.truths[scenario.truth] = run(model, scenario._replace(autocast=False))
            except Exception as error:
                self.truth_dtype = f"float32 ({_one_line(error)})"
                self.truths[scenario.truth] = expected
        return self.truths[scenario.truth]


def within_rounding(stock: Any, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A copy whose weights were changed within the rounding of a dtype."""
    model = copy.deepcopy(stock)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            parameter.mul_(1 + torch.finfo(dtype).eps * noise)
    return model


def compare(got: Result, samples: list[Result], truth: Result, autocast: bool) -> None:
    """Raises AssertionError where `got` is farther from the truth than stock, or laid out unlike.

    With several samples of stock's rounding the parameters of a module are judged together: a bias
    whose exact gradient is zero is all rounding, and its module's weight tells how much.
    """
    expected = samples[0]
    if got.layout != expected.layout:
        raise AssertionError(f"output holds {got.layout}, stock {expected.layout}")
    if (got.loss.dtype, got.loss.shape) != (expected.loss.dtype, expected.loss.shape):
        raise AssertionError(f"loss is {got.loss.dtype} {tuple(got.loss.shape)}")
    present = {name for name, value in expected.values.items() if value is not None}
    ours = {name for name, value in got.values.items() if value is not None}
    if ours != present:
        raise AssertionError(f"gradients differ in presence: {sorted(ours ^ present)[:4]}")
    # Under autocast float32 results carry the rounding of bfloat16 products.
    dtype = torch.bfloat16 if autocast else None
    losses = [sample.loss for sample in samples]
    assert_close_as_torch("loss", got.loss, farthest(losses, truth.loss), truth.loss, dtype)
    for name, members in _groups(sorted(present), len(samples) > 1).items():
        ours, exact, *others = (_joined(result, members) for result in (got, truth, *samples))
        assert_close_as_torch(name, ours, farthest(others, exact), exact, dtype)


def _groups(names: list[str], by_module: bool) -> dict[str, list[str]]:
    """What is judged together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[0] if by_module else name, []).append(name)
    return groups


def _joined(result: Result, names: list[str]) -> Tensor:
    values = [result.values[name] for name in names]
    return values[0] if len(values) == 1 else torch.cat([value.flatten() for value in values])


def applies(scenario: Scenario, model: Any) -> bool:
    """Whether the class knows of what the scenario is about."""
    if "router" not in scenario.truth:
        return True
    return hasattr(model.config.get_text_config(), "output_router_logits")


def judge(name: str) -> dict[str, Any]:
    """The verdict on a class, as the result file holds it."""
    try:
        stock = build(name)
        batch(stock)
    except Exception as error:
        return {"verdict": "not built", "reason": _one_line(error) + _where(error)}
    judge = Judge(stock)
    outcomes = {scenario.name: judge.outcome(scenario) for scenario in SCENARIOS}
    for variant, settings in VARIANTS.get(name, {}).items():
        other = Judge(build(name, **settings))
        outcomes[variant] = other.outcome(SCENARIO["plain"])
    return verdict(outcomes) | facts(name, stock) | {"truth": judge.truth_dtype}


def facts(name: str, model: Any) -> dict[str, Any]:
    """What a support table tells of the class."""
    head = model.get_output_embeddings()
    own_loss = facts_of(model, family_of(model)).own_loss
    types = [
        model_type
        for mapping in (mapping for mappings in PARTS.values() for mapping in mappings)
        for model_type, value in mapping.items()
        if name in ([value] if isinstance(value, str) else value)
    ]
    return {
        "model_types": list(dict.fromkeys(types)),
        "labels": "" if shifts_labels(model) else spell_shift(own_loss),
        "bias": getattr(head, "bias", None) is not None,
        "router_loss": applies(SCENARIO["router loss by keyword"], model),
    }


def verdict(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Fused or refused by the plain forward; one wrong scenario makes the class wrong."""
    by_status: dict[str, dict[str, str]] = {}
    for name, outcome in outcomes.items():
        by_status.setdefault(outcome.status, {})[name] = outcome.why
    for wrong in ("crash", "mismatch"):
        if wrong in by_status:
            name, why = next(iter(by_status[wrong].items()))
            record = {"verdict": wrong, "reason": f"{name}: {why}"}
            break
    else:
        plain = outcomes["plain"]
        names = {"equal": "fused", "refused": "refused", "stock fails": "not built"}
        record = {"verdict": names[plain.status], "reason": plain.why}
    record["equal"] = list(by_status.get("equal", {}))
    for status in ("refused", "stock fails", "mismatch", "crash"):
        if status in by_status and status != record["verdict"]:
            record[status.replace(" ", "_")] = by_status[status]
    return record


def gist(record: dict[str, Any]) -> tuple[str, list[str]]:
    """What must not change unseen: the verdict, and the scenarios that are refused."""
    return record["verdict"], sorted(record.get("refused", {}))


def share_of(names: list[str], share: int, shares: int) -> list[str]:
    """A part of the classes that depends on their names alone."""
    return [name for name in names if zlib.crc32(name.encode()) % shares == share]


def read_result() -> dict[str, Any]:
    """The committed verdicts and the version of transformers that they were found with."""
    return json.loads(RESULT.read_text())


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = (UnsupportedModelError, AssertionError)
    return text if isinstance(error, known) else f"{type(error).__name__}: {text[:300]}"


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(frame.filename).name}:{frame.lineno})"


def sweep(names: list[str]) -> dict[str, Any]:
    """The verdicts, told as they come."""
    records = {}
    for name in names:
        start = time.perf_counter()
        records[name] = record = judge(name)
        seconds = time.perf_counter() - start
        print(f"{record['verdict']:10} {seconds:5.1f} s  {name}  {record['reason']}", flush=True)
    return records


def main() -> None:
    """Sweeps the classes that are named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="classes; all of them without")
    parser.add_argument("--write", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    if options.names:
        print(json.dumps(sweep(options.names), indent=2))
        return
    result = {
        "transformers": transformers.__version__,
        **{part: sweep(class_names(part)) for part in PARTS},
    }
    if options.write:
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
