"""Run by test_trainer_on_gpu.py in its own process: one run of the real Trainer, fused and stock.

The truth is the stock Trainer in float64 with none of the case's settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from accelerate.state import AcceleratorState
from causal_loss import causal_loss
from oracle import assert_means_close, products_dtype
from torch import Tensor, nn
from trains_like import assert_gradients_close

from hf_fused_head import FusedHeadTrainer, patch_report

VOCAB, LENGTH, ROWS, STEPS = 503, 24, 16, 4
HIDDEN = 64
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_DECODER, tie_word_embeddings=False)
    )


def gemma2() -> Any:
    """A head that is tied, and whose softcap is felt."""
    config = transformers.Gemma2Config(
        **_DECODER,
        tie_word_embeddings=True,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=16,
        sliding_window=LENGTH,
    )
    return transformers.Gemma2ForCausalLM(config)


def with_adapters(model: Any, **options: Any) -> Any:
    """LoRA on the head and on the body, off its start, where it does nothing."""
    config = peft.LoraConfig(r=16, target_modules=["q_proj", "down_proj", "lm_head"], **options)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            # On the CPU, so that the numbers are the same wherever the model is.
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, device="cpu"))
    return adapted


def lora() -> Any:
    return with_adapters(llama())


def dora() -> Any:
    return with_adapters(llama(), use_dora=True)


def quantised(bits: int, folder: Path) -> Any:
    """Llama with a body of 4 or 8 bits; its head keeps its weight."""
    llama().save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32
    )


class Case(NamedTuple):
    """One way to train.

    Attributes:
        arguments: Of `TrainingArguments`, beside the plain ones.
        build: Makes the model.
        setting: A statement about TF32 that is made first, as a user's script does.
        engine: Asked for by name on a GPU; None where the head runs its own forward.
        bits: Of the body's weights, by bitsandbytes; 0 to leave them.
    """

    arguments: dict[str, Any]
    build: Callable[[], Any] = llama
    setting: str = ""
    engine: str | None = "triton"
    bits: int = 0

    def model(self, folder: Path, exact: bool = False) -> Any:
        """The same at every call, or the same in float64."""
        torch.manual_seed(1)
        if not self.bits:
            model = self.build()
        else:
            body = quantised(self.bits, folder / "whole")
            model = with_adapters(body.dequantize() if exact else body)
        if exact:
            model = model.double()
            inner = model.get_base_model() if hasattr(model, "get_base_model") else model
            inner.loss_function = causal_loss
        return model

    def plain_arguments(self) -> dict[str, Any]:
        """Those of the truth, which has neither speed nor rounding of its own."""
        own = ("bf16", "fp16", "tf32", "torch_compile")
        plain = {key: value for key, value in self.arguments.items() if key not in own}
        return {**plain, "optim": "adamw_torch"} if self.bits else plain


_ACCUMULATION = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "label_smoothing_factor": 0.1,
}
CASES = {
    "fp32": Case({}),
    "bf16": Case({"bf16": True}),
    "fp16": Case({"fp16": True}),
    "tf32": Case({"tf32": True}),
    "tf32 beside bf16": Case({"tf32": True, "bf16": True}),
    "tf32 by the older API": Case({}, setting="torch.backends.cuda.matmul.allow_tf32 = True"),
    "tf32 by the older function": Case({}, setting="torch.set_float32_matmul_precision('high')"),
    "tf32 by the newer API": Case({}, setting="torch.backends.cuda.matmul.fp32_precision = 'tf32'"),
    "tf32 by the older API, then off": Case(
        {"tf32": False}, setting="torch.backends.cuda.matmul.allow_tf32 = True"
    ),
    "compile": Case({"torch_compile": True}),
    "compile beside bf16": Case({"torch_compile": True, "bf16": True}),
    "accumulation": Case(_ACCUMULATION),
    "accumulation beside bf16": Case({**_ACCUMULATION, "bf16": True}),
    "lora": Case({}, build=lora),
    "lora beside bf16": Case({"bf16": True}, build=lora),
    "dora": Case({}, build=dora, engine=None),
    "dora beside bf16": Case({"bf16": True}, build=dora, engine=None),
    "softcap": Case({}, build=gemma2),
    "softcap beside bf16": Case({"bf16": True}, build=gemma2),
    "8 bits": Case({"bf16": True, "optim": "adamw_bnb_8bit", "learning_rate": 1e-2}, bits=8),
    "4 bits": Case({"bf16": True, "optim": "adamw_bnb_8bit", "learning_rate": 1e-2}, bits=4),
}


def rows() -> list[dict[str, list[int]]]:
    """Sequences with unequal numbers of labels; one has none."""
    generator = torch.Generator().manual_seed(2)
    data = []
    for index in range(ROWS):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator).tolist()
        ignored = LENGTH if index == 5 else index
        data.append({"input_ids": ids, "labels": [-100] * ignored + ids[ignored:]})
    return data


def arguments(folder: Path, changes: dict[str, Any]) -> Any:
    """Plain descent, so that weights follow gradients and not their signs."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.5,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**settings, **changes})


class Run(NamedTuple):
    """Losses of training, then of evaluation, and how far the weights moved."""

    losses: Tensor
    moved: dict[str, Tensor | None]


def run(trainer_class: type, model: nn.Module, args: Any, **options: Any) -> Run:
    """Trains and evaluates."""
    # The precision that accelerate keeps for a process is not the next trainer's.
    AcceleratorState._reset_state()
    data: Any = rows()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: parameter.detach().cpu().clone() for name, parameter in trained.items()}
    trainer = trainer_class(
        model=model, args=args, train_dataset=data, eval_dataset=data, **options
    )
    trainer.train()
    trainer.evaluate()
    # A step that fp16's scaler skips compares nothing.
    assert not trainer.accelerator.optimizer_step_was_skipped
    history, keys = trainer.state.log_history, ("loss", "eval_loss")
    losses = [entry[key] for key in keys for entry in history if key in entry]
    moved = {name: p.detach().cpu() - start[name] for name, p in trained.items()}
    return Run(torch.tensor(losses, dtype=torch.float64), moved)


def precision(args: Any) -> torch.dtype:
    """A dtype with as many digits as products have."""
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else products_dtype(torch.float32)


def main(name: str, folder: Path) -> None:
    """Holds losses and weights of one case against those of stock."""
    case = CASES[name]
    exec(case.setting)
    plain_args = arguments(folder, case.plain_arguments())
    truth = run(transformers.Trainer, case.model(folder, exact=True), plain_args)
    args = arguments(folder, case.arguments)
    stock = run(transformers.Trainer, case.model(folder), args)
    model = case.model(folder)
    on_gpu = torch.cuda.is_available() and case.engine is not None
    options = {"head_options": {"impl": case.engine}} if on_gpu else {}
    ours = run(FusedHeadTrainer, model, args, **options)
    report = patch_report(model)
    assert report.fused, report
    assert len(truth.losses) == STEPS + 1
    losses = (ours.losses.float(), stock.losses, truth.losses)
    assert_means_close("losses", *losses, ROWS * LENGTH // STEPS, precision(args))
    assert_gradients_close(ours.moved, stock.moved, truth.moved)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
