"""Questions about Python: MiniLM finds passages, a reader points to the answer in the best."""

import argparse

from fasttransformer.models import SpanModel
from fasttransformer.models.data import questions
from fasttransformer.models.retrieval import OpenReader, Retriever
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1200)
parser.add_argument("--records", type=int, help="of each kind and of passages, for a quick look")
args = parser.parse_args()

training, dev, held_out = (side[: args.records] for side in questions.records())
task = task_of("answer")
options = TrainingOptions(
    "answer", steps=args.steps, vocab_size=2000, embed_dim=128, hidden_dim=256, num_heads=4,
    max_length=384,
)  # fmt: skip
result = train(task, training, "reader", options, evaluation=dev)
print("to choose by", result.metrics, result.baselines)

model = SpanModel.from_pretrained("reader")
print("held out, from the right passage", task.evaluate(model, held_out))
reader = OpenReader(task, model, Retriever(questions.passages()[: args.records]))
measured, beside = reader.measured(held_out)
print("held out, from all passages", measured.scores(), measured.intervals(), beside)
for found in reader.answer(["What does Message.keys do?", "What is SequenceMatcher?"]):
    print(found.answer, found.probability, found.passage)
