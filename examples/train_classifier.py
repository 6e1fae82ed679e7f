"""Opinions: held-out things, and opinion words that training never had."""

from fasttransformer.models import TextClassifier
from fasttransformer.models.data import sentiment
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

training, dev, held_out, _, held_out_words = sentiment.records()
task = task_of("classify")
options = TrainingOptions(
    "classify", steps=1500, dropout=0.2, vocab_size=1000, embed_dim=64, hidden_dim=128, num_heads=4
)
train(task, training, "opinions", options)

model = TextClassifier.from_pretrained("opinions")
print("new things", task.evaluate(model, new_things))
print("new words, at chance", task.evaluate(model, new_words))
print(model.predict(["The film was not bad.", "Frankly, the castle is lovely."]))
