"""Text like Python's documentation, drawn piece by piece."""

from fasttransformer.models import LanguageModel
from fasttransformer.models.data import summaries
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

training, dev, held_out = summaries.texts()
options = TrainingOptions(
    "generate", steps=3000, batch_size=24, learning_rate=2e-3, vocab_size=2000
)
result = train(task_of("generate"), training, "writer", options, evaluation=held_out)
print(result.metrics, result.baselines)

model = LanguageModel.from_pretrained("writer")
for piece in model.stream("function open", max_new_tokens=60, do_sample=True, top_p=0.9, seed=0):
    print(piece, end="", flush=True)
print()
