"""The model card of a recipe's run: what was trained, on what, how, and how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


def write_card(
    folder: Path,
    *,
    base: str,
    dataset: str,
    adapter: bool,
    facts: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Writes README.md.

    Args:
        folder: Of the saved model.
        base: The model that was trained, as its name is loaded.
        dataset: What it was trained on.
        adapter: Whether the folder holds adapters instead of all weights.
        facts: Of the run, by name.
        metrics: Of the evaluation after it.
    """
    name = folder.resolve().name
    package = "peft" if adapter else "transformers"
    data = ModelCardData(
        # A name of the hub; folders and models made on the spot are none.
        base_model=base if "/" in base and not Path(base).exists() else None,
        library_name=package,
        pipeline_tag="text-generation",
        tags=["hf-fused-head", *(["lora"] if adapter else [])],
        model_name=name,
        eval_results=[
            EvalResult("text-generation", dataset, dataset, metric, round(value, 6))
            for metric, value in metrics.items()
        ],
    )
    what = "LoRA adapters for" if adapter else "All weights of"
    loader = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    shown = {**facts, **{f"evaluation {key}": f"{value:.4g}" for key, value in metrics.items()}}
    rows = "\n".join(f"| {key} | {value} |" for key, value in shown.items())
    ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"{what} `{base}`, trained on `{dataset}` by `recipes/finetune.py` of hf-fused-head: the "
        "loss was computed inside the head, without logits.\n\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"```python\nfrom {package} import {loader}\n\n"
        f'model = {loader}.from_pretrained("{folder.resolve()}")\n```\n'
    ).save(folder / "README.md")
