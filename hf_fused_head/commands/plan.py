"""`hf-fused-head plan`: memory of a head for a batch, or the longest batch for a memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import DeviceOption, ForceOption, JsonOption

if TYPE_CHECKING:
    import torch

_HEAD = "The head alone (--tokens)"
_STEP = "The whole training step (--memory)"


class Impl(str, Enum):
    """Who computes the loss."""

    auto = "auto"
    triton = "triton"
    torch = "torch"
    reference = "reference"


class Kind(str, Enum):
    """What is trained."""

    full = "full"
    lora = "lora"


class StateDtype(str, Enum):
    """Dtype of the optimizer's states."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Hub name, model folder, config file, or the name of a bench workload.",
            autocompletion=common.workload_names,
        ),
    ],
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Tokens a step, batch x length.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Of a card, as 24GiB: the longest batch."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights; default: what the model states.")
    ] = None,
    budget_mib: Annotated[
        int | None, typer.Option("--budget-mib", min=1, help="Workspace the head may use.")
    ] = None,
    impl: Annotated[
        Impl, typer.Option("--impl", metavar="IMPL", help="auto, triton, torch or reference.")
    ] = Impl.auto,
    device: DeviceOption = None,
    card: Annotated[
        str | None,
        typer.Option("--card", help="A GPU that need not be here, for example 'NVIDIA A100'."),
    ] = None,
    frozen_head: Annotated[
        bool,
        typer.Option(
            "--frozen-head", help="The head gets no gradient, as with LoRA.", rich_help_panel=_HEAD
        ),
    ] = False,
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            help='Gradients arrive per token (reduction="none").',
            rich_help_panel=_HEAD,
        ),
    ] = False,
    tp: Annotated[
        int,
        typer.Option("--tp", min=1, help="Ranks that share the vocabulary.", rich_help_panel=_HEAD),
    ] = 1,
    fsdp: Annotated[
        int,
        typer.Option("--fsdp", min=1, help="Ranks that share the weights.", rich_help_panel=_HEAD),
    ] = 1,
    sp: Annotated[
        int,
        typer.Option("--sp", min=1, help="Ranks that share every sequence.", rich_help_panel=_HEAD),
    ] = 1,
    training: Annotated[
        list[Kind] | None,
        typer.Option(
            "--training",
            metavar="KIND",
            help="full or lora; repeat for both, the default.",
            rich_help_panel=_STEP,
        ),
    ] = None,
    no_checkpointing: Annotated[
        bool,
        typer.Option(
            "--no-checkpointing",
            help="Keep what layers compute, instead of recomputing it in the backward.",
            rich_help_panel=_STEP,
        ),
    ] = False,
    optimizer_dtype: Annotated[
        StateDtype | None,
        typer.Option(
            "--optimizer-dtype",
            metavar="DTYPE",
            help="Of AdamW's states, float32 or bfloat16; default: that of each trained weight.",
            rich_help_panel=_STEP,
        ),
    ] = None,
    load_in_4bit: Annotated[
        bool,
        typer.Option(
            "--load-in-4bit",
            help="Linear layers of the body in 4 bits; LoRA only.",
            rich_help_panel=_STEP,
        ),
    ] = False,
    lora_rank: Annotated[
        int, typer.Option("--lora-rank", min=1, help="Of the adapters.", rich_help_panel=_STEP)
    ] = 16,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Show what a head takes for --tokens, or the longest batch that fits --memory.

    --tokens: memory and passes of the stock head and of every schedule of the fused one; with --tp,
    --fsdp or --sp those of one rank, and what that rank holds and sends.

    --memory: the longest batch whose whole training step fits, with weights, gradients, optimizer,
    activations and head; stock and fused, full and LoRA training.
    """
    if (tokens is None) == (memory is None):
        raise common.UserError(
            "one of `--tokens` and `--memory` must be given, got "
            f"{'none' if tokens is None else 'both'}: --tokens N plans the head of a step, "
            "--memory 24GiB finds the longest batch"
        )
    common.refuse_overwriting(json_file, force=force)
    _refuse_options(context, _HEAD if tokens is None else _STEP)
    head: dict[str, Any] = {
        "device_type": _device_type(device, card),
        "card": card,
        "impl": impl.value,
        "memory_budget_mib": budget_mib,
    }
    chosen = None if dtype is None else common.dtype_named(dtype)
    try:
        if tokens is not None:
            rank = {"frozen_head": frozen_head, "per_token": per_token}
            content = _plan_head(model, tokens, chosen, (tp, fsdp, sp), **rank, **head)
        else:
            step = {
                "checkpointing": not no_checkpointing,
                "optimizer_dtype": optimizer_dtype and common.dtype_named(optimizer_dtype.value),
                "load_in_4bit": load_in_4bit,
                "lora_rank": lora_rank,
            }
            kinds = [kind.value for kind in training or ()]
            content = _plan_step(model, memory or "", chosen, kinds, step, head)
    except (ValueError, ImportError, NotImplementedError) as error:
        raise common.UserError(common.in_options(str(error))) from error
    common.write_json(json_file, content)


def _refuse_options(context: typer.Context, panel: str) -> None:
    """Options of the other kind of plan would have no effect."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and getattr(parameter, "rich_help_panel", None) == panel:
            name = "--memory" if panel == _HEAD else "--tokens"
            raise common.UserError(
                f"`{parameter.opts[0]}` must be left out with `{name}`: it would have no effect"
            )


def _device_type(device: str | None, card: str | None) -> str:
    """A plan may be for a machine that this one is not, so the device need not be here."""
    from hf_fused_head.benchmark import environment

    device_type = device or ("cuda" if card else environment.default_device().type)
    if device_type not in ("cpu", "cuda"):
        raise common.UserError(f"`--device` must be cpu or cuda, got {device_type!r}")
    if card is not None and device_type != "cuda":
        raise common.UserError(
            f"`--device` must be cuda or left out with --card {card!r}, got {device_type!r}"
        )
    return device_type


def _plan_head(
    model: str,
    tokens: int,
    dtype: torch.dtype | None,
    ranks: tuple[int, int, int],
    **options: Any,
) -> dict:
    from hf_fused_head.benchmark import estimate, scaling

    layout = scaling.Layout(*ranks)
    shape = estimate.read_shape(model, dtype)
    share = scaling.per_rank(shape, tokens, layout, options["frozen_head"])
    shape = replace(shape, vocab_size=share.rows)
    result = estimate.estimate(shape, share.tokens, shared_hidden=layout.tensor > 1, **options)
    content = result.document()
    if layout.ranks > 1:
        content["rank"] = asdict(share)
        common.say(estimate.rank_line(content["rank"]))
    common.say(estimate.headline(content))
    common.console().print(estimate.table(content))
    return content


def _plan_step(
    model: str,
    memory: str,
    dtype: torch.dtype | None,
    kinds: list[str],
    step: dict[str, Any],
    head: dict[str, Any],
) -> dict:
    from hf_fused_head.benchmark import step_memory

    request = step_memory.Request(model, step_memory.memory_bytes(memory), dtype, kinds, **step)
    content = request.document()
    with common.progress_bar() as progress:
        for training in progress.track(request.trainings, description=f"running {model} on shapes"):
            content["records"] += request.records(training, head)
    common.say(step_memory.headline(content))
    common.console().print(step_memory.table(content))
    return content
