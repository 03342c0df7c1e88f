"""Everything that is written to or read from disk about weights.  Read it when a file surprises you.

A model directory is a Hugging Face BERT directory: config.json, weights under Hugging Face's tensor names, vocab.txt
and tokenizer.json.  Any such directory, or a Hub id, is a teacher or a student to fine-tune.  Weights are written as
model.safetensors where safetensors is installed, else as pytorch_model.bin; either is read.  Nothing is unpickled
beyond tensors (`weights_only=True`).
"""
import dataclasses
import json
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from cli import UserError
from model import ACTIVATIONS, BertConfig, BertForMaskedLM, BertForSequenceClassification


def find_model(name):
    """The model directory `name`: a directory on this disk, or a Hub id (`bert-base-uncased`) through its cache."""
    path = Path(name)
    if (path / "config.json").exists():
        return path
    if path.exists() or name.count("/") > 1:
        raise UserError(f"{name} is not a model directory (no config.json)")
    from huggingface_hub import snapshot_download  # comes with tokenizers
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "vocab.txt", "model*.safetensors", "*.bin"]))
    except Exception as e:      # no network, no such model, no permission: whatever the Hub's client raises
        raise UserError(f"{name}: neither a model directory on this disk nor to be had from the Hub "
                        f"({type(e).__name__}): give a directory with config.json") from None


def read_config(path):
    raw = json.loads((path / "config.json").read_text())
    if raw.get("model_type") != "bert":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}: only 'bert' works here")
    if raw.get("hidden_act", "gelu") not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {raw['hidden_act']!r}: one of {', '.join(ACTIVATIONS)} works here")
    return BertConfig(**{f.name: raw[f.name] for f in dataclasses.fields(BertConfig) if f.name in raw})


def read_weights(path):
    """{Hugging Face's tensor name: tensor}, the encoder's names with the prefix `bert.`."""
    if (path / "model.safetensors").exists():
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise UserError(f"{path}/model.safetensors needs safetensors: pip install safetensors") from None
        weights = load_file(path / "model.safetensors")
    elif (path / "pytorch_model.bin").exists():
        weights = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    else:
        raise UserError(f"{path}: neither model.safetensors nor pytorch_model.bin is there")
    encoder = ("embeddings.", "encoder.", "pooler.")
    return {"bert." + name if name.startswith(encoder) else name: tensor for name, tensor in weights.items()}


def fill(model, path, optional=()):
    """Loads the directory's weights into `model`; returns the names it lacks, all under the prefixes `optional`."""
    weights, own = read_weights(path), model.state_dict()
    missing = [name for name in own if name not in weights]
    needed = [name for name in missing if not name.startswith(optional)]
    if needed:
        raise UserError(f"{path}: {len(needed)} tensors are missing, {needed[0]} first")
    for name in own.keys() & weights.keys():
        if own[name].shape != weights[name].shape:
            raise UserError(f"{path}: {name} is {tuple(weights[name].shape)}, "
                            f"but config.json makes it {tuple(own[name].shape)}")
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return missing


def load_mlm(path):
    """(BertForMaskedLM, whether the checkpoint holds an LM head)."""
    model = BertForMaskedLM(read_config(path))
    return model, not fill(model, path, optional=("cls.",))


def load_classifier(path, num_labels, seed, dropout=None):
    """A classifier on the directory's encoder; the head, and a pooler that is not there, are initialised by `seed`."""
    torch.manual_seed(seed)
    config = read_config(path)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model = BertForSequenceClassification(config, num_labels)
    fill(model, path, optional=("classifier.", "bert.pooler."))
    return model


def read_tokenizer(path):
    """The tokenizer of a model directory."""
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_file(str(path / "tokenizer.json"))
    if (path / "vocab.txt").exists():
        from prepare import load_tokenizer
        return load_tokenizer(str(path / "vocab.txt"))
    raise UserError(f"{path}: neither tokenizer.json nor vocab.txt is there, so its ids mean nothing")


def same_vocabulary(tokenizer, path):
    """Refuses a model whose token -> id map is not that of `tokenizer`: the sizes alone prove nothing."""
    ours, theirs = tokenizer.get_vocab(), read_tokenizer(path).get_vocab()
    differ = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)),
                    key=lambda t: (ours.get(t, len(ours)), t))
    if differ:
        raise UserError(f"{path} has another vocabulary than the data: {len(differ)} tokens differ, first "
                        + ", ".join(f"{t!r} ({ours.get(t)} here, {theirs.get(t)} there)" for t in differ[:5])
                        + f": prepare the data with  --vocab {path}")


def save_model(directory, model, tokenizer, head):
    """Writes a BertForMaskedLM as a model directory: with its LM head if `head`, else as an encoder (BertModel).

    Written beside its place and moved there, so a directory of that name is always whole."""
    directory, part = Path(directory), Path(f"{directory}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    module = model if head else model.bert
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    try:
        from safetensors.torch import save_file
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    except ImportError:
        torch.save(weights, part / "pytorch_model.bin")
    config = dict(model_type="bert", architectures=["BertForMaskedLM" if head else "BertModel"],
                  **dataclasses.asdict(model.config))
    (part / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer.save(str(part / "tokenizer.json"))
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (part / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocab), encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(part, directory)
