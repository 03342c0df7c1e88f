"""Fine-tune a model directory on a labelled task and score it.  Read it sixth.

    python finetune_glue.py --model runs/tinybert/model --task-dir glue/SST-2 --seeds 3

A task directory holds train.tsv and dev.tsv in SST-2's form: a header line, then `sentence <tab> label`, the label a
whole number from 0.  Every model is fine-tuned by the same recipe: AdamW, linear warm-up and decay, the score of the
last step (not the best on dev), on several seeds, which set the new head, the order of the examples and dropout.
"""
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from arm import multiplies_in_bf16
from cli import UserError, run
from data import hashed
from train import learning_rate


@dataclass
class Config:
    model: str                  # model directory or Hub id
    task_dir: str               # directory with train.tsv and dev.tsv
    seeds: int = 3              # fine-tuning runs: mean and standard deviation over them
    peak_lr: float = 5e-5       # reached after 6% of the steps
    batch_size: int = 32        # sentences
    epochs: int = 5             # passes over train.tsv
    max_len: int = 128          # ids a sentence is cut to, [CLS] and [SEP] included
    dropout: float = 0.1        # in the encoder and before the classifier
    out: str | None = None      # JSON file for the scores
    save: str | None = None     # model directory for the classifier of the last seed
    device: str | None = None   # default: cuda where there is one, else cpu


def read_tsv(path):
    """(sentences, labels) of a TSV in SST-2's form."""
    try:
        # not splitlines(), which also breaks at U+2028; no csv quoting, since the official files have none
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: a task directory holds train.tsv and dev.tsv") from None
    sentences, labels = [], []
    for number, line in enumerate(lines[1:], 2):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != 2 or not fields[1].isdecimal():
            raise UserError(f"{path}, line {number}: not `sentence <tab> label`: {line[:60]!r}")
        sentences.append(fields[0])
        labels.append(int(fields[1]))
    if not sentences:
        raise UserError(f"{path}: no examples in it")
    return sentences, np.array(labels)


def encode(tokenizer, sentences, max_len):
    """One array of ids per sentence: [CLS] ... [SEP], cut to max_len."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return [np.array([cls, *e.ids[:max_len - 2], sep])
            for e in tokenizer.encode_batch(list(sentences), add_special_tokens=False)]


def pad(examples, pad_id):
    """(ids, real), both (B, S) with S the longest of these examples."""
    ids = np.full((len(examples), max(map(len, examples))), pad_id)
    for row, example in zip(ids, examples, strict=True):
        row[:len(example)] = example
    lengths = np.array([len(e) for e in examples])
    return torch.from_numpy(ids), torch.from_numpy(np.arange(ids.shape[1]) < lengths[:, None])


def finetune(model, examples, labels, batch_size, epochs, peak_lr, seed, pad_id):
    """Trains the classifier in place.  Batches hold examples of like length, in an order that `seed` draws."""
    device = next(model.parameters()).device
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
                                  lr=peak_lr, fused=True)
    lengths, rng, step = np.array([len(e) for e in examples]), np.random.default_rng(seed), 0
    total = epochs * -(-len(examples) // batch_size)
    model.train()
    for _ in range(epochs):
        # shuffled, then sorted by length within windows of 50 batches: little padding, and still another order
        order = rng.permutation(len(examples))
        windows = [w[np.argsort(lengths[w], kind="stable")] for w in np.split(
            order, range(50 * batch_size, len(order), 50 * batch_size))]
        batches = np.split(np.concatenate(windows), range(batch_size, len(order), batch_size))
        for at in rng.permutation(len(batches)):
            picked = batches[at]
            ids, real = pad([examples[i] for i in picked], pad_id)
            torch.manual_seed(int(hashed(seed, step) >> np.uint64(1)))                      # dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_in_bf16(device)):
                logits = model(ids.to(device), real.to(device))
            F.cross_entropy(logits.float(), torch.from_numpy(labels[picked]).to(device)).backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / total, peak_lr)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1


@torch.no_grad()
def predict(model, examples, pad_id, batch_size=64):
    """(n, num_labels) logits, in the examples' order."""
    device = next(model.parameters()).device
    model.eval()
    order = np.argsort([len(e) for e in examples], kind="stable")
    logits = [None] * len(examples)
    for at in range(0, len(order), batch_size):
        picked = order[at:at + batch_size]
        ids, real = pad([examples[i] for i in picked], pad_id)
        for i, row in zip(picked, model(ids.to(device), real.to(device)).float().cpu().numpy(), strict=True):
            logits[i] = row
    return np.stack(logits)


def score(config, say=print):
    """Fine-tunes and scores on every seed; returns {"scores": [...], "mean", "std", "majority", "n"} in percent."""
    path, task = checkpoint.find_model(config.model), Path(config.task_dir)
    tokenizer = checkpoint.read_tokenizer(path)
    pad_id = tokenizer.token_to_id("[PAD]")
    (train_x, train_y), (dev_x, dev_y) = read_tsv(task / "train.tsv"), read_tsv(task / "dev.tsv")
    train_x, dev_x = (encode(tokenizer, x, config.max_len) for x in (train_x, dev_x))
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scores = []
    for seed in tqdm(range(config.seeds), desc=f"{task.name} {config.model}", leave=False, disable=None):
        model = checkpoint.load_classifier(path, int(train_y.max()) + 1, seed, config.dropout).to(device)
        finetune(model, train_x, train_y, config.batch_size, config.epochs, config.peak_lr, seed, pad_id)
        scores.append(100 * float((predict(model, dev_x, pad_id).argmax(-1) == dev_y).mean()))
        say(f"{task.name} seed {seed}: accuracy {scores[-1]:.1f}")
    if config.save:
        checkpoint.save_model(config.save, model, tokenizer, card=(
            f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n`{config.model}` fine-tuned by nanoKD on "
            f"{task.name} (seed {seed}): dev accuracy {scores[-1]:.1f} of {len(dev_y):,} examples.\n"))
    std = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    return dict(scores=scores, mean=float(np.mean(scores)), std=std,
                majority=100 * float(np.bincount(dev_y).max() / len(dev_y)), n=len(dev_y))


def main(config):
    result = score(config)
    print(f"{Path(config.task_dir).name}: accuracy {result['mean']:.1f} ± {result['std']:.1f} over {config.seeds} "
          f"seeds, n = {result['n']}, majority class {result['majority']:.1f}")
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run(main, Config, __doc__)
