"""Any text -> the same bytes twice, nothing lost, nothing read that was not asked for."""
import gzip
import hashlib
import itertools
import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import prepare
from cli import UserError
from conftest import text
from data import SPECIAL, TokenDirectory


def files(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def make(out, *sources, vocab=None, vocab_size=None, val_fraction=0.1):
    return prepare.prepare(prepare.Config(list(map(str, sources)), str(out), vocab, vocab_size, val_fraction))


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(text(300)) + "\n")
    return path


def test_the_same_text_gives_the_same_bytes_plain_or_compressed(raw, tmp_path):
    for name, opener in (("text.txt.gz", gzip.open), ("text.txt.xz", lzma.open)):
        with opener(tmp_path / name, "wb") as f:
            f.write(raw.read_bytes())
    runs = [make(tmp_path / f"out{i}", source, vocab_size=300) for i, source in enumerate(
        (raw, raw, tmp_path / "text.txt.gz", tmp_path / "text.txt.xz"))]
    assert files(tmp_path / "out0") == files(tmp_path / "out1")
    assert len({json.dumps(run["sha256"]) for run in runs}) == 1


def test_the_ids_are_the_documents_each_ended_by_sep(raw, tmp_path):
    documents = text(300)
    manifest = make(tmp_path / "out", raw, vocab_size=300)
    directory = TokenDirectory(tmp_path / "out")
    tokenizer, sep = directory.read_tokenizer(), directory.special["[SEP]"]
    ids = np.concatenate([directory.split("train"), directory.split("val")])
    found = {tuple(d) for d in np.split(ids, np.flatnonzero(ids == sep) + 1)[:-1]}
    assert found == {(*itertools.chain.from_iterable(
        tokenizer.encode(line, add_special_tokens=False).ids for line in d.split("\n")), sep) for d in documents}
    assert manifest["documents"] == 300 and manifest["train_tokens"] + manifest["val_tokens"] == len(ids)
    assert 0.02 < manifest["val_tokens"] / len(ids) < 0.25


def test_validation_documents_stay_when_text_is_added_and_duplicates_go(raw, tmp_path):
    make(tmp_path / "out", raw, vocab_size=300)
    more = tmp_path / "more.txt"
    more.write_text("\n\n".join(text(50, seed=1) + text(300)) + "\n")
    manifest = make(tmp_path / "out2", more, raw, vocab=tmp_path / "out/tokenizer.json")
    assert manifest["documents"] == 350 and manifest["duplicates"] == 300
    assert set(prepare_split(tmp_path / "out", "val")) <= set(prepare_split(tmp_path / "out2", "val"))


def prepare_split(out, split):
    directory = TokenDirectory(out)
    ids = directory.split(split)
    return [tuple(d) for d in np.split(ids, np.flatnonzero(ids == directory.special["[SEP]"]) + 1)[:-1]]


def test_a_trained_vocabulary_is_special_tokens_then_sorted_ones(corpus):
    tokens = sorted(TokenDirectory(corpus).vocab.items(), key=lambda item: item[1])
    tokens = [token for token, _ in tokens]
    assert tokens[:5] == list(SPECIAL) and tokens[5:] == sorted(tokens[5:]) and len(tokens) == 300


def test_a_given_vocabulary_tokenizes_as_bert_does(tmp_path):
    tokens = [*SPECIAL, "hello", "world", "##s", ",", "e", "##e"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    ours = prepare.load_tokenizer(str(tmp_path / "vocab.txt"))
    theirs = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"))
    for sentence in ("Hello, worlds", "HÉLLO ée", "unknown"):
        assert ours.encode(sentence).ids == theirs.encode(sentence).ids
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, "Hello"]) + "\n")               # has capitals: cased
    assert prepare.load_tokenizer(str(tmp_path)).encode("Hello", add_special_tokens=False).ids == [len(tokens)]


def test_ids_above_65535_get_32_bits(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"t{i}" for i in range(70_000))]) + "\n")
    (tmp_path / "text.txt").write_text("\n\n".join(f"t{i} t{i + 1}" for i in range(69_000, 69_500)) + "\n")
    manifest = make(tmp_path / "out", tmp_path / "text.txt", vocab=tmp_path / "vocab.txt")
    assert manifest["dtype"] == "uint32" and TokenDirectory(tmp_path / "out").split("train").max() > 65_535


def test_few_documents_are_split_by_chunks(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(text(400)).replace("\n\n", "\n"))
    manifest = make(tmp_path / "out", tmp_path / "one.txt", vocab_size=300)
    assert manifest["documents"] == 1 and manifest["val_tokens"] > 0
    directory = TokenDirectory(tmp_path / "out")
    for name in ("train", "val"):
        assert len(directory.split(name)) == manifest[f"{name}_tokens"] > 0


@pytest.mark.parametrize("content, message", [(None, "no such file"), ("", "no text"), ("\n \n\n", "no text")])
def test_a_missing_or_empty_corpus_is_refused_and_leaves_no_manifest(tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_text(content)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a"]))
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", tmp_path / "text.txt", vocab=tmp_path / "vocab.txt")
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_vocabulary_that_is_none_is_refused(raw, tmp_path):
    for vocab, size, message in ((None, None, "either --vocab"), ("x", 5, "either --vocab"),
                                 (tmp_path / "nowhere.txt", None, "neither"), (raw, None, r"\[PAD\]")):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out", raw, vocab=vocab and str(vocab), vocab_size=size)


def test_docstrings_come_from_required_packages_alone_and_nothing_is_imported():
    packages = prepare.required_packages()
    assert {"torch", "numpy", "tokenizers", "tqdm", "sympy"} <= packages
    assert not packages & {"pytest", "transformers", "scikit-learn", "scipy", "ruff", "pip"}
    code = """
import itertools, sys, prepare
before = set(sys.modules)
first = list(itertools.islice(prepare.docstrings(), 3000))
assert len({package for package, _ in first}) > 2 and all(len(text) >= 20 for _, text in first)
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"anyio", "click", "sympy", "torch", "networkx"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(prepare.__file__).parent)
