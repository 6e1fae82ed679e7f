"""Summaries of Python's documentation: docs/tutorial_summarizer.md as a program."""

import argparse

from fasttransformer.models import Seq2SeqModel
from fasttransformer.models.data import summaries
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=5000)
parser.add_argument("--records", type=int, help="of each kind, for a quick look")
args = parser.parse_args()

training, dev, held_out = (side[: args.records] for side in summaries.records())
task = task_of("summarize")
options = TrainingOptions(
    "summarize", steps=args.steps, dropout=0.2, label_smoothing=0.1, max_length=128
)
train(task, training, "summarizer", options, evaluation=dev)

model = Seq2SeqModel.from_pretrained("summarizer")
print("held out", task.evaluate(model, held_out), task.baselines(model, training, held_out))
print(model.generate([record["text"] for record in held_out[:5]], max_new_tokens=40))
