"""Questions about Python: MiniLM finds the passage, a reader points to the answer in it."""

from fasttransformer.models import SpanModel
from fasttransformer.models.data import questions
from fasttransformer.models.retrieval import Retriever
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train

training, dev, held_out = questions.records()
options = TrainingOptions(
    "answer", steps=1200, vocab_size=2000, embed_dim=128, hidden_dim=256, num_heads=4
)
result = train(task_of("answer"), training, "reader", options, evaluation=held_out)
print(result.metrics, result.baselines)

model = SpanModel.from_pretrained("reader")
retriever = Retriever(questions.passages()[:2000])
asked = ["What does Message.keys do?", "What is SequenceMatcher?"]
passages = [retriever.passages[best[0]] for best in retriever.nearest(asked)]
print(list(zip(asked, passages, model.answer(asked, passages))))
