"""Everything that is written to or read from disk about weights.  Read it when a file surprises you.

A model directory is a Hugging Face BERT directory: config.json, weights under Hugging Face's tensor names,
vocab.txt and tokenizer.json.  Any such directory, or a Hub id, is a teacher or a student to fine-tune: safetensors or
pytorch_model.bin, whole or sharded, with or without the prefix `bert.` (or torch's own), pooler and LM head.  What
config.json says of the computation is understood or refused by name; what a checkpoint holds is used or listed as
ignored; what it lacks is refused unless it is not needed.  Nothing is unpickled beyond tensors (`weights_only=True`).
"""
import dataclasses
import hashlib
import io
import json
import math
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
from plumbing.files import as_json, json_object, log_records, parsing, sha256, write_whole
from plumbing.tokenizer import load_tokenizer

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias",
             "cls.predictions.decoder.bias": "cls.predictions.bias"}
DECODER = "cls.predictions.decoder.weight"              # tied: the word embedding under another name
EMBEDDING = "bert.embeddings.word_embeddings.weight"
WRAPPERS = r"^((module|_orig_mod|base_model|model|bert)\.)*(?=(bert|embeddings|encoder|pooler|cls|classifier)\.)"
PLAIN = dict(is_decoder=False, add_cross_attention=False, is_encoder_decoder=False, quantization_config=None,
             position_embedding_type="absolute", pruned_heads={}, auto_map=None)    # else it is another computation
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
PARTS = {"an adapter that was not merged into the weights": r"lora_|base_layer|adapter|modules_to_save",
         "quantised weights": r"\.(SCB|qweight|qzeros|scales?|g_idx|absmax|quant_|_packed|zero_point|weight_scale)",
         "a decoder's cross-attention": "crossattention", "relative positions": "distance_embedding|relative"}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find_model(name):
    """The model directory `name`: a directory on this disk, or HUB_ID[@REVISION] through huggingface_hub's cache."""
    path = Path(name)
    if not path.exists() and beside(path, "old").exists():              # save_model was killed between two renames
        path = beside(path, "old")
    if (path / "adapter_config.json").exists():
        raise UserError(f"{name} holds an adapter (adapter_config.json): merge it into its base model "
                        f"(merge_and_unload of peft), and give that")
    if (path / "config.json").is_file():
        return path
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
    """The BertConfig of a model directory: of a plain BERT, and as large as the files of its weights allow."""
    file = path / "config.json"
    raw = json_object(file)

    def need(good, name, value, wanted):
        if not good:
            raise UserError(f"{file}: {name} is {shown(repr(value), 60)}: {wanted}")
    with parsing(file):
        kind, family = raw.get("model_type"), raw.get("architectures") or ["Bert"]
        need(kind == "bert" or kind is None and family[0].startswith("Bert"), "model_type", kind,
             "only BERT works here (model_type 'bert')")
        c = BertConfig(**{f.name: raw[f.name] for f in dataclasses.fields(BertConfig) if f.name in raw})
        for name, plain in (PLAIN | dict(embedding_size=c.hidden_size)).items():
            need(raw.get(name) in (None, plain), name, raw.get(name), f"only {plain!r} works here")
        for f in dataclasses.fields(c):
            value, least = getattr(c, f.name), int(f.name != "pad_token_id")
            need(f.type is not int or type(value) is int and value >= least or value is None and not least,
                 f.name, value, f"a whole number from {least} belongs there")
            need(f.type is not float or type(value) in (int, float) and 0 <= value <= 1,
                 f.name, value, "a number from 0 to 1 belongs there")
        need((c.pad_token_id or 0) < c.vocab_size, "pad_token_id", c.pad_token_id,
             f"it lies beyond a vocab_size of {c.vocab_size}")
        need(c.hidden_act in ACTIVATIONS, "hidden_act", c.hidden_act, f"one of {', '.join(ACTIVATIONS)} works here")
        need(c.hidden_size % c.num_attention_heads == 0, "hidden_size", c.hidden_size,
             f"it is not a multiple of {c.num_attention_heads} heads")
    least = c.hidden_size * (c.vocab_size + c.max_position_embeddings + c.type_vocab_size + c.num_hidden_layers * (
        4 * c.hidden_size + 2 * c.intermediate_size)) + 500 * c.num_hidden_layers       # its names alone take 500
    held = sum(f.stat().st_size for f in weight_files(path))
    if least > held:
        raise UserError(f"{file} describes a model of {shown(format(least, ','), 40)} numbers and more, its weights "
                        f"are {held:,} bytes: they are cut, quantised, or another model's")
    return c


def weight_files(path):
    """The files that hold the weights: safetensors before pytorch_model.bin, whole or as an index lists them."""
    for name in WEIGHTS:
        if (path / name).is_file():
            return [path / name]
        if (index := path / f"{name}.index.json").is_file():
            with parsing(index):
                files = [path / Path(shard).name for shard in sorted(set(json_object(index)["weight_map"].values()))]
            if gone := [file for file in files if not file.is_file()]:
                raise UserError(f"{shown(gone[0])}: no such file, though {path} lists it")
            return files
    raise UserError(f"{path}: neither model.safetensors nor pytorch_model.bin is there, nor an index of them")


def read_weights(path):
    """{tensor name: tensor}: Hugging Face's names of today, the encoder's with the prefix `bert.`."""
    expected, named = sums_of(path), {}
    for file in weight_files(path):
        if file.name in expected and expected[file.name] != sha256(file):
            raise UserError(f"{file} is not the file that was written: its sha256 is not the one in SHA256SUMS")
        for name, tensor in tensors_in(file).items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise UserError(f"{file}: {shown(name, 60)} is no tensor ({type(tensor).__name__}): of a "
                                f"training checkpoint, the model's state_dict alone belongs here")
            name = re.sub(WRAPPERS, "", name)
            for old, new in OLD_NAMES.items():
                name = re.sub(rf"(^|\.){re.escape(old)}$", rf"\g<1>{new}", name)
            named["bert." * name.startswith(("embeddings.", "encoder.", "pooler.")) + name] = tensor
    if DECODER in named:
        named.setdefault(EMBEDDING, named[DECODER])                     # saved once, under the other name
    return named


def sums_of(path):
    """{file name: sha256} that a model directory's SHA256SUMS holds; {} where there is none."""
    file = path / "SHA256SUMS"
    text = file.read_text("utf-8", "replace") if file.is_file() else ""
    return {name: digest for digest, name in re.findall(r"^(\w{64}) [ *](.+)$", text, re.M)}


def tensors_in(file):
    with parsing(file):
        if file.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError:
                raise UserError(f"{file} needs safetensors: pip install safetensors") from None
            return load_file(file)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as z:            # torch skips the CRCs, and compresses nothing: a bomb might
                if any(part.compress_type for part in z.infolist()) or z.testzip():
                    raise zipfile.BadZipFile
        return {**torch.load(file, map_location="cpu", weights_only=True)}


class Loaded(NamedTuple):
    model: torch.nn.Module
    missing: list           # tensors that the checkpoint lacks (they keep their initialisation)
    ignored: list           # tensors that it holds and nothing here uses


def fill(model, path, optional=()):
    """Loads the directory's weights into `model`; what is missing must lie under one of the prefixes `optional`."""
    weights, own, layers = read_weights(path), model.state_dict(), model.config.num_hidden_layers
    there = [int(i) for i in re.findall(r"^bert\.encoder\.layer\.([0-9]{1,9})\.", "\n".join(weights), re.M)]
    if there and max(there) != layers - 1:
        raise UserError(f"{path}: config.json asks for {layers} layers, the weights hold {max(there) + 1}")
    for name in weights:
        unknown = name.startswith("bert.") and name not in own and name not in POOLER and not name.endswith("_ids")
        of = [part for part, pattern in PARTS.items() if re.search(pattern, name)] + ["no plain BERT"] * unknown
        if of:
            raise UserError(f"{path}: {shown(name)} belongs to {of[0]}: only the weights of a plain BERT work here")
    missing = [name for name in own if name not in weights]
    if needed := [name for name in missing if not name.startswith(optional or "-")]:
        raise UserError(f"{path}: {len(needed)} tensors are missing, {needed[0]} first; there are "
                        f"{shown(', '.join(sorted(weights.keys() - own.keys()) or weights), 120)}")
    for name in (own.keys() | {DECODER}) & weights.keys():
        tensor, shape = weights[name], own.get(name, own[EMBEDDING]).shape
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise UserError(f"{path}: {name} holds {tensor.dtype}, {tensor.layout}: quantised weights, or none: "
                            f"floats belong there")
        if tensor.shape != shape:
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}, but config.json makes it {tuple(shape)}")
        if not tensor.isfinite().all():
            raise UserError(f"{path}: {name} holds values that are not finite: the file is damaged")
    if "cls.predictions.bias" in own.keys() & weights.keys():
        tied = json_object(path / "config.json").get("tie_word_embeddings") is not False
        if not (torch.equal(weights[DECODER], weights[EMBEDDING]) if DECODER in weights else tied):
            raise UserError(f"{path}: {DECODER} is not the word embedding: an untied decoder does not work here")
    model.load_state_dict({name: weights[name] for name in own if name in weights}, strict=False)
    return Loaded(model, missing, [shown(name) for name in weights if name not in own and name != DECODER])


def load_mlm(path, vocab_size=None):
    """A BertForMaskedLM; without an LM head in the checkpoint, `missing` lists `cls.` and the head is random.

    `vocab_size`: the tokenizer's, where the checkpoint's vocabulary is padded: the surplus rows are cut."""
    loaded = fill(BertForMaskedLM(read_config(path)), path, optional=("cls.",))
    model = loaded.model
    if vocab_size is not None and vocab_size < model.config.vocab_size:
        words = model.bert.embeddings.word_embeddings
        words.num_embeddings = model.config.vocab_size = vocab_size
        for p in (words.weight, model.cls.predictions.bias):
            p.data = p.data[:vocab_size].clone()
    return loaded


def load_classifier(path, num_labels, seed, dropout=None):
    """A classifier on the directory's encoder; the head, and a pooler that was never trained, come from `seed`."""
    config = read_config(path)
    if dropout is not None:
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    torch.manual_seed(seed)
    # By the width alone: what a recipe of pretraining began with has no say in fine-tuning
    std = 0.02 if config.hidden_size >= 512 else math.sqrt(0.4 / config.hidden_size)
    model = BertForSequenceClassification(dataclasses.replace(config, initializer_range=std), num_labels)
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
    config, raw = read_config(path), json_object(path / "config.json")
    kind, problem = raw.get("architectures"), raw.get("problem_type")
    if kind != ["BertForSequenceClassification"]:
        raise UserError(f"{path} is no classifier (its config.json says {shown(kind, 60)}): fine-tune one with --save, "
                        f"and give the directory beside its trial's scores")
    if problem == "multi_label_classification":
        raise UserError(f"{path} gives an example any number of labels: only one of several, or a score, works here")
    with parsing(path / "config.json"):     # transformers leaves two classes without names of their own out
        names = {int(i): str(name) for i, name in raw.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"}).items()}
        names, columns = [names[i] for i in range(len(names))], list(map(str, raw.get("text_columns", [])))
    file = path / "tokenizer_config.json"
    with parsing(file):
        cut = int(json_object(file).get("model_max_length", 1e9)) if file.is_file() else 10 ** 9
        if cut < 8:
            raise ValueError(f"model_max_length {cut}")
    model = fill(BertForSequenceClassification(config, len(names)), path).model.eval()
    return Classifier(model, names, problem == "regression" or len(names) == 1, columns,
                      min(cut, config.max_position_embeddings))


def read_tokenizer(path):
    """The tokenizer of a model directory."""
    tokenizer, size = load_tokenizer(str(path), ""), read_config(path).vocab_size
    if size < tokenizer.get_vocab_size():
        raise UserError(f"{path}: config.json has vocab_size {size}, its tokenizer {tokenizer.get_vocab_size()} tokens")
    return tokenizer


class Form(NamedTuple):
    """How a sentence encoder makes an embedding of the last hidden state, as sentence-transformers reads it."""
    pooling: str = "mean"               # over real positions; or "cls"
    normalize: bool = False             # to length 1
    max_len: int | None = None          # ids, [CLS] and [SEP] included; None: as many as there are positions

    def __str__(self):
        return (f"{self.pooling} pooling" + ", normalised" * self.normalize
                + (f", at most {self.max_len} ids" if self.max_len else ""))


def read_form(path):
    """The Form that a model directory is written for; of one that does not say the mean.  Refuses any other."""
    def content(name):
        return json.loads((path / name).read_text(encoding="utf-8")) if (path / name).is_file() else {}
    with parsing(path):
        kinds = [m["type"].rpartition(".")[2] for m in content("modules.json")]
        pooling, prefix = content("1_Pooling/config.json"), "pooling_mode_"
        modes = pooling.get("pooling_mode") or [key for key, on in pooling.items() if key.startswith(prefix) and on]
        modes = [re.sub(f"{prefix}|_tokens?", "", mode) for mode in ([modes] if isinstance(modes, str) else modes)]
        longest = read_config(path).max_position_embeddings
        lengths = (content("sentence_bert_config.json").get("max_seq_length"),
                   content("tokenizer_config.json").get("model_max_length"), longest)
        length = int(min(longest, next(filter(None, lengths))))
    if modes not in ([], ["mean"], ["cls"]) or kinds not in ([], *(
            ["Transformer", "Pooling", "Normalize"][:n] for n in (2, 3))):
        raise UserError(f"{path} makes embeddings by {shown(', '.join(kinds), 100)}, pooling "
                        f"{shown(', '.join(modes), 60)}: only Transformer, Pooling (mean or cls), Normalize work here")
    return Form(*modes or ["mean"], "Normalize" in kinds, length)


def framed(tokenizer):
    """A copy that neither cuts nor pads: [CLS] a [SEP], or [CLS] a [SEP] b [SEP] with 1 as the type of b [SEP]."""
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


def save_run(out, state):
    """Everything a run needs to go on, in out/checkpoint.pt: tensors, then their sha256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_whole(out / "checkpoint.pt", data + hashlib.sha256(data).digest())


def load_run(out):
    """The state in `out`, or None where no checkpoint was ever written.  Damage is never a restart."""
    if not (file := out / "checkpoint.pt").exists():
        return None
    data = file.read_bytes()
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise UserError(f"{file} is damaged (its sha256 does not match): remove it to start anew")
    with parsing(file, "remove it"):            # a forged pickle with a right checksum
        return torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)


def cut_log(file, step):
    """Leaves the lines of log.jsonl up to `step`: what a killed run wrote beyond its checkpoint is done again."""
    if file.exists():
        kept = [line + b"\n" for line, said in log_records(file.read_bytes().split(b"\n")) if said["step"] <= step]
        write_whole(file, b"".join(kept))


def save_model(directory, model, tokenizer, head=True, card="", max_len=None, names=None, columns=(), form=None):
    """Writes a model directory: a BertForMaskedLM with its LM head if `head`, else as an encoder; or a classifier.

    `card`: the text of its README.md; `max_len`: ids at which its tokenizer is to cut; `names`: of a classifier's
    labels; `columns`: those that its text stood in; `form`: a Form.  Written beside its place, then moved there: at any
    moment there is a whole one, or the one before beside it (find_model reads that, the next save moves it back)."""
    directory = Path(directory)
    part, old = room(directory)
    (part / "1_Pooling").mkdir(parents=True)
    files = files_of(model, framed(tokenizer), head, max_len, names, columns, form or Form())
    files["README.md"] = card.encode()
    # First, and with every other file in it: by it, what was begun or put there is told from what was not
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    for name, data in {"SHA256SUMS": sums.encode(), **files}.items():
        write_whole(part / name, data)
    if directory.exists():
        os.replace(directory, old)
    os.replace(part, directory)
    remove(old)


def files_of(model, tokenizer, head, max_len, names, columns, form):
    """{name: bytes} of a model directory."""
    c, buffer = model.config, io.BytesIO()
    kind = type(model).__name__ if head else "BertModel"
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in
               (model if head else model.bert).state_dict().items()}
    config = dict(model_type="bert", architectures=[kind], **dataclasses.asdict(c))
    if kind == "BertModel":
        weights |= untrained_pooler(c)                  # what transformers' BertModel expects to find
    if kind == "BertForSequenceClassification":
        names = names or [f"LABEL_{i}" for i in range(model.classifier.out_features)]
        config |= dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
                       text_columns=list(columns),                   # a pipeline's sigmoid is not for scores:
                       problem_type="regression" if len(names) == 1 else "single_label_classification")
    try:
        from safetensors.torch import save
        files = {WEIGHTS[0]: save(weights, metadata={"format": "pt"})}
    except ImportError:
        torch.save(weights, buffer)
        files = {WEIGHTS[1]: buffer.getvalue()}
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    # PreTrainedTokenizerFast takes tokenizer.json as it is, token types only where model_input_names has them;
    # BertTokenizer would build its own from the vocabulary and the settings of the normaliser
    tokenizer_config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=max_len or c.max_position_embeddings, do_lower_case=normalizer.get("lowercase", False),
        strip_accents=normalizer.get("strip_accents"),
        tokenize_chinese_chars=normalizer.get("handle_chinese_chars", True),
        unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *[("2_Normalize", "Normalize")] * form.normalize]
    modules = [dict(idx=i, name=str(i), path=where, type=f"sentence_transformers.models.{what}")
               for i, (where, what) in enumerate(modules)]
    pooling = dict(word_embedding_dimension=c.hidden_size, pooling_mode_mean_tokens=form.pooling == "mean",
                   pooling_mode_cls_token=form.pooling == "cls")
    return files | {"config.json": as_json(config), "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
                    "vocab.txt": "".join(f"{token}\n" for token, _ in vocab).encode(),
                    "tokenizer_config.json": as_json(tokenizer_config), "modules.json": as_json(modules),
                    "1_Pooling/config.json": as_json(pooling)}


def beside(directory, what):
    """Where a model is while it is written (part), or while the new one takes its place (old)."""
    return directory.parent / f"{directory.name}.{what}"


def room(directory, dry_run=False):
    """Makes room for save_model, in (part, old): what a killed one has left goes, or back to its place.  Refuses,
    before anything is lost, what is no model of ours, whole or begun."""
    part, old = beside(directory, "part"), beside(directory, "old")
    for place in (directory, part, old):
        entries(place)
    if not dry_run:
        if old.exists() and not directory.exists():
            os.replace(old, directory)
        remove(part)
        remove(old)
    return part, old


def entries(directory):
    """What save_model has written there, SHA256SUMS last; what it has not is refused."""
    sums, paths = sums_of(directory), sorted(directory.rglob("*"), reverse=True)       # a folder after what is in it

    def ours(path):
        name = path.relative_to(directory).as_posix()
        whole = re.sub(r"\.\d+\.part$", "", name)                      # of a save that was killed
        return whole in ("SHA256SUMS", "1_Pooling") or whole in sums and (whole != name or sums[name] == sha256(path))
    foreign = [directory] if directory.is_symlink() or directory.is_file() else [p for p in paths if not ours(p)]
    if foreign:
        raise UserError(f"{shown(foreign[0])} is not ours, and {directory} is where a model is to be saved: "
                        f"nothing was touched; move it away, or give another --out")
    return sorted(paths, key=lambda path: path.name == "SHA256SUMS")


def remove(directory):
    """Unlinks a model of ours."""
    for path in (*entries(directory), *[directory] * directory.exists()):
        path.rmdir() if path.is_dir() else path.unlink()


def untrained_pooler(config):
    """The pooler that an encoder is saved with: pretraining has none.  Always the same, so it can be told apart."""
    D, generator = config.hidden_size, torch.Generator().manual_seed(0)
    return {"pooler.dense.weight": torch.randn(D, D, generator=generator) * config.initializer_range,
            "pooler.dense.bias": torch.zeros(D)}
