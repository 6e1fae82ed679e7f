"""Opinions of things that training never had, and in words that it never had.

A model from scratch can do the first; the second takes one that was trained on more, MiniLM.
"""

import argparse

from fasttransformer.models import TextModel
from fasttransformer.models.data import sentiment
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1500)
parser.add_argument("--records", type=int, help="of each kind, for a quick look")
args = parser.parse_args()

training, dev, new_things, _, new_words = (side[: args.records] for side in sentiment.records())
small = {"dropout": 0.2, "vocab_size": 1000, "embed_dim": 64, "hidden_dim": 128, "num_heads": 4}
for encoder, sizes in (("scratch", small), ("minilm", {})):
    task = task_of("classify", encoder=encoder)
    options = TrainingOptions("classify", steps=args.steps, encoder=encoder, **sizes)
    train(task, training, f"opinions-{encoder}", options, evaluation=dev)
    model = TextModel.from_pretrained(f"opinions-{encoder}")
    print(encoder, "new things", task.evaluate(model, new_things))
    print(encoder, "new words", task.evaluate(model, new_words))
    print(model.predict(["The film was not bad.", "Frankly, the castle is sublime."]))
