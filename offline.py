"""What is computed once for many runs: a teacher's targets, or what to train on.  Read it after compare.py.

    python offline.py cache --teacher teacher --data data/docs --seq-len 64 --samples 50 --out caches/docs
    python train.py --strategy vanilla_kd --teacher-cache caches/docs --data data/docs --seq-len 64 ...

    python offline.py score --teacher teacher --data data/docs --seq-len 64 --out scores/docs
    python train.py --strategy no_kd --keep scores/docs/difference.npy --data data/docs --seq-len 64 ...

cache: at every masked position of every block, in each of --variants masks, --samples draws from
softmax(z_t / tau): enough for an unbiased gradient of the soft cross-entropy (arXiv 2503.16870).  A run with
it loads no teacher.

score: the teacher's and a small reference's log-probabilities of the masked ids, of each unit u of 8 blocks

    s_m(u) = mean over masks, blocks and masked positions of log p_m(x_i | the corrupted block)
    r(u)   = s_teacher(u) - s_reference(u)              the expected masked-loss gap

and, by it, which half of the units to train on: MiniPLM's difference sampling (arXiv 2410.17215, section 2.4)
for masked LM.  The reference is trained by train.py's loop on a 20th of the units, none of which can be kept.
Beside difference.npy stand its controls: teacher (highest s_t), reference (lowest s_ref), random, flipped
(lowest r), all.

Both go on where they were killed, and say what they cost: train.py takes it off the budget (docs/offline.md).
"""
import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from data import Blocks, TokenDirectory, hashed
from model import BertForMaskedLM
from plumbing import checkpoint
from plumbing.artefact import BLOCK, POSITION, fingerprint, hardware, pair
from plumbing.cli import Checked, Count, Fraction, Length, Positive, Seed, UserError, fail, run, writable
from plumbing.device import choose_device, multiplies_in_bf16, ready_process
from plumbing.diagnose import token_losses
from plumbing.files import read_json, sha256, share, write_json
from plumbing.rundir import contents

UNIT, HELD_OUT = 8, 20          # blocks in a unit; one unit in so many is the reference's
CHUNK = 4096                    # blocks between two records of how far it is
GATE_UNITS, RELIABLE, GAP = 2000, 0.6, 0.1      # what a selection must show before it is made


@dataclass
class Cache(Checked):
    teacher: str                # model directory or Hub id, with an LM head
    data: str                   # token directory
    out: str                    # directory of the cache
    variants: Count = 1         # masks of a block that are cached: train.py's --mask-variants
    samples: Annotated[int, "[1, 255]"] = 50    # draws at a masked position
    tau: Positive = 1.0         # temperature of the teacher's distribution
    seed: Seed = 0              # of the draws
    mask_seed: Seed = 0         # of the masks: train.py's --mask-seed
    seq_len: Length = 128       # positions in a block
    unique_tokens: Count | None = None  # the first so many ids of the data alone
    micro_batch: Count = 64     # blocks per forward pass
    device: str | None = None   # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    bf16: bool | None = None    # bf16 weights; default: where that is faster


@dataclass
class Score(Checked):
    teacher: str                # model directory or Hub id, with an LM head
    data: str                   # token directory
    out: str                    # directory of scores and selections
    reference_size: str = "2L256"       # of the model that is trained on the held-out units: layers L width
    reference_epochs: Count = 1  # passes over them
    draws: Count = 1            # K, masks of each block that are scored
    alpha: Fraction = 0.5       # part of the units that is kept
    mask_seed: Seed = 0         # of the masks
    seq_len: Length = 128       # positions in a block
    unique_tokens: Count | None = None  # the first so many ids of the data alone
    batch_size: Count = 32      # of the reference's training: blocks per optimizer step
    micro_batch: Count = 64     # blocks per forward pass
    device: str | None = None   # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    bf16: bool | None = None    # default: where that is faster


# ------------------------------------------------------------------------------------ work that can be killed

def grow(out, request, count, make, what, say, step):
    """Appends make(begin, end, bytes so far) -> {file: array} to the files in `out`, `step` rows at a time,
    up to `count` rows; what a killed one wrote after its last note is cut off.  (seconds, {file: bytes})"""
    note = out / "progress.json"
    state = read_json(note) if note.exists() else dict(request=request, rows=0, seconds=0.0, bytes={})
    if differ := [k for k, v in request.items() if state["request"].get(k) != v]:
        raise UserError(f"--out {out} holds the beginning of another one ({', '.join(differ)} differ): give "
                        f"another --out, or remove it")
    if state["rows"] < count:
        few = min(16, count - state["rows"])
        sample = make((count - few) // 2, (count - few) // 2 + few, {})
        need = sum(a.nbytes for a in sample.values()) / few * (count - state["rows"])
        free = shutil.disk_usage(out).free
        say(f"{out}: about {need / 1e6:,.1f} MB more on a disk with {free / 1e6:,.0f} MB free")
        if need * 1.1 > free:
            raise UserError(f"--out {out}: {need / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free: give "
                            f"another --out, or fewer of --samples, --variants or --unique-tokens")
    with tqdm(total=count, initial=state["rows"], unit=f" {what}", desc=str(out), mininterval=2,
              disable=state["rows"] >= count) as bar:
        while state["rows"] < count:
            began, end = time.monotonic(), min(count, state["rows"] + step)
            for name, array in make(state["rows"], end, state["bytes"]).items():
                size = state["bytes"].get(name, 0)
                with open(out / name, "ab") as f:
                    if f.tell() < size:
                        raise UserError(f"{out / name} is cut ({f.tell():,} of {size:,} bytes): remove "
                                        f"{out} to start anew")
                    f.truncate(size)
                    f.write(array.tobytes())
                    f.flush()
                state["bytes"][name] = size + array.nbytes
            bar.update(end - state["rows"])
            state["rows"], state["seconds"] = end, state["seconds"] + time.monotonic() - began
            write_json(note, state)
    return state["seconds"], state["bytes"]


def made(config, work, say):
    """The manifest of what work(out, directory, request, say) makes, or has made; one process at a time."""
    out, directory = writable(config.out), TokenDirectory(config.data)
    out.mkdir(parents=True, exist_ok=True)
    how = ("out", "data", "teacher", "micro_batch", "device")
    request = {k: v for k, v in dataclasses.asdict(config).items() if k not in how}
    request |= contents(directory, config.teacher)

    def do(_):
        if (out / "manifest.json").exists():
            manifest = read_json(out / "manifest.json")
            if differ := [k for k, v in request.items() if manifest["request"].get(k) != v]:
                raise UserError(f"--out {out} was made with another {', '.join(differ)}: give another --out")
            say(f"{out} is finished: nothing to do")
            return manifest
        directory.verify()
        manifest = dict(
            request=request, corpus=request["contents of data"], teacher=request["contents of teacher"],
            seq_len=config.seq_len, mask_seed=config.mask_seed,
            hardware=hardware(choose_device(config.device)))
        manifest |= work(out, directory, request, say)
        manifest["files"] = {name: (size, sha256(out / name)) for name, size in manifest["files"].items()}
        write_json(out / "manifest.json", manifest)
        for name in ("progress.json", "scores"):
            (out / name).unlink(missing_ok=True)
        say(f"{out}: {manifest['flops']:.3g} FLOPs, {manifest['seconds']:,.0f} s, which a run's budget pays")
        return manifest
    return share([out], do)[0]


def masked_lm(path, directory, config):
    """(forward(ids, masked) -> logits (M, V) on the device, FLOPs of one block)."""
    device, path = choose_device(config.device), checkpoint.find_model(path)
    checkpoint.same_vocabulary(directory.read_tokenizer(), path)
    model, missing, _ = checkpoint.load_mlm(path, V := len(directory.vocab))
    if missing:
        raise UserError(f"--teacher {path} has no LM head, so no distribution over ids: give one that has it")
    if config.seq_len > model.config.max_position_embeddings:
        raise UserError(f"--seq-len {config.seq_len}: --teacher {path} ends at position "
                        f"{model.config.max_position_embeddings}")
    ready_process(device)
    model.to(device, torch.bfloat16 if multiplies_in_bf16(device, config.bf16) else None).eval()

    @torch.no_grad()
    def forward(ids, masked):
        return model(ids.to(device), masked.to(device))["logits"][:, :V].float()
    return forward, forward_flops(model.config, config.seq_len, blocks_to_mask(directory, config).k)


def blocks_to_mask(directory, config):
    return Blocks(directory, "train", config.seq_len, 0, config.unique_tokens, mask_seed=config.mask_seed)


def forward_flops(shape, seq_len, k):
    """Of one block, logits at its masked positions alone: what train.py charges a teacher for."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counted:
        ids, masked = (torch.zeros(1, n, dtype=torch.long) for n in (seq_len, k))
        BertForMaskedLM(shape).eval()(ids, masked)
    return counted.get_total_flops()


# ------------------------------------------------------------------------------------------------------ cache

def draw(logits, key, samples, tau=1.0):
    """(M, N) ids, i.i.d. from softmax(logits / tau) (M, V); `key` (M,) is all that the chance depends on."""
    cdf = (logits / tau).double().softmax(-1).cumsum(-1)
    uniform = (hashed(key[:, None], np.arange(samples)) >> np.uint64(11)) * 2.0 ** -53
    at = torch.from_numpy(uniform).to(cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, at, right=True).clamp(max=logits.shape[-1] - 1).cpu().numpy()


def packed(batch, drawn, log_p, begin, vocab_size):
    """{file: array} of some blocks: see plumbing/artefact.py.  `begin`: the pairs before them."""
    ids = np.sort(drawn, 1)
    first = np.diff(ids, axis=1, prepend=-1) != 0                                           # (M, N)
    pairs, number = np.empty(first.sum(), pair(vocab_size)), first.sum(1)
    pairs["id"], pairs["count"] = ids[first], np.diff(np.append(np.flatnonzero(first), ids.size))
    positions, blocks = np.empty(len(ids), POSITION), np.empty(len(batch.ids), BLOCK)
    positions["number"], positions["log_p"] = number, np.maximum(log_p, -6e4)
    of_block = number.reshape(batch.masked.shape).sum(1)
    blocks["offset"], blocks["hash"] = begin + of_block.cumsum() - of_block, fingerprint(batch)
    return dict(blocks=blocks, positions=positions, pairs=pairs)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def cache(config, say=print):
    """The teacher's targets of every block in every variant of its masks."""
    def work(out, directory, request, say):
        forward, flops = masked_lm(config.teacher, directory, config)
        blocks = blocks_to_mask(directory, config)
        itemsize = pair(blocks.vocab_size).itemsize

        def make(begin, end, done):
            parts, at = [], done.get("pairs", 0) // itemsize
            for first in range(begin, end, config.micro_batch):
                row = np.arange(first, min(end, first + config.micro_batch))
                variant, block = np.divmod(row, blocks.count)
                batch = blocks.masked(block, variant)
                logits = forward(*map(torch.from_numpy, batch[:2]))                         # (M, V)
                labels = torch.from_numpy(batch.labels.reshape(-1, 1)).to(logits.device)
                log_p = logits.log_softmax(-1).gather(1, labels).flatten().cpu().numpy()
                key = hashed(config.seed, variant[:, None], block[:, None], batch.masked).flatten()
                drawn = draw(logits, key, config.samples, config.tau)
                parts.append(packed(batch, drawn, log_p, at, blocks.vocab_size))
                at += len(parts[-1]["pairs"])
            return joined(parts)
        rows = blocks.count * config.variants
        say(f"{rows:,} blocks through the teacher: {flops * rows:.3g} FLOPs")
        seconds, sizes = grow(out, request, rows, make, "blocks", say, CHUNK)
        positions = np.memmap(out / "positions", POSITION, "r")
        mean, loss = float(positions["number"].mean()), -float(positions["log_p"].mean(dtype=np.float64))
        size = sum(sizes.values()) / 1e6
        say(f"{out}: {mean:.1f} different ids in {config.samples} draws, {size:,.1f} MB; the teacher's loss "
            f"on these blocks is {loss:.4f}")
        return dict(variants=config.variants, samples=config.samples, tau=config.tau, blocks=blocks.count,
                    masked=blocks.k, widest=int(positions["number"].max()), ids=mean, teacher_mlm=loss,
                    flops=flops * rows, seconds=seconds, files=sizes)
    return made(config, work, say)


# ------------------------------------------------------------------------------------------------------ score

def ranks(values):
    """Of 1-D values, ties by place."""
    return np.argsort(np.argsort(values, kind="stable"), kind="stable")


def gate(scores):
    """(split-half Spearman of r, mean r) of scores (units, 8, K, 2); refuses what would mean nothing.

    A half is every other (block, mask) of a unit, as on a chess board: with K = 2 each has every block."""
    r = scores[..., 0] - scores[..., 1]                                                     # (units, 8, K)
    white = np.indices(r.shape[1:]).sum(0) % 2 == 0
    halves = [ranks(r[:, half].mean(1)) for half in (white, ~white)]
    reliability, gap = float(np.corrcoef(*halves)[0, 1]) if len(r) > 2 else 0.0, float(r.mean())
    if not (reliability >= RELIABLE and gap > GAP):
        raise UserError(f"no selection: of teacher minus reference on {len(r):,} units, the split-half rank "
                        f"correlation is {reliability:.2f} (at least {RELIABLE} needed: more --draws, or "
                        f"text that differs more) and the mean {gap:+.2f} nat (more than {GAP} needed: a "
                        f"better teacher)")
    return reliability, gap


def selections(units, scores, alpha):
    """{name: the units that it keeps, in the corpus's order} of unit ids (n,) and mean scores (n, 2)."""
    s_t, s_ref = scores.astype(np.float64).T
    best = dict(difference=s_t - s_ref, teacher=s_t, reference=-s_ref, random=hashed(units, 2) * 1.0,
                flipped=s_ref - s_t)
    n = round(alpha * len(units))
    return {name: np.sort(units[np.lexsort((units, -value))[:n]]) for name, value in best.items()}


def blocks_of(units):
    return (units[:, None] * UNIT + np.arange(UNIT)).ravel()


def score(config, say=print):
    """Trains the reference, scores every unit with both models and writes the selections."""
    def work(out, directory, request, say):
        blocks = blocks_to_mask(directory, config)
        units = np.arange(blocks.count // UNIT)
        held = hashed(units) % np.uint64(HELD_OUT) == 0
        pool = units[~held][np.argsort(hashed(units[~held], 1), kind="stable")]     # its beginning: a sample
        forward, flops = masked_lm(config.teacher, directory, config)
        tokens = config.reference_epochs * int(held.sum()) * UNIT * config.seq_len
        taught = train.train(train.Config(
            "no_kd", budget_tokens=max(1, tokens), data=config.data, size=config.reference_size,
            out=str(out / "reference"), seq_len=config.seq_len, batch_size=config.batch_size,
            micro_batch=min(config.batch_size, config.micro_batch), dropout=0.0, val_times=1,
            device=config.device, bf16=config.bf16), say=say, keep=blocks_of(units[held]))
        reference, reference_flops = masked_lm(out / "reference/model", directory, config)

        def make(begin, end, _):
            block, found = blocks_of(pool[begin:end]), []
            for j in range(config.draws):
                batch = blocks.masked(block, np.full(len(block), j))
                found.append([-token_losses(f, batch, config.micro_batch).mean(1)
                              for f in (forward, reference)])
            return dict(scores=np.asarray(found, np.float32).transpose(2, 0, 1))            # (8 units, K, 2)

        def scored(count):
            took, sizes = grow(out, request, count, make, "units", say, CHUNK // UNIT)
            return took, np.fromfile(out / "scores", np.float32).reshape(-1, UNIT, config.draws, 2)[:count]
        gate(scored(min(GATE_UNITS, len(pool)))[1])
        seconds, found = scored(len(pool))
        reliability, gap = gate(found[:GATE_UNITS])
        say(f"teacher minus reference: {gap:+.2f} nat; split-half rank correlation {reliability:.2f} over "
            f"{min(GATE_UNITS, len(pool)):,} units")
        kept = selections(pool, found.mean((1, 2)), config.alpha)
        best, overlap = kept["difference"], {}
        for name, mine in kept.items():
            parts = [np.isin(part, mine).mean() for part in np.array_split(np.sort(pool), 10)]
            overlap[name] = len(np.intersect1d(mine, best)) / len(np.union1d(mine, best))
            say(f"{name:10} keeps {len(mine):,} of {len(pool):,} units, Jaccard with difference "
                f"{overlap[name]:.2f}; of each tenth of the corpus "
                + " ".join(f"{part:.0%}" for part in parts))
        for name in ("teacher", "reference"):
            if overlap[name] > 0.9:
                say(f"beware: difference keeps what the {name} alone would: it says nothing of the other model")
        whole = np.full((blocks.count, config.draws, 2), np.nan, np.float32)
        whole[blocks_of(pool)] = found.reshape(-1, config.draws, 2)
        arrays = {name: blocks_of(mine) for name, mine in kept.items()}
        arrays |= dict(all=np.arange(blocks.count), scores=whole)
        for name, array in arrays.items():
            np.save(out / f"{name}.npy", array)
        return dict(reliability=reliability, gap=gap, jaccard=overlap, alpha=config.alpha,
                    flops=(flops + reference_flops) * len(pool) * UNIT * config.draws
                    + taught["student_flops"],
                    seconds=seconds + taught["charged_seconds"],
                    files={f"{name}.npy": (out / f"{name}.npy").stat().st_size for name in arrays})
    return made(config, work, say)


COMMANDS = {"cache": (cache, Cache), "score": (score, Score)}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        sys.argv[0] += " " + (name := sys.argv.pop(1))
        run(*COMMANDS[name], __doc__)
    elif sys.argv[1:2] in (["--help"], ["-h"]):
        print(f"{__doc__}\npython offline.py cache --help, python offline.py score --help: the flags")
    else:
        fail("give one of the words cache and score after offline.py (see python offline.py --help)")
