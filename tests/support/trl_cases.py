"""Tiny runs of TRL's trainers, on words that every test knows: no hub, no GPU, plain SGD."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

WORDS = [f"w{index}" for index in range(40)]
TRAINERS = ("sft", "dpo", "kto", "rloo", "grpo")
# They make logits, or read the head's weight.
UNFUSED = ("cpo", "orpo", "gkd", "online_dpo", "distillation")
_CLASSES = {
    "cpo": ("trl.experimental.cpo", "CPO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "gkd": ("trl.experimental.gkd", "GKD"),
    "online_dpo": ("trl.experimental.online_dpo", "OnlineDPO"),
    "distillation": ("trl", "Distillation"),
    **{name: ("trl", name.upper()) for name in TRAINERS},
}
_GENERATION = {"num_generations": 2, "max_completion_length": 5, "beta": 0.0}
_SPECIAL: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"beta": 0.5},
    "kto": {"beta": 0.5},
    "rloo": _GENERATION,
    "grpo": _GENERATION,
    "cpo": {},
    "orpo": {},
    "gkd": {"lmbda": 0.0},
    "online_dpo": {"max_new_tokens": 4},
    "distillation": {"max_completion_length": 4},
}


def tokenizer() -> Any:
    """One token for each word."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


def policy(family: str = "llama", **settings: Any) -> Any:
    """The same tiny model at every call, as large as the tokenizer asks for."""
    return build(family, vocab_size=3 + len(WORDS), **settings)


def text(start: int, length: int) -> str:
    return " ".join(WORDS[(start + 3 * step) % len(WORDS)] for step in range(length))


def rows(name: str) -> Any:
    """Eight rows of unequal length in the form that the trainer takes."""
    made = []
    for index in range(8):
        prompt, good, bad = text(index, 3 + index % 3), text(index + 7, 4), text(index + 19, 6)
        made.append(
            {
                "sft": {"prompt": prompt, "completion": " " + good},
                "dpo": {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad},
                "kto": {"prompt": prompt, "completion": " " + bad, "label": index % 2 == 0},
                "rloo": {"prompt": prompt},
                "grpo": {"prompt": prompt},
                "cpo": {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad},
                "orpo": {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad},
                "gkd": {"messages": [_said("user", prompt), _said("assistant", good)]},
                "online_dpo": {"prompt": prompt},
                "distillation": {
                    "prompt": [_said("user", prompt)],
                    "completion": [_said("assistant", good)],
                },
            }[name]
        )
    return datasets.Dataset.from_list(made)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def reward(completions: list[str], **_: Any) -> list[float]:
    """Prefers completions with many different words."""
    return [float(len(set(completion.split()))) for completion in completions]


def trainer(
    name: str,
    folder: Path,
    prepare: Callable[[nn.Module], nn.Module] = lambda model: model,
    peft_config: Any = None,
    build: Callable[..., Any] = policy,
    **changes: Any,
) -> Any:
    """TRL's trainer of this name, the same one at every call.

    Args:
        name: One of `TRAINERS` or `UNFUSED`.
        folder: Where it writes.
        prepare: What is done to the policy and to the reference model before.
        peft_config: Adapters; then the base model is the reference.
        build: Makes the policy and, with another `seed`, the reference model.
        changes: Of its arguments.
    """
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        **_SPECIAL[name],
    }
    module, stem = importlib.import_module(_CLASSES[name][0]), _CLASSES[name][1]
    config, cls = getattr(module, f"{stem}Config"), getattr(module, f"{stem}Trainer")
    keywords: dict[str, Any] = {"processing_class": tokenizer(), "peft_config": peft_config}
    if name in ("gkd", "distillation"):
        keywords["teacher_model"] = build(seed=1)
    if name in ("rloo", "grpo", "online_dpo"):
        keywords["reward_funcs"] = reward
    if name in ("dpo", "kto") and peft_config is None:
        keywords["ref_model"] = prepare(build(seed=1))
    if "eval_strategy" in changes:
        keywords["eval_dataset"] = rows(name)
    torch.manual_seed(0)
    args = config(**{**settings, **changes})
    return cls(model=prepare(build()), args=args, train_dataset=rows(name), **keywords)
