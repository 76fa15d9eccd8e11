"""A tiny Llama, rows of unequal length and plain SGD: what the tests of the Trainer train.

`assert_same_training` holds FusedHeadTrainer to transformers' Trainer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from causal_loss import in_float64
from oracle import assert_close_as_torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_fused_head import FusedHeadTrainer, patch_report

VOCAB = 211  # Prime: no tile, chunk or window divides it.
HIDDEN = 32
SEQ = 12
STEPS = 4


def build(tied: bool = False, vocab_size: int = VOCAB, lora: bool = False) -> nn.Module:
    """A tiny Llama in float32; the same weights at every call."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    if not lora:
        return model
    adapters = LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"])
    model = get_peft_model(model, adapters)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            # Zero at the start, which would hide a forgotten adapter.
            nn.init.normal_(weight, std=0.1)
    return model


def rows(count: int = 16, masked: tuple[int, ...] = ()) -> list[dict[str, list[int]]]:
    """Sequences with unequal numbers of labels; those in `masked` have none."""
    generator = torch.Generator().manual_seed(2)
    data = []
    for index in range(count):
        ids = torch.randint(VOCAB, (SEQ,), generator=generator).tolist()
        ignored = SEQ if index in masked else index % (SEQ - 3)
        data.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return data


def arguments(folder: Path, **changes: object) -> TrainingArguments:
    """Plain SGD, so that weights answer to gradients and not to their signs."""
    settings: dict[str, object] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**settings, **changes})


def history(trainer: Trainer, key: str) -> Tensor:
    """What was logged under `key`, in order."""
    values = [entry[key] for entry in trainer.state.log_history if key in entry]
    return torch.tensor(values, dtype=torch.float64)


def trained(trainer_class: type[Trainer], model: nn.Module, data: list, **settings) -> Trainer:
    """A trainer after its run over `data`, evaluated on the same."""
    trainer = trainer_class(model=model, train_dataset=data, eval_dataset=data, **settings)
    trainer.train()
    trainer.evaluate()
    return trainer


def assert_same_training(
    model: nn.Module, data: list, folder: Path, data_collator: Any = None, **changes: object
) -> None:
    """Losses, evaluation loss and weights: fused against stock, by stock's distance to float64."""
    stock, truth = copy.deepcopy(model), in_float64(model)
    before = [weight.detach().clone() for weight in model.parameters()]
    args = arguments(folder, **changes)
    settings = {"args": args, "data_collator": data_collator}
    expected = trained(Trainer, stock, data, **settings)
    exact = trained(Trainer, truth, data, **settings)
    ours = trained(FusedHeadTrainer, model, data, **settings)
    assert patch_report(model).fused
    for key in ("loss", "eval_loss", "grad_norm"):
        found, wanted = history(ours, key).float(), history(expected, key).float()
        assert len(found) == len(wanted) > 0
        assert_close_as_torch(key, found, wanted, history(exact, key))
    names = [name for name, _ in stock.named_parameters()]
    assert names == [name for name, _ in model.named_parameters()]
    moved = 0
    for name, found, wanted, right, start in zip(
        names, model.parameters(), stock.parameters(), truth.parameters(), before, strict=True
    ):
        assert_close_as_torch(name, found, wanted, right)
        moved += not torch.equal(found, start)
    assert moved > 0


def expected_metrics(model: nn.Module, data: list) -> dict[str, Tensor]:
    """The metrics by logits, as means over all labelled tokens of `data`."""
    nll, entropy, correct = [], [], []
    for row in data:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[labels != -100]
        labels = labels[labels != -100]
        nll.append(-log_probs.gather(-1, labels[:, None])[:, 0])
        entropy.append(-(log_probs.exp() * log_probs).sum(-1))
        correct.append((log_probs.argmax(-1) == labels).to(log_probs.dtype))
    return {
        "mean_token_accuracy": torch.cat(correct).mean(),
        "entropy": torch.cat(entropy).mean(),
        "perplexity": torch.cat(nll).mean().exp(),
    }


def assert_metrics(entry: dict, prefix: str, model: nn.Module, data: list) -> None:
    """Those of a log entry, by their distance from float64."""
    single, double = (expected_metrics(m, data) for m in (model, in_float64(model)))
    for name, truth in double.items():
        found = torch.tensor(entry[prefix + name], dtype=torch.float32)
        assert_close_as_torch(prefix + name, found, single[name], truth)


def odd_model() -> nn.Module:
    """A model whose forward does to its logits what no head of ours does."""

    class OddForCausalLM(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids).last_hidden_state
            logits = self.lm_head(hidden).sigmoid()
            loss = None
            if labels is not None:
                loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
            return CausalLMOutput(loss=loss, logits=logits)

    # The stock Trainer shifts labels for the class names that it knows.
    OddForCausalLM.__name__ = "LlamaForCausalLM"
    model = build()
    model.__class__ = OddForCausalLM
    return model
