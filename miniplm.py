"""The half of a corpus that a teacher would have a student read: MiniPLM for masked LM.  Read it after compare.py.

    python miniplm.py data/wiki --teacher bert-base-uncased --out data/chosen --controls random,flipped
    python train.py --strategy no_kd --data data/chosen/kept --budget-hours 4

A unit u is 8 blocks in a row.  The teacher, and a small reference that trains on one unit in 20, are asked for the
masked ids of all other units, the pool, both of the same corrupted blocks:

    s_m(u) = mean over K masks, 8 blocks and k masked positions of log p_m(x_i | the corrupted block)
    r(u)   = s_teacher(u) - s_reference(u)              the expected masked-loss gap

and the half with the largest r is kept (difference sampling, arXiv 2410.17215, section 2.4).  What is made, what it
costs and how it goes on after a kill: docs/miniplm.md.
"""
import dataclasses
import time
from dataclasses import dataclass
from shutil import copyfile
from typing import Annotated

import numpy as np
from tqdm import tqdm

import train
from data import Blocks, hashed
from plumbing.budget import flops_per_block
from plumbing.cli import Checked, Count, Fraction, Length, Times, UserError, run, writable
from plumbing.device import choose_device, hardware, multiplies_in_bf16, ready_process
from plumbing.diagnose import masked_lm, token_losses
from plumbing.files import claim_each, read_json, sha256, write_json, write_whole
from plumbing.glue import spearman
from plumbing.rundir import contents
from plumbing.tokens import FILES, TokenDirectory

UNIT, HELD_OUT = 8, 20          # blocks in a unit; one unit in so many is the reference's
CHUNK = 500                     # units in a file of scores
GATE_UNITS, RELIABLE, GAP = 2000, 0.6, 0.1      # what the scores of so many units must show before they choose
CONTROLS = ("random", "flipped", "teacher", "reference", "all")


@dataclass
class Config(Checked):
    data: list[str]             # the token directory to choose from
    teacher: str                # model directory or Hub id, with an LM head
    out: str                    # directory of the token directories that are made
    controls: Annotated[str, str, CONTROLS] = ""    # beside kept, such as random,flipped
    alpha: Fraction = 0.5       # part of the pool that is kept
    draws: Times = 1            # K, masks of each block that are scored
    reference_size: str = "2L256"       # of the model that trains on the held-out units: layers L width
    reference_epochs: Times = 1  # passes over them
    batch_size: Count = 32      # of the reference's training: blocks per optimizer step
    seq_len: Length = 128       # positions in a block, of the runs too that read what is made
    unique_tokens: Count | None = None  # the first so many ids of the data alone
    device: str | None = None   # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    bf16: bool | None = None    # default: where that is faster


def miniplm(config, say=print):
    """Makes kept and the controls that are asked for, where they are not there yet; one process at a time."""
    if len(config.data) > 1:
        raise UserError(f"{' '.join(config.data)}: give one token directory")
    out, source, device = writable(config.out), TokenDirectory(config.data[0]), choose_device(config.device)
    # Refused before anything is made: a reference, or a part of the data, that cannot be
    train.Config(budget_steps=1, size=config.reference_size, batch_size=config.batch_size,
                 seq_len=config.seq_len).check()
    Blocks(source, "train", config.seq_len, 0, config.unique_tokens)
    how = ("data", "out", "controls", "device")
    request = {k: v for k, v in dataclasses.asdict(config).items() if k not in how} | dict(
        source=source.manifest["sha256"], teacher=contents(source, config.teacher)["contents of teacher"])
    claim_each([out], lambda _: make(config, out, source, request, device, say))


def make(config, out, source, request, device, say):
    """The same, of what is to be made (`request`) in a directory that no other process has."""
    note = out / "request.json"
    if not note.exists():
        if any(path.suffix != ".part" for path in out.iterdir()):
            raise UserError(f"--out {out} holds something else: give another --out")
        write_json(note, request | dict(hardware=hardware(device)))
    before = read_json(note)
    if differ := [k for k, v in request.items() if before.get(k) != v]:
        raise UserError(f"--out {out} was made with another {', '.join(differ)}: give another --out")
    todo = [rule for rule in ("kept", *config.controls.split(","))
            if rule and not (out / rule / "manifest.json").exists()]
    if not todo:
        return say(f"{out} is finished: nothing to do")
    source.verify()
    ready_process(device)
    blocks = Blocks(source, "train", config.seq_len, 0, config.unique_tokens)
    units = np.arange(blocks.count // UNIT)
    held = hashed(units) % np.uint64(HELD_OUT) == 0
    pool = units[~held][np.argsort(hashed(units[~held], 1), kind="stable")]     # its beginning: a sample

    models, flops, seconds = both_models(config, out, source, blocks, units[held], device, say)
    # As a teacher's forward pass is charged
    price = train.Config(strategy="vanilla_kd", size=config.reference_size, seq_len=config.seq_len)
    flops += config.draws * len(pool) * UNIT * sum(flops_per_block(price, shape, shape)[1] for _, shape in models)
    say(f"{len(pool):,} units to score: {flops:.3g} FLOPs, the reference's training included")
    reliability, gap = gate(scored(config, out, blocks, pool[:GATE_UNITS], models)[0])
    say(f"teacher minus reference: {gap:+.2f} nat; split-half rank correlation {reliability:.2f}")
    scores, took = scored(config, out, blocks, pool, models)
    chosen = choices(pool, scores.mean((1, 2)), config.alpha) | dict(all=units)
    for rule in todo:
        mine = chosen[rule]
        same = float(np.isin(mine, chosen["kept"]).mean())
        say(f"{rule:9} {len(mine):,} units, {same:.0%} of them kept"
            + "; beware: so the other model hardly mattered" * (rule in ("teacher", "reference") and same > 0.95))
        write(out / rule, source, ids_of(blocks, mine), request | dict(
            rule=rule, units=len(mine), pool=len(pool), also_kept=same, gap=gap, reliability=reliability,
            flops=flops, seconds=seconds + took, hardware=before["hardware"]))
    say(f"{out}: {flops:.3g} FLOPs, {seconds + took:,.0f} s, which compare.py takes off a budget")


def both_models(config, out, source, blocks, held, device, say):
    """([(forward, BertConfig)] of the teacher and the reference, FLOPs and seconds of training the reference)."""
    how = source.read_tokenizer(), config.seq_len, "--teacher", device, multiplies_in_bf16(device, config.bf16)
    teacher = masked_lm(config.teacher, *how)
    if (there := len(held) * UNIT) < config.batch_size:
        raise UserError(f"{source.path}: {there} blocks are held out for the reference, fewer than a batch of "
                        f"{config.batch_size}: give a smaller --batch-size, or more text")
    if not (out / "held_out/manifest.json").exists():
        write(out / "held_out", source, ids_of(blocks, held), dict(rule="held out"))
    taught = train.train(train.Config(
        strategy="no_kd", budget_tokens=config.reference_epochs * there * config.seq_len, data=str(out / "held_out"),
        size=config.reference_size, out=str(out / "reference_run"), seq_len=config.seq_len, dropout=0.0, val_times=1,
        batch_size=config.batch_size, device=config.device, bf16=config.bf16), say=say)
    return [teacher, masked_lm(out / "reference_run/model", *how)], taught["student_flops"], taught["charged_seconds"]


def scored(config, out, blocks, units, models):
    """((units, 8, K, 2) log p of the teacher and the reference, seconds).  A file of each CHUNK stays, whose last
    number is its seconds."""
    found = []
    (out / "scores").mkdir(exist_ok=True)
    for at in tqdm(range(0, len(units), CHUNK), desc=str(out / "scores"), mininterval=2):
        file, some = out / f"scores/{at}", units[at:at + CHUNK]
        if not file.exists():
            began, block = time.monotonic(), (some[:, None] * UNIT + np.arange(UNIT)).ravel()
            batches = [blocks.mask(blocks.read(block), hashed(0, j, block)) for j in range(config.draws)]
            s = [[-token_losses(model, batch).mean(1) for model, _ in models] for batch in batches]
            s = np.asarray(s).transpose(2, 0, 1)                                            # (8 units, K, 2)
            write_whole(file, np.float32([*s.ravel(), time.monotonic() - began]).tobytes())
        found.append(np.fromfile(file, np.float32))
        if len(found[-1]) != len(some) * UNIT * config.draws * 2 + 1:
            raise UserError(f"{file} is damaged: remove it, and give the command again")
    return (np.concatenate([part[:-1] for part in found]).reshape(-1, UNIT, config.draws, 2),
            float(sum(part[-1] for part in found)))


def gate(scores):
    """(split-half Spearman of r, mean r) of scores (units, 8, K, 2); refuses what would mean nothing.

    A half is every other (block, mask) of a unit, as on a chess board: with K = 2 each has every block."""
    r = scores[..., 0] - scores[..., 1]                                                     # (units, 8, K)
    white = np.indices(r.shape[1:]).sum(0) % 2 == 0
    reliability, gap = float(spearman(r[:, white].mean(1), r[:, ~white].mean(1))), float(r.mean())
    if not (reliability >= RELIABLE and gap > GAP):
        raise UserError(f"nothing is chosen: over {len(r):,} units two halves of the scores agree with a rank "
                        f"correlation of {reliability:.2f} ({RELIABLE} needed: more --draws, or text that differs "
                        f"more), and the teacher is ahead by {gap:+.2f} nat (over {GAP} needed: a better teacher)")
    return reliability, gap


def choices(units, scores, alpha):
    """{rule: the units that it keeps, in the corpus's order} of unit ids (n,) and mean scores (n, 2); ties by id."""
    s_t, s_ref = scores.astype(np.float64).T
    best = dict(kept=s_t - s_ref, flipped=s_ref - s_t, teacher=s_t, reference=-s_ref, random=hashed(units, 2) * 1.0)
    n = round(alpha * len(units))
    return {rule: np.sort(units[np.lexsort((units, -value))[:n]]) for rule, value in best.items()}


def ids_of(blocks, units):
    """The ids of these units, some units at a time: written back to back they make the same blocks."""
    size = UNIT * blocks.body
    return (np.concatenate([blocks.tokens[u * size:(u + 1) * size] for u in units[at:at + CHUNK]])
            for at in range(0, len(units), CHUNK))


def write(out, source, parts, facts):
    """A token directory of these arrays of ids, with the source's validation ids and tokenizer; manifest.json last."""
    unk, tokens, m = source.special["[UNK]"], 0, source.manifest
    unknown = sum(int((ids == unk).sum()) for ids in source.scan("val"))
    out.mkdir(exist_ok=True)
    with open(out / "train.bin", "wb") as f:
        for ids in parts:
            ids.tofile(f)
            tokens, unknown = tokens + len(ids), unknown + int((ids == unk).sum())
    for name in FILES[1:]:
        copyfile(source.path / name, out / name)
    same = {k: m.get(k) for k in ("dtype", "vocab_size", "val_tokens", "fingerprint")}
    write_json(out / "manifest.json", facts | same | dict(
        train_tokens=tokens, unknown=unknown, bytes={name: (out / name).stat().st_size for name in FILES},
        sha256={name: sha256(out / name) for name in FILES}))


def paid(run):
    """The train.Config of a run on a directory made here, with what that has cost taken off its budget: in FLOPs or
    hours; tokens and steps charge nothing outside a step."""
    (unit, total), m = run.budget, TokenDirectory(run.data).manifest
    if unit == "hours" and m["hardware"] != (here := hardware(choose_device(run.device))):
        raise UserError(f"--budget-hours: {run.data} was made on {m['hardware']}, whose seconds are not those of "
                        f"{here}: make it here, or give --budget-flops")
    cost = dict(flops=m["flops"], hours=m["seconds"] / 3600).get(unit, 0)
    if cost >= total:
        raise UserError(f"--budget-{unit} {total:g}: making {run.data} has cost {cost:g}, which leaves the student "
                        f"nothing: give a larger budget, or --unique-tokens")
    return dataclasses.replace(run, unique_tokens=None, **{f"budget_{unit}": total - cost})


if __name__ == "__main__":
    run(miniplm, Config, __doc__)
