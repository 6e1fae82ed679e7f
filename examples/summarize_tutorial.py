"""The summarizer of a well-known tutorial, to the letter but for its imports.

The tutorial imports Encoder, Decoder and Seq2SeqModel from transformers, where no release has them;
here they come from this package, and run on its kernels. Strings go in, the model's tokenizer is
its default one (bytes), ``outputs.logits`` would be there if it were asked for.

Its scheduler is kept as it is, and trains nothing: with ``num_training_steps=-1`` the factor of the
learning rate is max(0, (-1 - step) / max(1, -1 - 0)), which is 0 from the first step on.
``get_linear_schedule_with_warmup(optimizer, warmup, steps)`` with the true number of steps is what
was meant.
"""

from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset
from transformers import get_linear_schedule_with_warmup

from fasttransformer.models import Decoder, Encoder, Seq2SeqModel


class TextDataset(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


data = [
    {"src": "The cat sat on the mat all day and slept.", "tgt": "A cat slept."},
    {"src": "It rained in the morning; the sun shone later.", "tgt": "Rain, then sun."},
    {"src": "She wrote the program, tested it and went home.", "tgt": "She programmed."},
    {"src": "The train was late because of snow on the line.", "tgt": "Snow delayed a train."},
]

src_encoder = Encoder(32000, 512, 2048, 3, 8, False)
tgt_decoder = Decoder(32000, 512, 2048, 3, 8, False)
seq2seq = Seq2SeqModel(src_encoder, tgt_decoder, 32000, 512, 2048, 6)
optimizer = AdamW(seq2seq.parameters(), lr=1e-4)
scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=-1)
for batch in DataLoader(TextDataset(data), batch_size=4, shuffle=True):
    optimizer.zero_grad()
    outputs = seq2seq(batch["src"], batch["tgt"])
    outputs.loss.backward()
    optimizer.step()
    scheduler.step()
    print(f"loss {outputs.loss.item():.3f}, learning rate {scheduler.get_last_lr()[0]}")

print(seq2seq.generate([data[0]["src"]], max_new_tokens=20))
