"""What offline.py computes once for many runs, as a run reads it: a teacher's cache, a selection of blocks.

An artefact is a directory.  manifest.json, written last, says what it was made from, what it cost and the
sha256 of its files; runs/ holds a small file for each distinct run that has used it: they share the cost.  A
teacher's cache is three files, in the order of (variant, block):

    blocks      u64 where the block's pairs begin, u64 hash of the block as masked: compared at each read
    positions   of each masked position: u8 how many different ids were drawn, f16 log p_t(label)
    pairs       u16 id (u32 above V = 65,535), u8 how many of the N draws fell on it
"""
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import Blocks, hashed
from plumbing.cli import UserError
from plumbing.files import json_object, parsing, sha256, write_json
from plumbing.rundir import NOT_THE_RUN, contents
from strategies import SAMPLED_CE, SOFT_CE

NOT_ANOTHER = ("ledger", "micro_batch", "device", "teacher_cache")     # the same run, all the same
BLOCK = np.dtype([("offset", "<u8"), ("hash", "<u8")])
POSITION = np.dtype([("number", "u1"), ("log_p", "<f2")])


class CachedBatch(NamedTuple):
    """A Batch with what a teacher's cache holds for it."""
    ids: np.ndarray
    masked: np.ndarray
    labels: np.ndarray
    drawn: np.ndarray       # (B, k, n) int64, ids that were drawn from the teacher's distribution
    shares: np.ndarray      # (B, k, n) float32, of the draws that fell on each; 0 beyond the last


def pair(vocab_size):
    return np.dtype([("id", "<u2" if vocab_size <= 2 ** 16 - 1 else "<u4"), ("count", "u1")])


def fingerprint(batch):
    """(B,) uint64 of a Batch's ids, masked positions and labels."""
    ids, masked, labels = batch
    of_positions = hashed(masked, labels, np.arange(masked.shape[1])).sum(1)
    return hashed(hashed(ids, np.arange(ids.shape[1])).sum(1), of_positions)


def like_cached(path, batch):
    """A flat Batch as it is, or, where a `path` is given, with as many draws of 0 as the cache there has at
    most, and with one where there is no cache yet."""
    if not path:
        return batch
    file = Path(path) / "manifest.json"
    with parsing(file):
        n = int(json_object(file)["widest"]) if file.exists() else 1
    drawn = torch.zeros(len(batch.labels), n, dtype=torch.long, device=batch.ids.device)
    return CachedBatch(*batch, drawn, drawn.float())


def from_cache(strategy):
    """The strategy with a teacher's cache in the place of its teacher, where that will do: for soft_ce."""
    return strategy._replace(terms={
        name: SAMPLED_CE._replace(weight=term.weight) if term.of is SOFT_CE.of else term
        for name, term in strategy.terms.items()})


def refuse(config, phases):
    """What --teacher-cache and --keep cannot be used with."""
    flags = [f"--{name.replace('_', '-')}" for name in ("teacher_cache", "keep") if getattr(config, name)]
    for other, wrong in ((f"--seq-len {config.seq_len}", any(p.seq_len != config.length for p in phases)),
                         (f"--mask-rate {config.mask_rate}", any(p.mask_rate != 0.15 for p in phases)),
                         (f"--strategy {config.strategy}", any(p.strategy.causal for p in phases))):
        if flags and wrong:
            raise UserError(f"{flags[0]} holds blocks of one length with 0.15 of their positions masked, "
                            f"for masked LM alone: leave it or {other} out")
    for phase in phases if config.teacher_cache else ():
        if more := set(phase.strategy.needs("teacher")) - {"samples"}:
            raise UserError(f"--teacher-cache holds soft targets only; {phase.name} needs the teacher's "
                            f"{', '.join(sorted(more))}: leave it out, or take --strategy vanilla_kd")
    if config.teacher_cache and not any(phase.strategy.needs("teacher") for phase in phases):
        raise UserError(f"--teacher-cache: {config.strategy} needs no teacher: leave it out")
    if config.ledger != "full" and not flags:
        raise UserError(f"--ledger {config.ledger} belongs to --teacher-cache or --keep")
    if config.static_masks and config.mask_variants:
        raise UserError(f"--static-masks is --mask-variants 1: leave out one of it and --mask-variants "
                        f"{config.mask_variants}")


def arm_of(config):
    """What compare.py calls the run of a train.Config."""
    kept = Path(config.keep or "").stem
    name = "miniplm" + f"+{kept}" * (kept != "difference") if config.keep else config.strategy
    return (name + "+init" * (config.init == "teacher") + "+released" * config.as_released
            + "+cached" * bool(config.teacher_cache) + "+amortised" * (config.ledger == "amortised"))


def hardware(device):
    """Whose seconds they are."""
    return (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)")


class Artefact:
    flag, made_by = "", ""

    def __init__(self, path):
        self.path, self.name = Path(path), f"{self.flag} {path}"
        if not (file := self.path / "manifest.json").is_file():
            raise UserError(f"{self.name}: nothing finished is there (no manifest.json): make it with  python "
                            f"offline.py {self.made_by} ..., which goes on where it was stopped")
        with parsing(file, f"give what  python offline.py {self.made_by}  has made"):
            self.manifest = json_object(file)
            sizes = {name: int(size) for name, (size, _) in self.manifest["files"].items()}
        for name, size in sizes.items():
            file = self.path / name
            there = file.stat().st_size if file.exists() else 0
            if there != size:
                raise self.damaged(name, f"{there:,} of {size:,} bytes")

    def damaged(self, name, why):
        return UserError(f"{self.path / name} is damaged ({why}): remove {self.path} and run offline.py "
                         f"{self.made_by} again")

    def verify(self):
        for name, (_, digest) in self.manifest["files"].items():
            if sha256(self.path / name) != digest:
                raise self.damaged(name, "its sha256 is not the manifest's")

    def refuse_other(self, **here):
        """One line that names all in which this was made for something else than the run."""
        m = self.manifest
        differ = [name + (f" ({m[name]} there, {value} here)" if np.isscalar(value) else "")
                  for name, value in here.items() if m[name] != value]
        if differ:
            raise UserError(f"{self.name} was made with another {', '.join(differ)}: make one for this run, "
                            f"or give the run what it was made with")

    def cost(self, unit, device):
        """What making it has cost, in a budget's unit; tokens and steps charge nothing outside a step."""
        m = self.manifest
        if unit == "hours" and m["hardware"] != hardware(device):
            raise UserError(f"--budget-hours: {self.path} was made on {m['hardware']}, this is "
                            f"{hardware(device)}, so its seconds are not this machine's: make it here, "
                            f"or give --budget-flops")
        return dict(flops=m["flops"], hours=m["seconds"] / 3600).get(unit, 0)

    def shares_cost(self):
        """Whether runs with it share its cost: those of a control do not."""
        return True

    def register(self, config, note=True):
        """Notes the run among those that use it; how many there are.  In both ledgers it is the same run."""
        run = {k: v for k, v in dataclasses.asdict(config).items() if k not in (*NOT_THE_RUN, *NOT_ANOTHER)}
        run["keep"] = Path(config.keep or "").name
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        file = self.path / "runs" / f"{digest[:16]}.json"
        if note and self.shares_cost() and not file.exists():
            file.parent.mkdir(exist_ok=True)
            write_json(file, run)
        return len({file, *file.parent.glob("*.json")})


class TeacherCache(Artefact):
    flag, made_by = "--teacher-cache", "cache"

    def attach(self, blocks, tau):
        """From now on the blocks come with what was drawn for them."""
        m = self.manifest
        self.refuse_other(seq_len=blocks.seq_len, masked=blocks.k, tau=tau, mask_seed=blocks.mask_seed)
        if blocks.mask_variants > m["variants"] or blocks.there > m["blocks"]:
            raise UserError(f"{self.name} holds {m['variants']} mask variant(s) of {m['blocks']:,} blocks, "
                            f"the run asks for {blocks.mask_variants} of {blocks.there:,}: give "
                            f"--mask-variants or --unique-tokens, or make a larger one")
        self.blocks = np.memmap(self.path / "blocks", BLOCK, "r")
        self.positions = np.memmap(self.path / "positions", POSITION, "r").reshape(-1, blocks.k)
        self.pairs = np.memmap(self.path / "pairs", pair(blocks.vocab_size), "r")
        blocks.targets = self.targets

    def targets(self, batch, block, variant):
        row = variant * self.manifest["blocks"] + block                                     # (B,)
        wrong = np.flatnonzero(self.blocks["hash"][row] != fingerprint(batch))
        if len(wrong):
            raise UserError(f"{self.name}: block {block[wrong[0]]} has other ids or masks than those that "
                            f"the teacher saw: it belongs to other data; make one for these")
        n = self.positions["number"][row].astype(np.int64)                                  # (B, k)
        start = self.blocks["offset"][row].astype(np.int64)[:, None] + n.cumsum(1) - n
        at = np.arange(self.manifest["widest"])
        inside = at < n[..., None]                                                          # (B, k, n)
        pairs = self.pairs[np.where(inside, start[..., None] + at, 0)]
        shares = np.where(inside, pairs["count"], 0) / np.float32(self.manifest["samples"])
        return CachedBatch(*batch, np.where(inside, pairs["id"], 0).astype(np.int64), shares)


class Selection(Artefact):
    flag, made_by = "--keep", "score"

    def __init__(self, file):
        self.file = Path(file)
        super().__init__(self.file.parent)
        self.name = f"--keep {file}"
        if self.file.name not in self.manifest["files"]:
            raise UserError(f"{self.name}: no such selection; there are "
                            f"{', '.join(name for name in self.manifest['files'] if name != 'scores.npy')}")

    def shares_cost(self):
        return self.file.stem == "difference"


class Offline:
    """The artefacts of one run, none for most: its blocks, and what of the budget is spent beforehand.
    `keep`: ids of the blocks to train on, in place of --keep's."""

    def __init__(self, config, directory, keep=None):
        self.config, self.directory, self.given, self.keep = config, directory, keep, keep
        self.charge, self.summary, self.lines = 0, {}, []
        self.cache = TeacherCache(config.teacher_cache) if config.teacher_cache else None
        self.selection = Selection(config.keep) if config.keep else None
        self.all = [a for a in (self.cache, self.selection) if a]
        for a in self.all:
            a.refuse_other(corpus=directory.manifest["sha256"])
        if self.selection:
            self.selection.refuse_other(seq_len=config.length)
            with parsing(self.selection.file):
                self.keep = np.load(self.selection.file)
        if self.cache and config.teacher != type(config).teacher:       # without --teacher: the cache's own
            self.cache.refuse_other(teacher=contents(directory, config.teacher)["contents of teacher"])
        self.blocks(config.phases[-1])                                  # refuses what does not fit together

    def verify(self):
        for a in self.all:
            a.verify()

    def blocks(self, phase):
        """The Blocks of a phase."""
        config, m, keep = self.config, self.cache and self.cache.manifest, self.keep
        seed, variants = config.mask_seed, config.mask_variants
        if m:
            seed = m["mask_seed"] if seed is None else seed
            variants = m["variants"] if not (variants or config.static_masks) else variants
        blocks = Blocks(self.directory, "train", phase.seq_len, config.seed, config.unique_tokens,
                        config.static_masks, phase.mask_rate, phase.strategy.causal, seed, variants, keep)
        if keep is not None and keep.max(initial=0) >= blocks.there:
            raise UserError(f"{self.selection.name}: block {keep.max()} in it, but with --unique-tokens "
                            f"{config.unique_tokens} there are {blocks.there}: score with it too")
        if keep is not None and blocks.count < config.batch_size:
            name = self.selection.name if self.selection else "what is held out for the reference"
            raise UserError(f"{name}: {blocks.count} blocks, fewer than a batch of {config.batch_size}: give "
                            f"a smaller --batch-size, or more text")
        if m:
            tau, = {phase.strategy.tau for phase in config.phases if phase.strategy.needs("teacher")}
            self.cache.attach(blocks, tau)
        return blocks

    def record(self, before, device):
        """What config.json holds of them.  The charge stays what it was when the run began."""
        if self.given is not None:
            ids = np.ascontiguousarray(self.given).tobytes()
            return {"contents of keep": hashlib.sha256(ids).hexdigest()}
        if not self.all:
            return {}
        found = {"contents of artefacts": [a.manifest["files"] for a in self.all]}
        if "charge" in before:
            return self.tell(found | {k: before[k] for k in ("charge", "sharing")})
        unit, total = self.config.budget
        share = self.config.ledger == "amortised"
        sharing = [a.register(self.config, note=False) if share and a.shares_cost() else 1 for a in self.all]
        charge = sum(a.cost(unit, device) / n for a, n in zip(self.all, sharing, strict=True))
        if charge >= total:
            raise UserError(f"--budget-{unit} {total:g}: {' and '.join(str(a.path) for a in self.all)} cost "
                            f"{charge:g} of it ({self.config.ledger.upper()}), which leaves the student "
                            f"nothing: give a larger budget, or --unique-tokens, or fewer --variants")
        if not self.config.dry_run:
            self.register()
        return self.tell(found | dict(charge=charge, sharing=sharing))

    def register(self):
        for a in self.all:
            a.register(self.config)

    def tell(self, record):
        """The record; notes what the summary and the screen say of it."""
        (unit, total), ledger, self.charge = self.config.budget, self.config.ledger, record["charge"]
        shared = f", shared by {', '.join(map(str, record['sharing']))} registered run(s)"
        self.summary = dict(ledger=ledger, charge=self.charge, sharing=record["sharing"], artefacts=[
            dict(path=str(a.path)) | {k: a.manifest[k] for k in ("flops", "seconds")} for a in self.all])
        self.lines = [f"offline: {self.charge:g} of {total:g} {unit} are spent before the first step, for "
                      f"{' and '.join(a.name for a in self.all)} ({ledger.upper()}"
                      f"{shared * (ledger == 'amortised')})"]
        return record


def register(runs, directory):
    """Notes all the runs with the artefacts that they share, before the first of them is charged its part."""
    for each in runs:
        if each.teacher_cache or each.keep:
            Offline(each, directory).register()
