"""A token directory, which prepare.py makes: its files, held against what its manifest says of them."""
import json
import os
from pathlib import Path

import numpy as np

from plumbing.cli import UserError, shown
from plumbing.files import parsing, sha256
from plumbing.tokenizer import SPECIAL, load_tokenizer

FILES = ("train.bin", "val.bin", "tokenizer.json")
COUNTS = ("vocab_size", "train_tokens", "val_tokens", "unknown")
SCAN = 2 ** 22              # ids looked at in one go, so that describing a large file takes no memory


class TokenDirectory:
    """The files of a token directory, opened.  `split(name)` is the memmapped ids of "train" or "val"."""

    def __init__(self, path):
        self.path, file = Path(path), Path(path) / "manifest.json"
        try:
            with parsing(file, "run prepare.py again"):
                self.manifest = json.loads(file.read_text(encoding="utf-8"))
                self.dtype = {"uint16": np.uint16, "uint32": np.uint32}[self.manifest["dtype"]]
                sizes, _ = ({name: self.manifest[key][name] for name in FILES} for key in ("bytes", "sha256"))
                counts, width = {name: self.manifest[name] for name in COUNTS}, np.dtype(self.dtype).itemsize
                if not all(type(n) is int and n >= 0 for n in (*sizes.values(), *counts.values())) or any(
                        not 0 < sizes[f"{s}.bin"] == counts[f"{s}_tokens"] * width for s in ("train", "val")):
                    raise ValueError("its sizes and counts")
            for name, size in sizes.items():
                file = self.path / name
                with open(file, "rb") as f:
                    found = f.seek(0, os.SEEK_END)
                if found != size:
                    raise UserError(f"{file}: {found} bytes where manifest.json says {size}: run prepare.py again")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{file} is missing: run prepare.py again" if file.name in FILES else
                            f"{path} is not a token directory (no manifest.json): make one with  "
                            f"python prepare.py TEXT.txt --vocab bert-base-uncased --out {path}") from None
        except OSError as e:
            raise UserError(f"{file} cannot be read ({e.strerror}): mend that, or run prepare.py with another "
                            f"--out") from None
        self.vocab = self.read_tokenizer().get_vocab()
        self.special = {token: self.vocab[token] for token in SPECIAL}
        if len(self.vocab) != self.manifest["vocab_size"]:
            raise UserError(f"{self.path / 'tokenizer.json'} has {len(self.vocab)} tokens where "
                            f"manifest.json says {self.manifest['vocab_size']}: it belongs to other files; "
                            f"run prepare.py again")

    def read_tokenizer(self):
        return load_tokenizer(str(self.path / "tokenizer.json"), "")

    def split(self, name):
        return np.memmap(self.path / f"{name}.bin", dtype=self.dtype, mode="r")

    def scan(self, name):
        """The ids of a split, some millions at a time."""
        ids = self.split(name)
        return (ids[at:at + SCAN] for at in range(0, len(ids), SCAN))

    def verify(self):
        """Compares every file with its sha256 in the manifest, every id with the size of the vocabulary."""
        for name in FILES:
            expected, found = shown(self.manifest["sha256"][name]), sha256(self.path / name)
            if found != expected:
                raise UserError(f"{self.path / name}: sha256 is {found[:12]}..., manifest.json says "
                                f"{expected[:12]}...: the file was changed; run prepare.py again")
        for name in ("train", "val"):
            largest = max((int(ids.max()) for ids in self.scan(name)), default=0)
            if largest >= len(self.vocab):
                raise UserError(f"{self.path / name}.bin: id {largest} in it, the vocabulary ends at "
                                f"{len(self.vocab) - 1}: run prepare.py again")
