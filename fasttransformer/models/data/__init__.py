"""Records for training: reading them, and making them from what every Python has at hand.

``python -m fasttransformer.models.data TASK --out FOLDER`` writes ``train.jsonl`` and
``held_out.jsonl`` of a task; the modules here say how each is made.
"""

from .records import FIELDS, BadRecords, Record, read_records, write_records
from .split import split

__all__ = ["FIELDS", "BadRecords", "Record", "read_records", "split", "write_records"]
