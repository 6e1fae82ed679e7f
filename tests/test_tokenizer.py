"""The tokenizer: every text there and back, whatever it holds."""

import copy
import pickle
import warnings

import hypothesis
import pytest
from hypothesis import strategies

from fasttransformer.models import Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "the lazy dog sleeps, the quick fox does not",
    "敏捷的棕色狐狸跳过了懒狗。狐狸跳过了狗。",
    "Съешь же ещё этих мягких французских булок",
] * 3
ODD = [
    "", " ", "\n\n\t ", "a", "  two  spaces ", "你好，世界！",
    "مرحبا بالعالم", "नमस्ते", "👩‍👩‍👧‍👦🇩🇪 e\u0301",
    "\x00\x01 zero", "</s><pad><s><sep>", "line\r\nline", "\ufeffmark", "\U0010ffff", "1234567890",
]  # fmt: skip


@pytest.fixture(scope="module", params=["trained", "default"])
def tokenizer(request):
    return Tokenizer.train(TEXTS, 320) if request.param == "trained" else Tokenizer.default(32000)


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_there_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.decode_stream(ids)) == text
    assert all(4 <= i < tokenizer.vocab_size for i in ids)  # special tokens are in no text
    assert tokenizer.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert tokenizer.decode([1, *ids, 2, 0, 0]) == text


@hypothesis.given(strategies.text(strategies.characters(exclude_categories=())))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_string_is_encoded(text):
    """Lone surrogates, which have no UTF-8, become U+FFFD; pairs of them are characters."""
    tokenizer = Tokenizer.default()
    back = tokenizer.decode(tokenizer.encode(text))
    assert back == text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        assert back == text
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert len(ids) == len(offsets) and all(0 <= s < e <= len(text) for s, e in offsets)


def test_surrogates():
    tokenizer = Tokenizer.default()
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"
    assert tokenizer.encode(["a\udfff", "b"])[1] == tokenizer.encode("b")


@hypothesis.given(strategies.lists(strategies.integers(0, 319), max_size=40))
@hypothesis.settings(max_examples=200, deadline=None)
def test_a_stream_of_any_ids_is_their_text(ids):
    tokenizer = test_a_stream_of_any_ids_is_their_text.tokenizer
    ids = [i % tokenizer.vocab_size for i in ids]
    assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)


test_a_stream_of_any_ids_is_their_text.tokenizer = Tokenizer.train(TEXTS, 320)


def test_decoding_is_the_librarys():
    tokenizer = Tokenizer.train(TEXTS, 320)
    for text in ODD:
        ids = tokenizer.encode(text)
        assert tokenizer._bpe.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


def test_training_shortens_and_is_reproducible():
    first, second = Tokenizer.train(iter(TEXTS), 320), Tokenizer.train(TEXTS, 320)
    assert first == second and first.vocab_size == 320 == len(first)
    assert first != Tokenizer.default()
    for text in TEXTS:
        assert len(first.encode(text)) < 0.7 * len(Tokenizer.default().encode(text))
    assert Tokenizer.train([], 1000).vocab_size == 260
    assert Tokenizer.default(260) == Tokenizer.default(32000)


def test_long_texts_lose_their_end_with_a_warning():
    tokenizer = Tokenizer.train(TEXTS, 320)
    for text in ("x" * 10_000_000, "word " * 2_000_000, "你好" * 3_000_000):
        with pytest.warns(UserWarning, match="1 of 2 texts have more than 50 tokens"):
            ids, short = tokenizer.encode([text, "short"], eos=True, max_length=50)
        assert len(ids) == 50 and ids[-1] == 2
        start = tokenizer.decode(ids)
        assert text.startswith(start.rstrip("\ufffd")) and tokenizer.decode(short) == "short"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = tokenizer.encode("a" * 7)
        assert tokenizer.encode("a" * 7, max_length=len(exact)) == exact
        assert len(tokenizer.encode("a b " * 200_000)) >= 200_000  # whole without a limit
    with pytest.raises(ValueError, match="max_length is 1"):
        tokenizer.encode("a", bos=True, eos=True, max_length=1)


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_offsets_are_characters_of_the_text(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    covered = {i for start, end in offsets for i in range(start, end)}
    assert covered == set(range(len(text)))


def test_files(tmp_path):
    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save(tmp_path / "new" / "folder")
    assert Tokenizer.load(tmp_path / "new" / "folder") == tokenizer
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["tokenizer.json"]
    for copied in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert copied == tokenizer and copied.encode("你好 fox") == tokenizer.encode("你好 fox")
    with pytest.raises(FileNotFoundError):
        Tokenizer.load(tmp_path)
    for content in ("{", "{}", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="is not a tokenizer"):
            Tokenizer.load(tmp_path)


def test_transformers_reads_the_file(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.train(TEXTS, 320)
    tokenizer.save(tmp_path)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    assert theirs("the quick 狐狸")["input_ids"] == tokenizer.encode("the quick 狐狸")
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Tokenizer.train(TEXTS, 259), ValueError, "vocab_size is 259; it must be 260"),
        (lambda: Tokenizer.default(100), ValueError, "vocabulary of 100 is too small"),
        (lambda: Tokenizer.train([1], 300), TypeError, "must be strings, got int"),
        (lambda: Tokenizer.default().encode(["a", None]), TypeError, "got NoneType"),
        (lambda: Tokenizer.default().decode([260]), ValueError, "id 260 is outside"),
        (lambda: Tokenizer.default().decode([-1]), ValueError, "id -1 is outside"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
