"""Any text -> the same bytes twice, nothing lost, nothing read that was not asked for."""
import bz2
import errno
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import pickle
import random
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import BertWordPieceTokenizer

import prepare
from conftest import text
from plumbing import glue, rows, sources
from plumbing.cli import UserError
from plumbing.files import hold
from plumbing.tokenizer import SPECIAL, load_tokenizer, wordpiece
from plumbing.tokens import TokenDirectory


def files(directory):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(directory.iterdir())
            if p.name != ".nanokd"}


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
    (folder / ".hidden.txt").write_text("not read")
    (folder / "a.txt").write_text("\n\n".join(documents[:100]))
    (folder / "b.TXT").write_text("\n\n".join(documents[100:200]))
    (folder / "deeper/c.jsonl.gz").write_bytes(gzip.compress(jsonl(documents[200:], "text")))
    for suffix, pack in ((".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)):
        (tmp_path / f"packed.txt{suffix}").write_bytes(pack(raw.read_bytes()))
        (tmp_path / f"packed.jsonl{suffix}").write_bytes(pack(jsonl(documents, "body")))
    (tmp_path / "packed.00000-of-01024.json.gz").write_bytes(gzip.compress(jsonl(documents, "body")))      # as in C4
    (tmp_path / "packed.json").write_bytes(jsonl(documents, "body"))
    (tmp_path / "packed").write_bytes(jsonl(documents, "body"))
    (tmp_path / "packed.data").write_bytes(b"\xef\xbb\xbf\n" + jsonl(documents, "body"))       # whatever the name
    inside = [("./one", "\n\n".join(documents[:100]).encode()), ("__MACOSX/._one", b"\0\5\x16\7\0"),
              ("a.png", b"\x89PNG" * 20), ("deep/.two.txt", b"not read"),
              ("../two", jsonl(documents[100:], "body"))]
    tar(tmp_path / "packed.tar", inside)
    for suffix, pack in ((".tar.gz", gzip.compress), (".tgz", gzip.compress), (".tar.xz", lzma.compress)):
        (tmp_path / f"packed{suffix}").write_bytes(pack((tmp_path / "packed.tar").read_bytes()))
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as z:
        z.writestr("one.txt", "\n\n".join(documents[:100]))
        z.writestr("table.csv", "not read")
        z.writestr("two.jsonl", jsonl(documents[100:], "body"))
    first = make(tmp_path / "out", raw, vocab=vocab)
    again = make(tmp_path / "out2", raw, vocab=vocab)
    assert files(tmp_path / "out") == files(tmp_path / "out2") and first == again
    no_column = "without the column 'body' of --columns"
    for given in (folder, *sorted(tmp_path.glob("packed*"))):
        made = make(tmp_path / "out2", given, vocab=vocab, columns=None if given == folder else "body")
        assert made["sha256"] == first["sha256"], given
        assert made["met"] == ({f"left out: .csv ({no_column})": 1} if ".zip" in given.suffixes else
                               {"left out: .png (binary or not UTF-8)": 1} if {".tar", ".tgz"} & {*given.suffixes} else
                               dict(boms=1) if given.name == "packed.data" else {})
    for content in (raw.read_bytes(), jsonl(documents, "text"), gzip.compress(raw.read_bytes()),
                    tar(tmp_path / "any", [("a.txt", raw.read_bytes())])):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(content))))
        assert make(tmp_path / "out2", "-", vocab=vocab)["sha256"] == first["sha256"]


def tar(path, contents):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in contents:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path.read_bytes()


def jsonl(documents, field):
    return "".join(json.dumps({"id": 1, field: document}) + "\n" for document in documents).encode()


def parquet(path, texts, field="text"):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.table({"id": range(len(texts)), field: texts}), path, row_group_size=70)


def test_parquet_and_rows_that_are_sentences(raw, vocab, tmp_path):
    first = make(tmp_path / "out", raw, vocab=vocab)
    parquet(tmp_path / "a.parquet", text(300))
    assert make(tmp_path / "out2", tmp_path / "a.parquet", vocab=vocab)["sha256"] == first["sha256"]
    parquet(tmp_path / "b.parquet", [None, *text(300)])
    manifest = make(tmp_path / "out2", tmp_path / "b.parquet", vocab=vocab)
    assert manifest["sha256"] == first["sha256"] and manifest["met"] == {"bad_rows": 1}
    manifest = make(tmp_path / "out2", tmp_path / "a.parquet", vocab=vocab, document_per="file")
    assert manifest["documents"] == 1 and manifest["characters"] == first["characters"] + 299
    parquet(tmp_path / "c.parquet", [*[None] * 10, *["a line\n" * 600] * 120, *text(130)])
    assert make(tmp_path / "out2", tmp_path / "c.parquet", vocab=vocab)["met"] == {"bad_rows": 10}
    with pytest.raises(UserError, match="without the column 'body' of --columns: it has 'id', 'text'"):
        make(tmp_path / "out3", tmp_path / "a.parquet", vocab=vocab, columns="body")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-1])
    with pytest.raises(UserError, match="a.parquet is damaged or not ours"):
        make(tmp_path / "out3", tmp_path / "a.parquet", vocab=vocab)


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
    assert manifest["met"] == {"bad_rows": 4, "boms": 1}
    path.write_bytes(jsonl(["lone \ud800 surrogate, nul \0 inside"], "text"))
    assert make(tmp_path / "out", path, vocab=vocab)["met"] == {"lone_surrogates": 1, "nul_lines": 1}
    for content, message in ((b'{"id": 1, "body": "a"}', "which of 'id', 'body' are text. Say it with --col"),
                             (b"text", "no JSON lines")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out", path, vocab=vocab)


@pytest.mark.parametrize("content, met, documents", [
    ('{"text": null}\n{"id": 1}\n{oops\n' + jsonl(["a b"] + ["c d"] * 90, "text").decode(), {"bad_rows": 3}, 2),
    ('\ufeff\n \n{"text": "a"}\n\n\r\n\t{"text": "b"}', {"boms": 1}, 2),
    ('{"text": "a ? b"}\n{"text": "a \\ud83d b"}\n{"text": "c \\udc00\\ud800"}\n', {"lone_surrogates": 3}, 3),
    ('{"text": "\\ud83d\\ude00 d"}\n', {}, 1), ("", None, 0), ("{}\n{}\n", None, 0)])
def test_rows_of_json_are_read_counted_and_mended(content, met, documents, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *"abcd?"]) + "\n")
    (tmp_path / "x.jsonl").write_text(content, encoding="utf-8")
    if not documents:
        with pytest.raises(UserError, match="x.jsonl is empty"):
            make(tmp_path / "out", tmp_path / "x.jsonl", vocab=tmp_path / "vocab.txt")
        return
    manifest = make(tmp_path / "out", tmp_path / "x.jsonl", vocab=tmp_path / "vocab.txt")
    ids = np.concatenate([TokenDirectory(tmp_path / "out").split(name) for name in ("train", "val")])
    assert manifest["met"] == met and manifest["documents"] == documents
    assert (ids == 9).sum() == content.count("?") and manifest["unknown"] == content.count("ude00")


@pytest.mark.parametrize("rows_, message", [
    (['{"text": ["a", "b"]}'] * 20, "100% of its rows are damaged or have no text in the column"),
    (['{"text": "a"}'] * 90 + ['{"text": {"a": "b"}}'] * 10, "10% of its rows are damaged"),
    (['{"body": "a"}'] * 60 + ['{"text": "a"}'] * 40, "40% of its rows are damaged"),
    (['{"text": "a"}', '{"text": "' + "a" * 2000 + '"}'], "line 2 is longer than 0 MB: one row belongs there"),
    (['{"text": "' + "a" * 2000], "line 1 is longer than 0 MB")])
def test_rows_of_json_that_cannot_be_read_are_one_line(rows_, message, vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST", 1000)
    (tmp_path / "x.jsonl").write_text("\n".join(rows_))
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", tmp_path / "x.jsonl", vocab=vocab)


def test_parquet_holds_text_in_strings_alone(raw, vocab, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    first, texts = make(tmp_path / "out", raw, vocab=vocab), text(300)
    for column in (pa.array(texts, pa.large_string()), pa.array(texts).dictionary_encode(),
                   pa.array(texts, pa.string_view())):
        table = pa.table({"other": pa.nulls(300), "text": column, "image": [b"x" * 99] * 300})
        pq.write_table(table, tmp_path / "x.parquet")
        assert make(tmp_path / "out2", tmp_path / "x.parquet", vocab=vocab)["sha256"] == first["sha256"]
    for column in ([t.encode() for t in texts], [[t] for t in texts], [{"a": t} for t in texts], pa.nulls(300)):
        pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
        with pytest.raises(UserError, match="x.parquet: 100% of its rows are damaged or have no text in the column"):
            make(tmp_path / "out2", tmp_path / "x.parquet", vocab=vocab)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cr"])
def test_other_encodings_and_line_ends_are_named(encoding, vocab, tmp_path):
    message = ("text whose lines end in CR alone" if encoding == "cr" else "UTF-16 or UTF-32: .* iconv -f UTF-16 -t")
    for file, lines in (("x.txt", "\n\n".join(text(9)) + " \xe9"), ("x.md", "# caf\xe9\n\ntext and more of it"),
                        ("x.jsonl", '{"text": "some words"}\n'), ("x", '{"text": "some words"}\n')):
        content = lines.replace("\n", "\r").encode() if encoding == "cr" else lines.encode(encoding)
        for path, packed in ((tmp_path / file, content), (tmp_path / f"{file}.gz", gzip.compress(content))):
            path.write_bytes(packed)
            with pytest.raises(UserError, match=f"{path.name} is {message}"):
                make(tmp_path / "out", path, vocab=vocab)


WRAPPED = "A heading\n=========\n\nThis is the prose of a\nfile that goes on and\non to its end.\n\nOn it\ngoes.\n"
@pytest.mark.parametrize("name, content, said", [
    ("a.rst", WRAPPED, True), ("a.txt", WRAPPED + "One ends.\n", True), ("a.md", WRAPPED + "One ends.\n" * 5, False),
    ("a.txt", '"It ends."\n(So does it!)\nSo: \u201cit\u201d?\u201d\n*Ends:*\n\u5b8c\u3002\nno\n', False),
    ("a.jsonl", jsonl(["no end", "none"], "text").decode(), False)])
def test_hard_wrapped_prose_is_noticed(name, content, said, vocab, tmp_path, capsys):
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / name).write_text(content, encoding="utf-8")
    (tmp_path / "b.txt").write_text("A line that ends.\n" * 500)
    for per in ("blank-line", "file"):
        make(tmp_path / "out", tmp_path / "top", tmp_path / "b.txt", vocab=vocab, document_per=per)
        lines = [line for line in capsys.readouterr().err.splitlines() if "hard-wrapped" in line]
        assert len(lines) == (said and per == "blank-line")
        assert all(line.startswith(f"{tmp_path / 'top'}: most lines do not end in") for line in lines)


def test_an_archive_is_read_whatever_its_members_are_called(vocab, tmp_path, capsys):
    names = ["../up/a.txt", "/abs/b.md", "./c", "..", "d\\e.rst", "f\x1b[31m\n.txt", "x" * 90 + ".jsonl"]
    members = [(name, jsonl([words], "text") if "json" in name else words.encode())
               for name, words in zip(names, text(len(names)), strict=True)]
    tar(tmp_path / "a.tar", [*members, (".hidden/a.txt", b"not read"), ("__MACOSX/b.txt", b"not read")])
    assert make(tmp_path / "out", tmp_path / "a.tar", vocab=vocab)["documents"] == len(names)
    inner = (tmp_path / "a.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as archive:              # links, devices, archives: counted
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo("a.txt")
            info.type, info.linkname, info.size = kind, "a.txt", 4 * (kind == tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(b"text"))
        for name, content in (("in.tar", inner), ("in.txt", gzip.compress(b"more")), ("in.zip", zipped(a="b")),
                              ("in.md", "text".encode("utf-16"))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    manifest = make(tmp_path / "out", tmp_path / "a.tar", vocab=vocab)
    assert (manifest["documents"], manifest["met"]) == (2, {            # in.txt is unpacked
        "left out: .md (UTF-16 or UTF-32)": 1, "left out: .tar (an archive inside of another one)": 1,
        "left out: .txt (a link or a device)": 4, "left out: .zip (an archive inside of another one)": 1})
    tar(tmp_path / "b.tar", [("\x1b[2J\nb.txt", b"words"), ("b.\x1b[2J", b"%PDF-")])
    prepare.main(prepare.Config([str(tmp_path / "b.tar")], str(tmp_path / "out"), str(vocab)))
    assert "met: 1 left out: .\\x1b[2j (a PDF)" in (said := capsys.readouterr().err) and "\x1b[2" not in said


def test_what_is_no_file_is_refused_and_not_waited_for(raw, vocab, tmp_path):
    os.mkfifo(tmp_path / "fifo.txt")
    for source in (tmp_path / "fifo.txt", "/dev/zero"):
        with pytest.raises(UserError, match=f"{Path(source).name} is a directory, a FIFO or a device: give a file"):
            make(tmp_path / "out", source, vocab=vocab)
    with pytest.raises(UserError, match="--vocab .*/fifo.txt: neither"):
        make(tmp_path / "out", raw, vocab=tmp_path / "fifo.txt")


def test_names_reach_no_terminal_with_escapes(raw, vocab, tmp_path, capsys):
    (tmp_path / "top").mkdir()
    (tmp_path / "top/a.txt").write_bytes(raw.read_bytes())
    (tmp_path / "top/b.x\x1b[2J\n").write_bytes(bytes(range(256)))
    prepare.main(prepare.Config([str(tmp_path / "top")], str(tmp_path / "out"), str(vocab)))
    assert "met: 1 left out: .x\\x1b[2j" in (said := capsys.readouterr().err) and "\x1b[2" not in said
    (tmp_path / "c\x1b[2J\n.txt").write_bytes(b"%PDF-")
    with pytest.raises(UserError, match="is a PDF") as e:
        make(tmp_path / "out", tmp_path / "c\x1b[2J\n.txt", vocab=vocab)
    assert str(e.value).isprintable()


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


def zipped(**contents):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as z:
        for name, content in contents.items():
            z.writestr(zipfile.ZipInfo(name), content)                  # without today's date: a test's name
    return file.getvalue()


WORDS = b"some words, and more of them on a line\n" * 100
@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"%PDF-1.7\n" + WORDS, "is a PDF: convert it first"),
    ("a.docx", zipped(**{"[Content_Types].xml": "<x/>", "word/document.xml": "<x/>"}), "is an Office document or"),
    ("a.txt", zipped(mimetype="application/epub+zip", a="<x/>"), "is an Office document or an EPUB"),
    ("a.zip", zipped(**{"a.png": b"\x89PNG" * 20, "b.csv": "x"}), "a.zip: no text in it; met: 1 left out: .png .bin"),
    ("a.tar", [("b.parquet", b"PAR1" + WORDS), ("c.zip", zipped(a="b"))], "a.tar: no text in it; met: 1 left "
     "out: .parquet .an archive inside of another one., 1 left out: .zip"),
    ("a.zip.gz", gzip.compress(zipped(a="x"), mtime=0), "a.zip.gz is damaged or not ours .BadZipFile: File is"),
    ("a.gz", b"", "a.gz does not begin as its name says .damaged, or a Git LFS"),
    ("a.doc", b"\xd0\xcf\x11\xe0" + WORDS, "is an Office document: take the text out"),
    ("a.txt", b"{\\rtf1 " + WORDS, "is an Office document: take"),
    ("a.pkl", pickle.dumps(["text"] * 100), "is binary or not UTF-8"),
    ("a.txt", b"\x89PNG\r\n" + bytes(range(256)), "is binary or not UTF-8"),
    ("a.txt.zst", b"\x28\xb5\x2f\xfd" + WORDS, "is packed by Zstandard: unpack it first"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "begin as its name says .*Git LFS"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer: fetch"),
    ("a.txt", b"\n<!DOCTYPE html>\n" + WORDS, "is HTML or XML: take the text out"),
    ("wiki.xml", b"\xef\xbb\xbf<?xml version='1.0'?>" + WORDS, "is HTML or XML"),
    ("a.csv", b"a,b,c,d\n" + b"x,y,z,u\n" * 9, "is a table without a column 'text': which of 'a', 'b', 'c', 'd' are"),
    ("a.tsv.gz", gzip.compress(b"0.5\t1\n", mtime=0), "is without a header .line 1 holds 1."),
    ("a.json", b'[\n {"text": "a"}\n]', "is one JSON array: make it one object per line first, as in  jq"),
    ("a.json", b'{\n "text": "a"\n}', "a.json is no JSON lines"), ("a.jsonl", WORDS, "a.jsonl is no JSON lines"),
    ("a.txt", ("caf\xe9 au lait\n" * 100).encode("latin-1") + WORDS, "is binary or not UTF-8: convert it first"),
    ("a.txt", WORDS * 20 + b"\xe9" * 30 + b"\n\xe9" * 150, "is binary or not UTF-8: convert it first"),
    ("a.bin", bytes(range(256)) * 40, "is binary or not UTF-8"),
    ("a.txt", WORDS + bytes(200) + b"\n" * 5 + b"\1" * 20, None),
    ("a.txt", (WORDS[:-1] + b"\0\n") * 3, None),
    ("a.jsonl", jsonl(["words"] * 100, "text") + b'{"text": 3}\n' * 30, "23% of its rows are damaged or have no text"),
    ("a.jsonl", jsonl(["words"] * 100, "text") + b'{"text": 3}\n' * 5, None),
])
def test_what_is_no_text_is_refused_by_what_it_is(vocab, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else tar(path, content)
    if message is None:                                                 # a few bad lines are counted
        assert make(tmp_path / "out", path, vocab=vocab)["met"]
        return
    with pytest.raises(UserError, match=message) as e:
        make(tmp_path / "out", path, vocab=vocab)
    assert "\n" not in str(e.value) and path.name in str(e.value) and not (tmp_path / "out").exists()


def test_a_tar_that_is_cut_anywhere_or_has_a_damaged_header_is_refused(vocab, tmp_path):
    whole = tar(tmp_path / "a.tar", [("a.txt", b"some words\n" * 200), ("b.txt", b"some other words\n" * 200)])
    assert make(tmp_path / "out", tmp_path / "a.tar", vocab=vocab)["documents"] == 2
    second = 512 + 2560                                                 # where the second header is
    assert whole[second:second + 5] == b"b.txt"
    cuts = [whole[:n] for n in (0, 1, 400, 512, 700, second, second + 100, second + 512, second + 700, 7168)]
    for content in (*cuts, whole[:second + 100] + b"x" * 100 + whole[second + 200:]):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError, match="a.tar.* (is damaged or not ours|does not begin as its name says)"):
            make(tmp_path / "out", tmp_path / "a.tar", vocab=vocab)


def test_a_directory_is_read_to_its_end_and_says_what_is_left_out(vocab, tmp_path, capsys):
    documents, top = text(120), tmp_path / "top"
    for i, name in enumerate(("a.txt", "AA/wiki_00", "b.TXT", "c.json", "d.JSONL.gz", "e.text")):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        part = documents[20 * i:20 * (i + 1)]
        content = jsonl(part, "text") if "json" in name.lower() else "\n\n".join(part).encode()
        (top / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for i, name in enumerate(("README", "a.md", "b.rst", "c.cfg", "d.log.xz", "lines.0001")):
        content = f"another {'text ' * i}" if name != "lines.0001" else '{"text": "a line"}\n{"text": "more lines"}\n'
        (top / name).write_bytes(lzma.compress(content.encode()) if name.endswith("xz") else content.encode())
    for name in ("f.csv", "g.csv", "__MACOSX/._a", "__MACOSX/a.txt", ".git/HEAD", ".DS_Store"):
        (top / name).parent.mkdir(exist_ok=True)
        (top / name).write_bytes(b"not read")
    for name, content in (("i.PDF", b"%PDF-1.4"), ("program", b"\x7fELF" * 20), ("j.pyc", bytes(range(200))),
                          ("k.md", "wide".encode("utf-16")), ("l.rst", b"a\rb\r"), ("m.docx", zipped(mimetype="b")),
                          ("h.html.gz", gzip.compress(b"<html>")), ("o.ipynb", b'{\n "cells": []\n}'),
                          ("r.json", b'{ \r\n "a": 1\n}'), ("p.rst", "d\xe9j\xe0 vu\n".encode("latin-1") * 10),
                          ("q.svg", b"<svg>"), ("s.map", b'{"a": 1}\n'), ("t.txt", b"%PDF-1.4")):
        (top / name).write_bytes(content)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/j.txt").write_text("another document that is linked to")
    (top / "linked.txt").symlink_to(tmp_path / "elsewhere/j.txt")
    (top / "circle").symlink_to(top)
    (top / "nowhere").symlink_to(tmp_path / "gone")
    os.mkfifo(top / "pipe")
    config = prepare.Config([str(top)], str(tmp_path / "out"), str(vocab), val_fraction=0.1)
    prepare.main(config)
    manifest = TokenDirectory(tmp_path / "out").manifest
    assert manifest["documents"] == 128 and manifest["files"] == 28
    assert manifest["met"] == {f"left out: {what}": n for what, n in {
        f"{top / 'circle'} (no file)": 1, f"{top / 'nowhere'} (no file)": 1, f"{top / 'pipe'} (no file)": 1,
        ".csv (a table without a column 'text')": 2, ".docx (an Office document or an EPUB)": 1, ".gz (HTML or XML)": 1,
        ".ipynb (no JSON lines)": 1, ".json (no JSON lines)": 1, ".map (a table without a column 'text')": 1,
        ".md (UTF-16 or UTF-32)": 1, ".pdf (a PDF)": 1, ".pyc (binary or not UTF-8)": 1,
        ".rst (binary or not UTF-8)": 1,
        ".rst (text whose lines end in CR alone)": 1, ".svg (HTML or XML)": 1, ".txt (a PDF)": 1,
        "without suffix (binary or not UTF-8)": 1}.items()}
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("met: ")]
    assert len(said) == 1 and said[0].startswith("met: 2 left out: .csv (a table without") and said[0].endswith(", ...")


def test_what_cannot_be_opened_is_named_with_its_reason(vocab, raw, tmp_path, monkeypatch):
    """Permissions do not bind the superuser, as whom tests may run, so the system's answer is a stand-in."""
    top, scandir = tmp_path / "top", os.scandir
    (top / "locked").mkdir(parents=True)
    (top / "a.txt").write_bytes(raw.read_bytes())

    def refuse(path, *rest):
        if Path(path).name in ("locked", "secret.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path) if not rest else open(path, *rest)
    monkeypatch.setattr(os, "scandir", refuse)
    assert make(tmp_path / "out", top, vocab=vocab)["met"] == {f"left out: {top / 'locked'} (Permission denied)": 1}
    with pytest.raises(UserError, match=r"no text in it; met: 1 left out: .*locked \(Permission denied\)"):
        make(tmp_path / "out", top / "locked", vocab=vocab)
    monkeypatch.setattr(rows, "open", refuse, raising=False)
    (tmp_path / "secret.txt").write_bytes(raw.read_bytes())
    with pytest.raises(UserError) as e:
        make(tmp_path / "out", tmp_path / "secret.txt", vocab=vocab)
    assert str(e.value).endswith("secret.txt cannot be read (Permission denied): mend that, or leave it out")


@pytest.mark.parametrize("content, per_blank_line, per_file", [
    ("one\n\ntwo\n", ["one", "two"], ["one\ntwo"]),
    ("\n\none\nmore \n \n\n two", ["one\nmore", "two"], ["one\nmore\ntwo"])])
def test_documents_are_what_the_flag_says(tmp_path, content, per_blank_line, per_file):
    (tmp_path / "a.txt").write_text(content)
    files = sources.find_files(str(tmp_path / "a.txt"), Counter())
    for per, expected in (("blank-line", per_blank_line), ("file", per_file)):
        assert [p.text for p in sources.read_documents(files, Counter(), document_per=per)] == expected


def test_no_long_document_is_on_both_sides(vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DOCUMENT", 200)
    books = ["\n\n".join(text(8, seed=i)) for i in range(120)]
    for i, book in enumerate(books):
        (tmp_path / f"books-{i:03}.txt").write_text(book)
    copy = books[3].split("\n")
    (tmp_path / "copy.txt").write_text("\n".join(copy))
    (tmp_path / "same_end.txt").write_text("another beginning of the book. " * 10 + "\n" + books[5])
    manifest = make(tmp_path / "out", *sorted(tmp_path.glob("*.txt")), vocab=vocab, document_per="file")
    assert manifest["documents"] == 121 and manifest["duplicates"] == 1
    assert manifest["met"]["long_documents"] == 122
    assert 0 < manifest["val_tokens"] < 0.3 * manifest["train_tokens"]
    tokenizer, sides = TokenDirectory(tmp_path / "out").read_tokenizer(), {}
    for side in ("train", "val"):
        for ids in prepare_split(tmp_path / "out", side):
            sides.setdefault(ids[:-1], set()).add(side)
    assert all(len(side) == 1 for side in sides.values())               # the same text is on one side

    def encode(piece):
        return tuple(itertools.chain.from_iterable(
            tokenizer.encode(line, add_special_tokens=False).ids for line in piece.text.split("\n")))
    for book in books:
        pieces = [encode(piece) for piece in sources.pieces(filter(None, book.split("\n")), "", Counter())]
        first = prepare.document_key(np.array(pieces[0], "<u4").tobytes())
        side = "val" if prepare.is_validation(first, 0.1) else "train"
        assert len(pieces) > 2 and all(sides[ids] == {side} for ids in pieces)


def test_documents_that_differ_only_for_the_eye_are_duplicates(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "cafe", "au", "lait"]) + "\n")
    text = "cafe au lait\n\nCaf\xe9 au\nlait\n\nCAFE\x01 AU LAIT\n\nlait\n\n\x01\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    manifest = make(tmp_path / "out", tmp_path / "a.txt", vocab=tmp_path / "vocab.txt")
    assert (manifest["documents"], manifest["duplicates"]) == (2, 2)


def test_a_docstrings_side_follows_from_its_beginning_alone(vocab, tmp_path, monkeypatch):
    documents = [d.replace("\n", " ") + " and so on, and so forth" * 8 for d in text(300)]
    later = [d[:prepare.HEAD].upper().replace(" ", "\n") + d[prepare.HEAD:] + " in version 2" for d in documents]
    for i, given in enumerate((documents, later)):
        prepare.prepare(prepare.Config(["docstrings"], str(tmp_path / str(i)), str(vocab), val_fraction=0.1), given)
    tokenizer = TokenDirectory(tmp_path / "0").read_tokenizer()
    expected = sorted(tuple(tokenizer.encode(d.replace("\n", " "), add_special_tokens=False).ids) for d in later
                      if prepare.is_validation(prepare.docstring_key(d), 0.1))
    held_out = [prepare.is_validation(prepare.docstring_key(d), 0.1) for d in documents]
    assert held_out == [prepare.is_validation(prepare.docstring_key(d), 0.1) for d in later] and 10 < sum(held_out) < 60
    assert sorted(ids[:-1] for ids in prepare_split(tmp_path / "1", "val")) == expected
    assert len(prepare_split(tmp_path / "0", "val")) == len(expected)
    head = "a word " * 22 + "123456"                                    # the rule itself, written out
    key = hashlib.blake2b(head.encode(), digest_size=8).digest()
    assert len(head) == 160 and prepare.docstring_key(f"  \xc0 W\xf6rd {head[7:]} more".replace("\xf6", "o")) == key
    # from the source itself, and not beside another one
    monkeypatch.setattr(sources, "docstrings", lambda: (("torch", d) for d in later))
    make(tmp_path / "2", "docstrings", vocab=vocab)
    assert files(tmp_path / "2")["val.bin"] == files(tmp_path / "1")["val.bin"]


def test_a_small_corpus_gives_a_tenth_to_validation_and_is_warned_of(vocab, tmp_path, capsys):
    for documents, n in ((text(150), 150), (text(1), 1), ([*text(140), " ".join(text(1000, seed=3))], 141)):
        (tmp_path / "a.txt").write_text("\n\n".join(documents))
        prepare.main(prepare.Config([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(vocab)))
        manifest = TokenDirectory(tmp_path / "out").manifest
        assert manifest["documents"] == n
        assert 0 < manifest["val_tokens"] <= 0.11 * (manifest["train_tokens"] + manifest["val_tokens"]) + 1
        blocks = manifest["val_tokens"] // 126
        assert f"validation is small: {blocks} blocks at --seq-len 128" in capsys.readouterr().err
    prepare.main(prepare.Config([str(tmp_path / "a.txt")], str(tmp_path / "out"), str(vocab), val_fraction=0.3))
    assert "validation is small" not in capsys.readouterr().err


def test_one_long_document_does_not_make_validation_half_of_the_ids(vocab, tmp_path):
    """Of these 150 documents, the hash puts the longest into validation."""
    tokenizer = load_tokenizer(str(vocab))
    short = text(149)
    for seed in itertools.count():
        long = text(1000, seed=seed)
        ids = [i for line in "\n".join(long).split("\n") for i in tokenizer.encode(line, add_special_tokens=False).ids]
        if prepare.is_validation(prepare.document_key(np.array(ids, "<u4").tobytes()), 0.3):
            break
    (tmp_path / "a.txt").write_text("\n\n".join([*short, "\n".join(long)]))
    manifest = make(tmp_path / "out", tmp_path / "a.txt", vocab=vocab, val_fraction=0.3)
    total = manifest["val_tokens"] + manifest["train_tokens"]
    assert len(ids) > total / 2 and 0.2 < manifest["val_tokens"] / total < 0.4 and manifest["documents"] == 150
    assert sorted(files(tmp_path / "out")) == ["manifest.json", "tokenizer.json", "train.bin", "val.bin"]
    together = [TokenDirectory(tmp_path / "out").split(name) for name in ("train", "val")]
    assert sum(map(len, together)) == total
    assert sum((ids == 3).sum() for ids in together) == 150             # no id is lost: [SEP] is 3


def test_a_second_prepare_with_the_same_out_is_refused(raw, vocab, tmp_path, monkeypatch, capsys):
    first = make(tmp_path / "out", raw, vocab=vocab)
    with hold(tmp_path / "out", "tokens"):
        done = subprocess.run([sys.executable, prepare.__file__, str(raw), "--vocab", str(vocab), "--out",
                               str(tmp_path / "out")], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == (f"error: --out {tmp_path / 'out'}: another process is "
                                                        f"writing there: wait for it, or give another --out\n")
    assert make(tmp_path / "out", raw, vocab=vocab) == first            # free again
    monkeypatch.setitem(sys.modules, "fcntl", None)                     # as on Windows
    capsys.readouterr()
    assert make(tmp_path / "out", raw, vocab=vocab) == first
    said = [line for line in capsys.readouterr().err.splitlines() if "locked" in line]
    assert said == [f"{tmp_path / 'out/.nanokd'} cannot be locked here: let no second process work on it"]


@pytest.mark.parametrize("changes, expected", [
    (dict(vocab=None), "give either --vocab (an existing vocabulary) or --vocab-size (train one)"),
    (dict(vocab=None, vocab_size=-5), "--vocab-size -5: must be a whole number, at least 6"),
    (dict(vocab=None, vocab_size=10 ** 12), "--vocab-size 1000000000000: must be a whole number, at least 6 and"),
    (dict(vocab=None, vocab_size=9), "--vocab-size 9: the text's characters alone take"),
    (dict(vocab="/none/vocab.txt"), "--vocab /none/vocab.txt: neither on this disk nor given by the Hub or its cache"),
    (dict(vocab="{tmp}"), "neither tokenizer.json nor vocab.txt is in {tmp}"),
    (dict(vocab="{tmp}/damaged/tokenizer.json"), "damaged/tokenizer.json is damaged or not ours (JSONDecodeError: "),
    (dict(vocab="{tmp}/damaged/vocab.txt"), "damaged/vocab.txt is damaged or not ours (UnicodeDecodeError: "),
    (dict(val_fraction=0.0), "--val-fraction 0.0: must be a number, at least 1e-9 and below 1"),
    (dict(val_fraction=1.0), "--val-fraction 1.0: must be a number, at least 1e-9 and below 1"),
    (dict(val_fraction=-0.1), "--val-fraction -0.1: must be a number, at least 1e-9 and below 1"),
    (dict(val_fraction=float("nan")), "--val-fraction nan: must be a number, at least 1e-9 and below 1"),
    (dict(document_per="page"), "--document-per page: must be one of blank-line, line, file"),
    (dict(out="{tmp}/text.txt"), "text.txt: no directory to write in: {tmp}/text.txt: Not a directory"),
    (dict(out="{tmp}/text.txt/a"), "text.txt/a: no directory to write in: {tmp}/text.txt: Not a directory"),
    (dict(out=""), "--out is empty: say what belongs there, or leave it out"),
    (dict(sources=["{tmp}/none.txt"]), "none.txt: no such file: give files"),
    (dict(sources=["{tmp}/" + "x" * 300]), "cannot be read (File name too long)"),
    (dict(sources=["some/wiki"]), "some/wiki: no such file: give files, directories or the word docstrings; what is on "
                                  "the Hub comes by  hf download OWNER/NAME --repo-type dataset --local-dir DIRECTORY"),
])
def test_wrong_arguments_are_refused_in_one_line(raw, vocab, tmp_path, changes, expected):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/tokenizer.json").write_text("{")
    (tmp_path / "damaged/vocab.txt").write_bytes(b"\xff\n")

    def place(value):
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
    given = dict(sources=[str(raw)], out=str(tmp_path / "out"), vocab=str(vocab)) | {
        key: [place(v) for v in value] if isinstance(value, list) else place(value) for key, value in changes.items()}
    with pytest.raises(UserError) as e:
        prepare.prepare(prepare.Config(**given))
    assert place(expected) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written_is_said_before_the_work(raw, vocab, tmp_path, monkeypatch):
    def refuse(dir):                                    # permissions do not bind the superuser
        raise PermissionError(errno.EACCES, "Permission denied")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="out: no directory to write in: .*: Permission denied"):
        make(tmp_path / "out", raw, vocab=vocab)


@pytest.mark.parametrize("name, message", [
    ("a.txt", "UTF-16"), *((f"a.txt{s}", "is damaged or not ours") for s in (".gz", ".xz", ".bz2", ".zip"))])
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


def test_a_full_disk_leaves_what_was_there(raw, vocab, tmp_path):
    make(tmp_path / "out", raw, vocab=vocab)
    before = files(tmp_path / "out")
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
    pieces = sources.cut(words, met)
    assert max(map(len, pieces)) <= 65_535 and met["long_lines"] == 1
    assert "".join(pieces).replace(" ", "") == words.replace(" ", "")
    documents = [sources.Piece(piece, "") for piece in pieces]
    batches = list(prepare.batches(documents, characters=100_000))
    assert max(sum(len(piece.text) for piece in batch) for batch in batches) < 100_000 + 65_536
    assert [piece for batch in batches for piece in batch] == documents


def test_a_document_without_end_is_cut_at_a_line(monkeypatch):
    monkeypatch.setattr(sources, "DOCUMENT", 100)
    met = Counter()
    pieces = list(sources.pieces(["a" * 40] * 7 + ["", "b"], "", met))
    assert [len(p.text.split("\n")) for p in pieces] == [3, 3, 1, 1] and met["long_documents"] == 1
    assert [p.begins for p in pieces] == [True, False, False, True]


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
    ours = load_tokenizer(str(tmp_path / "vocab.txt"))
    theirs = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"))
    for sentence in ("Hello, worlds", "HÉLLO ée", "unknown"):
        assert ours.encode(sentence).ids == theirs.encode(sentence).ids
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, "Hello"]) + "\n")               # has capitals: cased
    assert load_tokenizer(str(tmp_path)).encode("Hello", add_special_tokens=False).ids == [len(tokens)]


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_casing_is_what_the_tokenizers_configuration_says(tmp_path, file, monkeypatch):
    tokens = [*SPECIAL, "hello", "Hello", "\u2028"]
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    else:
        wordpiece({token: i for i, token in enumerate(tokens)}).save(str(tmp_path / file))

    def first_id():
        return load_tokenizer(str(tmp_path)).encode("Hello", add_special_tokens=False).ids
    for lower, expected in ((True, [5]), (False, [6])):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
        assert first_id() == expected

    import huggingface_hub as hub
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert load_tokenizer("some/bert").encode("Hello", add_special_tokens=False).ids == [6]


def test_the_hubs_own_client_reads_its_cache_in_a_fresh_process(raw, vocab, tmp_path):
    """No stand-in: huggingface_hub itself, offline, on a cache laid out as it lays it out."""
    def cached(kind, name, file):
        place, commit = tmp_path / f"hub/{kind}--{name.replace('/', '--')}", "a" * 40
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(commit)
        (place / "snapshots" / commit / file).parent.mkdir(parents=True)
        return place / "snapshots" / commit / file

    def run(name):
        command = [sys.executable, "prepare.py", raw, "--vocab", name, "--out", tmp_path / "out"]
        return subprocess.run(command, env=os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1"), text=True,
                              capture_output=True, cwd=Path(prepare.__file__).parent)
    cached("models", "some/bert", "tokenizer.json").write_bytes(vocab.read_bytes())
    assert "300 documents" in run("some/bert").stderr
    done = run("no/bert")
    assert done.returncode == 2 and "nor given by the Hub or its cache" in done.stderr and "Trace" not in done.stderr


def test_a_vocabulary_with_a_token_twice_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "a", "b", "a"]) + "\n")
    with pytest.raises(UserError, match="lines 6 and 8 are both 'a'"):
        load_tokenizer(str(tmp_path / "vocab.txt"))


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
    for vocab, size, message in ((None, None, "either --vocab"), ("x", 300, "either --vocab"),
                                 (tmp_path / "nowhere.txt", None, "neither"), (raw, None, r"\[PAD\]")):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "out", raw, vocab=vocab and str(vocab), vocab_size=size)


def test_docstrings_come_from_required_packages_alone_and_nothing_is_imported():
    packages = sources.required_packages()
    assert {"torch", "numpy", "tokenizers", "tqdm", "sympy"} <= packages
    assert not packages & {"pytest", "transformers", "scikit-learn", "scipy", "ruff", "pip"}
    code = """
import itertools, sys; from plumbing import sources
before = set(sys.modules)
first = list(itertools.islice(sources.docstrings(), 3000))
assert len({package for package, _ in first}) > 2 and all(len(text) >= 20 for _, text in first)
new = {m.split(".")[0] for m in set(sys.modules) - before}
assert not new & {"anyio", "click", "sympy", "torch", "networkx"}, new
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(prepare.__file__).parent)


# ---------------------------------------------------------------------------------- text of the kind that it will meet

def table_of(path, names, rows_):
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in (names, *rows_)), encoding="utf-8")
    return path


def documents_made(out, *given, **other):
    """(The documents, as text that a vocabulary with all their words gives back, the manifest.)"""
    manifest = make(out, *given, val_fraction=1e-9, **other)            # validation is the last of the ids
    directory = TokenDirectory(out)
    ids = np.concatenate([directory.split(name) for name in ("train", "val")])
    found = np.split(ids, np.flatnonzero(ids == directory.special["[SEP]"]) + 1)[:-1]
    return [directory.read_tokenizer().decode(d) for d in found], manifest


@pytest.fixture
def words(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *(f"w{i}" for i in range(300)), "."]) + "\n")
    return tmp_path / "vocab.txt"


@pytest.mark.parametrize("names, columns, expected, met", [
    (("text", "label"), None, ["w0", "w1", "w2"], {}), (("id", "query"), None, ["w10", "w11", "w12"], "'query'"),
    (("review", "verdict"), None, ["w0", "w1", "w2"], "'review'"), (("w", "stars"), "w", ["w0", "w1", "w2"], {}),
    (("id", "text"), None, ["w10", "w11", "w12"], {}), (("label", "text_b"), None, ["w10", "w11", "w12"], "'text_b'"),
    (("a", "b"), "a,b", ["w0 w10", "w1 w11", "w2 w12"], {})])
def test_the_rows_of_a_table_are_documents(words, tmp_path, names, columns, expected, met):
    """The columns in --columns, else `text`, else those that fine-tuning would take, which is told."""
    verdicts = "verdict" in names
    rows_ = [(f"w{i}", f"w{10 + (i > 0 if verdicts else i)}") for i in range(3)]
    (tmp_path / "in").mkdir()
    for kind, mark in ((".csv", ","), (".tsv", "\t")):
        (tmp_path / f"in/a{kind}").write_text("\n".join([mark.join(names), *map(mark.join, rows_), "", mark]))
    objects = [json.dumps(dict(zip(names, row, strict=True))) for row in rows_]
    (tmp_path / "in/a.jsonl").write_text("\n".join(objects))
    arrow, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(arrow.table({name: list(c) for name, c in zip(names, zip(*rows_, strict=True), strict=True)}),
                   tmp_path / "in/a.parquet")
    met = met and {f"tables with the text in {met}": 1}
    for file in sorted((tmp_path / "in").iterdir()):
        found, made = documents_made(tmp_path / "out", file, vocab=words, columns=columns, document_per="line")
        assert found == expected and made["met"] == met and made["unknown"] == 0
    made = make(tmp_path / "out", tmp_path / "in", vocab=words, columns=columns)
    assert made["documents"] == 3 and made["duplicates"] == 9


@pytest.mark.parametrize("names, rows_, columns, message", [
    (("query", "passage"), [(f"w{i}", f"w{i + 9}") for i in range(9)], None, "'query', 'passage' are text. Say it wit"),
    (("a", "b", "c", "label"), [("w", "w", "w", 1)] * 9, None, "which of 'a', 'b', 'c', 'label' are text"),
    (("text", "label"), [("w1", 1)] * 9, "body", "a.tsv is without the column 'body' of --columns: it has 'text'"),
    (("w1", 0.5), [("w2", 0)] * 9, None, "a.tsv is without a header .line 1 holds 0.5.")])
def test_a_table_whose_text_is_not_told_is_refused_by_name_and_left_out_of_a_directory(
        words, tmp_path, names, rows_, columns, message):
    (tmp_path / "in").mkdir()
    table_of(tmp_path / "in/a.tsv", names, rows_)
    (tmp_path / "in/b.txt").write_text("w1 w2\n")
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", tmp_path / "in/a.tsv", vocab=words, columns=columns)
    made = make(tmp_path / "out", tmp_path / "in", vocab=words, columns=columns)
    assert made["documents"] == 1 and [key.startswith("left out: .tsv (") for key in made["met"]] == [True]


def test_each_line_is_a_document(words, tmp_path):
    long = "w7 " * 40_000                                               # cut, and one document all the same
    (tmp_path / "a.txt").write_text(f"w1 w2\n\n \nw3\nw3\n w4 .\n{long}\nw5")
    found, made = documents_made(tmp_path / "out", tmp_path / "a.txt", vocab=words, document_per="line")
    assert found == ["w1 w2", "w3", "w4.", long.strip(), "w5"]
    assert made["duplicates"] == 1 and made["met"] == dict(long_lines=1)


def test_the_dev_rows_of_tasks_are_left_out_on_both_sides(words, tmp_path):
    """Of a directory's dev file, and of what a single file sets apart; the text may be of that very file."""
    pairs = [(f"w{i} .", f"W{i + 100}", i % 2) for i in range(90)]
    single = table_of(tmp_path / "pairs.tsv", ("s", "t", "label"), pairs)
    (tmp_path / "task").mkdir()
    table_of(tmp_path / "task/train.tsv", ("text", "label"), [(f"w{i}", i % 2) for i in range(200, 220)])
    table_of(tmp_path / "task/dev.tsv", ("text", "label"), [(f"w{i}", i % 2) for i in range(220, 230)])
    (tmp_path / "a.txt").write_text("\n".join(f"w{i}" for i in range(200, 230)))
    found, made = documents_made(tmp_path / "out", single, tmp_path / "a.txt", vocab=words, columns="s,t",
                                 document_per="line", without=f"one={single},two={tmp_path / 'task'}")
    dev = {sides[0] for sides in glue.read_task("one", glue.own_task(single, say=lambda _: None), None)["dev"][0]}
    assert 2 < len(dev) < 20 and made["met"]["lines left out: a side of a row of --without"] == 2 * len(dev) + 10
    assert found == [f"{a[:-2]}. {b.lower()}" for a, b, _ in pairs if a not in dev] + [f"w{i}" for i in range(200, 220)]
    with pytest.raises(UserError, match="--tasks 'x': unknown or given twice"):
        make(tmp_path / "out", single, vocab=words, without="x")


def test_the_dev_rows_of_an_official_task_are_left_out(real_data, wiki, tmp_path):
    for part in ("train", "dev"):
        lines = (real_data / f"glue/RTE/{part}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        (tmp_path / f"{part}.txt").write_text("\n".join("\n".join(line.split("\t")[1:3]) for line in lines).upper())
    given = tmp_path / "dev.txt", tmp_path / "train.txt"
    for without, some in ((None, True), ("rte", False)):
        made = make(tmp_path / "out", *given, vocab=wiki[1], document_per="line", without=without,
                    glue_dir=str(real_data / "glue"))
        assert bool(made["source_tokens"][str(given[0])]) == some and made["source_tokens"][str(given[1])] > 1e5
    assert made["met"]["lines left out: a side of a row of --without"] >= 2 * 277


def test_at_most_so_many_ids_of_each_source_and_the_shares_are_told(words, tmp_path, capsys):
    for name, first, n in (("small", 0, 4), ("large", 4, 200)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"w{i} w{i}" for i in range(first, first + n)))
    given = [str(tmp_path / f"{name}.txt") for name in ("small", "large")]
    prepare.main(prepare.Config(given, str(tmp_path / "out"), str(words), document_per="line", at_most=31))
    manifest = TokenDirectory(tmp_path / "out").manifest
    assert manifest["source_tokens"] == {given[0]: 12, given[1]: 30}    # the first ones, whole documents
    assert manifest["documents"] == 14 and manifest["train_tokens"] + manifest["val_tokens"] == 42
    assert f"shares: {given[0]} 28.6%, {given[1]} 71.4%" in capsys.readouterr().err
    prepare.main(prepare.Config(given[:1], str(tmp_path / "out"), str(words), document_per="line"))
    assert "shares" not in capsys.readouterr().err


def test_a_source_that_is_full_is_not_read_to_its_end(words, tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"w{i % 300} w{i // 300 % 300}\n" for i in range(60_000)) + "\xff")
    met, files_ = Counter({f"_full {tmp_path}/a.txt": 1}), sources.find_files(f"{tmp_path}/a.txt", Counter())
    assert not list(sources.read_documents(files_, met, document_per="line")) and met["_lines"] < 300
