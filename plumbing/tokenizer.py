"""BERT's WordPiece tokenizer: trained, or read from a file, a directory or the Hub.  All of it is tokenizers' own."""
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from plumbing.cli import UserError, shown
from plumbing.files import json_object, parsing

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000             # characters a trained vocabulary knows, the most frequent ones
VOCABULARIES = ("tokenizer.json", "vocab.txt")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")              # these take tokenizer.json as it is
CLASSES = (None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast", *GENERIC)


def wordpiece(vocab, lowercase=True, **normalizer):
    """BERT's tokenizer, as Hugging Face's tokenizers builds it, for a token -> id map."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if vocab:
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])])
    return tokenizer


def train_vocabulary(texts, size):
    """A WordPiece vocabulary, the same on each run: special tokens, then the rest in sorted order.

    tokenizers breaks ties between merges by ids that follow a hash map's order, so two runs differ in ids and, where
    there are ties, in tokens too.  Naming every character and its `##` form in advance fixes those ids."""
    learner = wordpiece({})
    count = Counter()
    for text in texts:
        count.update(learner.normalizer.normalize_str(text))
    alphabet = sorted(sorted((c for c in count if not c.isspace()), key=lambda c: (-count[c], c))[:ALPHABET])
    forms = []
    for vocab_size in (1, size):                   # a first pass without merges, to find the forms that occur
        learner.train_from_iterator(texts, trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *forms], show_progress=False,
            initial_alphabet=alphabet, limit_alphabet=len(alphabet)))
        forms = sorted(token for token in learner.get_vocab() if token.startswith("##"))
    tokens = [*SPECIAL, *sorted(set(learner.get_vocab()) - set(SPECIAL))]
    if len(tokens) > size:
        raise UserError(f"--vocab-size {size}: the text's characters alone take {len(tokens)} entries")
    return wordpiece({token: i for i, token in enumerate(tokens)})


def load_tokenizer(name, flag="--vocab "):
    """A tokenizer from vocab.txt, tokenizer.json, a directory that holds one of them, or a Hub id, which gives the ids
    of transformers' BertTokenizer.  What the files beside it say is honoured or refused by name.  Casing is what
    tokenizer_config.json says; else what tokenizer.json says; a vocab.txt alone lower-cases, unless one in twenty of
    its words has capitals."""
    path, where = Path(name), f"{flag}{name}"
    if not path.is_file():                                              # a FIFO is not waited for
        top = path if path.is_dir() else hub_files(name)
        path = next((top / f for f in VOCABULARIES if (top / f).is_file()), None)
        if not path:
            raise UserError(f"{where}: neither tokenizer.json nor vocab.txt is in {top}")
    settings, special, legacy, model = (json_object(f) if f.is_file() else {} for f in map(path.with_name, BESIDE))

    def only(what, found, allowed):
        if found not in allowed:
            raise UserError(f"{where}: {what} is {shown(found, 60)}: "
                            f"only {', '.join(str(a or 'none') for a in allowed)} works here")
    with parsing(where, "give a vocab.txt or a tokenizer.json that can be read"):
        only("tokenizer_class", kind := settings.get("tokenizer_class") or model.get("tokenizer_class"), CLASSES)
        only("auto_map", settings.get("auto_map"), [None])
        if "added_tokens_decoder" not in settings:                      # else it says what the two older files said
            settings = settings | special | dict(added_tokens_decoder=legacy and dict(enumerate(legacy)))
        change = {ours: settings[theirs] for theirs, ours in (
            ("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
            ("tokenize_chinese_chars", "handle_chinese_chars")) if theirs in settings}
        if path.suffix == ".json":
            raw = json_object(path)
            if kind not in GENERIC and (raw.get("normalizer") or {}).get("type") == "BertNormalizer":
                raw["normalizer"] |= change
            tokenizer = Tokenizer.from_str(json.dumps(raw))
        else:
            tokenizer = from_vocab(where, path, change)
        vocab, parts = tokenizer.get_vocab(), json.loads(tokenizer.to_str())
        only("model", parts["model"].get("type"), ["WordPiece"])
        only("unk_token", parts["model"]["unk_token"], ["[UNK]"])
        there = {*SPECIAL, *(token.content for token in tokenizer.get_added_tokens_decoder().values())}
        if more := [token for token in tokens_in(settings) if token not in there]:
            raise UserError(f"{where}: a file beside it adds the token {shown(repr(more[0]), 60)}: save_pretrained of "
                            f"transformers' AutoTokenizer writes a tokenizer.json that holds all")
        check_special(where, vocab)
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError(f"{where}: {len(vocab):,} tokens with ids up to {max(vocab.values()):,}: a "
                            f"token is there twice, or one is missing")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokens_in(settings):
    """The tokens that the settings of a tokenizer name, each a text or a dict."""
    found = [value for key, value in settings.items() if key.endswith("_token") and isinstance(value, str | dict)]
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"):
        value = settings.get(key) or []
        found += value.values() if isinstance(value, dict) else value
    return [token["content"] if isinstance(token, dict) else token for token in found]


def from_vocab(where, path, normalizer):
    """The tokenizer of a vocab.txt."""
    with open(path, encoding="utf-8", newline="\n") as f:
        lines = f.read().rstrip("\r\n").split("\n")                    # not splitlines(): U+2028 may be a token
    tokens, vocab = [line.rstrip() or line.rstrip("\r") for line in lines], {}
    check_special(where, set(tokens))
    for i, token in enumerate(tokens):
        if vocab.setdefault(token, i) != i:
            raise UserError(f"{where}: lines {vocab[token] + 1:,} and {i + 1:,} are both "
                            f"{shown(repr(token), 60) if token else 'blank lines'}: each token stands there once")
    words = [token for token in tokens if not re.fullmatch(r"\[.*\]|<.*>", token)]
    lower = sum(token != token.lower() for token in words) < 0.05 * len(words)
    return wordpiece(vocab, **dict(lowercase=lower) | normalizer)


def hub_files(name):
    """The directory of a model's vocabulary from the Hub, or from its cache."""
    import huggingface_hub as hub  # comes with tokenizers
    try:
        return Path(hub.snapshot_download(name, allow_patterns=[*VOCABULARIES, *BESIDE]))
    except Exception as e:      # of many kinds: no network, no such model, not allowed
        raise UserError(f"--vocab {name}: neither on this disk nor given by the Hub or its cache ({shown(e)}): give a "
                        f"vocab.txt, a tokenizer.json, a directory that holds one, or a Hub id") from None


def check_special(where, vocab):
    missing = [token for token in SPECIAL if token not in vocab]
    if missing:
        raise UserError(f"{where}: a BERT vocabulary has {' '.join(missing)}, this one does not")


def fingerprint(tokenizer):
    """What two tokenizers must share to share a corpus: the id map and the normaliser."""
    parts = json.loads(tokenizer.to_str())
    text = json.dumps([sorted(tokenizer.get_vocab().items()), parts["normalizer"], parts["pre_tokenizer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
