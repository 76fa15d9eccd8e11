"""Conversations for the recipes: through the chat template, with loss on assistant turns only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import TemplateError
from sources import UserError, blocks_of, load_rows
from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
IGNORED = -100


def load_chats(name: str, column: str) -> list[Messages]:
    """The conversations of a .jsonl file or a data set of the hub.

    Args:
        name: As for `load_texts`.
        column: The column or key that holds a list of {"role": ..., "content": ...}.

    Raises:
        UserError: If there is no such data, or a row is no conversation with an assistant's turn.
    """
    chats = []
    for number, row in enumerate(load_rows(name, column), start=1):
        messages = row[column]
        is_chat = isinstance(messages, list) and all(
            isinstance(message, dict) and {"role", "content"} <= message.keys()
            for message in messages
        )
        if not is_chat or not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"--dataset {name}, conversation {number}: {column!r} must hold messages with role "
                "and content, one of them the assistant's"
            )
        chats.append(messages)
    return chats


def contents(chats: Iterable[Messages]) -> list[str]:
    """What was said, for a tokenizer that is trained on it."""
    return [str(message["content"]) for messages in chats for message in messages]


def pack_chats(
    chats: Iterable[Messages], tokenizer: PreTrainedTokenizerBase, seq_len: int, max_blocks: int
) -> Any:
    """Conversations end to end, as `pack`; only tokens of assistant turns have a label.

    Raises:
        UserError: If the tokenizer has no chat template, or one that does not go turn by turn.
    """
    if tokenizer.chat_template is None:
        raise UserError("--chat: this model's tokenizer has no chat template, use one that has")
    if not tokenizer.is_fast:
        raise UserError("--chat: this model's tokenizer cannot say where its tokens begin")
    return blocks_of(_encoded(chats, tokenizer), seq_len, max_blocks)


def _encoded(
    chats: Iterable[Messages], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation."""
    for messages in chats:
        text, spans = _rendered(messages, tokenizer)
        tokens = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        labels = [
            token if any(begin <= start < end for begin, end in spans) else IGNORED
            for token, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
        ]
        yield tokens["input_ids"], labels


def _rendered(
    messages: Messages, tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's turns are in it, ends included."""

    def render(count: int, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:count], tokenize=False, add_generation_prompt=prompt
        )

    try:
        text, spans = render(len(messages)), []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                before, after = render(index, prompt=True), render(index + 1)
                if not text.startswith(after) or not after.startswith(before):
                    raise UserError(
                        "--chat: the chat template of this model changes earlier turns, so that "
                        "its answers cannot be found; use one that goes turn by turn"
                    )
                spans.append((len(before), len(after)))
    except TemplateError as error:
        raise UserError(f"--chat: the chat template refuses a conversation, {error}") from error
    return text, spans
