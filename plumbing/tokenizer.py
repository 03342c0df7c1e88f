"""BERT's WordPiece tokenizer: trained, or read from a file, a directory or the Hub.  All of it is tokenizers' own."""
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from plumbing.cli import UserError, shown
from plumbing.files import json_object, parsing

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = 1000             # characters a trained vocabulary knows, the most frequent ones
VOCABULARIES = ("tokenizer.json", "vocab.txt")
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json")
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")              # these take tokenizer.json as it is
CLASSES = (None, "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast", *GENERIC)
KINDS = ("BertNormalizer BertPreTokenizer Sequence Lowercase NFC NFD NFKC NFKD Strip StripAccents Whitespace "
         "WhitespaceSplit Punctuation Digits").split()                  # a Replace or Split of another's need not end


def wordpiece(vocab, lowercase=True, added=(), **normalizer):
    """BERT's tokenizer, as Hugging Face's tokenizers builds it, for a token -> id map."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, **normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    if vocab:
        tokenizer.add_tokens(list(added))                               # which may say more of a special token
        tokenizer.add_special_tokens([t for t in SPECIAL if t not in (a.content for a in added)])
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
    of transformers' BertTokenizer.  What the files beside it say, casing too, is honoured or refused by name.  Where
    they say nothing, a vocab.txt lower-cases, unless one in twenty of its words has capitals."""
    path, where = Path(name), f"{flag}{name}"
    if not path.is_file():                                              # a FIFO is not waited for
        top = path if path.is_dir() else hub_files(name)
        path = next((top / f for f in VOCABULARIES if (top / f).is_file()), None)
        if not path:
            raise UserError(f"{where}: neither tokenizer.json nor vocab.txt is in {top}")
    settings, special, legacy, model = (json_object(f) if f.is_file() else {} for f in map(path.with_name, BESIDE))
    if not settings.get("extra_special_tokens"):                        # its older name
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None)

    def only(what, found, allowed):
        if found not in allowed:
            raise UserError(f"{where}: {what} is {shown(found, 60)}: "
                            f"only {', '.join(str(a or 'none') for a in allowed)} works here")
    with parsing(where, "give a vocab.txt or a tokenizer.json that can be read"):
        only("tokenizer_class", kind := settings.get("tokenizer_class") or model.get("tokenizer_class"), CLASSES)
        only("auto_map", settings.get("auto_map"), [None])
        if "added_tokens_decoder" in settings:                          # it says what the two older files said
            legacy = {}
        else:
            settings = settings | special
        added, ids = added_tokens(settings, legacy)
        for key, token in zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True):
            only(key, content(settings.get(key)), [None, token])
        change = {ours: settings[theirs] for theirs, ours in (
            ("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
            ("tokenize_chinese_chars", "handle_chinese_chars")) if theirs in settings}
        if path.suffix == ".json":
            raw = json_object(path)
            if kind not in GENERIC and (raw.get("normalizer") or {}).get("type") == "BertNormalizer":
                raw["normalizer"] |= change
            tokenizer = Tokenizer.from_str(json.dumps(raw))
            there = {token.content for token in tokenizer.get_added_tokens_decoder().values()} - ids.keys()
            tokenizer.add_tokens([token for token in added if token.content not in there])
        else:
            tokenizer = from_vocab(where, path, added, change)
        vocab, parts = tokenizer.get_vocab(), json.loads(tokenizer.to_str())
        only("model", parts["model"].get("type"), ["WordPiece"])
        only("unk_token", parts["model"]["unk_token"], ["[UNK]"])
        for part in ("normalizer", "pre_tokenizer"):
            for found in re.findall(r'"type": "(\w+)"', json.dumps(parts[part])):
                only(part, found, KINDS)
        if wrong := [token for token in ids if vocab.get(token) != ids[token]]:
            raise UserError(f"{where}: {shown(repr(wrong[0]), 60)} has the id {vocab.get(wrong[0])} in it, and "
                            f"{shown(ids[wrong[0]], 60)} in the list of added tokens")
        check_special(where, vocab)
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise UserError(f"{where}: {len(vocab):,} tokens with ids up to {max(vocab.values()):,}: a "
                            f"token is there twice, or one is missing")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def content(token):
    """The text of a token, which stands alone or with its flags."""
    return token["content"] if isinstance(token, dict) else token


def added_tokens(settings, legacy):
    """([AddedToken], in the order in which transformers adds them; {text: id} of those whose id is said)."""
    extra = settings.get("extra_special_tokens") or []
    special = [settings[k] for k in sorted(settings) if k.endswith("_token") and isinstance(settings[k], str | dict)]
    special += extra.values() if isinstance(extra, dict) else extra
    names = [content(token) for token in special]
    special += settings.get("additional_special_tokens") or []          # special_tokens_map.json's
    special = [{**t} if isinstance(t, dict) else dict(content=t, special=True) for t in special]
    known = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    known |= {i: dict(content=text, normalized=text not in names) for text, i in legacy.items()}
    ids = {token["content"]: i for i, token in known.items()}
    tokens = [known[i] for i in sorted(known)] + [token for token in special if token["content"] not in ids]
    for token in tokens:
        token.pop("__type", None)
        token["special"] = token.get("special", False) or token["content"] in names
    return [AddedToken(**token) for token in tokens], ids


def from_vocab(where, path, added, normalizer):
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
    return wordpiece(vocab, added=added, **dict(lowercase=lower) | normalizer)


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
    if len(vocab) == len(SPECIAL):
        raise UserError(f"{where}: a vocabulary without words: {' '.join(SPECIAL)} and nothing else")


def fingerprint(tokenizer):
    """What two tokenizers must share to share a corpus: the id map and the normaliser."""
    parts = json.loads(tokenizer.to_str())
    text = json.dumps([sorted(tokenizer.get_vocab().items()), parts["normalizer"], parts["pre_tokenizer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
