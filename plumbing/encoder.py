"""A sentence encoder: what a student lost and won, and the teacher's layers alone, chosen without labels."""
import contextlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn import ModuleList

from data import Sentences
from kd_losses import pooled
from plumbing import checkpoint
from plumbing.budget import UNITS
from plumbing.checks import layers_of
from plumbing.cli import UserError
from plumbing.student import evenly
from plumbing.tokens import TokenDirectory
from step import autocast
from strategies import STRATEGIES

HELD_OUT = 1000             # sentences: what was lost is measured on so many, a start is chosen by so many
NEAREST = 10
ALL_SETS = 2e13             # FLOPs: up to here all sets of layers are tried


@torch.no_grad()
def embeddings(model, ids, form, bf16=False):
    """(n, D) of length 1, of the sentences `ids` (n, S), the short ones first: so little of them is padding."""
    pad_id, device, found = model.config.pad_token_id, next(model.parameters()).device, []
    for part in ids[(ids != pad_id).sum(1).argsort(stable=True)].split(64):
        part = part[:, :(part != pad_id).sum(1).max()].to(device)
        with autocast(device, bf16):
            h = model(part, None, part != pad_id, want=("hidden",))["hidden"].float()
        found.append(F.normalize(pooled(h, part != pad_id, form.pooling), dim=-1))
    return torch.cat(found)


def distance(a, b):
    """The loss of `sentence`, of embeddings (n, D)."""
    return (a - b).square().sum(-1).mean().item()


def neighbours(e):
    """(n, 10) the nearest of each of the embeddings (n, D), itself left out."""
    return (e @ e.T).fill_diagonal_(-math.inf).topk(min(NEAREST, len(e) - 1)).indices


@contextlib.contextmanager
def only(model, layers):
    """The model has these of its layers alone."""
    deep = model.bert.encoder["layer"]
    model.bert.encoder["layer"] = ModuleList(deep[i] for i in layers)
    yield
    model.bert.encoder["layer"] = deep


def lost_and_won(run):
    """{n, cut, student: {loss, neighbours}} on a run's held-out sentences, of the teacher's layers untrained and of the
    student: the loss, and the share of the ten nearest neighbours that are the teacher's too."""
    arm, blocks, found = run.arm, run.val_blocks, {}
    ids = torch.from_numpy(blocks.batch(0, min(HELD_OUT, blocks.count)).ids)
    depths = (m.config.num_hidden_layers for m in (arm.teacher, arm.student))
    kept = layers_of(run.config.init_layers) or evenly(*depths)
    of = {"teacher": embeddings(arm.teacher, ids, arm.form, arm.bf16),
          "student": embeddings(arm.student.eval(), ids, arm.form, arm.bf16)}
    with only(arm.teacher, kept):
        of["cut"] = embeddings(arm.teacher, ids, arm.form, arm.bf16)
    near = {name: neighbours(e) for name, e in of.items()}
    for name in ("cut", "student"):
        shared = (near[name][:, :, None] == near["teacher"][:, None]).any(2).float().mean().item()
        found[name] = dict(loss=distance(of[name], of["teacher"]), neighbours=shared)
        run.say(f"{name}: on {len(ids):,} held-out sentences loss {found[name]['loss']:.4f}, and of the {NEAREST} "
                f"nearest neighbours {shared:.1%} are the teacher's")
    return dict(found, n=len(ids))


def cut(config):
    """--strategy cut: writes the teacher with some of its layers, untrained, as a model directory."""
    if not config.teacher or any(getattr(config, f"budget_{unit}") for unit in UNITS):
        raise UserError("--strategy cut copies layers and trains nothing: give --teacher, and no budget")
    checkpoint.room(config.path, dry_run=True)
    path = checkpoint.find_model(config.teacher)
    tokenizer, form = checkpoint.read_tokenizer(path), checkpoint.read_form(path)
    teacher, missing, ignored = checkpoint.load_mlm(path, tokenizer.get_vocab_size())
    c = teacher.config
    deep = c.num_hidden_layers
    depth = config.shape.num_hidden_layers if config.size else math.ceil(deep / 2)
    if config.size and config.shape.hidden_size != c.hidden_size or depth > deep:
        raise UserError(f"--size {config.size}: {config.teacher} is {c.size}, and a cut is as wide and at most as deep")
    if config.init_layers == "best":
        if not missing or not config.data:
            raise UserError("--init-layers best chooses by the embeddings of text: give --data, and as --teacher a "
                            "sentence encoder, without an LM head")
        directory = TokenDirectory(config.data)
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        layers = best_layers(teacher.eval(), form, depth, directory)
    else:
        layers = layers_of(config.init_layers) or evenly(deep, depth)
    if len(layers) != depth or max(layers) >= deep:
        raise UserError(f"--init-layers {config.init_layers}: {depth} of 0 to {deep - 1} belong there")
    said = f"layers {', '.join(map(str, layers))}, from 0, of {config.teacher}, untrained"
    print(f"{config.path}: {said}; {form}" + "; its classifier is left out" * any("classifier" in n for n in ignored))
    if config.dry_run:
        return
    with only(teacher, layers):
        c.num_hidden_layers = depth
        config.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_model(config.path, teacher, tokenizer, not missing, f"{said}.\n", form.max_len, form=form)


def best_layers(teacher, form, depth, directory):
    """The layers, from 0, with which alone the teacher embeds the first sentences of train (seed 0) most like it does
    with all: the best of every set, or from the first and the last on, one more at a time."""
    blocks = Sentences(directory, "train", STRATEGIES["sentence"].seq_len, 0)
    deep = teacher.config.num_hidden_layers
    ids = torch.from_numpy(blocks.batch(0, min(HELD_OUT, blocks.count)).ids)
    whole, losses = embeddings(teacher, ids, form), {}

    def best_of(sets):
        losses.clear()
        for layers in sets:
            with only(teacher, layers):
                losses[layers] = distance(embeddings(teacher, ids, form), whole)
        return min(losses, key=losses.get)
    if depth < 3 or math.comb(deep, depth) * depth * 24 * teacher.config.hidden_size ** 2 * ids.numel() <= ALL_SETS:
        best_of(itertools.combinations(range(deep), depth))
    else:
        chosen = 0, deep - 1
        while len(chosen) < depth:
            chosen = best_of(tuple(sorted({*chosen, i})) for i in range(deep) if i not in chosen)
    ranked = sorted(losses, key=losses.get)
    print(f"{len(losses)} sets of layers on {len(ids):,} sentences of {directory.path}, the best:")
    for layers in ranked[:5]:
        print(f"  {losses[layers]:.4f}  --init-layers {','.join(map(str, layers))}")
    return ranked[0]
