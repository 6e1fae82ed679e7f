"""``fasttransformer summarize | translate | answer | generate | classify``: a model at work.

Texts come from the arguments, from a file or from stdin, one a line; each gives one line of output,
in its place, also where it is blank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ._output import UsageError, command, positive

#: Texts that are read, and answered, together.
CHUNK = 256
#: command → (what it does, the field of its JSON output)
COMMANDS = {
    "summarize": ("a short text for each long one", "summary"),
    "translate": ("each text in the other language that the model knows", "translation"),
    "answer": ("an answer to each question, from a context or from the best of many passages",
               "answer"),
    "generate": ("how each text goes on", "text"),
    "classify": ("a label for each text", "label"),
}  # fmt: skip
_EXAMPLES = {
    "summarize": "  fasttransformer summarize --model summaries < pages.txt\n"
    "  fasttransformer summarize --model summaries --whole --file page.txt\n",
    "translate": "  fasttransformer translate --model numbers 'twenty-one'\n"
    "  fasttransformer translate --model numbers --file lines.txt --json | jq .translation\n",
    "answer": "  fasttransformer answer --model reader --context 'Ada wrote it.' 'Who wrote it?'\n"
    "  fasttransformer answer --model reader --passages pages.txt < questions.txt\n",
    "generate": "  fasttransformer generate --model writer 'function open' --max-new-tokens 80\n"
    "  fasttransformer generate --model writer 'function open' --stream --temperature 0.7\n",
    "classify": "  fasttransformer classify --model reviews 'The film was great.'\n"
    "  cut -f2 table.tsv | fasttransformer classify --model reviews --json\n",
}


def run(args: argparse.Namespace) -> int:
    name = args.command
    if args.text and args.file:
        raise UsageError("texts come from arguments or from --file, not from both")
    model = load(args.model, name)
    ask = _asker(name, model, args)
    if name == "generate" and args.stream:
        return _stream(model, args)
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    for texts in _chunks(args):
        # A blank line has nothing to say something about.
        places = [i for i, text in enumerate(texts) if text.strip()]
        found: list[dict[str, Any]] = [{} for _ in texts]
        if places:
            try:
                results = ask([texts[i] for i in places])
            except ImportError as error:
                raise UsageError(str(error)) from None
            for i, result in zip(places, results):
                found[i] = result
        for text, result in zip(texts, found):
            print(_line(name, text, result, args.json), flush=name == "generate")
    return 0


def load(directory: str, name: str) -> Any:
    """The model in a folder, if it can do the task.

    Raises:
        UsageError: it is not there, is damaged, or is made for something else.
    """
    from ..models import TextModel
    from ..models.tasks import TASKS, task_of

    wanted = {*TASKS[name].models, *task_of(name, "text").models}
    try:
        model = TextModel.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {directory} holds no model: {error}") from None
    except ImportError as error:
        raise UsageError(str(error)) from None
    if not isinstance(model, tuple(wanted)):
        needed = " or ".join(sorted(kind.__name__ for kind in wanted))
        raise UsageError(
            f"--model: {directory} holds a {type(model).__name__}; {name} needs a {needed}"
        )
    return model


def _chunks(args: argparse.Namespace) -> Iterator[list[str]]:
    """The texts, some at a time."""
    if args.text:
        yield args.text
        return
    if args.file:
        try:
            content = Path(args.file).read_bytes()
        except OSError as error:
            raise UsageError(f"--file: {args.file} can't be read: {error.strerror}") from None
    else:
        content = sys.stdin.buffer.read()
    text = content.decode("utf-8", "replace").removeprefix("\ufeff")
    if args.whole:
        yield [text]
        return
    # Not splitlines: a form feed or a U+2028 within a line ends no line of the file.
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for first in range(0, len(lines), CHUNK):
        yield [line.removesuffix("\r") for line in lines[first : first + CHUNK]]


def _line(name: str, text: str, result: dict[str, Any], as_json: bool) -> str:
    field = COMMANDS[name][1]
    if as_json:
        asked = {"question": text} if name == "answer" else {"input": text}
        return json.dumps({**asked, field: "", **result}, ensure_ascii=False)
    return " ".join(result.get(field, "").split("\n")).replace("\r", " ").strip()


def _asker(name: str, model: Any, args: argparse.Namespace) -> Any:
    """texts → results."""
    field = COMMANDS[name][1]
    if name == "classify":
        return lambda texts: [
            {"label": str(label), "probability": round(p, 4)} for label, p in model.predict(texts)
        ]
    options = _options(args)
    if name == "answer":
        return _answerer(model, args, options)

    def generate(texts: Sequence[str]) -> list[dict[str, Any]]:
        try:
            found, scores = model.generate(texts, return_scores=True, **options)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return [{field: text, "score": round(s, 4)} for text, s in zip(found, scores)]

    return generate


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of ``generate`` that were given."""
    names = ("max_new_tokens", "num_beams", "repetition_penalty", "temperature", "top_k", "top_p",
             "seed")  # fmt: skip
    options = {name: getattr(args, name, None) for name in names}
    options = {name: value for name, value in options.items() if value is not None}
    drawn = {"temperature", "top_k", "top_p", "seed"} & options.keys()
    return {**options, "do_sample": True} if drawn else options


def _answerer(model: Any, args: argparse.Namespace, options: dict[str, Any]) -> Any:
    from ..models import SpanModel
    from ..models.tasks import task_of

    if (args.context is None) == (args.passages is None):
        raise UsageError("--context or --passages must say where answers are, one of the two")
    points = isinstance(model, SpanModel)
    task: Any = task_of("answer", "span" if points else "text")
    options = {} if points else options
    reader = None
    if args.passages:
        from ..models.retrieval import OpenReader

        reader = OpenReader(task, model, retriever_of(args.passages), args.top)

    def ask(questions: Sequence[str]) -> list[dict[str, Any]]:
        if reader is not None:
            best = reader.answer(questions, **options)
            found = [(one.answer, one.passage, one.probability) for one in best]
        else:
            contexts = [args.context] * len(questions)
            read = task.read(model, questions, contexts, **options)
            found = [(answer, args.context, probability) for answer, probability in read]
        return [
            {"answer": answer, "context": context, "probability": round(probability, 4)}
            for answer, context, probability in found
        ]

    return ask


def retriever_of(path: str) -> Any:
    """The passages of a file, one a line.

    Raises:
        UsageError: it can't be read or has none; MiniLM is not installed.
    """
    from ..models.retrieval import Retriever

    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        return Retriever([line for line in lines if line.strip()])
    except (OSError, UnicodeDecodeError, ValueError, ImportError) as error:
        raise UsageError(f"--passages: {path}: {error}") from None


def _stream(model: Any, args: argparse.Namespace) -> int:
    options = _options(args)
    if options.pop("num_beams", 1) != 1 or args.json:
        raise UsageError("--stream excludes --num-beams and --json")
    for texts in _chunks(args):
        for text in texts:
            for piece in model.stream(text, **options) if text.strip() else ():
                print(piece, end="", flush=True)
            print(flush=True)
    return 0


def add_parser(commands: Any) -> None:
    for name, (summary, _) in COMMANDS.items():
        parser = command(commands, name, summary, _EXAMPLES[name])
        parser.add_argument(
            "text", nargs="*", help="texts (the lines of --file or of stdin unless given)"
        )
        parser.add_argument(
            "--model", required=True, metavar="DIR",
            help=f"what `fasttransformer train --task {name}` wrote",
        )  # fmt: skip
        parser.add_argument("--file", metavar="FILE", help="texts, one a line")
        parser.add_argument(
            "--whole", action="store_true", help="the file, or all of stdin, is one text"
        )
        parser.add_argument(
            "--json", action="store_true", help="a JSON object a line, with the input and scores"
        )
        if name != "classify":
            _add_generation(parser, name)
        parser.set_defaults(run=run)


def add_top(parser: argparse.ArgumentParser) -> None:
    """What goes with --passages."""
    parser.add_argument(
        "--top", type=positive, default=3, metavar="N",
        help="passages that are read for each question (3)",
    )  # fmt: skip


def _add_generation(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="longest output (64)"
    )
    parser.add_argument("--num-beams", type=positive, metavar="N", help="beams of a search (1)")
    if name == "answer":
        parser.add_argument("--context", metavar="TEXT", help="where all answers are")
        parser.add_argument(
            "--passages", metavar="FILE",
            help="texts, one a line, among which MiniLM finds those that are read",
        )  # fmt: skip
        add_top(parser)
    if name == "generate":
        parser.add_argument("--temperature", type=float, metavar="X", help="draw, at X")
        parser.add_argument("--top-k", type=positive, metavar="K", help="draw from the K likeliest")
        parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest of P")
        parser.add_argument("--repetition-penalty", type=float, metavar="X", help="1 = none")
        parser.add_argument("--seed", type=int, metavar="N", help="draw the same again")
        parser.add_argument("--stream", action="store_true", help="print text as it is made")
