"""Everything that is written to or read from disk about weights.  Read it when a file surprises you.

A model directory is a Hugging Face BERT directory: config.json, weights under Hugging Face's tensor names,
vocab.txt and tokenizer.json.  Any such directory, or a Hub id, is a teacher or a student to fine-tune:
safetensors or pytorch_model.bin, whole or sharded, with or without the prefix `bert.`, the pooler and the LM
head, in any precision.  What a checkpoint holds is either used or listed as ignored; what it lacks is refused
unless it is not needed.

A student is written with its LM head (opens with AutoModelForMaskedLM) where its strategy trains one, else as
an encoder (AutoModel).  Nothing is unpickled beyond tensors (`weights_only=True`).
"""
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing

from model import ACTIVATIONS, BertConfig, BertForMaskedLM, BertForSequenceClassification
from plumbing.cli import UserError, shown
from plumbing.files import sha256, write_whole
from plumbing.tokenizer import load_tokenizer

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias",
             "cls.predictions.decoder.bias": "cls.predictions.bias"}
DECODER = "cls.predictions.decoder.weight"              # tied: the word embedding under another name
EMBEDDING = "bert.embeddings.word_embeddings.weight"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# All that save_model writes; SHA256SUMS, which tells a model of ours, is written first and goes last
MODEL = {*WEIGHTS, "SHA256SUMS", "config.json", "tokenizer.json", "vocab.txt", "tokenizer_config.json",
         "modules.json", "1_Pooling", "1_Pooling/config.json", "README.md"}
CHECKPOINTS = ("checkpoint.pt", "checkpoint.new.pt", "checkpoint.before.pt")      # newest first


# ---------------------------------------------------------------------------------------------------- reading

def find_model(name):
    """The model directory `name`: a directory on this disk, or HUB_ID[@REVISION] through
    huggingface_hub's cache."""
    path = Path(name)
    if not path.exists() and beside(path, "old").exists():              # save_model was killed between two renames
        path = beside(path, "old")
    try:
        for file in sorted(path.iterdir()) if path.exists() else ():
            if file.is_file():
                open(file, "rb").close()              # here, where one message names whichever is locked away
        if (path / "config.json").exists():
            return path
    except OSError as e:
        raise UserError(f"{name} cannot be read as a model directory: {e.filename}: {e.strerror}") from None
    if path.exists():
        raise UserError(f"{name} is not a model directory (no config.json)")
    repo, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo):
        raise UserError(f"{name} is neither a model directory nor a Hub id (no such directory)")
    from huggingface_hub import snapshot_download  # comes with tokenizers
    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            path = Path(snapshot_download(repo, revision=revision or None,
                                          allow_patterns=["*.json", "vocab.txt", weights]))
            if any(path.glob(weights)):
                break
    except Exception as e:      # no network, no such model, no permission: whatever the Hub's client raises
        raise UserError(f"{name}: not a directory on this disk, and not to be had from the Hub "
                        f"({type(e).__name__}): where there is a network, run  hf download {repo}  and bring "
                        f"its cache (HF_HOME), or give the path of a model directory") from None
    return path


def read_config(path):
    try:
        raw = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}/config.json is not a JSON object ({e})") from None
    kind = raw.get("model_type")
    if kind != "bert":
        raise UserError(f"{path}: model_type is {kind!r}: only BERT works here (model_type 'bert')")
    config = BertConfig(**{f.name: raw[f.name] for f in dataclasses.fields(BertConfig) if f.name in raw})
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), int(field.name != "pad_token_id")
        if field.type is int and (type(value) is not int or value < least):
            raise UserError(f"{path}/config.json: {field.name} is {value!r}: a whole number from "
                            f"{least} belongs there")
        if field.type is float and (type(value) not in (int, float) or not 0 <= value <= 1):
            raise UserError(f"{path}/config.json: {field.name} is {value!r}: a number "
                            f"from 0 to 1 belongs there")
    if config.pad_token_id >= config.vocab_size:
        raise UserError(f"{path}/config.json: pad_token_id is {config.pad_token_id}, beyond a vocab_size of "
                        f"{config.vocab_size}")
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {config.hidden_act!r}: one of "
                        f"{', '.join(ACTIVATIONS)} works here")
    if raw.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(f"{path}: position_embedding_type is "
                        f"{raw['position_embedding_type']!r}: only absolute works")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(f"{path}/config.json: hidden_size {config.hidden_size} is not a multiple of "
                        f"{config.num_attention_heads} heads")
    return config


def weight_files(path):
    """The files that hold the weights: safetensors before pytorch_model.bin, whole or
    as an index lists them."""
    for name in WEIGHTS:
        if (path / name).exists():
            return [path / name]
        if (path / f"{name}.index.json").exists():
            try:
                shards = json.loads((path / f"{name}.index.json").read_text())["weight_map"].values()
                return [path / shard for shard in sorted(set(shards))]
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{path}/{name}.index.json is damaged: it "
                                f"names no files of weights") from None
    raise UserError(f"{path}: neither model.safetensors nor pytorch_model.bin is there, nor an index of them")


def read_weights(path):
    """{tensor name: tensor}: Hugging Face's names of today, the encoder's with the prefix `bert.`."""
    weights, sums = {}, path / "SHA256SUMS"
    sums_text = sums.read_text(errors="replace") if sums.exists() else ""
    expected = {name: digest for digest, name in re.findall(r"^(\w{64}) [ *](.+)$", sums_text, re.M)}
    for file in weight_files(path):
        if not file.exists():
            raise UserError(f"{file}: no such file, though {path} lists it")
        if file.name in expected and expected[file.name] != sha256(file):
            raise UserError(f"{file} is not the file that was written: its sha256 is not the one in {sums}")
        weights |= tensors_in(file)
    named = {}
    for name, tensor in weights.items():
        for old, new in OLD_NAMES.items():
            name = re.sub(rf"(^|\.){re.escape(old)}$", rf"\g<1>{new}", name)
        named["bert." + name if name.startswith(("embeddings.", "encoder.", "pooler.")) else name] = tensor
    return named


def tensors_in(file):
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        with open(file, "rb") as f:
            zipped = f.read(2) == b"PK"
        if zipped and zipfile.ZipFile(file).testzip():                  # torch skips the CRCs
            raise zipfile.BadZipFile
        return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError:
        raise UserError(f"{file} needs safetensors: pip install safetensors") from None
    except Exception as e:      # a cut or forged file: safetensors, zipfile and pickle each raise their own
        raise UserError(f"{file} cannot be read as tensors ({type(e).__name__}): it is cut, damaged or not a "
                        f"checkpoint") from None


class Loaded(NamedTuple):
    model: torch.nn.Module
    missing: list           # tensors that the checkpoint lacks (they keep their initialisation)
    ignored: list           # tensors that it holds and nothing here uses


def fill(model, path, optional=()):
    """Loads the directory's weights into `model`; what is missing must lie under one of
    the prefixes `optional`."""
    weights, own = read_weights(path), model.state_dict()
    missing = [name for name in own if name not in weights]
    needed = [name for name in missing if not name.startswith(optional or "-")]
    if needed:
        raise UserError(f"{path}: {len(needed)} tensors are missing, {needed[0]} first; config.json asks for "
                        f"{model.config.num_hidden_layers} layers")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise UserError(f"{path}: {name} is {tuple(weights[name].shape)}, "
                            f"but config.json makes it {tuple(own[name].shape)}")
        if not weights[name].isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite: the file is damaged")
    beyond = [name for name in weights if name.startswith("bert.encoder.layer.") and name not in own]
    if beyond:
        raise UserError(f"{path}: config.json asks for {model.config.num_hidden_layers} layers, the weights "
                        f"hold more ({beyond[0]})")
    if DECODER in weights and not torch.equal(weights[DECODER], weights[EMBEDDING]):
        raise UserError(f"{path}: {DECODER} is not the word embedding: an untied decoder does not work here")
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return Loaded(model, missing, [name for name in weights if name not in own and name != DECODER])


def load_mlm(path, vocab_size=None):
    """A BertForMaskedLM; without an LM head in the checkpoint, `missing` lists `cls.` and the head is random.

    `vocab_size`: the tokenizer's, where the checkpoint's vocabulary is padded: the surplus rows are cut."""
    loaded = fill(BertForMaskedLM(read_config(path)), path, optional=("cls.",))
    model = loaded.model
    if vocab_size is not None and vocab_size < model.config.vocab_size:
        model.config.vocab_size = vocab_size
        words, head = model.bert.embeddings.word_embeddings, model.cls.predictions
        words.weight = torch.nn.Parameter(words.weight.detach()[:vocab_size].clone())
        words.num_embeddings = vocab_size
        head.bias = torch.nn.Parameter(head.bias.detach()[:vocab_size].clone())
    return loaded


def load_classifier(path, num_labels, seed, dropout=None):
    """A classifier on the directory's encoder; the head, and a pooler that was never
    trained, come from `seed`."""
    config = read_config(path)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config, num_labels)
    pooler = {name: p.clone() for name, p in model.bert.pooler.state_dict().items()}
    fill(model, path, optional=("classifier.", "bert.pooler."))
    if torch.equal(model.bert.pooler["dense"].weight, untrained_pooler(config)["pooler.dense.weight"]):
        model.bert.pooler.load_state_dict(pooler)
    return model


class Classifier(NamedTuple):
    model: torch.nn.Module
    names: list             # of the classes, in the order of their numbers
    score: bool             # one output, which is a score
    columns: list           # of text, as they were called where it was fine-tuned; [] where that is not known
    max_len: int            # ids an example is cut to


def read_classifier(path):
    """What --save, or transformers, has written as a BertForSequenceClassification."""
    config, raw = read_config(path), json.loads((path / "config.json").read_text())
    if raw.get("architectures") != ["BertForSequenceClassification"]:
        raise UserError(f"{path} is no classifier (its config.json says {raw.get('architectures')}): "
                        f"fine-tune one with --save, and give the directory beside its trial's scores")
    if raw.get("problem_type") == "multi_label_classification":
        raise UserError(f"{path} gives an example any number of labels: only one label of several, "
                        f"or a score, works here")
    try:        # transformers leaves two classes without names of their own out
        names = [name for _, name in sorted((int(i), str(name)) for i, name in raw.get(
            "id2label", {"0": "LABEL_0", "1": "LABEL_1"}).items())]
        file = path / "tokenizer_config.json"
        cut = int(json.loads(file.read_text()).get("model_max_length", 1e9)) if file.exists() else 10 ** 9
        model = BertForSequenceClassification(config, len(names))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        raise UserError(f"{path}: the id2label in config.json, or "
                        f"tokenizer_config.json, is damaged") from None
    score = raw.get("problem_type") == "regression" or len(names) == 1
    return Classifier(fill(model, path).model.eval(), names, score, raw.get("text_columns", []),
                      min(cut, config.max_position_embeddings))


def read_tokenizer(path):
    """The tokenizer of a model directory."""
    for name in ("tokenizer.json", "vocab.txt"):
        if (path / name).exists():
            try:
                return load_tokenizer(str(path / name))
            except UserError as e:
                raise UserError(f"{path / name} is not the vocabulary of a BERT, or is damaged "
                                f"({str(e).removeprefix(f'--vocab {path / name}: ')})") from None
    raise UserError(f"{path}: neither tokenizer.json nor vocab.txt is there, so its ids mean nothing")


def framed(tokenizer):
    """A copy that neither cuts nor pads: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] with 1
    as the type of b [SEP]."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.post_processor = BertProcessing(*((t, tokenizer.token_to_id(t)) for t in ("[SEP]", "[CLS]")))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def same_vocabulary(tokenizer, path):
    """Refuses a model whose token -> id map is not that of `tokenizer`: the sizes alone prove nothing."""
    ours, theirs = tokenizer.get_vocab(), read_tokenizer(path).get_vocab()
    differ = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
                    key=lambda t: (ours.get(t, len(ours)), t))
    if differ:
        raise UserError(f"{path} has another vocabulary than the data: {len(differ)} tokens differ, first "
                        + ", ".join(f"{t!r} ({ours.get(t)} here, {theirs.get(t)} there)" for t in differ[:5])
                        + f": prepare the data with  --vocab {path}")
    if read_config(path).vocab_size < len(theirs):
        raise UserError(f"{path}: config.json has vocab_size {read_config(path).vocab_size}, its tokenizer "
                        f"{len(theirs)} tokens")


# -------------------------------------------------------------------------------------------------- run state

def save_run(out, state):
    """Everything a run needs to go on, in out/checkpoint.pt: tensors, then their sha256.
    The one before is kept."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    new = out / "checkpoint.new.pt"
    write_whole(new, data + hashlib.sha256(data).digest())
    if (out / "checkpoint.pt").exists():
        os.replace(out / "checkpoint.pt", out / "checkpoint.before.pt")
    os.replace(new, out / "checkpoint.pt")


def checkpoints(out):
    """The files of a run's checkpoints, newest first."""
    return [out / name for name in CHECKPOINTS if (out / name).exists()]


def load_run(out, say):
    """The newest good state in `out`, or None where no checkpoint was ever written.
    Damage is never a restart."""
    files = checkpoints(out)
    for file in files:
        data = file.read_bytes()
        if hashlib.sha256(data[:-32]).digest() == data[-32:]:
            try:
                return torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
            except Exception as e:      # a forged pickle with a right checksum
                raise UserError(f"{file} is not a checkpoint of ours ({type(e).__name__})") from None
        say(f"warning: {file} is damaged (its sha256 does not match)")
    if files:
        names = " and ".join(file.name for file in files)
        raise UserError(f"{out}: every checkpoint is damaged: remove {names} to start anew")
    return None


def cut_log(file, step):
    """Leaves the lines of log.jsonl up to `step`: what a killed run wrote beyond its
    checkpoint is done again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().split("\n"):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:              # the last line of a killed run, cut short
            pass
    write_whole(file, "".join(kept).encode())


# ---------------------------------------------------------------------------------------------------- writing

def save_model(directory, model, tokenizer, head=True, card="", max_len=None, names=None, columns=()):
    """Writes a model directory: a BertForMaskedLM with its LM head if `head`, else as an
    encoder; or a classifier.

    `card` is the text of its README.md; `max_len`: how many ids it was fine-tuned on, where its tokenizer is
    to cut.  `names`: of a classifier's labels; `columns`: those that its text stood in.
    Written and synced beside its place, then moved there: whatever happens, a whole one of that name, or the
    one before beside it (find_model reads that, the next save moves it back)."""
    directory = Path(directory)
    room(directory)
    part = beside(directory, "part")
    (part / "1_Pooling").mkdir(parents=True)
    c = model.config
    kind = type(model).__name__ if head else "BertModel"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in
               (model if head else model.bert).state_dict().items()}
    extra = {}
    if kind == "BertModel":
        weights |= untrained_pooler(c)                  # what transformers' BertModel expects to find
    if kind == "BertForSequenceClassification":
        names = names or [f"LABEL_{i}" for i in range(model.classifier.out_features)]
        extra = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
                     text_columns=list(columns),                     # a pipeline's sigmoid is not for scores:
                     problem_type="regression" if len(names) == 1 else "single_label_classification")
    try:
        from safetensors.torch import save
        file, data = part / WEIGHTS[0], save(weights, metadata={"format": "pt"})
    except ImportError:
        file, buffer = part / WEIGHTS[1], io.BytesIO()
        torch.save(weights, buffer)
        data = buffer.getvalue()
    write(part / "SHA256SUMS", f"{hashlib.sha256(data).hexdigest()}  {file.name}\n")
    write_whole(file, data)
    write(part / "config.json", dict(
        model_type="bert", architectures=[kind], **dataclasses.asdict(c), **extra))
    save_tokenizer(part, framed(tokenizer), max_len or c.max_position_embeddings)
    write(part / "modules.json", [
        dict(idx=i, name=str(i), path=where, type=f"sentence_transformers.models.{what}")
        for i, (where, what) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])])
    write(part / "1_Pooling/config.json", dict(
        word_embedding_dimension=c.hidden_size, pooling_mode_mean_tokens=True))
    write(part / "README.md", card)
    for folder in (part / "1_Pooling", part):
        synced(folder)
    if directory.exists():
        os.replace(directory, beside(directory, "old"))
    os.replace(part, directory)
    synced(directory.parent)
    remove(beside(directory, "old"))


def beside(directory, what):
    """Where a model is while it is written (part), or while the new one takes its place (old)."""
    return directory.parent / f"{directory.name}.{what}"


def room(directory, dry_run=False):
    """Makes room for save_model: what a killed one has left goes, or back to its place.  Refuses, before
    anything is lost, what is no model of ours, whole or begun."""
    part, old = beside(directory, "part"), beside(directory, "old")
    for place in (directory, part, old):
        entries(place)
    if dry_run:
        return
    if old.exists() and not directory.exists():
        os.replace(old, directory)
    remove(part)
    remove(old)


def entries(directory):
    """What save_model has written there, SHA256SUMS last; what it has not is refused."""
    sums = directory / "SHA256SUMS"
    vouched = re.findall(r"^(\w{64})  (.+)$", sums.read_text(errors="replace"), re.M) if sums.is_file() else []

    def ours(path):
        name = re.sub(r"\.\d+\.part$", "", path.relative_to(directory).as_posix())
        return (name in MODEL and not path.is_symlink() and path.is_dir() == (name == "1_Pooling")
                and (vouched or name in ("1_Pooling", "SHA256SUMS"))
                and (path.name not in WEIGHTS or (sha256(path), path.name) in vouched))
    found = sorted(directory.rglob("*"), key=lambda path: (path == sums, -len(path.parts), path))
    foreign = [path for path in found if not ours(path)]
    if os.path.lexists(directory) and (directory.is_symlink() or not directory.is_dir()):
        foreign = [directory]
    if foreign:
        raise UserError(f"{shown(foreign[0])} is not ours, and {directory} is where a model is to be saved: "
                        f"nothing was touched; move it away, or give another --out")
    return found


def remove(directory):
    """Unlinks a model of ours, by the names that save_model writes."""
    for path in (*entries(directory), *[directory] * directory.exists()):
        path.rmdir() if path.is_dir() else path.unlink()


def synced(directory):
    """Puts the names in a directory on the disk, where that can be asked for."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write(file, value):
    text = value if isinstance(value, str) else json.dumps(value, indent=1) + "\n"
    write_whole(file, text.encode())


def save_tokenizer(directory, tokenizer, max_len):
    """tokenizer.json, vocab.txt and what transformers has to be told of them."""
    write(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    write(directory / "vocab.txt", "".join(f"{token}\n" for token, _ in vocab))
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    # PreTrainedTokenizerFast takes tokenizer.json as it is, but gives token types only where
    # model_input_names has them.  BertTokenizer would build its own from the vocabulary and the
    # settings of the normaliser.
    write(directory / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=max_len, do_lower_case=normalizer.get("lowercase", False),
        strip_accents=normalizer.get("strip_accents"),
        tokenize_chinese_chars=normalizer.get("handle_chinese_chars", True),
        unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]"))


def untrained_pooler(config):
    """The pooler that an encoder is saved with: pretraining has none.  Always the same, so
    it can be told apart."""
    D, generator = config.hidden_size, torch.Generator().manual_seed(0)
    return {"pooler.dense.weight": torch.randn(D, D, generator=generator) * config.initializer_range,
            "pooler.dense.bias": torch.zeros(D)}
