"""The benchmark of many ranks; `torchrun` starts it, once a rank.

    torchrun --nproc-per-node=2 -m hf_fused_head.benchmark.parallel head llama3-8b --json FILE
    torchrun --nproc-per-node=2 -m hf_fused_head.benchmark.parallel step llama-1b --json FILE

`head` cuts a head along its vocabulary (`sharded_head`), `step` trains a model under FSDP2
(`training_step`). Without a launcher it is a group of one rank. `hf-fused-head bench --from-json`
shows what was written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from hf_fused_head.benchmark import (
    contenders,
    environment,
    report,
    sharded_head,
    suite,
    training_step,
)
from hf_fused_head.benchmark.files import refuse_overwriting
from hf_fused_head.benchmark.ranks import Ranks, joined
from hf_fused_head.benchmark.terminal import console
from hf_fused_head.benchmark.workloads import WORKLOADS
from hf_fused_head.options import Impl


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints on the first rank; 0 done, 1 a check failed, 2 a user error."""
    options = _parser().parse_args(arguments)
    # The meter of CPU memory is torch's profiler, whose start and stop would be logged.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    rank = 0
    try:
        with joined(options.device) as ranks:
            rank = ranks.rank
            _refuse_everywhere(options, ranks)
            content = (_head if options.what == "head" else _step)(options, ranks)
    except ValueError as error:
        if rank == 0:
            print(f"parallel: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if rank == 0:
        _show(content, options.markdown)
    return int(any(map(_is_bad, content["results"])))


def _is_bad(row: dict) -> bool:
    """Whether one of ours is wrong or has died."""
    ours = row["contender"] in ("ours", "alone", "sharded")
    return ours and (row["status"] == "failed" or (row["check"] or "passed") != "passed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parallel", description="Measure on every rank.")
    kinds = parser.add_subparsers(dest="what", required=True)
    head = kinds.add_parser(
        "head", help="a head sharded along its vocabulary, beside one shard alone"
    )
    head.add_argument("workload", choices=list(WORKLOADS))
    head.add_argument("--impl", default="auto", choices=get_args(Impl))
    head.add_argument("--budget-mib", type=_positive, help="workspace of a rank")
    head.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    head.add_argument("--repeats", type=_positive, default=10, help="timed rounds")
    step = kinds.add_parser("step", help="a training step under FSDP2")
    step.add_argument("model", choices=list(training_step.MODELS))
    step.add_argument(
        "-c", "--contender", default=",".join(training_step.HEADS), help="separated by commas"
    )
    step.add_argument("--steps", type=_positive, default=20, help="with a loss each")
    step.add_argument(
        "--sequences",
        type=_positive,
        help="of a step on all ranks together; default: one a rank. Losses of runs with as many "
        "can be compared",
    )
    for command in (head, step):
        command.add_argument("--warmup", type=_natural, default=2, help="untimed rounds or steps")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--device", help="cpu or cuda; default: GPUs where there are any")
        command.add_argument("--json", type=Path, metavar="FILE")
        command.add_argument("--force", action="store_true", help="overwrite the file")
        command.add_argument("--commit", help="of this source; default: what git says")
        command.add_argument("--markdown", action="store_true", help="print Markdown")
    return parser


def _natural(text: str, first: int = 0) -> int:
    if not text.isdecimal() or int(text) < first:
        raise argparse.ArgumentTypeError(f"must be a whole number from {first}, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    return _natural(text, first=1)


def _refuse_everywhere(options: argparse.Namespace, ranks: Ranks) -> None:
    """The first rank looks at the file; all of them learn what it found."""
    found = None
    if ranks.rank == 0:
        try:
            refuse_overwriting(options.json, force=options.force)
        except ValueError as error:
            found = str(error)
    found = ranks.gather(found)[0]
    if found is not None:
        raise ValueError(found)


def _head(options: argparse.Namespace, ranks: Ranks) -> dict:
    workload = WORKLOADS[options.workload]
    settings = suite.Settings(options.repeats, options.warmup, check=True, seed=options.seed)
    protocol = sharded_head.protocol(settings, ranks.device)
    header = _header(sharded_head.KIND, protocol, options, ranks)
    dtype = options.dtype or workload.dtype
    records = sharded_head.measure_head(
        workload, dtype, options.impl, options.budget_mib, settings, ranks
    )
    return _written(header, records, options, ranks)


def _step(options: argparse.Namespace, ranks: Ranks) -> dict:
    sequences = options.sequences or ranks.size
    course = training_step.Course(options.steps, options.warmup, sequences, options.seed)
    header = _header(training_step.KIND, course.protocol(), options, ranks)
    names = [name for name in options.contender.split(",") if name]
    model = training_step.MODELS[options.model]
    records = training_step.measure_training(
        model,
        names,
        course,
        ranks,
        # A run of an hour that is killed keeps what it has measured.
        lambda done: _written(header, done, options, ranks),
    )
    return _written(header, records, options, ranks)


def _header(kind: str, protocol: dict, options: argparse.Namespace, ranks: Ranks) -> dict:
    header = environment.header(ranks.device, contenders.PEER_PACKAGES, protocol)
    header["commit"] = options.commit or header["commit"]
    devices = ranks.gather(environment.describe(ranks.device)["name"])
    return {**header, "kind": kind, "ranks": {**ranks.describe(), "devices": devices}}


def _written(
    header: dict, records: Sequence[Any], options: argparse.Namespace, ranks: Ranks
) -> dict:
    content = report.document(header, records)
    if ranks.rank == 0 and options.json is not None:
        report.write_json(options.json, content)
    return content


def _show(content: dict, markdown: bool) -> None:
    if markdown:
        print(report.markdown(content), end="")
        return
    out = console()
    for line in report.header_lines(content["header"]):
        out.print(line, highlight=False, markup=False)
    for table in report.tables(content):
        out.print(table)


if __name__ == "__main__":
    sys.exit(main())
