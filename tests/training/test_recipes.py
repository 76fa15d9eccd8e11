"""The recipes do what they say, on a machine without a hub, and mistakes cost one line."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import ModelCard
from oracle import assert_close_as_torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.newest

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = ["--max-steps", "6", "--seq-len", "64", "--batch-size", "4"]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`recipes/finetune.py` as a module, run from an empty folder."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("finetune")


def numbers(pattern: str, text: str) -> list[float]:
    """The groups of the one place where `pattern` is found."""
    found = re.findall(pattern, text)
    assert len(found) == 1, text
    return [float(group) for group in found[0]]


def test_default_run(tmp_path: Path) -> None:
    """The command of the README, with fewer steps: the loss falls and it says what was saved."""
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "no-hub")}
    # PEFT 0.21 asks transformers 5.23 for a property by its old name.
    offline["PYTHONWARNINGS"] = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    done = subprocess.run(
        [sys.executable, str(RECIPES / "finetune.py"), *SMALL],
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert "100%" in done.stderr  # the progress bar
    assert "mean_token_accuracy" in done.stdout
    first, last = numbers(r"Loss ([\d.]+) -> ([\d.]+),", done.stdout)
    assert last < first
    final = done.stdout.strip().splitlines()[-1]
    shapes = r"([\d.]+) MiB of float32 \((\d+) tokens x (\d+) words\) in each of (\d+) steps"
    measured = r"Measured peak of head and loss: ([\d.]+) MiB"
    logits_mib, tokens, vocab_size, steps, peak_mib = numbers(rf"{shapes}\. {measured}", final)
    assert (tokens, vocab_size, steps) == (4 * 64, 8192, 6)
    assert f"{logits_mib:.1f}" == f"{tokens * vocab_size * 4 / 2**20:.1f}"
    assert 0 < peak_mib < logits_mib
    assert [folder.name for folder in (tmp_path / "outputs").iterdir()]


def test_compare(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock and fused take the same steps; losses, time and memory stand side by side."""
    output = tmp_path / "run"
    assert recipe.main([*SMALL, "--compare", "--output-dir", str(output)]) == 0
    shown = capsys.readouterr().out
    losses = re.findall(r"loss at step (\d+) +│ +([\d.]+) │ +([\d.]+) │", shown)
    assert [step for step, _, _ in losses] == list("123456")
    stock, fused = (torch.tensor([float(row[i]) for row in losses]) for i in (1, 2))
    # Six printed decimals: as near as float32 holds a loss of this size, a few steps on.
    assert_close_as_torch("loss", fused, stock, stock.double())
    numbers(r"evaluation loss +│ +([\d.]+) │ +([\d.]+) │", shown)
    assert min(numbers(r"step, median ms +│ +([\d.]+) │ +([\d.]+) │", shown)) > 0
    memory = numbers(r"peak head memory, MiB +│ +([\d.]+) │ +([\d.]+) │", shown)
    assert memory[1] < memory[0]
    final = shown.strip().splitlines()[-1]
    measured = r"Measured peak of head and loss: ([\d.]+) MiB instead of ([\d.]+) MiB\."
    assert numbers(measured, final) == memory[::-1]


def test_what_is_saved_loads_again(recipe: ModuleType, tmp_path: Path) -> None:
    """The adapter with its base, the tokenizer and the log; the loaded model is the trained one."""
    output = tmp_path / "run"
    assert recipe.main([*SMALL, "--output-dir", str(output)]) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert "perplexity" in log[0] and [entry for entry in log if "eval_entropy" in entry]
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoPeftModelForCausalLM.from_pretrained(output)
    texts = recipe.load_texts("python-docs", "text")
    # The same blocks and the same split as in the run, by the same seed.
    blocks = recipe.pack(texts, tokenizer, 64, 6 * 4 + recipe.EVAL_BLOCKS)
    held_out = blocks.train_test_split(test_size=len(blocks) // 10, seed=0)["test"]
    ids = torch.tensor(held_out["input_ids"])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        truth = model.double()(input_ids=ids, labels=ids).loss
    logged = torch.tensor([entry["eval_loss"] for entry in log if "eval_loss" in entry])
    assert_close_as_torch("eval_loss", logged, loss[None], truth[None])


def test_full_fine_tuning_of_a_local_model(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--full trains every weight; its result is a folder that --model takes."""
    first, second = tmp_path / "first", tmp_path / "second"
    text = tmp_path / "notes.jsonl"
    lines = [json.dumps({"body": "the cat sat on the mat " * 40, "id": i}) for i in range(30)]
    text.write_text("\n".join(lines))
    local = ["--dataset", str(text), "--text-column", "body"]
    assert recipe.main([*SMALL, "--full", *local, "--output-dir", str(first)]) == 0
    model = AutoModelForCausalLM.from_pretrained(first)
    assert type(model).__name__ == "LlamaForCausalLM"
    again = ["--model", str(first), "--full", "--lr", "1e-3", "--output-dir", str(second)]
    capsys.readouterr()
    assert recipe.main([*SMALL, *again, *local]) == 0
    trained = AutoModelForCausalLM.from_pretrained(second)
    before, after = model.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]


def test_the_default_run_learns_and_shows_stock_beside_fused(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = [*SMALL, "--max-steps", "16"]
    assert recipe.main([*longer, "--output-dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    before, after = numbers(r"Evaluation perplexity (\d+) -> (\d+), accuracy", shown)
    assert after < before / 2
    first, last = numbers(r"accuracy ([\d.]+)% -> ([\d.]+)%", shown)
    assert last > first
    numbers(r"evaluation perplexity +│ +([\d.]+) │ +([\d.]+) │", shown)


def test_a_run_resumes_where_it_stopped(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rest of the steps gives the adapter that all of them gave."""
    output = tmp_path / "run"
    options = [*SMALL, "--no-compare", "--output-dir", str(output)]
    assert recipe.main([*options, "--save-steps", "3"]) == 0
    whole = AutoPeftModelForCausalLM.from_pretrained(output).state_dict()
    shutil.rmtree(output / "checkpoint-6")
    (output / "adapter_model.safetensors").unlink()
    capsys.readouterr()
    assert recipe.main([*options, "--resume"]) == 0
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 7))
    resumed = AutoPeftModelForCausalLM.from_pretrained(output).state_dict()
    assert whole.keys() == resumed.keys()
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_an_adapter_loads_from_any_folder(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by a relative name, read from elsewhere; its base too, where that is a folder."""
    assert recipe.main([*SMALL, "--no-compare", "--output-dir", "first"]) == 0
    again = ["--model", "./first/base", "--output-dir", "second"]
    assert recipe.main([*SMALL, *again]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("first", "second"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)


def test_the_model_card_says_what_was_trained(recipe: ModuleType, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert recipe.main([*SMALL, "--no-compare", "--output-dir", str(output)]) == 0
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags
    assert "LoRA adapters for `tiny`, trained on `python-docs`" in card.text
    for line in ("| loss on | every token |", "| steps | 6 |", "| tokens a block | 64 |"):
        assert line in card.text
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    (logged,) = (entry["eval_perplexity"] for entry in log if "eval_perplexity" in entry)
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert shown["perplexity"] == round(logged, 6)
    assert "More Information Needed" not in card.text


CHATS = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"What is {i} + 1?"},
            {"role": "assistant", "content": f"That is {i + 1}."},
            {"role": "user", "content": "And twice that?"},
            {"role": "assistant", "content": f"{2 * i + 2}, of course."},
        ]
    }
    for i in range(60)
]


def test_chats_have_loss_on_assistant_turns_only(recipe: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(map(json.dumps, CHATS)))
    chats = recipe.load_chats(str(file), "messages")
    tokenizer = recipe.load_model("tiny", recipe.contents(chats), 64)[1]
    blocks = recipe.pack_chats(chats, tokenizer, 64, 1000)
    ids = [token for row in blocks["input_ids"] for token in row]
    labels = [label for row in blocks["labels"] for label in row]
    assert len(ids) == len(labels)
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    text = tokenizer.decode([label for label in labels if label != -100])
    said = "".join(
        f"{message['content']}<|endoftext|>\n"
        for chat in CHATS
        for message in chat["messages"]
        if message["role"] == "assistant"
    )
    # What is left over at the end makes no block.
    assert text and said.startswith(text)
    rest = tokenizer.decode([t for t, label in zip(ids, labels, strict=True) if label == -100])
    assert "What is 3 + 1?" in rest and "of course" not in rest and "<|assistant|>" in rest


def test_chat_training(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    options = ["--chat", "--dataset", "chats.jsonl", "--lr", "1e-2", "--output-dir", "run"]
    assert recipe.main([*SMALL, *options]) == 0
    before, after = numbers(r"Evaluation perplexity (\d+) -> (\d+),", capsys.readouterr().out)
    assert after < before / 2
    assert "| loss on | assistant turns |" in (tmp_path / "run" / "README.md").read_text()


def test_a_template_that_changes_earlier_turns_is_refused(recipe: ModuleType) -> None:
    chats = [chat["messages"] for chat in CHATS]
    tokenizer = recipe.load_model("tiny", recipe.contents(chats), 64)[1]
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(recipe.UserError, match="changes earlier turns"):
        recipe.pack_chats(chats, tokenizer, 64, 10)
    tokenizer.chat_template = None
    with pytest.raises(recipe.UserError, match="has no chat template"):
        recipe.pack_chats(chats, tokenizer, 64, 10)


MISTAKES = {
    "chat without data": ("--chat", "--chat needs a --dataset of conversations"),
    "no messages": ("--chat --dataset table.jsonl", "no column 'messages', it has body"),
    "no conversation": (
        "--chat --text-column body --dataset table.jsonl",
        "conversation 1: 'body' must hold messages",
    ),
    "nothing to resume": ("--resume --output-dir full", "has no checkpoint"),
    "resume what": ("--resume", "--resume needs the --output-dir"),
    "missing text": ("--dataset nowhere.txt", "nowhere.txt: no such file"),
    "missing gguf": ("--model nowhere.gguf", "nowhere.gguf: no such file"),
    "broken gguf": ("--model broken.gguf", "broken.gguf: cannot be loaded"),
    "missing folder": ("--model ./nowhere", "./nowhere: no such folder"),
    "unknown model": ("--model no-such/model", "no-such/model: cannot be loaded"),
    "unknown data": ("--dataset no-such/data", "no-such/data: cannot be loaded"),
    "bad column": ("--dataset table.jsonl", "no column 'text', it has body"),
    "no text": ("--dataset table.jsonl --text-column id", "line 1: 'id' must hold text"),
    "broken json": ("--dataset broken.jsonl", "line 2: not JSON"),
    "short text": ("--dataset short.txt", "too short for two blocks of --seq-len 64"),
    "full folder": ("--output-dir full", "full is not empty"),
    "file as folder": ("--output-dir short.txt", "short.txt is a file"),
    "bad number": ("--max-steps 0", "'0' is no whole number above 0"),
    "bad rate": ("--lr fast", "invalid float value: 'fast'"),
    "unknown option": ("--speed 9", "unrecognized arguments: --speed 9"),
}


@pytest.fixture
def bad_files(tmp_path: Path) -> None:
    """Files that are there and no good, in the working folder."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").write_text("precious")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "table.jsonl").write_text('{"body": "some text", "id": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path / "broken.gguf").write_text("no gguf")


@pytest.mark.usefixtures("bad_files")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(
    name: str, recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clear line on stderr, exit code 2, nothing written."""
    command, message = MISTAKES[name]
    before = sorted(tmp_path.rglob("*"))
    try:
        code = recipe.main([*SMALL, *command.split()])
    except SystemExit as stop:  # argparse leaves so
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], shown.err
    assert shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_exit_code_of_the_command(tmp_path: Path) -> None:
    """The process itself ends with 2 and its stderr is the one line."""
    done = subprocess.run(
        [sys.executable, str(RECIPES / "finetune.py"), "--dataset", "nowhere.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr == "error: --dataset nowhere.txt: no such file\n"


def test_commands_of_the_readme(recipe: ModuleType) -> None:
    """Every finetune command in recipes/README.md is one that the parser takes."""
    text = (RECIPES / "README.md").read_text()
    starts = r"(?:python|accelerate launch \S+ \S+|torchrun \S+)"
    commands = re.findall(
        rf"^{starts} recipes/finetune\.py(.*?)(?: +#.*)?$", text, flags=re.MULTILINE
    )
    assert len(commands) == len(re.findall(r"^\S.* recipes/finetune\.py", text, re.MULTILINE)) > 10
    for command in commands:
        recipe.parse(command.split())
