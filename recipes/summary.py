"""What a run of a recipe showed, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

MIB = 2**20


@dataclass
class Run:
    """What one training run showed."""

    losses: list[tuple[int, float]]  # (step, mean loss since the step before)
    before: dict[str, float]  # evaluation before the first step; empty where it is not made
    after: dict[str, float]
    step_ms: float
    head_bytes: int | None  # None where other processes hold parts of the head

    @property
    def eval_loss(self) -> float:
        """After the last step."""
        return self.after["loss"]


def learned_line(run: Run) -> str:
    """Evaluation before the first step and after the last one."""
    line = f"Evaluation perplexity {run.before['perplexity']:.0f} -> {run.after['perplexity']:.0f}"
    if "mean_token_accuracy" in run.after:
        accuracies = (part["mean_token_accuracy"] for part in (run.before, run.after))
        line += ", accuracy " + " -> ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    return line


def comparison(stock: Run, fused: Run) -> Table:
    """Losses, step time and peak head memory side by side, of one process each."""
    if stock.head_bytes is None or fused.head_bytes is None:
        raise ValueError("`stock` and `fused` must be runs of one process, which are measured")
    table = Table("", "stock", "fused", "fused - stock", title="The same steps, twice")
    for column in table.columns[1:]:
        column.justify = "right"
    for (step, ours), (_, theirs) in zip(fused.losses, stock.losses, strict=True):
        table.add_row(
            f"loss at step {step}", f"{theirs:.6f}", f"{ours:.6f}", f"{ours - theirs:+.1e}"
        )
    difference = fused.eval_loss - stock.eval_loss
    table.add_row(
        "evaluation loss", f"{stock.eval_loss:.6f}", f"{fused.eval_loss:.6f}", f"{difference:+.1e}"
    )
    table.add_row(
        "evaluation perplexity",
        f"{stock.after['perplexity']:.2f}",
        f"{fused.after['perplexity']:.2f}",
        f"{fused.after['perplexity'] / stock.after['perplexity'] - 1:+.1%}",
    )
    table.add_section()
    table.add_row(
        "step, median ms",
        f"{stock.step_ms:.0f}",
        f"{fused.step_ms:.0f}",
        f"{fused.step_ms / stock.step_ms - 1:+.0%}",
    )
    table.add_row(
        "peak head memory, MiB",
        f"{stock.head_bytes / MIB:.1f}",
        f"{fused.head_bytes / MIB:.1f}",
        f"{fused.head_bytes / stock.head_bytes - 1:+.0%}",
    )
    return table


def saved_line(fused: Run, stock: Run | None, tokens: int, vocab_size: int, steps: int) -> str:
    """What the head saved: from shapes, and measured where it was."""
    logits_mib = tokens * vocab_size * 4 / MIB
    line = (
        f"The head never made its logits: {logits_mib:.1f} MiB of float32 ({tokens} tokens x "
        f"{vocab_size} words) in each of {steps} steps"
    )
    if fused.head_bytes is None:
        return f"{line} of every process."
    line = f"{line}. Measured peak of head and loss: {fused.head_bytes / MIB:.1f} MiB"
    if stock is None or stock.head_bytes is None:
        return f"{line}; --compare measures the stock head too."
    return f"{line} instead of {stock.head_bytes / MIB:.1f} MiB."
