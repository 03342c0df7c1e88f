"""A sentence encoder: what a student lost and won, the teacher's layers alone, a start chosen without labels.

Read it with data.Sentences, when you have an encoder and text but no labels.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch.nn import ModuleList

from data import Sentences
from kd_losses import pooled, sentence_mse
from plumbing import checkpoint
from plumbing.budget import UNITS
from plumbing.checks import layers_of
from plumbing.cli import UserError
from plumbing.device import multiplies_in_bf16
from plumbing.student import evenly, initial_student, start_from
from plumbing.tokens import TokenDirectory
from step import autocast
from strategies import STRATEGIES

HELD_OUT = 1000             # sentences: what was lost is measured on so many, a start is chosen by so many
NEAREST = 10
ALL_SETS = 2e13             # FLOPs: up to here all sets of layers are tried


# --------------------------------------------------------------------------------------- what was lost and won

@torch.no_grad()
def embeddings(model, ids, form, bf16=False):
    """(n, D) of length 1, of the sentences `ids` (n, S), in the order of `by_length`."""
    device, found = next(model.parameters()).device, []
    for part, real in by_length(ids.to(device), model.config.pad_token_id):
        with autocast(device, bf16):
            h = model(part, None, real, want=("hidden",))["hidden"].float()
        found.append(F.normalize(pooled(h, real, form.pooling), dim=-1))
    return torch.cat(found)


def by_length(ids, pad_id, size=64):
    """(ids (size, longest of them), what is not padding) of all sentences `ids` (n, S), the short ones first."""
    lengths = (ids != pad_id).sum(1)
    for part in ids[lengths.argsort(stable=True)].split(size):
        part = part[:, :(part != pad_id).sum(1).max()]
        yield part, part != pad_id


def neighbours(e):
    """(n, 10) the nearest of each of the embeddings (n, D), itself left out."""
    return (e @ e.T).fill_diagonal_(-math.inf).topk(min(NEAREST, len(e) - 1)).indices


def lost_and_won(run):
    """{n, start, student: {loss, neighbours}} on held-out sentences, of a run's first weights and its last: the loss
    of the strategy, and the share of the ten nearest neighbours that are the teacher's too."""
    arm, config = run.arm, run.config
    start = initial_student(config, run.directory)
    if config.start == "teacher":
        path = checkpoint.find_model(config.teacher)
        start_from(start, checkpoint.load_mlm(path, len(run.directory.vocab)).model,
                   layers_of(config.init_layers))
    ids = torch.from_numpy(run.val_blocks.batch(0, min(HELD_OUT, run.val_blocks.count)).ids)
    models = dict(teacher=arm.teacher, start=start.to(arm.device), student=arm.student)
    e = {name: embeddings(model.eval(), ids, arm.form, arm.bf16) for name, model in models.items()}
    near = {name: neighbours(each) for name, each in e.items()}
    found = dict(n=len(ids)) | {name: dict(
        loss=(e[name] - e["teacher"]).square().sum(-1).mean().item(),
        neighbours=(near[name][:, :, None] == near["teacher"][:, None]).any(2).float().mean().item())
        for name in ("start", "student")}
    run.say(f"on {len(ids):,} held-out sentences, before and after: loss {found['start']['loss']:.4f}, "
            f"{found['student']['loss']:.4f}; of the {NEAREST} nearest neighbours the teacher's "
            f"{found['start']['neighbours']:.1%}, {found['student']['neighbours']:.1%}")
    return found


# ------------------------------------------------------------------------------------- the teacher's layers alone

def cut(config):
    """--strategy cut: writes the teacher with some of its layers, untrained, as a model directory."""
    if any(getattr(config, f"budget_{unit}") for unit in UNITS):
        raise UserError("--strategy cut trains nothing: leave the budget out")
    path = checkpoint.find_model(config.teacher or " ")
    tokenizer, form = checkpoint.read_tokenizer(path), checkpoint.read_form(path)
    teacher, missing, _ = checkpoint.load_mlm(path, tokenizer.get_vocab_size())
    c = teacher.config
    depth = config.shape.num_hidden_layers if config.size else math.ceil(c.num_hidden_layers / 2)
    if config.size and config.shape.hidden_size != c.hidden_size or depth > c.num_hidden_layers:
        raise UserError(f"--size {config.size}: {config.teacher} is {c.size}, and a cut is as wide and at most as deep")
    checkpoint.room(config.path, dry_run=True)
    if config.init_layers == "best":
        if not missing:
            raise UserError(f"--init-layers best: {config.teacher} has an LM head, and only an encoder's layers are "
                            f"chosen by embeddings: give numbers, or none for the first, the last, evenly between")
        directory = TokenDirectory(config.data or " ")
        checkpoint.same_vocabulary(directory.read_tokenizer(), path)
        layers = best_layers(teacher, form, depth, directory)
    else:
        layers = layers_of(config.init_layers) or evenly(c.num_hidden_layers, depth)
    if len(layers) != depth or max(layers) >= c.num_hidden_layers:
        raise UserError(f"--init-layers {config.init_layers}: {depth} of 0 to {c.num_hidden_layers - 1} belong there")
    kept, c.num_hidden_layers = teacher.bert.encoder["layer"], depth
    teacher.bert.encoder["layer"] = ModuleList(kept[i] for i in layers)
    said = f"layers {', '.join(map(str, layers))}, from 0, of {config.teacher}, untrained"
    if not config.dry_run:
        config.path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_model(config.path, teacher, tokenizer, not missing, f"{said}.\n", form.max_len, form=form)
    print(f"{config.path}: {said}; {form}")


def best_layers(teacher, form, depth, directory):
    """The layers, from 0, whose untrained student embeds the first sentences of train most like the teacher (seed 0):
    of all sets, or one layer added after another between the first and the last."""
    blocks, deep = Sentences(directory, "train", STRATEGIES["sentence"].seq_len, 0), teacher.config.num_hidden_layers
    ids = torch.from_numpy(blocks.batch(0, min(HELD_OUT, blocks.count)).ids)
    price = math.comb(deep, depth) * depth * 24 * teacher.config.hidden_size ** 2 * ids.numel()
    if price <= ALL_SETS or depth < 3:
        losses = losses_of(teacher, form, ids, list(itertools.combinations(range(deep), depth)))
    else:
        losses, chosen = {}, (0, deep - 1)
        while len(chosen) < depth:
            found = losses_of(teacher, form, ids, [tuple(sorted({*chosen, i})) for i in range(deep) if i not in chosen])
            chosen, losses = min(found, key=found.get), found
    ranked = sorted(losses, key=losses.get)
    print(f"{len(losses)} sets of layers on {len(ids):,} sentences of {directory.path}, the best:")
    for layers in ranked[:5]:
        print(f"  {losses[layers]:.4f}  --init-layers {','.join(map(str, layers))}")
    return list(ranked[0])


@torch.no_grad()
def losses_of(teacher, form, ids, sets):
    """{layers: the loss of `sentence` of the student that has these of the teacher's layers}.  What two sets begin
    with alike is computed once."""
    losses, layers = dict.fromkeys(sets, 0.0), teacher.bert.encoder["layer"]

    def follow(x, begun):
        """Adds the losses of all sets that begin so; x (B, S, D) is what these layers leave."""
        if begun in losses:
            losses[begun] += sentence_mse(x, target, real, form.pooling).item() * len(x) / len(ids)
        for i in sorted({each[len(begun)] for each in sets if each[:len(begun)] == begun and len(each) > len(begun)}):
            follow(layers[i](x, layers[i].qkv(x), mask), (*begun, i))
    teacher.eval()
    cpu = torch.device("cpu")
    with autocast(cpu, multiplies_in_bf16(cpu)):
        for part, real in by_length(ids, teacher.config.pad_token_id):
            mask, target = real[:, None, None], teacher(part, None, real, want=("hidden",))["hidden"]
            follow(teacher.bert.embeddings(part), ())
    return losses
