"""``fasttransformer evaluate``: how good a trained model is on held-out records."""

from __future__ import annotations

import argparse
from typing import Any

from ._output import UsageError, command, console, escape, positive, print_json
from .texts import add_top, load, retriever_of
from .train import TASKS, scores_table


def run(args: argparse.Namespace) -> int:
    from ..models import Seq2SeqModel
    from ..models.data import BadRecords, read_records
    from ..models.tasks import task_of

    if args.passages and args.task != "answer":
        raise UsageError(f"--passages: {args.task} reads no passages")
    model = load(args.model, args.task)
    task = task_of(args.task, "text" if isinstance(model, Seq2SeqModel) else "span")
    options = {} if args.num_beams is None else {"num_beams": args.num_beams}
    if options and not isinstance(model, Seq2SeqModel):
        raise UsageError(f"--num-beams: {args.task} with this model makes no search")
    try:
        records = read_records(args.data, task.fields, task.problem)
        training = read_records(args.train_data, task.fields) if args.train_data else []
        records = records[: args.limit]
        measured = task.measured(model, records, **options)
        metrics, intervals = measured.scores(), measured.intervals()
        found = _from_passages(args, task, model, records, options) if args.passages else None
        baselines = task.baselines(model, training or records, records)
    except (BadRecords, ImportError, ValueError) as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json(
            {
                "records": len(records), "metrics": metrics, "intervals": intervals,
                "baselines": baselines, **({} if found is None else {"passages": found}),
            }
        )  # fmt: skip
    else:
        console().print(f"{len(records)} records")
        console().print(scores_table(metrics, baselines, intervals))
        if found is not None:
            console().print(f"\nfrom the passages of {escape(args.passages)}")
            console().print(scores_table(**found))
    return 0


def _from_passages(
    args: argparse.Namespace, task: Any, model: Any, records: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The scores of answers without the records' contexts."""
    from ..models.retrieval import OpenReader

    reader = OpenReader(task, model, retriever_of(args.passages), args.top)
    measured, beside = reader.measured(records, **options)
    return {
        "metrics": measured.scores(), "intervals": measured.intervals(),
        "baselines": beside,
    }  # fmt: skip


def add_parser(commands: Any) -> None:
    parser = command(
        commands, "evaluate",
        "ROUGE, BLEU, F1, accuracy or perplexity of a trained model, and of a trivial baseline",
        "  fasttransformer evaluate --task summarize --model summaries --data held_out.jsonl\n",
    )  # fmt: skip
    parser.add_argument("--task", choices=TASKS, required=True, help="what the model does")
    parser.add_argument("--model", required=True, metavar="DIR", help="its folder")
    parser.add_argument("--data", required=True, metavar="FILE", help="held-out records")
    parser.add_argument(
        "--train-data", metavar="FILE",
        help="what the baselines learn from (the held-out records, to their advantage)",
    )  # fmt: skip
    parser.add_argument(
        "--passages", metavar="FILE",
        help="texts, one a line; of the task answer: also judge answers from what MiniLM finds",
    )  # fmt: skip
    add_top(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="judge the first N (all)")
    parser.add_argument("--num-beams", type=positive, metavar="N", help="beams of a search (1)")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)
