"""The shapes that are measured, as frozen records, and the data that fills them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE_INDEX = -100

# Logits of a random head have this standard deviation before the target is raised.
_LOGIT_STD = 2.0


@dataclass(frozen=True)
class Workload:
    """One head and one batch.

    Attributes:
        name: What the command line calls it.
        num_tokens: T, tokens in the batch.
        hidden_size: H, width of the hidden states.
        vocab_size: V, rows of the head.
        dtype: Dtype of hidden states and head unless another is asked for.
        about: The model it is shaped like.
    """

    name: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    about: str

    @property
    def shape(self) -> str:
        """`T x H x V`, for people."""
        return f"{self.num_tokens}x{self.hidden_size}x{self.vocab_size}"


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("llama3-8b", 8192, 4096, 128256, "bfloat16", "Llama-3-8B"),
        Workload("qwen3-8b", 8192, 4096, 151936, "bfloat16", "Qwen3-8B"),
        Workload("gemma2-2b", 8192, 2304, 256000, "bfloat16", "Gemma-2-2B, without its softcap"),
        Workload("mistral-7b", 8192, 4096, 32768, "bfloat16", "Mistral-7B"),
        Workload("qwen3-0.6b", 16384, 1024, 151936, "bfloat16", "Qwen3-0.6B"),
        Workload("llama3-8b-32k", 32768, 4096, 128256, "bfloat16", "Llama-3-8B, long context"),
        Workload("llama3-8b-128k", 131072, 4096, 128256, "bfloat16", "Llama-3-8B, longer context"),
        Workload("gemma3-270m", 8192, 640, 262144, "bfloat16", "Gemma-3-270M"),
        Workload("llama3.2-1b-2k", 2048, 2048, 128256, "bfloat16", "Llama-3.2-1B, a small batch"),
        Workload("qwen2.5-0.5b-1k", 1024, 896, 151936, "bfloat16", "Qwen2.5-0.5B, a small batch"),
        Workload("llama3-8b-512", 512, 4096, 128256, "bfloat16", "Llama-3-8B, a small batch"),
        Workload("smollm2-cpu", 2048, 576, 49152, "float32", "SmolLM2-135M on a CPU"),
        Workload("smoke", 192, 64, 1031, "float32", "seconds on one core; V is prime"),
    )
}
CUDA_WORKLOADS = (
    "llama3-8b",
    "qwen3-8b",
    "gemma2-2b",
    "mistral-7b",
    "qwen3-0.6b",
    "llama3-8b-32k",
)
CPU_WORKLOADS = ("smollm2-cpu",)


@dataclass(frozen=True)
class Batch:
    """The tensors of one run; no contender may write to them.

    Attributes:
        hidden: [T, H].
        weight: [V, H].
        labels: [T] int64, `IGNORE_INDEX` where ignored.
        num_valid: Tokens that are not ignored.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    num_valid: int


def make_batch(
    workload: Workload,
    dtype: torch.dtype,
    device: torch.device,
    ignored: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Random data with the statistics of a trained model; the same for the same seed and device.

    Labels follow Zipf's law over the vocabulary. The hidden state of a token leans towards the
    head's row of its label by an amount that varies from token to token, so that some tokens are
    certain, some are surprises, and the mean loss is about 2 nats.

    Args:
        workload: The shape.
        dtype: Dtype of hidden states and head.
        device: Where the tensors are made.
        ignored: Fraction of the tokens whose label is `IGNORE_INDEX`.
        seed: Of the generator.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    num_tokens, hidden_size = workload.num_tokens, workload.hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = normal(workload.vocab_size, hidden_size).mul_(hidden_size**-0.5).to(dtype)
    labels = zipf_labels(num_tokens, workload.vocab_size, generator, device)
    # log V + std^2 / 2 is the log-sum-exp of the other logits; targets stand about it.
    pull = math.log(workload.vocab_size) + _LOGIT_STD**2 / 2 - 1 + 2.2 * normal(num_tokens, 1)
    hidden = normal(num_tokens, hidden_size).mul_(_LOGIT_STD)
    hidden = hidden.addcmul_(pull, weight[labels].float()).to(dtype)
    num_ignored = min(round(num_tokens * ignored), num_tokens - 1)
    order = torch.randperm(num_tokens, generator=generator, device=device)
    labels[order[:num_ignored]] = IGNORE_INDEX
    return Batch(hidden, weight, labels, num_tokens - num_ignored)


def zipf_labels(
    num_tokens: int, vocab_size: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Token ids by Zipf's law: [T] int64."""
    # Byte-pair vocabularies are roughly in order of frequency: the rank serves as the id.
    # Summed on the CPU: a GPU sums in another order every time, and ranks need the same labels.
    ranks = torch.arange(1, vocab_size + 1, dtype=torch.float64)
    cumulative = (1 / (ranks + 2.7)).cumsum(0)
    cumulative = (cumulative / cumulative[-1]).float().to(device)
    draws = torch.rand(num_tokens, generator=generator, device=device)
    labels = torch.searchsorted(cumulative, draws)
    return labels.clamp_(max=vocab_size - 1)
