"""A summarizer of half a minute; docs/applications.md has that of a quarter of an hour."""

import pytest

from fasttransformer.models.data import summaries
from fasttransformer.models.tasks import task_of
from fasttransformer.models.training import TrainingOptions, train


@pytest.mark.slow
def test_summaries_beat_the_first_words(tmp_path):
    sides = [
        [
            {"text": " ".join(record["text"].split()[:8]), "summary": record["summary"]}
            for record in side
            if len(record["summary"].split()) < 10
        ]
        for side in summaries.records()[:2]
    ]
    options = TrainingOptions(
        "summarize", steps=900, batch_size=64, learning_rate=4e-3, vocab_size=1500, embed_dim=128,
        hidden_dim=256, num_layers=1, num_heads=4, eval_every=900, save_every=900,
        eval_limit=200,
    )  # fmt: skip
    result = train(task_of("summarize"), sides[0], tmp_path, options, evaluation=sides[1])
    leads = max(scores["rougeL"] for scores in result.baselines.values())
    assert result.metrics["rougeL"] > leads
