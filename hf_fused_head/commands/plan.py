"""`hf-fused-head plan`: memory and passes of a head, from shapes alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from hf_fused_head.commands import common
from hf_fused_head.commands.common import DeviceOption, ForceOption, JsonOption


def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="Hub name, model folder, config file, or the name of a bench workload.",
        ),
    ],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens a step, batch x length.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the weights; default: what the model states.")
    ] = None,
    budget_mib: Annotated[
        int | None, typer.Option("--budget-mib", min=1, help="Workspace the head may use.")
    ] = None,
    frozen_head: Annotated[
        bool, typer.Option("--frozen-head", help="The head gets no gradient, as with LoRA.")
    ] = False,
    per_token: Annotated[
        bool, typer.Option("--per-token", help='Gradients arrive per token (reduction="none").')
    ] = False,
    tp: Annotated[int, typer.Option("--tp", min=1, help="Ranks that share the vocabulary.")] = 1,
    fsdp: Annotated[int, typer.Option("--fsdp", min=1, help="Ranks that share the weights.")] = 1,
    sp: Annotated[int, typer.Option("--sp", min=1, help="Ranks that share every sequence.")] = 1,
    impl: Annotated[str, typer.Option("--impl", help="auto, triton, torch or reference.")] = "auto",
    device: DeviceOption = None,
    card: Annotated[
        str | None,
        typer.Option("--card", help="A GPU that need not be here, for example 'NVIDIA A100'."),
    ] = None,
    json_file: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Show memory and passes of the stock head and of every schedule of the fused one.

    With --tp, --fsdp or --sp all of it is of one rank, and what that rank holds and sends beside it
    is shown too.
    """
    common.refuse_overwriting(json_file, force=force)
    from hf_fused_head.benchmark import environment, estimate, scaling

    # A plan may be for a machine that this one is not, so the device need not be here.
    device_type = device or ("cuda" if card else environment.default_device().type)
    if device_type not in ("cpu", "cuda"):
        raise common.UserError(f"`--device` must be cpu or cuda, got {device_type!r}")
    if card is not None and device_type != "cuda":
        raise common.UserError(
            f"`--device` must be cuda or left out with --card {card!r}, got {device_type!r}"
        )
    layout = scaling.Layout(tp, fsdp, sp)
    try:
        shape = estimate.read_shape(model, None if dtype is None else common.dtype_named(dtype))
        share = scaling.per_rank(shape, tokens, layout, frozen_head)
        result = estimate.estimate(
            replace(shape, vocab_size=share.rows),
            share.tokens,
            device_type=device_type,
            card=card,
            impl=impl,
            frozen_head=frozen_head,
            per_token=per_token,
            memory_budget_mib=budget_mib,
            shared_hidden=tp > 1,
        )
    except (ValueError, NotImplementedError) as error:
        raise common.UserError(str(error)) from error
    content = result.document()
    console = common.console()
    if layout.ranks > 1:
        content["rank"] = asdict(share)
        console.print(estimate.rank_line(content["rank"]), highlight=False, markup=False)
    console.print(estimate.headline(content), highlight=False, markup=False)
    console.print(estimate.table(content))
    common.write_json(json_file, content)
