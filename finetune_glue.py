"""Fine-tune a model directory on GLUE, or on labelled text of your own, and score it.  Read it after data.py.

    python finetune_glue.py --model runs/tinybert/model --glue-dir glue            # the paper's grid, 3 seeds
    python finetune_glue.py --model runs/tinybert/model --glue-dir glue --tasks rte,cola --quick    # one grid point
    python finetune_glue.py --model runs/tinybert/model --tasks reviews=reviews.csv --save      # your own
    python finetune_glue.py --model runs/glue/.../trials/reviews-... --predict new.csv  # what it then says of others
    python finetune_glue.py --model runs/tinybert/model --glue-dir glue --probe      # no fine-tuning: seconds

`--glue-dir` holds the official TSVs (CoLA/train.tsv, ...); a task absent there comes from the Hub (nyu-mll/glue).
Your own labelled text is a file, or a directory with train and dev: TSV (no quotes), CSV, JSONL or parquet.  Its
columns have names: one or two of text, and the label, a word or a whole number, or a score where that column is called
`score`.  Which is which is guessed and printed, or said with --columns text,label; a column that numbers the rows (id,
index, ...) is left out.  Of a single file a tenth is set apart as dev, by the hash of its text.

The recipe is the paper's (arXiv 2404.19319): AdamW, batch {16, 32} x lr {1e-5, 3e-5, 5e-5, 8e-5}, 5 epochs, linear
decay, 128 ids, dropout 0.1.  Ours: below width 512 lr {1e-4, 3e-4, 7e-4, 1e-3} and a head with a standard deviation of
sqrt(0.4 / width) in place of 0.02; 6% warm-up; the grid runs on seed 0 and the point that it picks on other seeds,
because the best of a grid on dev is too good to be true; a trial that ends predicting one class is repeated once at
half its rate, and the repeat counts if it does not.  The score is that of the last step.  A seed sets the new head,
the order of the examples and dropout.

Every trial (task, batch, lr, seed) is a file, OUT/trials/*.json, with the dev logits beside it (.npy).  What is
finished never runs again: the same command goes on after a kill, and processes that share OUT share the work.
"""
import hashlib
import io
import itertools
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm

from comparison import ngrams
from data import hashed
from plumbing import checkpoint, probe
from plumbing.cli import Checked, Positives, Seed, Share, Times, UserError, numbers, run
from plumbing.device import choose_device, multiplies_in_bf16
from plumbing.files import claim, claim_each, parsing, sha256, write_json, write_whole
from plumbing.glue import BINARY, PAPER, TASKS, Task, evaluate, parse_tasks, read_task, rows_of_text
from plumbing.tokens import TokenDirectory
from step import autocast, decay_groups, to_device
from train import learning_rate


@dataclass
class Config(Checked):
    model: str                              # model directory or Hub id
    glue_dir: str | None = None          # folder of the official TSVs; a task absent there comes from the Hub
    tasks: str = "cola,sst2,mrpc,stsb,qqp,mnli,qnli,rte"    # GLUE's names (wnli too); name=PATH: your own
    columns: str | None = None              # of your own: text,label or text,text,label; default: guessed
    predict: str | None = None       # a file of text: --model, a classifier, labels it, one JSON line per row
    batch_sizes: Annotated[str, int, "[1, 4096]"] | None = None     # the grid: examples per step; default: 16,32 ...
    peak_lrs: Positives | None = None       # ... times peak learning rates; default: by the model's width, see above
    quick: bool = False                     # default: one grid point, 32 x 5e-5, below width 512 32 x 7e-4
    labels: Annotated[int, "[1, 1e9]"] | None = None    # training examples, drawn anew for each run; default: all
    seeds: Times = 3                        # runs of the chosen point: mean and standard deviation over them
    first_seed: Seed | None = None      # of those runs; default: 1 after a grid, which runs on seed 0, else 0
    epochs: Times = 5                       # passes over the training examples
    max_len: Annotated[int, "[8, 65536]"] = 128     # ids an example is cut to, [CLS] and [SEP] included
    dropout: Share = 0.1                    # in the encoder and before the classifier
    out: str | None = None                  # directory of trials and glue.json; default: runs/glue/MODEL
    probe: bool = False                    # no fine-tuning: what the frozen encoder knows (plumbing/probe.py)
    data: str | None = None             # a token directory, for --probe: word order in its text too
    save: bool = False                 # keep each trial's classifier too, a model directory beside its scores
    device: str | None = None               # cpu, cuda or cuda:N; default: cuda where there is one, else cpu
    compile: bool = False                   # torch.compile of the training step, once for all lengths
    bf16: bool | None = None                # bf16 autocast; default: where that is faster


# {least width: what its models are fine-tuned with}
PEAK_LRS = {512: "1e-5,3e-5,5e-5,8e-5", 0: "1e-4,3e-4,7e-4,1e-3"}
QUICK_LR = {512: "5e-5", 0: "7e-4"}


def encode(tokenizer, sentences, max_len):
    """One (2, S) array per example: ids, [CLS] a [SEP] or [CLS] a [SEP] b [SEP], over token types, 0 or 1.

    What is longer than max_len loses the end of its longer sentence, or of both."""
    tokenizer = checkpoint.framed(tokenizer)
    tokenizer.enable_truncation(max_len)
    examples = []
    for at in range(0, len(sentences), 10_000):     # an Encoding takes a few kB, and MNLI has 400,000 of them
        batch = [s if len(s) == 2 else s[0] for s in sentences[at:at + 10_000]]
        examples += [np.array([e.ids, e.type_ids], np.int32) for e in tokenizer.encode_batch(batch)]
    return examples


def cut(tokenizer, sentences, examples, max_len):
    """How many of the examples are cut: those of max_len ids that would be longer if they could."""
    full = [s for s, e in zip(sentences, examples, strict=True) if e.shape[1] == max_len]
    return sum(e.shape[1] > max_len for e in encode(tokenizer, full, max_len + 1))


def pad(examples, pad_id, multiple=1, limit=math.inf):
    """(ids, real, token_types), each (B, S) with S the longest of these examples, or the next multiple up to
    the limit; token_types None if all are 0."""
    lengths = np.array([e.shape[1] for e in examples])
    shape = len(examples), min(-(-lengths.max() // multiple) * multiple, limit)
    ids, types = np.full(shape, pad_id), np.zeros(shape, np.int64)
    for row, type_row, example in zip(ids, types, examples, strict=True):
        row[:example.shape[1]], type_row[:example.shape[1]] = example
    real = np.arange(ids.shape[1]) < lengths[:, None]
    return torch.from_numpy(ids), torch.from_numpy(real), torch.from_numpy(types) if types.any() else None


def forward(model, examples, pad_id):
    device = next(model.parameters()).device
    multiple = 8 if device.type == "cuda" else 1        # attention masks aligned, fewer shapes
    padded = pad(examples, pad_id, multiple, model.config.max_position_embeddings)
    if padded[2] is not None and model.config.type_vocab_size < 2:
        raise UserError("type_vocab_size is 1 in the model's config.json, so it takes no pairs of sentences: give "
                        "tasks or columns of single ones")
    return model(*(x if x is None else to_device(x, device) for x in padded))


def shuffled_batches(lengths, batch_size, epochs, seed):
    """Index arrays: every example once an epoch, examples of like length together, as `seed` draws them."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        # shuffled, then sorted by length within windows of 50 batches: little
        # padding, and still another order
        order = rng.permutation(len(lengths))
        windows = [w[np.argsort(lengths[w], kind="stable")] for w in np.split(
            order, range(50 * batch_size, len(order), 50 * batch_size))]
        epoch = np.split(np.concatenate(windows), range(batch_size, len(order), batch_size))
        yield from (epoch[at] for at in rng.permutation(len(epoch)))


def finetune(model, examples, labels, batch_size, epochs, peak_lr, seed, pad_id, name="", bf16=False, compiled=False):
    """Trains in place: cross-entropy for classes, mean squared error for scores.  Returns the loss of each step."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(decay_groups(model.parameters(), 0.01), lr=peak_lr, fused=True)
    total, losses = epochs * -(-len(examples) // batch_size), []
    order = shuffled_batches(np.array([e.shape[1] for e in examples]), batch_size, epochs, seed)
    model.train()
    run = torch.compile(model, fullgraph=True, dynamic=True) if compiled else model
    for step, picked in enumerate(tqdm(order, desc=name, total=total, leave=False, disable=None)):
        torch.manual_seed(int(hashed(seed, step) >> np.uint64(1)))                          # dropout
        with autocast(device, bf16):
            logits = forward(run, [examples[i] for i in picked], pad_id).float()            # (B, num_labels)
        y = to_device(torch.from_numpy(labels[picked]), device)
        loss = F.mse_loss(logits[:, 0], y) if y.is_floating_point() else F.cross_entropy(logits, y)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / total, peak_lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())                 # read at the end: .item() here would wait for the device
    return torch.stack(losses).tolist()


@torch.no_grad()
def predict(model, examples, pad_id, batch_size=64):
    """(n, num_labels) logits, in the examples' order; in fp32, where they do not depend on the batch size."""
    model.eval()
    order = np.argsort([e.shape[1] for e in examples], kind="stable")
    rows = torch.cat([forward(model, [examples[i] for i in order[at:at + batch_size]], pad_id)
                      for at in range(0, len(order), batch_size)]).float().cpu().numpy()
    return np.nan_to_num(rows[np.argsort(order)])     # a run that diverged predicts one class, and is flagged


def finished_trial(file, settings, save=False):
    """The result of a trial that ran before, and with `save` has its classifier beside it; else None."""
    if not file.exists():
        return None
    with parsing(file, "delete it and run this again"):
        result = json.loads(file.read_text(encoding="utf-8"))
        differ = [k for k in settings if settings[k] != result["settings"].get(k)]
        if not all(map(math.isfinite, result.get("scores", {}).values())):
            raise ValueError("a score that is no number")
    if differ:
        raise UserError(f"{file} was run with another {', '.join(differ)}: give another --out, or delete it")
    return result if not save or file.with_suffix("").is_dir() else None


class Setup(NamedTuple):
    """What the trials of one task share."""
    config: Config
    path: Path              # the model directory
    digests: list           # of its config.json and weights
    tokenizer: Tokenizer
    device: torch.device
    name: str = ""
    task: Task | None = None
    parts: dict | None = None           # {file: (examples, labels)}, train first
    say: object = print


def drawn(n, labels, seed):
    """Which of n training examples a fine-tuning has: all, or so many labels, drawn by its seed."""
    if not labels or labels >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, labels]).permutation(n)[:labels])


def attempt(setup, name, batch, lr, seed):
    """One fine-tuning: (what the trial's record holds of it, dev logits (n, num_labels), the model)."""
    config, task, device = setup.config, setup.task, setup.device
    (x, y), *dev = setup.parts.values()
    of = drawn(len(y), config.labels, seed)
    began, pad_id = time.monotonic(), setup.tokenizer.token_to_id("[PAD]")
    model = checkpoint.load_classifier(setup.path, task.classes(y) or 1, seed, config.dropout).to(device)
    losses = finetune(model, [x[i] for i in of], y[of], batch, config.epochs, lr, seed, pad_id, name,
                      multiplies_in_bf16(device, config.bf16), config.compile)
    logits, scores, collapsed = [], {}, False
    for (x, y), where in zip(dev, ("", " mismatched"), strict=False):       # two dev sets: MNLI
        logits.append(predict(model, x, pad_id))
        values, same = evaluate(task, logits[-1][:, 0] if task.labels == () else logits[-1].argmax(-1), y)
        scores |= {m + where: v for m, v in values.items()}
        collapsed |= same
    record = dict(peak_lr=lr, scores=scores, collapsed=collapsed, seconds=time.monotonic() - began)
    setup.say(f"{setup.name} batch {batch} lr {lr:g} seed {seed}: {scores_in_words(record)} "
              f"({record['seconds']:.0f} s, {len(losses)} steps)")
    return record, np.concatenate(logits), model


def scores_in_words(record):
    return ", ".join(f"{m} {v:.1f}" for m, v in record["scores"].items()) + ", COLLAPSED" * record["collapsed"]


def run_trial(setup, file, batch, lr, seed):
    """The record of a trial: its one fine-tuning, or two where the first predicts one class.  Writes the logits of
    the one that counts beside `file`, and with --save its classifier."""
    config, kept = setup.config, file.with_suffix("")
    if config.save:
        checkpoint.room(kept)                                           # now, not when all is trained
    found = [attempt(setup, file.stem, batch, lr, seed)]
    if found[0][0]["collapsed"]:
        found.append(attempt(setup, file.stem, batch, lr / 2, seed))
    record, logits, model = found[0] if found[-1][0]["collapsed"] else found[-1]
    buffer = io.BytesIO()
    np.save(buffer, logits)
    write_whole(file.with_suffix(".npy"), buffer.getvalue())
    if config.save:
        task = setup.task
        checkpoint.save_model(
            kept, model, setup.tokenizer, max_len=config.max_len, columns=task.columns or task.text,
            names=None if task.labels in (None, (), BINARY) else task.labels,
            card=f"---\nlibrary_name: transformers\ntags: [bert, nanokd]\n---\n\n`{config.model}` fine-tuned by nanoKD "
                 f"on {setup.name} (batch {batch}, lr {record['peak_lr']:g}, seed {seed}) scores, on the dev examples: "
                 f"{scores_in_words(record)}.\n")
    return dict(record, attempts=[each for each, *_ in found])


def run_trials(setup, out, points):
    """{point: result} of (batch, lr, seed) points."""
    config = setup.config
    # the examples as the model sees them: another TSV, tokenizer or max_len makes another trial
    examples = hashlib.sha256(b"".join(a.tobytes() for x, y in setup.parts.values() for a in (*x, y)))
    settings = dict(model=setup.digests, examples=examples.hexdigest()[:16],
                    epochs=config.epochs, dropout=config.dropout, drawn=config.labels,
                    bf16=multiplies_in_bf16(setup.device, config.bf16),
                    labels=None if setup.task.columns else list(setup.task.labels or ()) or None)
    files = [out / f"{setup.name}-b{batch}-lr{lr:g}-seed{seed}.json" for batch, lr, seed in points]

    def trial(i):
        result = finished_trial(files[i], settings, config.save)
        if result is None:
            result = run_trial(setup, files[i], *points[i])
            write_json(files[i], dict(result, settings=settings))
        locks[i].unlink(missing_ok=True)
        return result
    locks = [file.with_suffix(".lock") for file in files]
    return dict(zip(points, claim_each(locks, trial, directories=False), strict=True))


def score_task(setup, out):
    """The grid on seed 0, the best point on fresh seeds."""
    points = grid(setup.config, checkpoint.read_config(setup.path).hidden_size)
    metric, several = setup.task.metrics[0], len(points) > 1
    trials = len(points) * several + setup.config.seeds
    first = int(several) if setup.config.first_seed is None else setup.config.first_seed
    if several:             # else there is nothing to choose, and seed 0 is as fresh as any
        chosen = run_trials(setup, out, [(*p, 0) for p in points])
        points = [max(points, key=lambda p: chosen[*p, 0]["scores"][metric])]
    results = run_trials(setup, out, [(*points[0], seed) for seed in range(first, first + setup.config.seeds)])
    results, (_, (_, y), *_) = list(results.values()), setup.parts.values()
    majority = np.full(len(y), 0 if setup.task.labels == () else np.bincount(y).argmax())
    mean = {}
    for m in results[0]["scores"]:
        scores = [r["scores"][m] for r in results]
        mean[m] = dict(scores=scores, mean=float(np.mean(scores)),
                       std=float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0)
    collapsed = [r["collapsed"] for r in results]
    return dict(mean.pop(metric), metric=metric, others=mean, batch_size=points[0][0], peak_lr=points[0][1],
                trials=trials, n=len(y), majority=evaluate(setup.task, majority, y)[0][metric],
                collapsed=sum(collapsed), collapsed_trials=collapsed, first_seed=first,
                repeated=sum(len(r.get("attempts", ())) > 1 for r in results))


def probed(task, labels, predictions):
    """What score_task says of fine-tunings, of a frozen encoder's predictions of the dev examples: one that nothing
    can change."""
    metric = "spearman" if task.labels == () else task.metrics[0]       # of a cosine only the order tells
    majority = np.full(len(labels), 0 if task.labels == () else np.bincount(labels).argmax())
    score, most = (evaluate(task, p, labels)[0][metric] for p in (predictions, majority))
    return dict(scores=[score], mean=score, std=0.0, metric=metric, n=len(labels), majority=most, collapsed=0,
                collapsed_trials=[False], frozen=True)


def kept_predictions(name, task, found, out):
    """(fine-tunings, dev examples): what each reported trial of score_task predicted of the first dev set."""
    files = [out / f"{name}-b{found['batch_size']}-lr{found['peak_lr']:g}-seed{found['first_seed'] + i}.npy"
             for i in range(len(found["scores"]))]
    logits = [np.load(file)[:found["n"]] for file in files]
    return np.stack([z[:, 0] if task.labels == () else z.argmax(-1) for z in logits])


def line(name, r):
    """A task's result in one line."""
    values = [f"{m} {v['mean']:.1f} ± {v['std']:.1f}" for m, v in [(r["metric"], r), *r["others"].items()]]
    return (f"{name}: {', '.join(values)} over {len(r['scores'])} seeds (batch {r['batch_size']}, "
            f"lr {r['peak_lr']:g}; {r['trials']} trials), n = {r['n']:,}, majority class {r['majority']:.1f}"
            + (f"; {r['repeated']} predicted one class and ran again at half the rate" if r["repeated"] else "")
            + (f"; {r['collapsed']} of {len(r['scores'])} COLLAPSED" if r["collapsed"] else ""))


def grid(config, width):
    """[(batch size, peak lr)] for a model of this width: what the flags say, else the defaults of that width."""
    lrs = QUICK_LR if config.quick else PEAK_LRS
    batch_sizes = config.batch_sizes or ("32" if config.quick else "16,32")
    peak_lrs = config.peak_lrs or next(text for least, text in lrs.items() if width >= least)
    return list(itertools.product(numbers(batch_sizes, int), numbers(peak_lrs)))


def opened(config, say):
    """The model and the tasks of a Config, read and checked: (Setup of no task, {name: Task}, {name: {file:
    (sentences, labels)}}, --out)."""
    path, tasks = checkpoint.find_model(config.model), parse_tasks(config.tasks, config.columns, say)
    model, tokenizer = checkpoint.read_config(path), checkpoint.read_tokenizer(path)
    digests = [sha256(f)[:16] for f in (path / "config.json", *checkpoint.weight_files(path))]
    if config.max_len > model.max_position_embeddings:
        raise UserError(f"--max-len {config.max_len}: {path} takes 8 to {model.max_position_embeddings}")
    texts = {name: read_task(name, task, config.glue_dir, say) for name, task in tasks.items()}
    out = "runs/glue/" + config.model.strip("/.").replace("/", "_") if config.out is None else config.out
    setup = Setup(config, path, digests, tokenizer, choose_device(config.device), say=say)
    return setup, tasks, texts, claim(out, "glue")


def score_model(config, say=print):
    """Fine-tunes and scores on every task; returns what glue.json holds, scores in percent."""
    setup, tasks, texts, out = opened(config, say)
    (out / "trials").mkdir(exist_ok=True)
    results = {}
    for name, task in tasks.items():
        parts, truncated = {}, {}
        for file, (x, y) in texts.pop(name).items():
            parts[file] = encode(setup.tokenizer, x, config.max_len), y
            truncated[file] = cut(setup.tokenizer, x, parts[file][0], config.max_len)
        if any(truncated.values()):
            say(f"{name}: longer than --max-len {config.max_len} and cut: " + ", ".join(
                f"{n:,} of {len(parts[file][1]):,} in {file}" for file, n in truncated.items()))
        found = score_task(setup._replace(name=name, task=task, parts=parts), out / "trials")
        results[name] = dict(found, truncated=truncated)
    averaged = [name for name in PAPER if name in results and tasks[name] is TASKS[name]]
    result = dict(model=config.model, tasks=results, averaged=averaged)
    for key, names in (("average", averaged), ("average_without_cola", [n for n in averaged if n != "cola"])):
        result[key] = float(np.mean([results[n]["mean"] for n in names])) if names else None
    write_json(out / "glue.json", result)
    return result


def probes(config, say=print, alone=False):
    """What probes.json holds: {tasks: {name: {linear, similarity}, "word order": {linear}}, predicted: {name: of
    each dev example}}.  `alone`: no regression where there is a similarity."""
    setup, tasks, texts, out = opened(config, say)
    bert, directory = checkpoint.load_mlm(setup.path).model.bert, None
    if config.data:
        directory = TokenDirectory(config.data)
        checkpoint.same_vocabulary(directory.read_tokenizer(), setup.path)
    examples = hashlib.sha256(repr([(name, x, y.tolist()) for name, parts in texts.items()
                                    for x, y in parts.values()]).encode())
    settings = dict(model=setup.digests, examples=examples.hexdigest()[:16], max_len=config.max_len,
                    similarity_alone=alone, data=directory and directory.manifest["sha256"])
    result = finished_trial(out / "probes.json", settings)
    if result:
        return result
    encoder = probe.Pooled(bert.to(setup.device), checkpoint.read_form(setup.path).pooling)

    def states(texts):
        """(n, D): the pooled last hidden states."""
        return predict(encoder, encode(setup.tokenizer, [(text,) for text in texts], config.max_len),
                       setup.tokenizer.token_to_id("[PAD]"))
    found, predicted = {}, {}
    for name, task in tasks.items():
        found[name], of_dev = probe.probe_task(task, texts.pop(name), states, alone)
        predicted[name] = of_dev.tolist()
    result = dict(tasks=found, predicted=predicted, settings=settings)
    if directory:
        found["word order"] = probe.probe_word_order(
            directory, lambda ids: predict(encoder, np.stack([ids, np.zeros_like(ids)], 1), 0))
    for name, values in found.items():
        say(f"{name}: {probe.in_words(values)}")
    write_json(out / "probes.json", result)
    return result


def label_rows(config, out):
    """Writes one JSON line per row of --predict to `out`: label and probabilities, or score; or what is wrong."""
    path = checkpoint.find_model(config.model)
    classifier, tokenizer = checkpoint.read_classifier(path), checkpoint.read_tokenizer(path)
    rows = rows_of_text(Path(config.predict), config.columns, classifier.columns)
    print(f"text from {next(rows)} ({config.predict})", file=sys.stderr)
    model, pad_id = classifier.model.to(choose_device(config.device)), tokenizer.token_to_id("[PAD]")
    while some := list(itertools.islice(rows, 1000)):
        good = [text for _, text, fault in some if not fault]
        found = iter(predict(model, encode(tokenizer, good, classifier.max_len), pad_id) if good else ())
        for place, _, fault in some:
            out.write(json.dumps(dict(error=f"{place} {fault}") if fault else said(classifier, next(found))) + "\n")
        out.flush()


def said(classifier, logits):
    """What a classifier makes of one row's logits."""
    if classifier.score:
        return dict(score=round(float(logits[0]), 6))
    p = np.exp(logits.astype(np.float64) - logits.max())
    return dict(label=classifier.names[p.argmax()], probabilities={
        name: round(float(v), 6) for name, v in zip(classifier.names, p / p.sum(), strict=True)})


def main(config):
    if config.predict:
        return label_rows(config, sys.stdout)
    if config.data and not config.probe:
        raise UserError("--data is for --probe: word order is asked in its text")
    if config.probe:
        print("probes of the frozen encoder, which no average holds, beside n-grams and a linear classifier:")
        found = probes(config)
        for name, task in parse_tasks(config.tasks, config.columns).items():
            scores, _ = ngrams.score(task, read_task(name, task, config.glue_dir))
            print(f"{name}: n-grams {scores[0]:.1f}")
        return found
    result = score_model(config)
    print()
    for name, r in result["tasks"].items():
        print(line(name, r))
    if result["averaged"]:
        names = result["averaged"]
        of = "the paper's 7 tasks" if len(names) == 7 else "+".join(names) + " alone"
        without = result["average_without_cola"]
        print(f"average over {of}: {result['average']:.1f}"
              + (f"; without cola: {without:.1f}" if without is not None and "cola" in names else ""))


if __name__ == "__main__":
    run(main, Config, __doc__)
