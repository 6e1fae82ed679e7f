"""Summaries of Python's documentation: docs/tutorial_summarizer.md as a program."""

from fasttransformer.models import Seq2SeqModel
from fasttransformer.models.data import summaries
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

training, dev, held_out = summaries.records()
task = task_of("summarize")
options = TrainingOptions(
    "summarize", steps=5000, dropout=0.2, label_smoothing=0.1, max_length=128, hold_out=0.05
)
train(task, training, "summarizer", options)

model = Seq2SeqModel.from_pretrained("summarizer")
print(task.evaluate(model, held_out), task.baselines(model, training, held_out))
print(model.generate([record["text"] for record in held_out[:5]], max_new_tokens=40))
