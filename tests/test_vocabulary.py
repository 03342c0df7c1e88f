"""Vocabularies of others: the ids of transformers' own tokenizer, or one line that names what was found."""
import json
import time

import pytest

from plumbing import checkpoint
from plumbing.cli import UserError
from plumbing.tokenizer import SPECIAL, load_tokenizer

WORDS = ("the The cat Cat é e ü ##s ##e [ ] < > hl ##l h ##h ent s 是 苹 果 是苹果 a ##a b [unused1] ÄÖ äö ao ! ##t c "
         "ca x ##x _ f o").split()
TEXTS = ("the [HL] cat [hl]", "The Cat é ü E", "<ent> <ENT> a<ent>b", "是苹果 the", "[MASK] the [CLS]", "ÄÖ äö Äö ao",
         "[unused1] the cats", "<s> a </s>", "  [HL]  cat", "x" * 120, "the_cat!")
LOWER = [word for word in WORDS if word == word.lower()]
SIZE = len(SPECIAL) + len(LOWER)


def flags(content, **other):
    return dict(content=content, lstrip=False, normalized=False, rstrip=False, single_word=False) | other


@pytest.fixture
def place(tmp_path):
    """place(words, **{file's name without .json: what it holds}): a directory with vocab.txt and these."""
    def make(words=LOWER, end="\n", line="\n", **files):
        text = line.join([*SPECIAL, *words]) + end
        (tmp_path / "vocab.txt").write_bytes(text.encode())
        for name, value in (dict(config=dict(model_type="bert")) | files).items():
            (tmp_path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
        return str(tmp_path)
    return make


def theirs(path):
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(path)


def assert_equal_ids(path):
    a, b = load_tokenizer(path), theirs(path)
    for text in TEXTS:
        assert a.encode(text, add_special_tokens=False).ids == b(text, add_special_tokens=False)["input_ids"], text
        assert checkpoint.framed(a).encode(text).ids == b(text)["input_ids"]
    return a


DECODER = {str(i): flags(token, special=True) for i, token in enumerate(SPECIAL)}
HONOURED = [
    dict(),
    dict(words=[*LOWER, "<S>", "<T>", "[ENT]", "The"]),                 # one word of 38 has capitals: lower-cased
    dict(words=[*LOWER, "\u2028", "zz  "]), dict(line="\r\n"), dict(end=""), dict(end="\n\n"),
    dict(words=WORDS, tokenizer_config=dict(do_lower_case=False)),
    dict(words=WORDS, tokenizer_config=dict(do_lower_case=True)),
    dict(tokenizer_config=dict(strip_accents=False, tokenizer_class="BertTokenizerFast")),
    dict(tokenizer_config=dict(tokenize_chinese_chars=False, tokenizer_class="DistilBertTokenizer")),
    dict(special_tokens_map=dict(mask_token=flags("[MASK]", lstrip=True), sep_token="[SEP]")),
    dict(tokenizer_config=dict(added_tokens_decoder=DECODER), added_tokens={"[HL]": SIZE})]     # which is not read then


@pytest.mark.parametrize("given", HONOURED, ids=[str(i) for i in range(len(HONOURED))])
def test_the_files_of_a_vocabulary_give_the_ids_of_transformers(place, tmp_path, given):
    """As they are, and saved by transformers as tokenizer.json."""
    path = place(**given)
    vocab = assert_equal_ids(path).get_vocab()
    theirs(path).save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text('{"model_type": "bert"}')
    saved = assert_equal_ids(str(tmp_path / "saved")).get_vocab()
    assert (tmp_path / "saved/tokenizer.json").exists() and vocab.items() - {("\u2028", SIZE)} <= saved.items()


def test_casing_without_a_word_on_it(place, tmp_path):
    """A vocab.txt alone is cased where one word in twenty has capitals; a tokenizer.json says it itself."""
    for capitals, cased in ((1, False), (2, True)):
        path = place([*(f"w{i}" for i in range(34)), "the", "cat", *(f"W{i}" for i in range(capitals))])
        assert load_tokenizer(path).encode("Cat", add_special_tokens=False).tokens == ["[UNK]" if cased else "cat"]
    tokenizer = load_tokenizer(place(WORDS))
    assert tokenizer.encode("The", add_special_tokens=False).tokens == ["The"]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for settings, said in (({}, "The"), (dict(do_lower_case=True), "the"),
                           (dict(do_lower_case=True, tokenizer_class="PreTrainedTokenizerFast"), "The")):
        assert load_tokenizer(place(WORDS, tokenizer_config=settings)).encode("The").tokens[1] == said
    assert_equal_ids(str(tmp_path))                                     # the last of them, which transformers reads so


REFUSED = [
    (dict(tokenizer_config=dict(tokenizer_class="BertJapaneseTokenizer")), "tokenizer_class is BertJapaneseTokenizer"),
    (dict(config=dict(model_type="bert", tokenizer_class="KoBertTokenizer")), "tokenizer_class is KoBertTokenizer"),
    (dict(tokenizer_config=dict(tokenizer_class="A\x1b[31m\nB")), r"tokenizer_class is A\\x1b\[31m: only"),
    (dict(tokenizer_config=dict(auto_map=dict(AutoTokenizer=["t.T", None]))), "auto_map is {'Auto.*: only none"),
    (dict(added_tokens={"[HL]": SIZE}), r"a file beside it adds the token '\[HL\]': save_pretrained of"),
    (dict(added_tokens={"[unused1]": len(SPECIAL) + LOWER.index("[unused1]")}), r"adds the token '\[unused1\]'"),
    (dict(special_tokens_map=dict(additional_special_tokens=["<ent>", "[HL]"])), "adds the token '<ent>'"),
    (dict(tokenizer_config=dict(extra_special_tokens=["[HL]"])), r"adds the token '\[HL\]'"),
    (dict(tokenizer_config=dict(added_tokens_decoder=DECODER | {str(SIZE): flags("[H]")})), r"adds the token '\[H\]'"),
    (dict(tokenizer_config=dict(cls_token="<s>")), "adds the token '<s>'"),
    (dict(special_tokens_map=dict(mask_token=flags("<mask>"))), "adds the token '<mask>'"),
    (dict(added_tokens="[1, 2]"), "added_tokens.json is damaged or not ours .TypeError"),
    (dict(added_tokens='{"\\ud800": 3}'), "adds the token"),
    (dict(tokenizer_config="[" * 10 ** 5), "tokenizer_config.json is damaged or not ours .RecursionError"),
    (dict(tokenizer_config=dict(do_lower_case="no")), "is damaged or not ours .TypeError"),
    (dict(words=["a", "b", "", "", "c"]), "lines 8 and 9 are both blank lines"),
    (dict(words=["a", "b", "a"]), "lines 6 and 8 are both 'a'"),
    (dict(words=["a", "a "]), "lines 6 and 7 are both 'a'"),
    (dict(words=[], line=" "), r"has \[PAD\] \[UNK\]")]


@pytest.mark.parametrize("given, message", REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_honoured_is_refused_by_name(place, given, message):
    with pytest.raises(UserError, match=message) as e:
        load_tokenizer(place(**given))
    assert str(e.value).isprintable() and len(str(e.value)) < 500


@pytest.mark.parametrize("change, message", [
    (lambda r: r.update(model=dict(type="BPE", vocab=r["model"]["vocab"], merges=[])), "model is BPE: only WordPiece"),
    (lambda r: r["model"].update(unk_token="the"), r"unk_token is the: only \[UNK\]"),
    (lambda r: r["model"]["vocab"].update(the=6), "a token is there twice, or one is missing"),
    (lambda r: r["model"]["vocab"].update(the=10 ** 6), "a token is there twice, or one is missing"),
    (lambda r: r["model"]["vocab"].update(the=10 ** 12), "damaged or not ours"),
    (lambda r: r.update(normalizer="x"), "damaged or not ours"), (lambda r: r.clear(), "damaged or not ours")])
def test_a_tokenizer_of_another_kind_is_refused_at_once(place, tmp_path, change, message):
    load_tokenizer(place()).save(str(tmp_path / "tokenizer.json"))
    raw, began = json.loads((tmp_path / "tokenizer.json").read_text()), time.monotonic()
    change(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))
    assert time.monotonic() - began < 5


def test_the_truncation_and_the_padding_of_a_tokenizer_are_not_applied_to_our_text(place, tmp_path):
    tokenizer = load_tokenizer(place())
    expected = tokenizer.encode("the cat " * 50).ids
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=64)
    assert len(tokenizer.encode("the cat " * 50).ids) == 64             # as it stands in the file
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(str(tmp_path))
    for each in (found, checkpoint.framed(found), checkpoint.framed(tokenizer)):
        assert each.encode("the cat " * 50).ids == expected and len(expected) == 102
        assert [len(e) for e in each.encode_batch(["the", "the cat " * 9])] == [3, 20]
