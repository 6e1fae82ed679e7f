"""Text to token ids and back: byte-level BPE, which has no unknown words in any language.

A text's UTF-8 bytes are the alphabet; training joins the most frequent neighbours to tokens, until
the vocabulary is as large as asked. Ids 0 to 3 are ``<pad>``, ``<s>``, ``</s>`` and ``<sep>``. They
stand for themselves alone: a text that spells "</s>" is encoded as four ordinary characters, so
nobody can end a sequence from within a text.

Sources: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword Units,
2016 (arXiv:1508.07909); bytes: Radford et al., Language Models are Unsupervised Multitask Learners,
2019. The implementation is the tokenizers library's.
"""

from __future__ import annotations

import codecs
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

SPECIALS = ("<pad>", "<s>", "</s>", "<sep>")
#: The least vocabulary: the special tokens and the 256 bytes.
SMALLEST = len(SPECIALS) + 256
FILE = "tokenizer.json"


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "fasttransformer.models needs the tokenizers library for text: "
            "pip install 'fasttransformer[text]'"
        ) from error
    return tokenizers


class Tokenizer:
    r"""Byte-level BPE.

    Every string is encoded and comes back as it was, spaces, line ends and zero bytes included.
    Lone surrogates, which are no characters and have no UTF-8, become U+FFFD (two that belong
    together are joined to their character first); so do bytes that make no character, when
    generated ids are decoded.

    Make one by :meth:`train`, :meth:`default` or :meth:`load`.

    >>> tokenizer = Tokenizer.train(["low lower lowest", "low slow"], vocab_size=270)
    >>> ids = tokenizer.encode("slow 你好", eos=True)
    >>> tokenizer.decode(ids)
    'slow 你好'
    """

    pad_id, bos_id, eos_id, sep_id = range(4)

    def __init__(self, implementation: Any) -> None:
        self._bpe = implementation
        vocabulary = sorted(implementation.get_vocab().items(), key=lambda entry: entry[1])
        of_character = {character: byte for byte, character in enumerate(_byte_characters())}
        self._pieces = [b""] * len(SPECIALS)
        for token, _ in vocabulary[len(SPECIALS) :]:
            self._pieces.append(bytes(of_character[character] for character in token))
        self._longest = max(map(len, self._pieces))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
        """Learns tokens from ``texts``, the same from the same texts.

        Args:
            texts: any number of strings; read once.
            vocab_size: the most tokens, 260 or more. Fewer come out where the texts have no more
                neighbours that occur ``min_frequency`` times.

        Raises:
            ValueError: ``vocab_size`` is less than 260.
            TypeError: a text is no string.
        """
        if vocab_size < SMALLEST:
            raise ValueError(
                f"Tokenizer: vocab_size is {vocab_size}; it must be {SMALLEST} or more "
                f"({len(SPECIALS)} special tokens and 256 bytes)"
            )
        library = _library()
        bytelevel = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe = library.Tokenizer(library.models.BPE())
        bpe.pre_tokenizer = bytelevel
        bpe.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIALS),
            initial_alphabet=sorted(bytelevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator((_encodable(text) for text in texts), trainer)
        return cls(_without_added_tokens(bpe.to_str()))

    @classmethod
    def default(cls, vocab_size: int = SMALLEST) -> Tokenizer:
        """The tokenizer of a model that is called with strings before one was trained: each byte a
        token. It is the same everywhere and fits any vocabulary of 260 or more; texts become three
        to four times as long as with a trained one.

        Raises:
            ValueError: ``vocab_size`` is less than 260.
        """
        if vocab_size < SMALLEST:
            raise ValueError(
                f"Tokenizer: a vocabulary of {vocab_size} is too small for text; it must be "
                f"{SMALLEST} or more. Token ids can be given instead of strings"
            )
        return cls.train((), SMALLEST)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self._pieces)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._bpe.to_str() == other._bpe.to_str()

    __hash__ = None  # type: ignore[assignment]

    # ---- text to ids --------------------------------------------------------------------------

    @overload
    def encode(  # type: ignore[overload-overlap]
        self, text: str, *, bos: bool = ..., eos: bool = ..., max_length: int | None = ...
    ) -> list[int]: ...
    @overload
    def encode(
        self, text: Sequence[str], *, bos: bool = ..., eos: bool = ..., max_length: int | None = ...
    ) -> list[list[int]]: ...
    def encode(self, text, *, bos=False, eos=False, max_length=None):
        """The ids of one string, or a list of them for each of many.

        Args:
            text: a string, or a sequence of strings.
            bos, eos: put ``<s>`` before, ``</s>`` after the text.
            max_length: the most ids, those two included. Longer texts lose their end, with a
                warning.

        Raises:
            TypeError: a text is no string.
            ValueError: ``max_length`` has no room for a token.
        """
        one = isinstance(text, str)
        texts = [text] if one else list(text)
        room = None if max_length is None else max_length - bos - eos
        if room is not None and room < 0:
            raise ValueError(f"Tokenizer: max_length is {max_length}; it has no room for a token")
        encoded, cut = [], 0
        for ids in self._batch(texts, room):
            if room is not None and len(ids) > room:
                ids, cut = ids[:room], cut + 1
            encoded.append([self.bos_id] * bos + ids + [self.eos_id] * eos)
        if cut:
            warnings.warn(
                f"Tokenizer: {cut} of {len(texts)} texts have more than {max_length} tokens; "
                "their ends are left out",
                stacklevel=2,
            )
        return encoded[0] if one else encoded

    def _batch(self, texts: list[str], room: int | None) -> list[list[int]]:
        texts = [_encodable(text) for text in texts]
        if room is not None:
            # A token is no longer than the longest: what lies beyond need not be encoded.
            reach = (room + 1) * self._longest
            texts = [text if len(text) <= reach else text[:reach] for text in texts]
        if len(texts) == 1:
            return [self._bpe.encode(texts[0]).ids]
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids, and for each the characters (start, end) of ``text`` that it is part of."""
        # A pair of surrogates is two of the text's characters and becomes one: replace singly.
        clean = text if _is_utf8(text) else "".join(c if _is_utf8(c) else "\ufffd" for c in text)
        encoding = self._bpe.encode(clean)
        return encoding.ids, encoding.offsets

    # ---- ids to text --------------------------------------------------------------------------

    @overload
    def decode(self, ids: Iterable[int]) -> str: ...
    @overload
    def decode(self, ids: Iterable[Iterable[int]]) -> list[str]: ...
    def decode(self, ids):
        """The text of a sequence of ids, or of each of many; special tokens are left out.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not isinstance(ids[0], int):
            return [self.decode(sequence) for sequence in ids]
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text in pieces, as soon as whole characters are there; joined, they are
        :meth:`decode`'s."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            piece = decoder.decode(self._bytes_of(i))
            if piece:
                yield piece
        piece = decoder.decode(b"", final=True)
        if piece:
            yield piece

    def _bytes_of(self, i: int) -> bytes:
        if not 0 <= i < self.vocab_size:
            raise ValueError(f"Tokenizer: id {i} is outside the vocabulary of {self.vocab_size}")
        return self._pieces[i]

    # ---- files --------------------------------------------------------------------------------

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``tokenizer.json`` into ``directory``, whole or not at all."""
        write_atomically(Path(directory) / FILE, self._bpe.to_str(pretty=True).encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no ``tokenizer.json`` in ``directory``.
            ValueError: the file is no tokenizer of this package.
        """
        path = Path(directory) / FILE
        text = path.read_text(encoding="utf-8")
        try:
            tokenizer = cls(_library().Tokenizer.from_str(text))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"Tokenizer: {path} is not a tokenizer: {error}") from error
        known = sorted(tokenizer._bpe.get_vocab().values())
        if known != list(range(len(known))):
            gap = next(i for i, known_id in enumerate([*known, -1]) if i != known_id)
            raise ValueError(
                f"Tokenizer: {path} has {len(known)} tokens, but none or several with the id {gap}"
            )
        ids = [tokenizer._bpe.token_to_id(special) for special in SPECIALS]
        if ids != list(range(len(SPECIALS))):
            raise ValueError(f"Tokenizer: {path} lacks {', '.join(SPECIALS)} as ids 0 to 3")
        return tokenizer


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: printable Latin-1 as it is, the
    others as what comes after Latin-1 (Radford et al., 2019)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_atomically(path: Path, content: bytes) -> None:
    """A reader, or the one after a crash, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _without_added_tokens(text: str) -> Any:
    """As entries of the vocabulary that no merge makes, special tokens are never found in texts."""
    description = json.loads(text)
    description["added_tokens"] = []
    return _library().Tokenizer.from_str(json.dumps(description))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encodable(text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"Tokenizer: texts must be strings, got {type(text).__name__}")
    if text.isascii() or _is_utf8(text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
