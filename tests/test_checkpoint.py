"""Model directories: transformers' are read, ours open in transformers, broken ones are refused."""
import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import normalizers

import train
from conftest import text
from model import BertConfig, BertForMaskedLM, BertForSequenceClassification
from plumbing import checkpoint
from plumbing.checkpoint import DECODER, EMBEDDING
from plumbing.cli import UserError
from plumbing.tokenizer import SPECIAL, wordpiece
from plumbing.tokens import TokenDirectory
from step import make_arm

QUIET = dict(say=lambda line: None)
SHAPES = [  # layers, width, heads, activation, how it is stored
    (2, 32, 2, "gelu", "safetensors"), (1, 64, 4, "gelu_new", "bin"), (3, 48, 3, "relu", "sharded"),
    (4, 32, 8, "gelu", "sharded bin"), (2, 96, 1, "gelu", "fp16"), (1, 48, 12, "gelu_new", "bf16")]


def theirs(layers=2, width=32, heads=2, act="gelu", kind="BertForMaskedLM", vocab=120):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
                                     num_attention_heads=heads, intermediate_size=4 * width, hidden_act=act)
    model = getattr(transformers, kind)(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


def store(model, path, how):
    """Writes a transformers model the ways that checkpoints are found in the wild."""
    model.save_pretrained(path, max_shard_size="20KB" if how.startswith("sharded") else "1GB")
    if "bin" in how:
        from safetensors.torch import load_file
        for file in list(path.glob("*.safetensors")):
            torch.save(load_file(file), file.with_name(file.name.replace("model", "pytorch_model", 1)
                                                       .replace("safetensors", "bin")))
            file.unlink()
        for index in path.glob("*.index.json"):
            raw = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
            index.with_name("pytorch_model.bin.index.json").write_text(raw)
            index.unlink()


def inputs(vocab=120, B=3, S=10):
    torch.manual_seed(1)
    return (torch.randint(0, vocab, (B, S)), torch.arange(S) < torch.tensor([S, 6, 2])[:, None],
            torch.randint(0, 2, (B, S)))


def compare_mlm(ours, reference):
    ids, real, types = inputs()
    with torch.no_grad():
        a = ours.eval()(ids, None, real, types, want=("hidden", "logits"))
        b = reference(ids, real.long(), types, output_hidden_states=True)
    assert (a["hidden"] - b.hidden_states[-1])[real].abs().max() < 1e-5
    assert (a["logits"] - b.logits)[real].abs().max() < 1e-4


@pytest.mark.parametrize("layers, width, heads, act, how", SHAPES)
def test_their_save_is_our_load(tmp_path, layers, width, heads, act, how):
    reference = theirs(layers, width, heads, act)
    if how in ("fp16", "bf16"):
        reference = reference.to(dict(fp16=torch.float16, bf16=torch.bfloat16)[how])
    store(reference, tmp_path, how)
    assert (len(checkpoint.weight_files(tmp_path)) > 1) == how.startswith("sharded")
    ours, missing, ignored = checkpoint.load_mlm(tmp_path)
    assert not missing and not ignored
    compare_mlm(ours, reference.float())


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("layers, width, heads, act", [s[:4] for s in SHAPES])
def test_our_save_is_their_load(corpus, tmp_path, monkeypatch, layers, width, heads, act, safetensors):
    transformers = pytest.importorskip("transformers")
    if not safetensors:
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    tokenizer = TokenDirectory(corpus).read_tokenizer()
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig.of_size(f"{layers}L{width}", heads, vocab_size=300, hidden_act=act))
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.1)
    checkpoint.save_model(tmp_path / "m", ours, tokenizer)
    assert (tmp_path / "m/model.safetensors").exists() == safetensors
    compare_mlm(ours, opened(transformers.AutoModelForMaskedLM, tmp_path / "m"))
    compare_mlm(checkpoint.load_mlm(tmp_path / "m").model, ours_as_reference(ours))
    checkpoint.save_model(tmp_path / "e", ours, tokenizer, head=False)
    encoder = opened(transformers.AutoModel, tmp_path / "e")
    ids, real, types = inputs()
    with torch.no_grad():
        hidden = encoder(ids, real.long(), types).last_hidden_state
        assert (ours.eval()(ids, None, real, types, want=("hidden",))["hidden"] - hidden)[real].abs().max() < 1e-5


def ours_as_reference(ours):
    class Out:
        pass

    def run(ids, real, types, output_hidden_states):
        out, found = Out(), ours.eval()(ids, None, real.bool(), types, want=("hidden", "logits"))
        out.hidden_states, out.logits = [found["hidden"]], found["logits"]
        return out
    return run


def opened(auto, path):
    """auto.from_pretrained(path), with nothing missing, unexpected, mismatched or warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = auto.from_pretrained(path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_a_trained_student_opens_with_its_own_class_and_the_same_tokenizer(tiny, corpus, tmp_path):
    transformers = pytest.importorskip("transformers")
    for strategy, auto in (("vanilla_kd", "AutoModelForMaskedLM"), ("minilm", "AutoModel")):
        train.train(tiny(strategy=strategy, budget_steps=2, out=str(tmp_path / strategy)), **QUIET)
        path = tmp_path / strategy / "model"
        opened(getattr(transformers, auto), path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        ours = TokenDirectory(corpus).read_tokenizer()
        for document in text(20, seed=9):
            assert tokenizer(document)["input_ids"] == ours.encode(document).ids
        assert tokenizer.mask_token == "[MASK]" and tokenizer.model_max_length == 512
        card = (path / "README.md").read_text()
        assert strategy in card and "--budget-steps 2" in card and "512 tokens" in card


def sentence_encoder(path, corpus, head):
    """Saves a model; ([the last hidden state of each of 40 sentences, by itself], the sentences)."""
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig.of_size("2L32", 2, vocab_size=300)).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, std=0.2)
    tokenizer, sentences = TokenDirectory(corpus).read_tokenizer(), " ".join(text(20, seed=9)).split(".")[:40]
    checkpoint.save_model(path, ours, tokenizer, head)
    with torch.no_grad():
        ids = [torch.tensor([tokenizer.encode(s).ids]) for s in sentences]
        return [ours(x, want=("hidden",))["hidden"][0] for x in ids], sentences


@pytest.mark.parametrize("head", [False, True])
def test_an_encoder_gives_the_same_hidden_states_in_transformers(corpus, tmp_path, head):
    transformers = pytest.importorskip("transformers")
    ours, sentences = sentence_encoder(tmp_path / "m", corpus, head)
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")(sentences, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
    with torch.no_grad():
        theirs = transformers.AutoModel.from_pretrained(tmp_path / "m").eval()(**batch).last_hidden_state
    assert all((a - b[:len(a)]).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("head", [False, True])
def test_an_encoder_gives_the_same_means_in_sentence_transformers(corpus, tmp_path, head):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    ours, sentences = sentence_encoder(tmp_path / "m", corpus, head)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "m"), device="cpu").encode(sentences)
    difference = max((a.mean(0) - torch.from_numpy(b)).abs().max() for a, b in zip(ours, theirs, strict=True))
    print(f"largest difference {difference:.1e} of values up to {abs(theirs).max():.2f}")
    assert difference < 1e-4


@pytest.mark.parametrize("settings", [
    dict(lowercase=True), dict(lowercase=False), dict(lowercase=True, strip_accents=False),
    dict(lowercase=False, strip_accents=True), dict(lowercase=True, handle_chinese_chars=False)])
def test_casing_and_accents_are_the_same_in_transformers(corpus, tmp_path, settings):
    """With AutoTokenizer, which takes tokenizer.json, and with BertTokenizer, which goes by tokenizer_config.json."""
    transformers = pytest.importorskip("transformers")
    vocab = {token: i for i, token in enumerate([*SPECIAL, *"aehoué東京中", *(f"##{c}" for c in "aehoué東京中ABH")])}
    tokenizer = wordpiece(vocab | {"H": len(vocab), "É": len(vocab) + 1})
    tokenizer.normalizer = normalizers.BertNormalizer(**settings)
    tokenizer.enable_truncation(4)                      # as sentence encoders are published
    ours = BertForMaskedLM(BertConfig.of_size("1L32", 2, vocab_size=len(vocab) + 2))
    checkpoint.save_model(tmp_path / "m", ours, tokenizer)
    tokenizer.no_truncation()
    sentences = ["Hé hé he HA", "東京中 東hé", "É e é E", "a [MASK] h"]
    for kind in (transformers.AutoTokenizer, transformers.BertTokenizer):
        theirs = kind.from_pretrained(tmp_path / "m")(sentences)
        assert theirs["input_ids"] == [tokenizer.encode(s).ids for s in sentences], kind
    again = checkpoint.read_tokenizer(tmp_path / "m")
    assert [again.encode(s).ids for s in sentences] == theirs["input_ids"]


def test_the_casing_of_tokenizer_config_is_that_of_the_model(teacher, tmp_path):
    """Where it differs from tokenizer.json, as in some cased models on the Hub, it is what transformers goes by."""
    shutil.copytree(teacher, tmp_path / "m")
    settings = dict(tokenizer_class="BertTokenizer", do_lower_case=False)
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    assert checkpoint.read_tokenizer(tmp_path / "m").normalizer.normalize_str("Ab") == "Ab"
    assert checkpoint.read_tokenizer(teacher).normalizer.normalize_str("Ab") == "ab"


def test_a_fine_tuned_classifier_opens_as_one(corpus, teacher, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = checkpoint.load_classifier(teacher, 3, seed=0)
    checkpoint.save_model(tmp_path / "c", model, checkpoint.read_tokenizer(teacher))
    reference = opened(transformers.AutoModelForSequenceClassification, tmp_path / "c")
    ids, real, types = inputs()
    with torch.no_grad():
        assert (model.eval()(ids, real, types) - reference(ids, real.long(), types).logits).abs().max() < 1e-5
    again = checkpoint.load_classifier(tmp_path / "c", 3, seed=1)
    assert torch.equal(again.bert.pooler["dense"].weight, model.bert.pooler["dense"].weight)


def test_an_untrained_pooler_is_drawn_by_the_seed_and_a_trained_one_is_kept(corpus, tmp_path):
    ours = BertForMaskedLM(BertConfig.of_size("1L32", 2, vocab_size=300))
    checkpoint.save_model(tmp_path / "e", ours, TokenDirectory(corpus).read_tokenizer(), head=False)
    checkpoint.save_model(tmp_path / "m", ours, TokenDirectory(corpus).read_tokenizer())
    pooler = [checkpoint.load_classifier(tmp_path / d, 2, seed).bert.pooler["dense"].weight
              for d, seed in (("e", 0), ("e", 1), ("m", 0))]
    assert not torch.equal(pooler[0], pooler[1]) and torch.equal(pooler[0], pooler[2])


def test_a_recipe_of_pretraining_has_no_say_in_the_head_of_fine_tuning(corpus, tmp_path):
    """An encoder that began with a larger spread gets the same head and pooler."""
    for name, std in (("a", 0.02), ("b", 0.06)):
        ours = BertForMaskedLM(BertConfig.of_size("1L32", 2, vocab_size=300, initializer_range=std))
        checkpoint.save_model(tmp_path / name, ours, TokenDirectory(corpus).read_tokenizer())
    a, b = (checkpoint.load_classifier(tmp_path / name, 2, 0) for name in "ab")
    assert torch.equal(a.classifier.weight, b.classifier.weight)
    assert torch.equal(a.bert.pooler["dense"].weight, b.bert.pooler["dense"].weight)


@pytest.mark.parametrize("change", ["no prefix", "old names", "pooler and nsp", "position ids", "stored decoder"])
def test_the_names_that_checkpoints_go_by(tmp_path, change):
    reference = theirs()
    store(reference, tmp_path, "bin")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    expected_missing, expected_ignored = False, set()
    if change == "no prefix":
        weights = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
        expected_missing = True
    if change == "old names":
        weights = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
                   for k, v in weights.items()}
    if change == "pooler and nsp":
        weights |= {"bert.pooler.dense.weight": torch.zeros(32, 32), "cls.seq_relationship.bias": torch.zeros(2)}
        expected_ignored = {"bert.pooler.dense.weight", "cls.seq_relationship.bias"}
    if change == "position ids":
        weights["bert.embeddings.position_ids"] = torch.arange(512)[None]
        expected_ignored = {"bert.embeddings.position_ids"}
    if change == "stored decoder":
        weights |= {"cls.predictions.decoder.weight": weights["bert.embeddings.word_embeddings.weight"],
                    "cls.predictions.decoder.bias": weights.pop("cls.predictions.bias")}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ours, missing, ignored = checkpoint.load_mlm(tmp_path)
    assert set(ignored) == expected_ignored and all(name.startswith("cls.") for name in missing)
    assert bool(missing) == expected_missing
    if not missing:
        compare_mlm(ours, reference)


def renamed(change):
    return lambda weights: {change(name): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("change", [
    *(renamed(lambda name, p=p: p + name) for p in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "bert.")),
    renamed(lambda name: "module." + name.removeprefix("bert.")),
    renamed(lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")),
    lambda w: {DECODER if name == EMBEDDING else name: tensor for name, tensor in w.items()},
    lambda w: w | {DECODER: w[EMBEDDING].clone(), "module." + DECODER: w[EMBEDDING].clone()},
    lambda w: {name: tensor.double() for name, tensor in w.items()}])
def test_other_names_of_the_same_weights_are_read(tmp_path, change):
    from safetensors.torch import load_file, save_file
    reference = theirs()
    store(reference, tmp_path, "safetensors")
    file = tmp_path / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    ours, missing, ignored = checkpoint.load_mlm(tmp_path)
    assert not missing and not ignored
    compare_mlm(ours, reference)


@pytest.mark.parametrize("changes", [
    dict(pad_token_id=None), dict(model_type=None), dict(pruned_heads={}), dict(chunk_size_feed_forward=5),
    dict(embedding_size=32), dict(is_decoder=False, quantization_config=None, position_embedding_type="absolute"),
    dict(use_cache=False, classifier_dropout=0.3, id2label={"0": "a"}, torch_dtype="float16", cell={}, pre_trained="")])
def test_what_changes_no_computation_is_read(tmp_path, changes):
    """pad_token_id null: transformers' own model then starts without a row for padding, and takes this one."""
    reference = theirs()
    store(reference, tmp_path, "safetensors")
    edit(tmp_path, **changes)
    ours = checkpoint.load_mlm(tmp_path).model
    compare_mlm(ours, reference)
    if changes.get("model_type", "bert"):
        compare_mlm(ours, pytest.importorskip("transformers").AutoModelForMaskedLM.from_pretrained(
            tmp_path, dtype=torch.float32).eval())
    checkpoint.save_model(tmp_path / "again", ours, wordpiece({t: i for i, t in enumerate([*SPECIAL, "a"])}))
    compare_mlm(checkpoint.load_mlm(tmp_path / "again").model, reference)


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize("change, message", [
    (renamed(lambda name: name.replace("bert.", "distilbert.")), "are missing, bert.*; there are distilbert.emb"),
    (renamed(lambda name: name.replace("query.", "query.base_layer.")), "query.base_layer.bias belongs to an adapter"),
    (lambda w: w | {QUERY.replace("weight", "lora_A.weight"): torch.zeros(2, 32)}, "lora_A.weight belongs to an ad"),
    (lambda w: w | {QUERY.replace("weight", "SCB"): torch.zeros(32)}, "query.SCB belongs to quantised weights"),
    (lambda w: w | {QUERY + ".absmax": torch.zeros(32)}, "absmax belongs to quantised weights"),
    (lambda w: w | {QUERY: w[QUERY].to(torch.int8)}, "query.weight holds torch.int8.*floats belong there"),
    (lambda w: w | {QUERY: w[QUERY].to(torch.uint8)}, "query.weight holds torch.uint8"),
    (lambda w: w | {QUERY: w[QUERY].to(torch.float8_e4m3fn)}, "query.weight holds torch.float8"),
    (lambda w: w | {QUERY: w[QUERY].to_sparse()}, "query.weight holds torch.float32, torch.sparse_coo"),
    (lambda w: w | {QUERY: w[QUERY].to("meta")}, "query.weight holds torch.float32"),
    (lambda w: w | {QUERY.replace("self.query", "self.distance_embedding"): w[QUERY]}, "belongs to relative positions"),
    (lambda w: w | {"bert.encoder.layer.0.crossattention.self.key.weight": w[QUERY]}, "a decoder's cross-attention"),
    (lambda w: w | {"bert.embeddings_project.weight": w[QUERY]}, "project.weight belongs to no plain BERT"),
    (lambda w: w | {"bert.\x1b[31m\nx": w[QUERY]}, r"bert.\\x1b\[31m belongs to no plain BERT"),
    (lambda w: {"state_dict": w, "epoch": 3}, "state_dict is no tensor .dict.: of a training checkpoint"),
    (lambda w: [*w.values()], "is damaged or not ours .TypeError"), (lambda w: w | {3: w[QUERY]}, "3 is no tensor"),
    (lambda w: w | {EMBEDDING: torch.zeros(1, 1).expand(10 ** 6, 10 ** 6)}, "is .1000000, 1000000., but config.json"),
    (lambda w: w | {EMBEDDING: w[EMBEDDING] * float("inf")}, "not finite")])
def test_weights_of_another_kind_are_named(tmp_path, change, message):
    store(theirs(), tmp_path, "bin")
    file = tmp_path / "pytorch_model.bin"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(UserError, match=message) as e:
        checkpoint.load_mlm(tmp_path)
    assert str(e.value).isprintable() and "layers" not in str(e.value)


def test_a_compressed_archive_and_a_record_that_is_cut_are_refused(tmp_path):
    """torch compresses nothing, so what is compressed may be a bomb; a tensor may claim more than its record holds."""
    store(theirs(), tmp_path, "bin")
    file = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(file) as z:
        parts = {part.filename: z.read(part) for part in z.infolist()}
    for how, cut in ((zipfile.ZIP_DEFLATED, 10 ** 6), (zipfile.ZIP_STORED, 8)):
        with zipfile.ZipFile(file, "w", how) as z:
            for name, data in parts.items():
                z.writestr(name, data[:cut] if name.endswith("/0") else data)
            z.writestr("archive/more", bytes(10 ** 6))
        with pytest.raises(UserError, match="is damaged or not ours"):
            checkpoint.load_mlm(tmp_path)


def test_an_adapter_without_its_base_model_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    for _ in range(2):                                  # alone, and beside the base model's config.json
        with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\): merge it into its base model"):
            checkpoint.find_model(str(tmp_path))
        (tmp_path / "config.json").write_text("{}")


def test_an_untied_decoder_matters_to_a_head_alone(tmp_path):
    store(theirs(), tmp_path, "bin")
    file = tmp_path / "pytorch_model.bin"
    torch.save(torch.load(file, weights_only=True) | {DECODER: torch.zeros(120, 32)}, file)
    checkpoint.load_classifier(tmp_path, 2, seed=0)
    with pytest.raises(UserError, match="untied decoder"):
        checkpoint.load_mlm(tmp_path)
    store(theirs(), tmp_path, "bin")
    edit(tmp_path, tie_word_embeddings=False)                           # transformers' decoder would be a random one
    with pytest.raises(UserError, match="untied decoder"):
        checkpoint.load_mlm(tmp_path)


def test_a_padded_vocabulary_is_cut(tmp_path, corpus, tiny, teacher):
    padded = tmp_path / "padded"
    shutil.copytree(teacher, padded)
    model = checkpoint.load_mlm(teacher).model
    words = model.bert.embeddings.word_embeddings
    words.weight = torch.nn.Parameter(torch.cat([words.weight.detach(), torch.randn(20, 48)]))
    model.cls.predictions.bias = torch.nn.Parameter(torch.cat([model.cls.predictions.bias.detach(), torch.ones(20)]))
    model.config.vocab_size = 320
    checkpoint.save_model(padded, model, checkpoint.read_tokenizer(teacher))
    results = [train.train(tiny(strategy="vanilla_kd", budget_steps=3, teacher=str(path), out=str(tmp_path / name)),
                           **QUIET) for name, path in (("a", padded), ("b", teacher))]
    assert results[0]["val"] == results[1]["val"] and results[0]["teacher_mlm"] == results[1]["teacher_mlm"]


def test_a_sentence_encoder_teaches_who_needs_no_head(tmp_path, tiny, corpus):
    """No LM head, no prefix, width 48 with 12 heads: as sentence encoders are published."""
    reference = theirs(3, 48, 12, kind="BertModel", vocab=300)
    encoder = tmp_path / "encoder"
    store(reference, encoder, "safetensors")
    shutil.copy(corpus / "tokenizer.json", encoder)
    for changes in (dict(strategy="tinybert", size="2L48", heads=12), dict(strategy="minilm", size="2L48", heads=12),
                    dict(strategy="minilmv2")):
        train.train(tiny(budget_steps=2, teacher=str(encoder), out=str(tmp_path / changes["strategy"]), **changes),
                    **QUIET)
    for strategy in ("vanilla_kd", "distilbert"):
        with pytest.raises(UserError, match="no LM head"):
            train.train(tiny(strategy=strategy, teacher=str(encoder), size="2L48"), **QUIET)


class Malice:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return (open, (self.sentinel, "w"))


def test_a_malicious_pickle_is_rejected_and_nothing_is_executed(tmp_path):
    store(theirs(), tmp_path, "bin")
    sentinel = str(tmp_path / "executed")
    for protocol in (2, 4):
        malice = pickle.dumps(Malice(sentinel), protocol=protocol)
        (tmp_path / "pytorch_model.bin").write_bytes(malice + bytes(10 ** 6))       # as large as the model
        with pytest.raises(UserError, match="is damaged or not ours"):
            checkpoint.load_mlm(tmp_path)
    torch.save({"x": Malice(sentinel), "y": torch.zeros(10 ** 6)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="is damaged or not ours"):
        checkpoint.load_mlm(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_damaged_files_are_refused(tmp_path, how):
    store(theirs(), tmp_path, how)
    file = checkpoint.weight_files(tmp_path)[0]
    whole = file.read_bytes()
    flip_at = 20 if how == "safetensors" else len(whole) // 2           # its header; a tensor's bytes
    flipped = whole[:flip_at] + bytes([whole[flip_at] ^ 0x10]) + whole[flip_at + 1:]
    for damage in (whole[:-1], whole[:len(whole) // 2], flipped):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="is damaged or not ours"):
            checkpoint.load_mlm(tmp_path)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="its weights are 0 bytes: they are cut, quantised, or another model's"):
        checkpoint.load_mlm(tmp_path)


def test_any_flipped_bit_of_a_directory_of_ours_is_found(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "m")
    file = checkpoint.weight_files(tmp_path / "m")[0]
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="sha256"):
        checkpoint.load_mlm(tmp_path / "m")


def edit(path, **changes):
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))


@pytest.mark.parametrize("changes, message", [
    (dict(model_type="roberta"), "only BERT works"), (dict(model_type="modernbert"), "only BERT works"),
    (dict(hidden_act="silu"), "gelu, gelu_new, relu"), (dict(position_embedding_type="relative_key"), "absolute"),
    (dict(num_hidden_layers=1), "asks for 1 layers, the weights hold 2"),
    (dict(num_hidden_layers=3), "asks for 3 layers, the weights hold 2"),
    (dict(hidden_size=64), r"config.json makes it \("), (dict(vocab_size=50), "config.json makes it"),
    (dict(num_attention_heads=5), "not a multiple of 5"), (dict(hidden_size="wide"), "hidden_size is 'wide'"),
    (dict(vocab_size=True), "vocab_size is True"), (dict(layer_norm_eps=None), "layer_norm_eps is None"),
    (dict(hidden_dropout_prob=1.5), "hidden_dropout_prob is 1.5: a number from 0 to 1"),
    (dict(num_hidden_layers=0), "num_hidden_layers is 0: a whole number from 1"),
    (dict(is_decoder=True), "is_decoder is True: only False"), (dict(add_cross_attention=True), "add_cross_attention"),
    (dict(quantization_config=dict(load_in_8bit=True)), "quantization_config is {'load_in_8bit': True}: only None"),
    (dict(embedding_size=16), "embedding_size is 16: only 32"), (dict(pruned_heads={"0": [1]}), "pruned_heads is {'0'"),
    (dict(auto_map={"AutoModel": "x.Y"}), "auto_map is"), (dict(is_encoder_decoder=True), "is_encoder_decoder is True"),
    (dict(model_type=None, architectures=["RobertaModel"]), "model_type is None: only BERT"),
    (dict(hidden_act=["gelu"]), "config.json is damaged or not ours .TypeError"),
    (dict(hidden_act="\x1b[31m"), r"hidden_act is '\\x1b\[31m'"),
    (dict(layer_norm_eps=float("nan")), "layer_norm_eps is nan"), (dict(vocab_size=1e12), "vocab_size is 10{12}.0"),
    *((dict([(name, 10 ** 10)]), "a model of .* numbers and more, its weights are .* bytes") for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings",
        "type_vocab_size")),
    (dict(pad_token_id=120), "pad_token_id is 120: it lies beyond a vocab_size of 120"),
    (dict(vocab_size=130), r"config.json makes it .130")])
def test_a_config_that_does_not_match_is_refused(tmp_path, changes, message):
    store(theirs(), tmp_path, "safetensors")
    edit(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        checkpoint.load_mlm(tmp_path)


def test_an_untied_decoder_and_values_that_are_not_finite_are_refused(tmp_path):
    store(theirs(), tmp_path, "bin")
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    torch.save(weights | {"cls.predictions.decoder.weight": torch.zeros(120, 32)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="untied"):
        checkpoint.load_mlm(tmp_path)
    weights["cls.predictions.bias"][3] = float("nan")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cls.predictions.bias holds values that are not finite"):
        checkpoint.load_mlm(tmp_path)


def test_what_is_no_model_is_refused_and_a_hub_id_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    for path, message in ((tmp_path, "no config.json"), (tmp_path / "nowhere/at/all", "neither a model directory")):
        with pytest.raises(UserError, match=message):
            checkpoint.find_model(str(path))
    import huggingface_hub
    asked = []

    def offline(repo, revision, allow_patterns):
        asked.append((repo, revision))
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="hf download google/bert"):
        checkpoint.find_model("google/bert@v1")
    assert asked == [("google/bert", "v1")]


def test_a_hub_id_is_fetched_at_its_revision_with_one_kind_of_weights(tmp_path, monkeypatch):
    import huggingface_hub
    asked = []

    def fetch(repo, revision, allow_patterns):
        asked.append((repo, revision, allow_patterns[-1]))
        (tmp_path / "config.json").write_text("{}")
        if "bin" in allow_patterns[-1]:
            (tmp_path / "pytorch_model.bin").write_text("")
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert checkpoint.find_model("bert-base-uncased") == tmp_path
    assert asked == [("bert-base-uncased", None, kind) for kind in ("model*.safetensors", "pytorch_model*.bin")]


def test_no_prefix_of_compile_reaches_a_saved_name(corpus, tiny, tmp_path):
    arm = make_arm(tiny(), TokenDirectory(corpus))
    arm.run_student = torch.compile(arm.student, backend="eager")
    arm.forward(*arm.dummy())
    checkpoint.save_model(tmp_path / "m", arm.student, TokenDirectory(corpus).read_tokenizer())
    assert not any("_orig_mod" in name or "module." in name for name in checkpoint.read_weights(tmp_path / "m"))


def test_a_vocabulary_of_the_same_size_is_not_the_same(corpus, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "m")
    (tmp_path / "m/tokenizer.json").unlink()
    tokenizer = TokenDirectory(corpus).read_tokenizer()
    checkpoint.same_vocabulary(tokenizer, tmp_path / "m")               # vocab.txt alone will do
    tokens = (tmp_path / "m/vocab.txt").read_text().splitlines()
    tokens[10:20] = reversed(tokens[10:20])
    (tmp_path / "m/vocab.txt").write_text("\n".join(tokens) + "\n")
    with pytest.raises(UserError) as e:
        checkpoint.same_vocabulary(tokenizer, tmp_path / "m")
    assert "10 tokens differ" in str(e.value) and str(e.value).count(" there)") == 5
    (tmp_path / "m/vocab.txt").unlink()
    with pytest.raises(UserError, match="neither tokenizer.json nor vocab.txt"):
        checkpoint.same_vocabulary(tokenizer, tmp_path / "m")


def test_a_c_locale_changes_nothing(teacher, tmp_path):
    """A label of a UTF-8 config.json is printed, a model of ours is asked, and a token directory is described."""
    shutil.copytree(teacher, tmp_path / "m")
    model = BertForSequenceClassification(checkpoint.read_config(teacher), 2)
    checkpoint.save_model(tmp_path / "m", model, checkpoint.read_tokenizer(teacher), names=["größer", "kleín"])
    raw = json.loads((tmp_path / "m/config.json").read_text(encoding="utf-8"))
    (tmp_path / "m/config.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "rows.csv").write_text("text\nà la größe\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "finetune_glue.py", "--model", tmp_path / "m", "--predict", tmp_path / "rows.csv"], text=True,
        capture_output=True, cwd=Path(train.__file__).parent,
        env=os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] in ("größer", "kleín")


def test_text_is_read_and_written_with_an_encoding_everywhere():
    """In binary, or as UTF-8: what the locale says is never asked."""
    root, found = Path(train.__file__).parent, []
    for file in (file for where in (".", "plumbing", "comparison", "exercises") for file in root.glob(f"{where}/*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name, said = getattr(call.func, "attr", getattr(call.func, "id", "")), ast.unparse(call)
            place = {"read_text": 0, "write_text": 1}.get(name, 9)      # where the encoding stands among the arguments
            binary = re.search(r"'[rwa]b\+?'|^(os|tarfile)\.open", said)
            if name in ("read_text", "write_text", "open", "fdopen") and not (
                    binary or "encoding=" in said or len(call.args) > place):
                found.append(f"{file.name}:{call.lineno}: {said}")
    assert not found
