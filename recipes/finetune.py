"""Fine-tunes a causal language model whose loss never makes logits.

    python recipes/finetune.py                                # a small Llama, made on the spot
    python recipes/finetune.py --chat --dataset chats.jsonl   # loss on the assistant's turns only
    python recipes/finetune.py --resume --output-dir folder   # on from its last checkpoint
    python recipes/finetune.py --model HuggingFaceTB/SmolLM2-135M --dataset my_notes.txt
    torchrun --nproc-per-node=2 recipes/finetune.py           # on two GPUs, or two CPU processes
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/finetune.py --full

Without options it needs no hub and no GPU: the model is built and its tokenizer trained here, and
the text is the documentation that every Python carries; the same steps run with the stock head and
with the fused one. The lines that matter are in `train()`:
`FusedHeadTrainer` stands where `transformers.Trainer` would, and nothing else changes.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import NoReturn

import datasets
import torch
import transformers
from accelerate import PartialState
from card import write_card
from chat import contents, load_chats, pack_chats
from head_memory import measure_head_bytes
from launch import Launch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from sources import UserError, load_config, load_model, load_texts, pack
from summary import Run, comparison, learned_line, saved_line
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from hf_fused_head import FusedHeadTrainer, UnsupportedModelError

EVAL_BLOCKS = 16


class StepClock(TrainerCallback):
    """Milliseconds of every optimizer step, the device's work included."""

    def __init__(self) -> None:
        self.steps_ms: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._begin = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps_ms.append((self._now() - self._begin) * 1e3)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = OneLineParser(description="Fine-tunes a causal language model without logits.")
    add = parser.add_argument
    add("--model", default="tiny", help="tiny (default), hub name, local folder or .gguf file")
    add(
        "--dataset",
        default="python-docs",
        help="python-docs (default), local .txt / .jsonl file, or hub name[:config]",
    )
    add("--text-column", help="column with the text (default: text; with --chat: messages)")
    add("--full", action="store_true", help="train every weight instead of LoRA adapters")
    add(
        "--chat",
        action="store_true",
        help="the column holds messages: the model's chat template, loss on assistant turns only",
    )
    add(
        "--compare",
        action=argparse.BooleanOptionalAction,
        help="run the same steps with the stock head as well; default: for tiny, in one process",
    )
    add("--save-steps", type=positive, metavar="N", help="a checkpoint every N steps, to resume")
    add("--resume", action="store_true", help="on from the last checkpoint in --output-dir")
    add("--max-steps", type=positive, default=40, metavar="N", help="default: 40")
    add("--seq-len", type=positive, default=256, metavar="N", help="tokens a block, default: 256")
    add("--batch-size", type=positive, default=8, metavar="N", help="blocks a step, default: 8")
    add("--lr", type=float, help="default: 2e-3 for tiny, else 2e-4 (LoRA) or 2e-5 (--full)")
    add("--seed", type=int, default=0, help="default: 0")
    add("--output-dir", type=Path, help="must be new or empty; default: outputs/finetune-<time>")
    options = parser.parse_args(argv)
    if options.lr is None:
        options.lr = 2e-3 if options.model == "tiny" else 2e-5 if options.full else 2e-4
    if options.text_column is None:
        options.text_column = "messages" if options.chat else "text"
    if options.chat and options.dataset == "python-docs":
        parser.error("--chat needs a --dataset of conversations")
    if options.resume and options.output_dir is None:
        parser.error("--resume needs the --output-dir of the run to go on with")
    return options


def positive(text: str) -> int:
    """An integer above zero, for argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def output_folder(wanted: Path | None, is_main: bool, resume: bool) -> Path:
    """The folder to write to, which must not hold anything before the main process writes."""
    # Absolute, since PEFT writes into an adapter where its base is.
    folder = (wanted or Path("outputs") / time.strftime("finetune-%Y%m%d-%H%M%S")).resolve()
    if resume:
        if not folder.is_dir() or get_last_checkpoint(folder) is None:
            raise UserError(f"--resume: {folder} has no checkpoint, start with --save-steps N")
        return folder
    if not is_main:
        return folder
    if folder.is_file():
        raise UserError(f"--output-dir {wanted} is a file: name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--output-dir {wanted} is not empty: name a new folder, or pass --resume")
    return folder


def with_adapters(
    model: PreTrainedModel, name: str, output: Path, tokenizer, write: bool
) -> PeftModel:
    """LoRA on every linear layer, and on the head of "tiny", which was never trained."""
    config = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if name == "tiny":
        # These weights are saved nowhere else: an adapter without them could not be loaded again.
        base = output / "base"
        if write:
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
        model.name_or_path = str(base)
        linear = [key for key, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
        config.target_modules = {key.rsplit(".", 1)[-1] for key in linear}
    return get_peft_model(model, config)


def train(
    model: torch.nn.Module,
    data: datasets.DatasetDict,
    options: argparse.Namespace,
    stock: bool,
    launch: Launch,
) -> tuple[Trainer, Run]:
    """Trains `model` in place, with the stock head or the fused one."""
    arguments = TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=0.0,
        logging_steps=max(1, options.max_steps // 10),
        save_strategy="no" if stock or options.save_steps is None else "steps",
        save_steps=options.save_steps or 1,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Without it, processes on a machine without GPUs would not know of one another.
        use_cpu=not torch.cuda.is_available(),
        bf16=launch.bf16,
        ddp_find_unused_parameters=False,
        report_to="none",
        seed=options.seed,
    )
    clock = StepClock()
    trainer_class = Trainer if stock else FusedHeadTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        callbacks=[clock],
    )
    head_bytes = None
    if launch.processes == 1:
        model.train()
        rows = [data["train"][i] for i in range(batch_blocks(data, options))]
        batch = trainer.data_collator(rows)
        batch = {name: tensor.to(arguments.device) for name, tensor in batch.items()}
        head_bytes = measure_head_bytes(model, batch)
    before = {} if launch.processes > 1 else evaluated(trainer, "before")
    last = get_last_checkpoint(options.output_dir) if options.resume and not stock else None
    trainer.train(resume_from_checkpoint=last)
    history = trainer.state.log_history
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    after = evaluated(trainer, "eval")
    # The first step warms caches up, so it is no measure of the others.
    step_ms = statistics.median(clock.steps_ms[1:] or clock.steps_ms)
    return trainer, Run(losses, before, after, step_ms, head_bytes)


def evaluated(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Loss and perplexity, and what the fused head adds to them."""
    metrics = trainer.evaluate(metric_key_prefix=prefix)
    names = ("loss", "perplexity", "mean_token_accuracy", "entropy")
    found = {n: metrics[f"{prefix}_{n}"] for n in names if f"{prefix}_{n}" in metrics}
    return {"perplexity": math.exp(found["loss"]), **found}


def batch_blocks(data: datasets.DatasetDict, options: argparse.Namespace) -> int:
    """Blocks in a full batch, which a short text may not fill."""
    return min(options.batch_size, len(data["train"]))


def run(options: argparse.Namespace, launch: Launch) -> None:
    """Prepares, trains, compares, saves, and says what came of it."""
    console = Console(soft_wrap=True, quiet=not launch.is_main)
    launch.check(options.seq_len, bool(options.compare), options.full)
    if options.compare is None:
        # Resumed steps are not all of them, so stock would take others.
        options.compare = options.model == "tiny" and launch.processes == 1 and not options.resume
    launch.check_model(options.model, load_config(options.model) if launch.size("tp") > 1 else None)
    options.output_dir = output_folder(options.output_dir, launch.is_main, options.resume)
    set_seed(options.seed)
    chats = load_chats(options.dataset, options.text_column) if options.chat else []
    texts = contents(chats) or load_texts(options.dataset, options.text_column)
    if options.model == "tiny":
        texts = list(texts)
    model, tokenizer = load_model(options.model, texts, options.seq_len, launch.size("tp"))
    # Sequence and tensor parallel processes share their blocks, the others have each their own.
    wanted = options.max_steps * options.batch_size * launch.processes + EVAL_BLOCKS
    if options.chat:
        blocks = pack_chats(chats, tokenizer, options.seq_len, wanted)
    else:
        blocks = pack(texts, tokenizer, options.seq_len, wanted)
    held_out = min(EVAL_BLOCKS, max(1, len(blocks) // 10))
    data = blocks.train_test_split(test_size=held_out, seed=options.seed)
    if not options.full:
        model = with_adapters(
            model, options.model, options.output_dir, tokenizer, write=launch.is_main
        )
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    console.print(
        f"{options.model}: {model.num_parameters():,} weights, {trainable:,} of them trained, "
        f"{vocab_size} words; {len(data['train'])} blocks of {options.seq_len} tokens to train "
        f"on, {held_out} to evaluate on"
    )
    stock = None
    if options.compare:
        twin = copy.deepcopy(model)
        console.print("Stock head:")
        stock = train(twin, data, options, stock=True, launch=launch)[1]
        del twin
        console.print("Fused head:")
    trainer, fused = train(model, data, options, stock=False, launch=launch)
    save(trainer, model, tokenizer, options, launch)
    if launch.is_main:
        card(options, fused, trainable)
    if stock is not None:
        console.print(comparison(stock, fused))
    console.print(
        f"Loss {fused.losses[0][1]:.3f} -> {fused.losses[-1][1]:.3f}, evaluation loss "
        f"{fused.eval_loss:.3f}, {fused.step_ms:.0f} ms a step; saved in {options.output_dir}"
    )
    if fused.before:
        console.print(learned_line(fused))
    tokens = (
        batch_blocks(data, options) * options.seq_len // (launch.size("cp") * launch.size("sp"))
    )
    console.print(saved_line(fused, stock, tokens, vocab_size, options.max_steps))


def save(
    trainer: Trainer,
    model: torch.nn.Module,
    tokenizer,
    options: argparse.Namespace,
    launch: Launch,
) -> None:
    """Writes the model or adapter, the tokenizer and the log; all processes must come here."""
    if launch.engine or launch.size("tp") > 1:
        # Only the Trainer knows how the parts are put together.
        trainer.save_model(str(options.output_dir))
    elif launch.is_main:
        # The base's embeddings are saved already, so PEFT need not copy them into the adapter.
        keep = {} if options.full else {"save_embedding_layers": False}
        model.save_pretrained(options.output_dir, **keep)
    if launch.is_main:
        tokenizer.save_pretrained(options.output_dir)
        trainer.save_state()


def card(options: argparse.Namespace, fused: Run, trainable: int) -> None:
    """Writes the model card of a run."""
    write_card(
        options.output_dir,
        base=options.model,
        dataset=options.dataset,
        adapter=not options.full,
        facts={
            "loss on": "assistant turns" if options.chat else "every token",
            "trained weights": f"{trainable:,}",
            "steps": options.max_steps,
            "blocks a step and process": options.batch_size,
            "tokens a block": options.seq_len,
            "peak learning rate": options.lr,
            "seed": options.seed,
        },
        metrics=fused.after,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the recipe; 2 and one line on stderr when something the user named is wrong."""
    options = parse(argv)
    launch = Launch.from_environment(os.environ)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    # Of PEFT for every checkpoint of adapters on the head, whose base is saved beside them.
    warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
    try:
        run(options, launch)
    except (UserError, UnsupportedModelError) as error:
        if launch.is_main:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if launch.processes > 1:
        PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
