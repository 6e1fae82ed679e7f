"""Records for training: reading them, and making them from what every Python has at hand.

``python -m fasttransformer.models.data TASK --out FOLDER`` writes three files of a task, which
share nothing: ``train.jsonl``; ``dev.jsonl``, by which options, steps and the data itself are
chosen; and ``held_out.jsonl``, which is for the figures that are reported. The modules here say how
each is made.
"""

from .records import FIELDS, BadRecords, Record, read_records, write_records
from .split import split

__all__ = ["FIELDS", "BadRecords", "Record", "read_records", "split", "write_records"]
