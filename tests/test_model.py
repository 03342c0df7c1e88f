"""The encoder against transformers' with the same weights, and what a forward pass leaves behind."""
import pytest
import torch

import model as bert
from model import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

SIZES = [("2L32", 2, "gelu"), ("3L48", 4, "gelu_new"), ("1L64", 1, "relu")]


def batch(V=97, B=3, S=12):
    ids = torch.randint(0, V, (B, S))
    real = torch.arange(S) < torch.tensor([12, 7, 1])[:, None]
    return ids, real, torch.randint(0, 2, (B, S))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size, heads, act", SIZES)
def test_hidden_states_and_logits_equal_transformers(size, heads, act, padding):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = BertForMaskedLM(BertConfig.of_size(size, heads, vocab_size=97, hidden_act=act)).eval()
    c = ours.config
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=97, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=heads,
        intermediate_size=c.intermediate_size, hidden_act=act)).eval()
    for p in ours.parameters():             # biases and LayerNorms away from 0 and 1, so that they count
        torch.nn.init.normal_(p, std=0.1)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not result.unexpected_keys and all("decoder" in name for name in result.missing_keys)
    theirs.tie_weights()
    ids, real, types = batch()
    with torch.no_grad():
        inner = [("hidden", i) for i in range(c.num_hidden_layers)]
        out = ours(ids, None, real if padding else None, types, want=("hidden", "logits", "embedding", *inner))
        ref = theirs(ids, real.long() if padding else None, types, output_hidden_states=True)
    at = real if padding else torch.ones_like(real)
    assert (out["embedding"] - ref.hidden_states[0])[at].abs().max() < 1e-5
    assert (out["hidden"] - ref.hidden_states[-1])[at].abs().max() < 1e-5
    assert all((out[h] - ref.hidden_states[h[1] + 1])[at].abs().max() < 1e-5 for h in inner)
    assert (out["logits"] - ref.logits)[at].abs().max() < 1e-4


def test_classifier_equals_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = BertForSequenceClassification(BertConfig.of_size("2L32", 2, vocab_size=97), 3).eval()
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        num_labels=3)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids, real, types = batch()
    with torch.no_grad():
        assert (ours(ids, real, types) - theirs(ids, real.long(), types).logits).abs().max() < 1e-5


@pytest.mark.parametrize("padding", [False, True])
def test_attention_with_and_without_gradient_is_the_same(padding):
    """Two implementations on CPU: torch's fused kernel where no gradient is wanted, plain lines where one is."""
    torch.manual_seed(0)
    model = BertModel(BertConfig.of_size("2L32", 2, vocab_size=97)).eval()
    ids, real, _ = batch()
    real = real if padding else None
    with torch.no_grad():
        fused = model(ids, real)["hidden"]
    plain = model(ids, real)["hidden"]
    assert plain.requires_grad and (plain - fused).abs().max() < 1e-5


@pytest.mark.parametrize("autocast", [False, True])
def test_the_layout_for_a_gpu_is_the_same_model(autocast, monkeypatch):
    """One product for q, k, v; a vocabulary of 97 as 128: outputs, gradients and tensors are those of the CPU."""
    found = []
    for on_gpu in (False, True):
        monkeypatch.setattr(bert, "on_gpu", lambda x, on=on_gpu: on)
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig.of_size("2L32", 2, vocab_size=97))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        ids, masked = torch.randint(0, 97, (3, 12)), torch.tensor([[1, 5], [0, 11], [2, 3]])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model.eval()(ids, masked, want=("logits", "qkv"))
        logits = out["logits"].float()
        relations = sum(x.float().square().mean() for x in out["qkv"][0])
        (bert.F.cross_entropy(logits, torch.arange(6)) + relations).backward()
        assert logits.shape == (6, 128 if on_gpu else 97) and not logits.softmax(-1)[:, 97:].any()
        found.append({"logits": logits[:, :97], "q": out["qkv"][0][0], "v": out["qkv"][0][2]}
                     | {name: p.grad for name, p in model.named_parameters()})
    for name, cpu in found[0].items():
        assert cpu.shape == found[1][name].shape, name
        scale = cpu.abs().max().clamp(min=1e-3)                         # keys' biases have a gradient of rounding only
        assert (cpu - found[1][name]).abs().max() <= (2e-2 if autocast else 2e-6) * scale, name


def test_on_a_gpu_attention_with_a_mask_never_builds_a_cudnn_graph(monkeypatch):
    """It would build one for each new length of a batch.  Without a mask the choice is torch's."""
    torch.manual_seed(0)
    q, real, allowed = torch.randn(3, 2, 12, 8), batch()[1][:, None, None], []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(*args, **named):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return fused(*args, **named)
    monkeypatch.setattr(bert.F, "scaled_dot_product_attention", spy)
    expected = bert.attention(q, q, q, real, 0.0)
    monkeypatch.setattr(bert, "on_gpu", lambda x: True)
    assert torch.allclose(bert.attention(q, q, q, real, 0.0), expected, atol=1e-6)
    bert.attention(q, q, q, None, 0.0)
    assert allowed == [True, False, True] and torch.backends.cuda.cudnn_sdp_enabled()


def test_padding_changes_nothing_at_real_positions():
    torch.manual_seed(0)
    model = BertModel(BertConfig.of_size("2L32", 2, vocab_size=97)).eval()
    ids = torch.randint(0, 97, (2, 8))
    padded = torch.cat([ids, torch.randint(0, 97, (2, 5))], 1)
    real = torch.arange(13).expand(2, -1) < 8
    with torch.no_grad():
        assert (model(ids)["hidden"] - model(padded, real)["hidden"][:, :8]).abs().max() < 1e-5


def test_logits_at_masked_positions_are_rows_of_all_logits():
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig.of_size("2L32", 2, vocab_size=97)).eval()
    ids, masked = torch.randint(0, 97, (3, 12)), torch.tensor([[1, 5], [0, 11], [2, 3]])
    some, every = model(ids, masked)["logits"], model(ids)["logits"]
    assert some.shape == (6, 97)
    assert torch.allclose(some, torch.stack([every[b, m] for b in range(3) for m in masked[b]]), atol=1e-6)


def test_logits_at_every_position_and_at_the_masked_ones_come_from_one_run_of_the_head():
    torch.manual_seed(0)
    model, runs = BertForMaskedLM(BertConfig.of_size("2L32", 2, vocab_size=97)).eval(), []
    ids, masked = torch.randint(0, 97, (3, 12)), torch.tensor([[1, 5], [0, 11], [2, 3]])
    some, every = model(ids, masked)["logits"], model(ids)["logits"]
    model.cls.register_forward_hook(lambda *_: runs.append(1))
    both = model(ids, masked, want=("all_logits", "logits"))
    assert len(runs) == 1 and torch.equal(both["all_logits"], every) and torch.allclose(both["logits"], some, atol=1e-6)


@pytest.mark.parametrize("want, runs", [
    (["embedding"], 0), ([("qkv", 1)], 1), (["qkv"], 2), ([("qkv", 1), ("qkv", 0)], 1), (["hidden"], 3),
    ([("qkv", 0), "hidden"], 3), ([("hidden", 0)], 1), ([("hidden", -2), ("qkv", 0)], 2), ([("hidden", 0), "qkv"], 2)])
def test_a_forward_pass_stops_where_the_last_wanted_thing_is(want, runs):
    model = BertModel(BertConfig.of_size("3L32", 2, vocab_size=97))
    count, projected = [], []
    for each in model.encoder["layer"]:
        each.output.register_forward_hook(lambda *_: count.append(1))
        each.attention["self"]["query"].register_forward_hook(lambda *_: projected.append(1))
    out = model(torch.zeros(1, 4, dtype=torch.long), want=want)
    assert set(out) == set(want) and len(count) == runs
    assert len(projected) == runs + any(need in want for need in ("qkv", ("qkv", runs)))


def test_layers_count_from_both_ends():
    torch.manual_seed(0)
    model = BertModel(BertConfig.of_size("3L32", 2, vocab_size=97)).eval()
    out = model(torch.randint(0, 97, (2, 5)), want=[(kind, i) for kind in ("qkv", "hidden") for i in range(-3, 3)])
    for i in range(3):
        assert all(torch.equal(a, b) for a, b in zip(out["qkv", i], out["qkv", i - 3], strict=True))
        assert torch.equal(out["hidden", i], out["hidden", i - 3])
    assert not torch.equal(out["qkv", 0][0], out["qkv", 2][0]) and not torch.equal(out["hidden", 0], out["hidden", 2])


def test_dropout_follows_train_and_eval():
    model = BertModel(BertConfig.of_size("1L32", 2, vocab_size=97))
    ids = torch.randint(0, 97, (2, 5))
    assert not torch.equal(model(ids)["hidden"], model(ids)["hidden"])
    model.eval()
    assert torch.equal(model(ids)["hidden"], model(ids)["hidden"])


@pytest.mark.parametrize("size, heads", [("6l768", None), ("6L", None), ("0L64", None), ("2L100", 3)])
def test_a_size_that_is_none_is_refused(size, heads):
    with pytest.raises(ValueError):
        BertConfig.of_size(size, heads)
