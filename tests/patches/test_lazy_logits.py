"""Lazy logits: nothing until used, the stock value and gradient then, or a clear error."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils.operations import convert_to_fp32
from oracle import assert_close_as_torch
from tiny_models import batch, build
from torch import Tensor, nn

from hf_fused_head import apply_patch, remove_patch
from hf_fused_head.patches.errors import LogitsUnavailableError
from hf_fused_head.patches.lazy_logits import LazyLogits, ReplicaLogits, UnavailableLogits


def pair(family: str = "gemma2", **settings: Any) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """A stock model, a patched copy of it, and inputs for both."""
    stock = build(family, **settings)
    return stock, apply_patch(copy.deepcopy(stock)), batch(stock)


def is_made(logits: Tensor) -> bool:
    assert isinstance(logits, LazyLogits)
    return logits._lazy._value is not None


QUESTIONS: list[Callable[[Tensor], Any]] = [
    lambda x: (x.shape, x.dtype, x.device, x.layout, x.ndim),
    lambda x: (x.size(), x.size(-1), x.dim(), x.numel(), x.stride(), len(x)),
    lambda x: (x.requires_grad, x.is_leaf, x.is_cuda, x.is_floating_point()),
    lambda x: (torch.is_tensor(x), torch.is_floating_point(x), x.is_contiguous(), x.nbytes),
    lambda x: hash(x) == id(x),
]


@pytest.mark.parametrize("index", range(len(QUESTIONS)))
@pytest.mark.parametrize("grad", [True, False])
def test_questions_about_the_tensor_make_nothing(index: int, grad: bool) -> None:
    stock, fused, inputs = pair()
    with torch.set_grad_enabled(grad):
        logits, expected = fused(**inputs).logits, stock(**inputs).logits
    assert QUESTIONS[index](logits) == QUESTIONS[index](expected)
    assert not is_made(logits)


STAYS_LAZY: list[Callable[[Tensor], Tensor]] = [
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.detach,
    Tensor.contiguous,
    Tensor.clone,
    lambda x: x.to(torch.bfloat16),
    lambda x: x.to(dtype=torch.float64),
    lambda x: x.to("cpu"),
    lambda x: x.to(device="cpu", dtype=torch.float16, non_blocking=True),
    lambda x: x.to(torch.empty(0, dtype=torch.bfloat16)),
    lambda x: x.bfloat16().detach().float(),
    convert_to_fp32,
]


@pytest.mark.parametrize("index", range(len(STAYS_LAZY)))
def test_casts_and_copies_stay_lazy_and_right(index: int) -> None:
    stock, fused, inputs = pair()
    cast = STAYS_LAZY[index]
    logits = fused(**inputs).logits
    result, expected = cast(logits), cast(stock(**inputs).logits)
    assert not is_made(logits) and not is_made(result)
    assert (result.dtype, result.requires_grad) == (expected.dtype, expected.requires_grad)
    assert torch.equal(result, expected)


def test_a_move_to_another_device_stays_lazy() -> None:
    """Accelerate's device maps bring every output to where the inputs lay."""
    _, fused, inputs = pair()
    logits = fused(**inputs).logits
    moved = logits.to("meta", torch.bfloat16)
    assert not is_made(moved) and not is_made(logits)
    assert (moved.device.type, moved.dtype) == ("meta", torch.bfloat16)
    result = moved * 2
    assert is_made(logits) and type(result) is Tensor and result.device.type == "meta"


def saved_and_loaded(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x.detach() * 1, file)
    file.seek(0)
    return torch.load(file)


USES: list[Callable[[Tensor], Any]] = [
    lambda x: x[0],
    lambda x: x[..., -1, :].argmax(-1),
    lambda x: x.sum(),
    lambda x: x * 2 + 1,
    lambda x: 2 - x,
    lambda x: torch.stack([x, x]),
    lambda x: torch.cat((x[:1], x)),
    lambda x: torch.where(x > 0, x, 0.0),
    lambda x: nn.functional.log_softmax(x, dim=-1),
    lambda x: nn.functional.cross_entropy(x.flatten(0, 1), torch.zeros(22, dtype=torch.long)),
    lambda x: x.cpu().to(torch.int64),
    lambda x: torch.from_numpy(x.detach().numpy().copy()),
    lambda x: torch.tensor(x.tolist()),
    lambda x: torch.as_tensor(np.asarray(x.detach())),
    lambda x: pickle.loads(pickle.dumps(x.detach())),
    lambda x: copy.deepcopy(x.detach()),
    saved_and_loaded,
    lambda x: torch.stack(list(x.unbind(0))),
    lambda x: torch.stack(list(x)),
    lambda x: x.new_zeros(3),
    lambda x: torch.zeros_like(x),
]


@pytest.mark.parametrize("index", range(len(USES)))
@pytest.mark.parametrize("grad", [True, False])
def test_every_use_gives_the_stock_value(index: int, grad: bool) -> None:
    stock, fused, inputs = pair()
    with torch.set_grad_enabled(grad):
        result = USES[index](fused(**inputs).logits)
        expected = USES[index](stock(**inputs).logits)
    assert type(result) is Tensor
    assert (result.dtype, result.requires_grad) == (expected.dtype, expected.requires_grad)
    assert torch.equal(result, expected)


def test_repr_shows_the_values() -> None:
    stock, fused, inputs = pair()
    with torch.no_grad():
        assert repr(fused(**inputs).logits) == repr(stock(**inputs).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"])
@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        contextlib.nullcontext,
    ],
    ids=["no_grad", "inference_mode", "autocast", "grad"],
)
def test_read_after_the_mode_has_ended_they_are_those_of_the_mode(
    family: str, mode: Callable[[], Any]
) -> None:
    stock, fused, inputs = pair(family)
    with mode():
        expected, logits = stock(**inputs).logits, fused(**inputs).logits
    assert logits.dtype == expected.dtype and logits.requires_grad == expected.requires_grad
    assert torch.equal(logits, expected)


def test_read_under_no_grad_they_still_carry_the_graph_of_the_forward() -> None:
    _, fused, inputs = pair()
    logits = fused(**inputs).logits
    with torch.no_grad():
        cut = logits.float().detach().float()
        copied = logits.bfloat16()
        _ = logits[0]
    assert logits.requires_grad and logits.sum().requires_grad and logits.grad_fn is not None
    assert not cut.requires_grad and not copied.requires_grad and not copied.sum().requires_grad


@pytest.mark.parametrize("cast", [lambda x: x, lambda x: x.double(), lambda x: x.clone().float()])
def test_their_gradient_is_the_stock_gradient(cast: Callable[[Tensor], Tensor]) -> None:
    stock, fused, inputs = pair()
    truth = copy.deepcopy(stock).double()
    for model in (stock, fused, truth):
        output = model(**inputs)
        (output.loss + cast(output.logits).square().mean()).backward()
    for (name, ours), theirs, true in zip(
        fused.named_parameters(), stock.parameters(), truth.parameters(), strict=True
    ):
        assert_close_as_torch(name, ours.grad, theirs.grad, true.grad)


def test_a_hook_on_their_gradient_waits_for_them() -> None:
    """FSDP hangs its hook on every output that requires grad, used or not."""
    _, fused, inputs = pair()
    seen: list[torch.Size] = []
    logits = fused(**inputs).logits
    logits.register_hook(lambda grad: seen.append(grad.shape))
    logits.register_hook(lambda grad: seen.append(torch.Size([0]))).remove()
    assert not is_made(logits)
    logits.float().clone().sum().backward()
    assert seen == [logits.shape]


def test_what_is_written_into_them_stays() -> None:
    _, fused, inputs = pair()
    with torch.no_grad():
        logits = fused(**inputs).logits
        view = logits.detach()
        logits[0, 0, 0] = 7.0
        logits.mul_(2)
    assert logits[0, 0, 0] == 14.0 and view[0, 0, 0] == 14.0


def test_they_are_made_once() -> None:
    _, fused, inputs = pair()
    logits = fused(**inputs).logits
    assert (logits * 1).data_ptr() != logits.data_ptr() == logits.data_ptr()


def test_removing_the_patch_does_not_take_them_away() -> None:
    stock, fused, inputs = pair()
    output = fused(**inputs)
    remove_patch(fused)
    assert torch.equal(output.logits, stock(**inputs).logits)


def step_the_head(model: Any, output: Any) -> None:
    output.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def replace_the_weight(model: Any, output: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def change_the_hidden_states(model: Any, output: Any) -> None:
    output.hidden_states[-1].detach().mul_(2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (step_the_head, "have changed since"),
        (replace_the_weight, "were replaced since"),
        (change_the_hidden_states, "changed in place"),
    ],
)
def test_what_cannot_be_made_again_is_refused_with_the_remedy(
    change: Callable[[Any, Any], None], reason: str
) -> None:
    _, fused, inputs = pair("llama", tie_word_embeddings=False)
    output = fused(**inputs, output_hidden_states=True)
    change(fused, output)
    with pytest.raises(LogitsUnavailableError, match=rf"{reason}.*without labels"):
        output.logits.sum()
    assert output.logits.shape[-1] == 101


class DropsOut(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.dropout, self.linear = nn.Dropout(0.5), linear

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(self.dropout(hidden))


def test_a_head_with_active_dropout_cannot_repeat_itself() -> None:
    model = build("llama", tie_word_embeddings=False)
    model.lm_head = DropsOut(model.lm_head)
    apply_patch(model).train()
    output = model(**batch(model))
    with pytest.raises(LogitsUnavailableError, match="dropout"):
        output.logits.sum()
    model.eval()
    assert torch.isfinite(model(**batch(model)).logits).all()


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.aten.mul(x, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def test_no_gradient_is_lost_where_python_cannot_see() -> None:
    """Straight into C++, the gradient of a tensor that does not exist yet must not vanish."""
    _, fused, inputs = pair()
    logits = fused(**inputs).logits
    try:
        torch.autograd.backward([logits], [torch.ones(logits.shape)])
    except RuntimeError:
        pass  # Before torch 2.13 this call looks at the C++ tensor alone.
    else:
        assert fused.lm_head.weight.grad is not None
    logits = fused(**inputs).logits
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(LogitsUnavailableError):
        Doubling.apply(logits)


def test_without_gradients_the_way_past_python_gives_the_value() -> None:
    stock, fused, inputs = pair()
    with torch.no_grad():
        logits, expected = fused(**inputs).logits, stock(**inputs).logits
        with torch._C.DisableTorchFunctionSubclass():
            result = Doubling.apply(logits)
    assert torch.equal(result, 2 * expected)


@pytest.mark.parametrize("cls", [UnavailableLogits, ReplicaLogits])
def test_logits_that_nothing_can_make_say_so_on_any_use(cls: type) -> None:
    logits = cls()
    assert logits.float().detach().to("cpu") is logits
    assert convert_to_fp32(logits) is logits
    assert not hasattr(logits, "dtype") and "without labels" in repr(logits)
    for use in (
        lambda: logits.sum(),
        lambda: logits[0],
        lambda: len(logits),
        lambda: bool(logits),
        lambda: torch.argmax(logits),
        lambda: logits.shape,
    ):
        with pytest.raises(LogitsUnavailableError, match="without labels"):
            use()


def test_gathering_the_outputs_of_replicas_keeps_the_placeholder() -> None:
    """As torch.nn.parallel.gather rebuilds what it does not know."""
    parts = [ReplicaLogits(), ReplicaLogits()]
    assert isinstance(type(parts[0])(map(list, zip(*parts, strict=True))), ReplicaLogits)
