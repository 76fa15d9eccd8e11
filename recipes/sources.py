"""Models and texts by name, for the recipes: from a hub, from local files, or made on the spot."""

from __future__ import annotations

import copy
import importlib
import inspect
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TINY_VOCABULARY = 8192
# Of the tokenizer that is trained here.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# What loading a model or a data set raises when it is the user's name for it that is wrong.
_LOAD_ERRORS = (OSError, ValueError, ImportError, KeyError, RuntimeError)


class UserError(Exception):
    """Something the user can mend; its text is one line."""


def load_texts(name: str, column: str) -> Iterable[str]:
    """The documents of a data set.

    Args:
        name: "python-docs", a local .txt, .jsonl or .json file, or a data set of the hub, as
            "owner/name" or "owner/name:config" (its split "train" is used).
        column: The column or key that holds the text; a .txt file is one document.

    Raises:
        UserError: If there is no such file, data set or column.
    """
    if name == "python-docs":
        from pydoc_data.topics import topics

        return [topics[title] for title in sorted(topics)]
    path = Path(name)
    if path.suffix == ".txt":
        return [_read(path)]
    rows = load_rows(name, column)
    if path.suffix in (".jsonl", ".json"):
        # All of a file's lines are checked before the first is used.
        rows = list(rows)
        for number, row in enumerate(rows, start=1):
            if not isinstance(row[column], str):
                raise UserError(f"{path}, line {number}: {column!r} must hold text")
    return (row[column] for row in rows)


def load_rows(name: str, column: str) -> Iterable[dict[str, Any]]:
    """The rows of a .jsonl file or a data set of the hub.

    Args:
        name: As for `load_texts`.
        column: What every row must have.

    Raises:
        UserError: If there is no such file, data set or column.
    """
    path = Path(name)
    if path.suffix in (".jsonl", ".json"):
        return _json_rows(path, column)
    repository, _, config = name.partition(":")
    try:
        dataset = load_dataset(repository, config or None, split="train")
    except _LOAD_ERRORS as error:
        raise UserError(f"--dataset {name}: cannot be loaded, {_first_line(error)}") from error
    if column not in dataset.column_names:
        raise UserError(_no_column(name, column, dataset.column_names))
    return dataset


def load_config(name: str) -> PretrainedConfig | None:
    """The config of a folder or hub model; None for "tiny" and .gguf files.

    Raises:
        UserError: If there is no such model.
    """
    if name == "tiny" or name.endswith(".gguf"):
        return None
    try:
        return AutoConfig.from_pretrained(name)
    except _LOAD_ERRORS as error:
        raise UserError(f"--model {name}: cannot be loaded, {_first_line(error)}") from error


def load_model(
    name: str, texts: Iterable[str], seq_len: int, tensor_parallel: int = 1
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: "tiny", a .gguf file, a local folder, or a model of the hub.
        texts: What the tokenizer of "tiny" is trained on.
        seq_len: The longest sequence that the model will see.
        tensor_parallel: Over how many processes every layer of a folder or hub model is cut.

    Raises:
        UserError: If there is no such model, or `seq_len` is too long for it.
    """
    if name == "tiny":
        tokenizer = train_tokenizer(texts)
        return build_tiny(len(tokenizer), seq_len), tokenizer
    path = Path(name)
    if path.suffix == ".gguf" and not path.is_file():
        raise UserError(f"--model {name}: no such file")
    if name.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"--model {name}: no such folder")
    try:
        if path.suffix == ".gguf":
            model = load_gguf(path)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        else:
            # An adapter keeps the name of its base, which must not depend on the working folder.
            where = str(path.resolve()) if path.is_dir() else name
            model = AutoModelForCausalLM.from_pretrained(where, **_cut_over(tensor_parallel))
            tokenizer = AutoTokenizer.from_pretrained(where)
    except _LOAD_ERRORS as error:
        raise UserError(f"--model {name}: cannot be loaded, {_first_line(error)}") from error
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise UserError(f"--seq-len {seq_len}: {name} reads at most {longest} tokens")
    return model, tokenizer


def _cut_over(size: int) -> dict[str, Any]:
    """What has every process read its share of each layer."""
    if size == 1:
        return {}
    distributed: Any = importlib.import_module("transformers.distributed")
    if "tp_size" in inspect.signature(distributed.DistributedConfig).parameters:
        return {"distributed_config": distributed.DistributedConfig(tp_plan="auto", tp_size=size)}
    return {"tp_plan": "auto", "tp_size": size}  # Earlier versions of transformers.


def load_gguf(path: Path) -> PreTrainedModel:
    """The model of a GGUF file, unpacked to float32 and ready to be trained."""
    options = {"gguf_file": path.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions keep the weights packed wherever they find a kernel for them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(path.parent, **options)
    # Unpacked or not, a model from GGUF counts as quantized, and the Trainer refuses those. The
    # same weights in a model of the same class do not.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(packed)(config)
    model.load_state_dict(packed.state_dict())
    model.name_or_path = str(path)
    return model


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of up to `TINY_VOCABULARY` words, learned from `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=PLAIN_TEMPLATE,
    )


def build_tiny(vocab_size: int, seq_len: int) -> LlamaForCausalLM:
    """A Llama with two layers and random weights: most of its work is in the head, as intended."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(seq_len, 1024),
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def pack(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_blocks: int
) -> Dataset:
    """Documents end to end, cut into blocks of `seq_len` tokens; every token has a label.

    Args:
        texts: The documents; no more of them are read than `max_blocks` needs.
        tokenizer: Its end-of-text token, where it has one, stands between documents.
        seq_len: Tokens a block; what is left over at the end is dropped.
        max_blocks: The most blocks to make.

    Raises:
        UserError: If the text is too short for two blocks, one to train on and one to evaluate on.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encoded() -> Iterator[tuple[list[int], list[int]]]:
        left = iter(texts)
        while some := list(islice(left, 100)):
            # `verbose`: documents longer than the model reads are divided, no reason to warn.
            for ids in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
                yield ids + end, ids + end

    return blocks_of(encoded(), seq_len, max_blocks)


def blocks_of(
    encoded: Iterable[tuple[list[int], list[int]]], seq_len: int, max_blocks: int
) -> Dataset:
    """Documents as ids and labels, end to end, in blocks of `seq_len` tokens with some label.

    Args:
        encoded: No more of them are read than `max_blocks` needs.
        seq_len: Tokens a block; what is left over at the end is dropped.
        max_blocks: The most blocks to make.

    Raises:
        UserError: If there is too little for two blocks, one to train on and one to evaluate on.
    """
    blocks: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    ids: list[int] = []
    labels: list[int] = []
    found = 0
    for more_ids, more_labels in encoded:
        ids, labels, found = ids + more_ids, labels + more_labels, found + len(more_ids)
        while len(ids) >= seq_len:
            # The first label of a block has no token before it to be predicted from.
            if any(label >= 0 for label in labels[1:seq_len]):
                blocks["input_ids"].append(ids[:seq_len])
                blocks["labels"].append(labels[:seq_len])
            ids, labels = ids[seq_len:], labels[seq_len:]
        if len(blocks["labels"]) >= max_blocks:
            break
    if len(blocks["labels"]) < 2:
        raise UserError(
            f"the text has {found} tokens, too short for two blocks of --seq-len {seq_len}: "
            "give more text or a smaller --seq-len"
        )
    return Dataset.from_dict({name: rows[:max_blocks] for name, rows in blocks.items()})


def _json_rows(path: Path, column: str) -> list[dict[str, Any]]:
    """The objects of a file with one a line, all checked before the first is used."""
    rows = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON, {error.msg}") from error
        if not isinstance(record, dict) or column not in record:
            keys = list(record) if isinstance(record, dict) else []
            raise UserError(_no_column(f"{path}, line {number}", column, keys))
        rows.append(record)
    return rows


def _read(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"--dataset {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--dataset {path}: cannot be read, {_first_line(error)}") from error


def _no_column(where: str, column: str, columns: list[str]) -> str:
    names = ", ".join(columns) or "none"
    return f"{where}: no column {column!r}, it has {names}; name one with --text-column"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
