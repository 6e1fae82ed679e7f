"""English and Chinese numbers, dates and counted things: make records, train, translate."""

import argparse

from fasttransformer.models import Seq2SeqModel
from fasttransformer.models.data import phrases
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1200)
parser.add_argument("--records", type=int, help="of each kind, for a quick look")
args = parser.parse_args()

training, dev, held_out = (side[: args.records] for side in phrases.records())
task = task_of("translate")
options = TrainingOptions(
    "translate", steps=args.steps, batch_size=48, dropout=0.0, vocab_size=800,
    embed_dim=128, hidden_dim=384, num_heads=4,
)  # fmt: skip
train(task, training, "translator", options, evaluation=dev)

model = Seq2SeqModel.from_pretrained("translator")
print("held out", task.evaluate(model, held_out), task.baselines(model, training, held_out))
print(model.generate(["March 3, 2024", "我有三本新书。"], max_new_tokens=32))
