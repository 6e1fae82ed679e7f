"""Text like Python's documentation, drawn piece by piece."""

import argparse

from fasttransformer.models import LanguageModel
from fasttransformer.models.data import summaries
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--records", type=int, help="of each kind, for a quick look")
args = parser.parse_args()

training, dev, held_out = (side[: args.records] for side in summaries.texts())
task = task_of("generate")
options = TrainingOptions(
    "generate", steps=args.steps, batch_size=24, learning_rate=2e-3, vocab_size=2000
)
train(task, training, "writer", options, evaluation=dev)

model = LanguageModel.from_pretrained("writer")
print("held out", task.evaluate(model, held_out), task.baselines(model, training, held_out))
for piece in model.stream("function open", max_new_tokens=60, do_sample=True, top_p=0.9, seed=0):
    print(piece, end="", flush=True)
print()
