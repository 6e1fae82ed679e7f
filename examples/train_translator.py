"""English and Chinese numbers, dates and counted things: make records, train, translate."""

from fasttransformer.models import Seq2SeqModel
from fasttransformer.models.data import phrases
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

training, dev, held_out = phrases.records()
options = TrainingOptions(
    "translate", steps=1200, batch_size=48, dropout=0.0, vocab_size=800,
    embed_dim=128, hidden_dim=384, num_heads=4,
)  # fmt: skip
result = train(task_of("translate"), training, "translator", options, evaluation=held_out)
print(result.metrics, result.baselines)

model = Seq2SeqModel.from_pretrained("translator")
print(model.generate(["March 3, 2024", "我有三本新书。"], max_new_tokens=32))
