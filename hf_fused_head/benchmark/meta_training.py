"""What one training step of a causal model allocates, from a run of its code on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hf_fused_head.benchmark.timeline import LiveBytes, Timeline

T = TypeVar("T")

KINDS = ("full", "lora")

# Long enough for the bytes of rows to dominate those of one tile in every operator.
_SAMPLE_TOKENS = 2048
# A weight in NF4 with a float32 scale for every 64.
_BYTES_4BIT = 0.5 + 4 / 64


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        kind: "full" or "lora".
        checkpointing: Whether layers are recomputed in the backward.
        optimizer_dtype: Of AdamW's two states; None for that of each trained weight.
        load_in_4bit: Whether the frozen linear layers of the body are quantised.
        lora_rank: Rank of the adapters.
    """

    kind: str
    checkpointing: bool = True
    optimizer_dtype: torch.dtype | None = None
    load_in_4bit: bool = False
    lora_rank: int = 16

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.load_in_4bit and self.kind == "full":
            raise ValueError("`load_in_4bit` must be off in full training: train with LoRA")


class MetaTraining:
    """A model in one kind of training, and the bytes of its step for any number of tokens.

    The model runs forward and backward when this is made, without memory or arithmetic.

    Attributes:
        head_sizes: Columns and rows of the head.
        softcap: Whether its logits are capped.
        weight_bytes: All parameters and buffers.
        optimizer_bytes: Both states of AdamW.

    Args:
        config: Of transformers.
        dtype: Of the weights.
        training: How it is trained.

    Raises:
        ImportError: If LoRA is asked for and PEFT is not installed.
        ValueError: If the model does not run without values.
    """

    def __init__(self, config: Any, dtype: torch.dtype, training: Training) -> None:
        self._name = type(config).__name__
        self._model = self._guarded(lambda: _prepared(config, dtype, training))
        vocab_size, hidden_size = self._model.get_output_embeddings().weight.shape
        self.head_sizes = hidden_size, vocab_size
        self.softcap = _has_softcap(self._model)
        self._unpacked_bytes = 0
        self.weight_bytes = sum(map(_bytes, (*self._model.parameters(), *self._model.buffers())))
        if training.load_in_4bit:
            self._pack_linear_layers()
        self.optimizer_bytes = sum(
            2 * weight.numel() * (training.optimizer_dtype or weight.dtype).itemsize
            for weight in self._model.parameters()
            if weight.requires_grad
        )
        self._body, self._stock_head = self._guarded(self._timelines)

    def activation_bytes(self, num_tokens: int) -> int:
        """What the layers hold for their backward when the head is called."""
        return round(self._body.at(num_tokens)[self._at_head].item())

    def backward_bytes(self, num_tokens: int) -> int:
        """Most bytes at once while the layers run, gradients of all weights included."""
        return self._body.peak(num_tokens) + self._unpacked_bytes

    def stock_head_bytes(self, num_tokens: int) -> int:
        """Most bytes beside the activations, from the head's call to the end of its backward."""
        return self._stock_head.peak(num_tokens)

    def _pack_linear_layers(self) -> None:
        from hf_fused_head.patches.meta_model import linear_weights

        weights = linear_weights(self._model)
        packed = sum(weight.numel() for weight in weights) * _BYTES_4BIT
        self.weight_bytes += round(packed) - sum(map(_bytes, weights))
        # Every product unpacks its weight and drops the copy.
        self._unpacked_bytes = max(map(_bytes, weights), default=0)

    def _timelines(self) -> tuple[Timeline, Timeline]:
        runs = [self._run(factor * _SAMPLE_TOKENS) for factor in (1, 2, 3)]
        bodies, heads, begins = zip(*runs, strict=True)
        self._at_head = begins[0]
        return Timeline(bodies, _SAMPLE_TOKENS), Timeline(heads, _SAMPLE_TOKENS)

    def _run(self, num_tokens: int) -> tuple[list[int], list[int], int]:
        """Bytes over a step of the body and over that of the stock head; when the head begins."""
        from hf_fused_head.patches.meta_model import flash_shapes

        model, base = self._model, self._model.base_model
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64, device="meta")
        with flash_shapes():
            with LiveBytes() as body:
                output = base(input_ids=tokens, use_cache=False, return_dict=True)
                at_head = len(body.line) - 1
                if output[0].shape[-1] != self.head_sizes[0]:
                    raise ValueError("the body does not return the hidden states of the head")
                # One row of logits: all gradients of a step, and nothing of its loss.
                model.get_output_embeddings()(output[0][:, -1:]).sum().backward()
            model.zero_grad()
            output[next(iter(output))] = output[0].detach().requires_grad_()
            # The model's own head and loss, on hidden states that are there already.
            base.forward = lambda *_, **__: output
            try:
                with LiveBytes() as head:
                    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            finally:
                del base.forward
        model.zero_grad()
        return body.line, head.line, at_head

    def _guarded(self, run: Callable[[], T]) -> T:
        """The result of `run`, whose errors are those of a model's own code without values."""
        try:
            return run()
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise ValueError(
                "`MODEL_OR_CONFIG` must describe a model that runs on shapes alone with --memory, "
                f"got a {self._name} ({type(error).__name__}: {first}): plan its head with --tokens"
            ) from error


def _prepared(config: Any, dtype: torch.dtype, training: Training) -> Any:
    from hf_fused_head.patches.meta_model import add_lora, meta_model

    model = meta_model(config, dtype)
    if training.kind == "lora":
        add_lora(model, training.lora_rank)
    if training.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _has_softcap(model: Any) -> bool:
    from hf_fused_head.patches.meta_model import has_softcap

    return has_softcap(model)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
