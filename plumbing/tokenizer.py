"""BERT's WordPiece tokenizer: trained, or read from a file, a directory or the Hub.  All of
it is tokenizers' own."""
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data import SPECIAL
from plumbing.cli import UserError, shown

ALPHABET = 1000             # characters a trained vocabulary knows, the most frequent ones


def wordpiece(vocab, lowercase=True):
    """BERT's tokenizer, as Hugging Face's tokenizers builds it, for a token -> id map."""
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
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

    tokenizers breaks ties between merges by ids that follow a hash map's order, so two runs differ in ids
    and, where there are ties, in tokens too.  Naming every character and its `##` form in
    advance fixes those ids."""
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


def load_tokenizer(name):
    """A tokenizer from vocab.txt, tokenizer.json, a directory that holds one of them, or a Hub id.

    Casing is what tokenizer_config.json beside it says; else what tokenizer.json says; a vocab.txt alone is
    cased if it has tokens with capitals."""
    names, settings = ("tokenizer.json", "vocab.txt"), {}
    path = Path(name)
    try:
        if path.is_dir():
            path = next((path / f for f in names if (path / f).is_file()), path)
        if path.is_dir():
            raise UserError(f"--vocab {name}: neither tokenizer.json nor vocab.txt is in this directory")
        config = path.parent / "tokenizer_config.json"
        if not path.is_file():
            path, config = hub_tokenizer(name)
        if config and config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
        tokenizer = Tokenizer.from_file(str(path)) if path.suffix == ".json" else from_vocab(name, path)
        if isinstance(normalizer := tokenizer.normalizer, normalizers.BertNormalizer):
            for theirs, ours in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                                 ("tokenize_chinese_chars", "handle_chinese_chars")):
                if theirs in settings:
                    setattr(normalizer, ours, settings[theirs])
            tokenizer.normalizer = normalizer
    except UserError:
        raise
    except Exception as e:      # tokenizers raises a bare Exception for whatever it does not like
        raise UserError(f"--vocab {name}: cannot be read ({getattr(e, 'strerror', None) or shown(e)}): "
                        f"give a vocab.txt or a tokenizer.json that can") from None
    vocab = tokenizer.get_vocab()
    check_special(name, vocab)
    if max(vocab.values()) >= len(vocab):
        raise UserError(f"--vocab {name}: {len(vocab):,} tokens with ids up to {max(vocab.values()):,}: a "
                        f"token is there twice, or one is missing")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def from_vocab(name, path):
    """The tokenizer of a vocab.txt."""
    with open(path, encoding="utf-8") as f:             # not splitlines(): U+2028 may be a token
        tokens = [line.rstrip("\n") for line in f]
    check_special(name, set(tokens))
    cased = any(token != token.lower() for token in tokens if token not in SPECIAL)
    return wordpiece({token: i for i, token in enumerate(tokens)}, lowercase=not cased)


def hub_tokenizer(name):
    """(tokenizer.json or vocab.txt, tokenizer_config.json or None) of a model on the Hub,
    as files on this disk."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith((".txt", ".json")):
        raise UserError(f"--vocab {name}: neither on this disk nor a name on the Hub: give a vocab.txt, a "
                        f"tokenizer.json, a directory that holds one, or a Hub id")
    import huggingface_hub as hub  # comes with tokenizers
    import huggingface_hub.errors  # which it does not import by itself
    found = []
    for names in (("tokenizer.json", "vocab.txt"), ("tokenizer_config.json",)):
        for f in names:
            try:
                found.append(Path(hub.hf_hub_download(name, f)))
                break
            except hub.errors.EntryNotFoundError:
                continue
            except Exception as e:      # of many kinds: no network, no such model, not allowed
                raise UserError(f"--vocab {name}: neither a vocabulary on this disk nor one that the Hub or "
                                f"its cache gives ({shown(e)})") from None
        else:
            found.append(None)
    if not found[0]:
        raise UserError(f"--vocab {name}: neither tokenizer.json nor vocab.txt is to be had "
                        f"from the Hub or its cache")
    return found


def check_special(name, vocab):
    missing = [token for token in SPECIAL if token not in vocab]
    if missing:
        raise UserError(f"--vocab {name}: a BERT vocabulary has {' '.join(missing)}, this one does not")


def fingerprint(tokenizer):
    """What two tokenizers must share to share a corpus: the id map and the normaliser."""
    parts = json.loads(tokenizer.to_str())
    text = json.dumps([sorted(tokenizer.get_vocab().items()), parts["normalizer"], parts["pre_tokenizer"]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
