"""Any text -> the same bytes twice, nothing lost, nothing read that was not asked for."""
import bz2
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import random
import resource
import subprocess
import sys
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import prepare
import sources
from cli import UserError
from conftest import text
from data import SPECIAL, TokenDirectory


def files(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())}


def make(out, *sources, vocab=None, vocab_size=None, val_fraction=0.1, **other):
    return prepare.prepare(prepare.Config(
        list(map(str, sources)), str(out), vocab and str(vocab), vocab_size, val_fraction, **other))


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(text(300)) + "\n")
    return path


@pytest.fixture
def vocab(corpus):
    return corpus / "tokenizer.json"


@pytest.fixture
def wiki(real_data):
    return real_data / "text/wiki_valid.txt.xz", real_data / "vocab/tokenizer.json"


def test_every_format_gives_the_same_bytes(raw, vocab, tmp_path, monkeypatch):
    documents, folder = text(300), tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "readme.md").write_text("not read")
    (folder / ".hidden.txt").write_text("not read")
    (folder / "a.txt").write_text("\n\n".join(documents[:100]))
    (folder / "b.txt").write_text("\n\n".join(documents[100:200]))
    (folder / "deeper/c.jsonl.gz").write_bytes(gzip.compress(jsonl(documents[200:], "text")))
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
        (tmp_path / f"packed.txt{suffix}").write_bytes(pack(raw.read_bytes()))
        (tmp_path / f"packed.jsonl{suffix}").write_bytes(pack(jsonl(documents, "body")))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as z:
        z.writestr("one.txt", "\n\n".join(documents[:100]))
        z.writestr("readme.md", "not read")
        z.writestr("two.jsonl", jsonl(documents[100:], "body"))
    first = make(tmp_path / "out", raw, vocab=vocab)
    again = make(tmp_path / "out2", raw, vocab=vocab)
    assert files(tmp_path / "out") == files(tmp_path / "out2") and first == again
    for i, given in enumerate(([folder], [folder / "*.txt", f"{folder}/**/*.gz"], *(
            [p] for p in sorted(tmp_path.glob("packed.*"))))):
        field = "text" if i < 2 else "body"
        assert make(tmp_path / "out2", *given, vocab=vocab, field=field)["sha256"] == first["sha256"], given
    for content in (raw.read_bytes(), jsonl(documents, "text")):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content))))
        assert make(tmp_path / "out2", "-", vocab=vocab)["sha256"] == first["sha256"]


def jsonl(documents, field):
    return "".join(json.dumps({"id": 1, field: document}) + "\n" for document in documents).encode()


def parquet(path, rows, field="text"):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.table({"id": range(len(rows)), field: rows}), path, row_group_size=70)


def test_parquet_and_rows_that_are_sentences(raw, vocab, tmp_path):
    first = make(tmp_path / "out", raw, vocab=vocab)
    parquet(tmp_path / "a.parquet", text(300))
    assert make(tmp_path / "out2", tmp_path / "a.parquet", vocab=vocab)["sha256"] == first["sha256"]
    parquet(tmp_path / "b.parquet", [None, *text(300)])
    manifest = make(tmp_path / "out2", tmp_path / "b.parquet", vocab=vocab)
    assert manifest["sha256"] == first["sha256"] and manifest["met"] == {"bad_rows": 1}
    manifest = make(tmp_path / "out2", tmp_path / "a.parquet", vocab=vocab, rows_per_document=3)
    assert manifest["documents"] == 100 and manifest["characters"] == first["characters"] + 200
    with pytest.raises(UserError, match="no column 'body': give --field, one of id, text"):
        make(tmp_path / "out3", tmp_path / "a.parquet", vocab=vocab, field="body")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-1])
    with pytest.raises(UserError, match="a.parquet cannot be read"):
        make(tmp_path / "out3", tmp_path / "a.parquet", vocab=vocab)


def test_a_data_set_of_the_hub_is_read_file_by_file(raw, vocab, tmp_path, monkeypatch):
    import huggingface_hub as hub
    documents, asked = text(300), []
    names = [f"{folder}/{split}-0000{i}-of-00002.parquet" for folder in ("en", "de") for split in ("train", "test")
             for i in range(2)]
    for i, name in enumerate(names[:2]):
        parquet(tmp_path / name, documents[150 * i:150 * (i + 1)])

    class Api:
        def dataset_info(self, name, revision, files_metadata):
            if name != "some/wiki":
                raise ConnectionError("404")
            return types.SimpleNamespace(sha="c" * 40, siblings=[
                types.SimpleNamespace(rfilename=n, size=1000) for n in ("README.md", *names)])

    def download(name, filename, repo_type, revision):
        asked.append((name, filename, repo_type, revision))
        return str(tmp_path / filename)
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    manifest = make(tmp_path / "out", "some/wiki/en", vocab=vocab)
    assert manifest["sha256"] == make(tmp_path / "out2", raw, vocab=vocab)["sha256"]
    assert asked == [("some/wiki", name, "dataset", "c" * 40) for name in names[:2]]        # not the test split
    assert manifest["hub"] == ["some/wiki@" + "c" * 40] and manifest["files"] == 2
    for source, message in (("some/wiki", "2 folders: name one, as in some/wiki/de"), ("some/wiki/fr", "no parquet"),
                            ("other/wiki", "neither on this disk nor")):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out3", source, vocab=vocab)
    names.remove("en/train-00001-of-00002.parquet")
    with pytest.raises(UserError, match="1 of its 2 files"):
        make(tmp_path / "out3", "some/wiki/en", vocab=vocab)


@pytest.mark.parametrize("dirty, clean, met", [
    (b"one\xff two\n\nthree", "one\ufffd two\n\nthree", {"bad_utf8_lines": 1}),
    (b"\xef\xbb\xbfone\n\ntwo", "one\n\ntwo", {"boms": 1}),
    (b"o\0ne\n\0\n\0two\0", "one\n\ntwo", {"nul_lines": 3}),
    (b"one\r\nmore\r\n\r\ntwo\rthree\r\n", "one\nmore\n\ntwo three", {}),
    (b" \n\t\n one \n\xc2\xa0\n\n\n two", "one\n\ntwo", {}),
    (b"one " * 20_000 + b"\ntwo\n\nthree", "one " * 20_000 + "two\n\nthree", {"long_lines": 1}),
    ("\u4e2d".encode() * 70_000, "\u4e2d " * 70_000, {"long_lines": 1}),                    # no whitespace
    (b"\xef\xbb\xbf" + b"three " * 11_000, "three " * 11_000, {"boms": 1, "long_lines": 1}),
    (b"one" + b" " * 200_000 + b"two", "one two", {"long_lines": 1}),
])
def test_what_text_can_bring_is_counted_and_does_not_change_the_ids(tmp_path, dirty, clean, met):
    tokens = [*SPECIAL, "one", "two", "three", "more", "\u4e2d"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (tmp_path / "dirty.txt").write_bytes(dirty)
    (tmp_path / "clean.txt").write_bytes(clean.encode())
    found, expected, again = (make(tmp_path / name, tmp_path / f"{source}.txt", vocab=tmp_path / "vocab.txt")
                              for name, source in (("a", "dirty"), ("b", "clean"), ("c", "dirty")))
    assert found == again and found["met"] == met and found["unknown"] == 0
    assert found["sha256"] == expected["sha256"] and found["documents"] == expected["documents"]


def test_rows_that_are_no_rows(raw, vocab, tmp_path):
    path, good = tmp_path / "a.jsonl", jsonl(text(300), "text").splitlines(keepends=True)
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good[0], b'{"text": 3}', b"[]", b"{", *good[1:], b'{"te']))
    manifest = make(tmp_path / "out", path, vocab=vocab)
    assert manifest["sha256"] == make(tmp_path / "out2", raw, vocab=vocab)["sha256"]
    assert manifest["met"] == {"bad_rows": 4}
    path.write_bytes(jsonl(["lone \ud800 surrogate, nul \0 inside"], "text"))
    assert make(tmp_path / "out", path, vocab=vocab)["met"] == {"nul_lines": 1}
    for content, message in ((b'{"id": 1, "body": "a"}', "give --field, one of id, body"), (b"text", "no JSON object")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out", path, vocab=vocab)


def damage(path, raw):
    """Writes a file that cannot be read to its end."""
    content = raw.read_bytes()
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("a.txt", content)
    elif path.suffix == ".txt":
        return path.write_bytes(content.decode().encode("utf-16"))
    else:
        path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[path.suffix](content))
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("name, message", [
    ("a.txt", "UTF-16"), *((f"a.txt{s}", "damaged or cut") for s in (".gz", ".xz", ".bz2", ".zip"))])
def test_a_cut_file_is_refused_and_what_was_there_stays(raw, vocab, tmp_path, name, message):
    make(tmp_path / "out", raw, vocab=vocab)
    before = files(tmp_path / "out")
    damage(tmp_path / name, raw)
    with pytest.raises(UserError, match=message) as e:
        make(tmp_path / "out", raw, tmp_path / name, vocab=vocab)
    assert "\n" not in str(e.value) and files(tmp_path / "out") == before


def test_killed_at_random_moments_and_run_again(vocab, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(text(8_000)))
    (tmp_path / "other.txt").write_text("\n\n".join(text(200, seed=1)))
    expected = make(tmp_path / "whole", tmp_path / "text.txt", vocab=vocab)["sha256"]
    make(tmp_path / "out", tmp_path / "other.txt", vocab=vocab)
    earlier, rng = files(tmp_path / "out"), random.Random(0)
    size = (tmp_path / "whole/train.bin").stat().st_size
    command = [sys.executable, prepare.__file__, str(tmp_path / "text.txt"), "--vocab", str(vocab), "--out",
               str(tmp_path / "out"), "--val-fraction", "0.1"]
    part = tmp_path / "out/train.bin.part"
    for share in (0.0, *(rng.uniform(0, 0.9) for _ in range(2)), 0.9):         # of the ids written
        part.unlink(missing_ok=True)
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not (part.exists() and part.stat().st_size >= share * size) and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        if process.wait():
            TokenDirectory(tmp_path / "out").verify()                   # the earlier one, whole
            assert files(tmp_path / "out").items() >= earlier.items()
            for left in (tmp_path / "out").glob("*.part"):
                left.write_bytes(left.read_bytes() + b"leftover")
    assert process.returncode == -9
    subprocess.run(command, check=True, capture_output=True)
    assert TokenDirectory(tmp_path / "out").manifest["sha256"] == expected
    assert sorted(files(tmp_path / "out")) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]


def test_killed_between_two_renames_the_directory_is_old_or_unusable_or_new(raw, vocab, tmp_path, monkeypatch):
    make(tmp_path / "whole", raw, vocab=vocab)
    replace = os.replace
    for n in range(4):
        left = iter(range(n))
        make(tmp_path / "out", raw, vocab=vocab, val_fraction=0.2)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", lambda a, b, left=left: replace(a, b) if next(left, None) is not None else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                make(tmp_path / "out", raw, vocab=vocab)
        with pytest.raises(UserError, match="no manifest.json"):
            TokenDirectory(tmp_path / "out")
        make(tmp_path / "out", raw, vocab=vocab)
        assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_too_little_room_is_said_before_the_work_and_a_full_disk_leaves_nothing(raw, vocab, tmp_path, monkeypatch):
    make(tmp_path / "out", raw, vocab=vocab)
    before = files(tmp_path / "out")
    with monkeypatch.context() as m:
        m.setattr(sources.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"will take about [\d,]+ bytes, 1,000 are free"):
            make(tmp_path / "out", raw, vocab=vocab)
    code = """
import resource, sys, prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))                 # a write beyond fails as on a full disk
prepare.run(prepare.main, prepare.Config, "")
"""
    done = subprocess.run([sys.executable, "-c", code, str(raw), "--vocab", str(vocab), "--out", str(tmp_path / "out")],
                          capture_output=True, text=True, cwd=Path(prepare.__file__).parent)
    assert done.returncode == 2 and "cannot be written (File too large)" in done.stderr, done.stderr
    assert files(tmp_path / "out") == before


def test_lines_and_batches_are_bounded(vocab):
    rng, line = random.Random(0), 1_000_000
    words = " ".join("x" * rng.randint(1, 90) for _ in range(line // 45)) + "y" * 300_000
    met = Counter()
    pieces = list(sources.paragraphs(io.BytesIO(words.encode()), met))
    assert max(map(len, pieces)) <= 2 * sources.LINE and met == {"long_lines": 1}
    assert "".join(pieces).replace(" ", "") == words.replace(" ", "")
    document, counts = "\n".join(pieces), Counter()
    batches = list(prepare.batches([document], 0.1, counts, characters=100_000))
    assert max(sum(len(line) for line, _, _ in batch) for batch in batches) < 100_000 + 2 * sources.LINE
    assert [ends for batch in batches for _, _, ends in batch] == [False] * (len(pieces) - 1) + [True]


def test_a_document_without_end_is_cut_at_a_line(monkeypatch):
    monkeypatch.setattr(sources, "DOCUMENT", 100)
    met = Counter()
    documents = list(sources.documents_of(["a" * 40] * 7, met))
    assert [len(d.split("\n")) for d in documents] == [3, 3, 1] and met["long_documents"] == 2


def test_documents_are_remembered_when_they_are_many(monkeypatch):
    monkeypatch.setattr(prepare, "RECENT", 50)
    seen, keys = prepare.Seen(), [prepare.document_key(str(i)) for i in range(1000)]
    assert all(seen.add(key) for key in keys) and not any(seen.add(key) for key in keys)
    assert len(seen.older) == 1000 and len(seen.recent) == 0


@pytest.mark.slow
def test_one_line_of_50_mb_takes_bounded_memory(wiki, tmp_path):
    with lzma.open(wiki[0], "rt", encoding="utf-8") as f:
        line = " ".join(f.read().split())
    (tmp_path / "line.txt").write_text(" ".join([line] * (50_000_000 // len(line.encode()) + 1)))
    subprocess.run([sys.executable, prepare.__file__, str(tmp_path / "line.txt"), "--vocab", str(wiki[1]), "--out",
                    str(tmp_path / "out")], check=True, capture_output=True)
    assert TokenDirectory(tmp_path / "out").manifest["met"]["long_lines"] == 1
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1.5e6                   # kB


def test_ids_are_those_of_transformers_on_10000_real_paragraphs(wiki, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = wiki[0].with_name("wiki_train.txt.xz")
    with lzma.open(path if path.exists() else wiki[0], "rt", encoding="utf-8") as f:
        lines = list(itertools.islice((line.strip() for line in f if line.strip()), 10_000))
    (tmp_path / "text.txt").write_text("\n\n".join(lines), encoding="utf-8")
    make(tmp_path / "out", tmp_path / "text.txt", vocab=wiki[1], val_fraction=1e-9)
    directory = TokenDirectory(tmp_path / "out")
    vocab = wiki[1].with_name("bert-base-uncased-vocab.txt")
    theirs = transformers.BertTokenizerFast(vocab=str(vocab), do_lower_case=True)
    sep, expected, seen = directory.special["[SEP]"], [], set()
    for line in lines:
        if line not in seen:
            seen.add(line)
            expected += [*theirs(line, add_special_tokens=False, verbose=False)["input_ids"], sep]
    assert len(lines) == 10_000                                         # none chosen for val: it is the last chunk
    assert np.array_equal(np.concatenate([directory.split("train"), directory.split("val")]), expected)


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


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_casing_is_what_the_tokenizers_configuration_says(tmp_path, file, monkeypatch):
    tokens = [*SPECIAL, "hello", "Hello", "\u2028"]
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    else:
        prepare.wordpiece({token: i for i, token in enumerate(tokens)}).save(str(tmp_path / file))

    def first_id():
        return prepare.load_tokenizer(str(tmp_path)).encode("Hello", add_special_tokens=False).ids
    for lower, expected in ((True, [5]), (False, [6])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert first_id() == expected

    import huggingface_hub as hub

    def download(name, filename):
        if not (tmp_path / filename).exists():
            raise hub.errors.EntryNotFoundError("404")
        return str(tmp_path / filename)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert prepare.load_tokenizer("some/bert").encode("Hello", add_special_tokens=False).ids == [6]


def test_the_hubs_own_client_reads_its_cache_in_a_fresh_process(raw, vocab, tmp_path):
    """No stand-in: huggingface_hub itself, offline, on a cache laid out as it lays it out."""
    def cached(kind, name, file):
        place, commit = tmp_path / f"hub/{kind}--{name.replace('/', '--')}", "a" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(commit)
        (place / "snapshots" / commit / file).parent.mkdir(parents=True)
        return place / "snapshots" / commit / file

    def run(source, name):
        command = [sys.executable, "prepare.py", source, "--vocab", name, "--out", tmp_path / "out"]
        return subprocess.run(command, env=os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"), text=True,
                              capture_output=True, cwd=Path(prepare.__file__).parent)
    cached("models", "some/bert", "tokenizer.json").write_bytes(vocab.read_bytes())
    parquet(cached("datasets", "some/wiki", "en/train.parquet"), text(300))
    for source in (raw, "some/wiki/en"):
        assert "300 documents" in run(source, "some/bert").stderr
    for source, name, message in ((raw, "no/bert", "from the Hub or its cache"), ("no/wiki", "some/bert", "no/wiki: ")):
        done = run(source, name)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_vocabulary_with_a_token_twice_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "b", "a"]) + "\n")
    with pytest.raises(UserError, match="7 tokens with ids up to 7"):
        prepare.load_tokenizer(str(tmp_path / "vocab.txt"))


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


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), ("", "no text"), ("\n \n\n", "no text"), ("\x01\n\n\u200b", "no text")])
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
    packages = sources.required_packages()
    assert {"torch", "numpy", "tokenizers", "tqdm", "sympy"} <= packages
    assert not packages & {"pytest", "transformers", "scikit-learn", "scipy", "ruff", "pip"}
    code = """
import itertools, sys, sources
before = set(sys.modules)
first = list(itertools.islice(sources.docstrings(), 3000))
assert len({package for package, _ in first}) > 2 and all(len(text) >= 20 for _, text in first)
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"anyio", "click", "sympy", "torch", "networkx"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(prepare.__file__).parent)
