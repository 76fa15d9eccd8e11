"""FusedHeadTrainer on masked and sequence-to-sequence models, and beside Seq2SeqTrainer."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import tiny_classes
import torch
from oracle import assert_close_as_torch
from tiny_trainer import arguments, assert_same_training, history
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from hf_fused_head import FusedHeadTrainer, apply_patch, last_stats, patch_report, remove_patch

T5, BART, BERT = "T5ForConditionalGeneration", "BartForConditionalGeneration", "BertForMaskedLM"


def build(name: str) -> Any:
    """A tiny model no parameter of which is zero, so that all are as large as their steps."""
    model = tiny_classes.build(name)
    torch.manual_seed(5)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Words that are numbers."""
    words = {str(number): number for number in range(tiny_classes.VOCAB_SIZE)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="1")),
        pad_token="0",
        unk_token="1",
        eos_token="2",
        mask_token="3",
    )


def sentences(count: int = 12) -> list[dict[str, list[int]]]:
    """Sources and targets of unequal lengths."""
    generator = torch.Generator().manual_seed(4)
    data = []
    for index in range(count):
        lengths = 4 + index % 5, 3 + index % 4
        source, target = (torch.randint(4, 90, (n,), generator=generator) for n in lengths)
        data.append({"input_ids": source.tolist(), "labels": target.tolist()})
    return data


def collator(model: Any) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(tokenizer(), model=model)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.2}], ids=["plain", "smooth"])
@pytest.mark.parametrize("name", [T5, BART])
def test_sequence_to_sequence_training_is_stocks(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name)
    changes = {"learning_rate": 0.02, "gradient_accumulation_steps": 2, **changes}
    collate = collator(model)
    assert_same_training(model, sentences(), tmp_path, data_collator=collate, **changes)


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.2}], ids=["plain", "smooth"])
def test_masked_training_is_stocks(changes: dict[str, Any], tmp_path: Path) -> None:
    collate = DataCollatorForLanguageModeling(tokenizer(), mlm=True, mlm_probability=0.3)
    torch.manual_seed(0)
    # Masked once, since every run would draw other places.
    masked = collate([{"input_ids": list(range(4 + row, 16 + row))} for row in range(12)])
    columns = masked["input_ids"].tolist(), masked["labels"].tolist()
    data = [{"input_ids": ids, "labels": labels} for ids, labels in zip(*columns, strict=True)]
    model = build(BERT)
    assert_same_training(model, data, tmp_path, learning_rate=0.05, **changes)


@pytest.mark.parametrize("name", [T5, BERT])
def test_the_targets_of_the_metrics_are_the_labels_that_count(name: str, tmp_path: Path) -> None:
    """Processes count them to weight their means."""
    model = build(name)
    data = [{"input_ids": list(range(4, 12)), "labels": list(range(5, 13))} for _ in range(3)]
    trainer = FusedHeadTrainer(model, arguments(tmp_path), eval_dataset=data)
    metrics = trainer.evaluate()
    stats = last_stats(model)
    assert stats is not None and trainer._targets is not None
    assert int(trainer._targets.ne(-100).sum()) == int(stats.num_valid) == 24
    stock = remove_patch(model)
    row = {key: torch.tensor([value]) for key, value in data[0].items()}
    with torch.no_grad():
        right = stock(**row).logits.argmax(-1) == row["labels"]
    assert metrics["eval_mean_token_accuracy"] == right.double().mean()


class FusedSeq2SeqTrainer(FusedHeadTrainer, Seq2SeqTrainer):
    """As the README has it."""


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_evaluation_by_generation(smoothing: float, tmp_path: Path) -> None:
    stock = build(T5)
    stock.generation_config.max_new_tokens = 6
    settings = {
        "output_dir": str(tmp_path),
        "predict_with_generate": True,
        "label_smoothing_factor": smoothing,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 2,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.02,
    }
    found = {}
    truth = copy.deepcopy(stock).double()
    for key, trainer_class, model in (
        ("fused", FusedSeq2SeqTrainer, copy.deepcopy(stock)),
        ("by the patch alone", Seq2SeqTrainer, apply_patch(copy.deepcopy(stock))),
        ("stock", Seq2SeqTrainer, stock),
        ("truth", Seq2SeqTrainer, truth),
    ):
        if smoothing and key == "by the patch alone":
            continue
        trainer = trainer_class(
            model,
            Seq2SeqTrainingArguments(**settings),
            data_collator=collator(model),
            train_dataset=sentences(),
            eval_dataset=sentences(),
            compute_metrics=lambda p: {"sum": float(p.predictions.clip(0).sum())},
        )
        trainer.train()
        trainer.evaluate()
        assert patch_report(model).fused == (key in ("fused", "by the patch alone"))
        found[key] = {name: history(trainer, name) for name in ("loss", "eval_loss", "eval_sum")}
    for key in found.keys() - {"stock", "truth"}:
        assert torch.equal(found[key]["eval_sum"], found["stock"]["eval_sum"])
        for name in ("loss", "eval_loss"):
            ours, theirs = found[key][name].float(), found["stock"][name].float()
            assert_close_as_torch(f"{key} {name}", ours, theirs, found["truth"][name])
