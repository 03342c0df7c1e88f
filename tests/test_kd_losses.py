"""Each loss against the slowest possible transcription of its formula, in Python floats and loops."""
import json
import math
from functools import partial

import pytest
import torch

import kd_losses as kd
import strategies as st
import train
from plumbing.tokens import TokenDirectory
from step import make_arm

B, N, S, H, D, M, V = 2, 3, 5, 4, 12, 6, 11
LENGTHS = [5, 3]                    # real positions of each row, where there is padding


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def real_mask(padding):
    return torch.arange(S) < torch.tensor(LENGTHS)[:, None] if padding else None


def lengths(padding):
    return LENGTHS if padding else [S] * B


# ------------------------------------------------------------------------------------ transcriptions: no tensors

def softmax(xs):
    top = max(xs)
    e = [math.exp(x - top) for x in xs]
    return [x / sum(e) for x in e]


def slow_mlm(z, labels):
    return sum(-math.log(softmax(row)[label]) for row, label in zip(z, labels, strict=True)) / len(z)


def slow_soft_ce(z_s, z_t, tau):
    total = 0.0
    for row_s, row_t in zip(z_s, z_t, strict=True):
        p_s, p_t = softmax([x / tau for x in row_s]), softmax([x / tau for x in row_t])
        total += sum(-t * math.log(s) for s, t in zip(p_s, p_t, strict=True))
    return tau ** 2 * total / len(z_s)


def slow_soft_kl(z_s, z_t, tau):
    total = 0.0
    for row_s, row_t in zip(z_s, z_t, strict=True):
        p_s, p_t = softmax([x / tau for x in row_s]), softmax([x / tau for x in row_t])
        total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    return tau ** 2 * total / len(z_s)


def slow_as_released_soft_ce(z_s, z_t):
    total, count = 0.0, 0
    for row_s, row_t in zip(z_s, z_t, strict=True):
        for s, t in zip(softmax(row_s), softmax(row_t), strict=True):
            total, count = total - t * math.log(s), count + 1
    return total / count


def slow_cosine(h_s, h_t, lens):
    total, rows = 0.0, 0
    for b in range(B):
        for i in range(lens[b]):
            x, y = h_s[b][i], h_t[b][i]
            norm = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(a * a for a in y))
            total, rows = total + 1 - sum(a * c for a, c in zip(x, y, strict=True)) / norm, rows + 1
    return total / rows


def slow_sentence_mse(h_s, h_t, lens, pooling):
    def embedding(rows, n):
        pooled = rows[0] if pooling == "cls" else [sum(x) / n for x in zip(*rows[:n], strict=True)]
        return [x / math.sqrt(sum(a * a for a in pooled)) for x in pooled]
    total = 0.0
    for b in range(B):
        e_s, e_t = embedding(h_s[b], lens[b]), embedding(h_t[b], lens[b])
        total += sum((x - y) ** 2 for x, y in zip(e_s, e_t, strict=True))
    return total / B


def slow_mse(h_s, h_t, W, lens):
    total, count = 0.0, 0
    for b in range(B):
        for i in range(lens[b]):
            x = h_s[b][i] if W is None else [sum(h_s[b][i][a] * W[d][a] for a in range(len(h_s[b][i])))
                                             for d in range(len(W))]
            for d in range(len(h_t[b][i])):
                total, count = total + (x[d] - h_t[b][i][d]) ** 2, count + 1
    return total / count


def slow_ln0(h):
    """LayerNorm without gain and bias, position by position."""
    def normal(x):
        mean = sum(x) / len(x)
        std = math.sqrt(sum((a - mean) ** 2 for a in x) / len(x))
        return [(a - mean) / std for a in x]
    return [[normal(x) for x in row] for row in h]


def slow_project(h, W):
    return [[[sum(a * w for a, w in zip(x, row, strict=True)) for row in W] for x in rows] for rows in h]


def dot(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(len(x))


def slow_attention_mse(q_s, k_s, q_t, k_t, lens):
    total, pairs = 0.0, sum(n * n for n in lens)
    for b in range(B):
        for n in range(N):
            for i in range(lens[b]):
                for j in range(lens[b]):
                    total += (dot(q_s[b][n][i], k_s[b][n][j]) - dot(q_t[b][n][i], k_t[b][n][j])) ** 2
    return total / pairs / N


def slow_attention_kl(q_s, k_s, q_t, k_t, lens):
    total, rows = 0.0, sum(lens)
    for b in range(B):
        for n in range(N):
            for i in range(lens[b]):
                p_s = softmax([dot(q_s[b][n][i], k_s[b][n][j]) for j in range(lens[b])])
                p_t = softmax([dot(q_t[b][n][i], k_t[b][n][j]) for j in range(lens[b])])
                total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    return total / (N * rows)


def slow_relation_kl(x_s, x_t, heads, lens):
    total, rows = 0.0, sum(lens)
    for b in range(B):
        for n in range(heads):
            def part(x, i, n=n, b=b):
                size = len(x[b][i]) // heads
                return x[b][i][n * size:(n + 1) * size]
            for i in range(lens[b]):
                p_s = softmax([dot(part(x_s, i), part(x_s, j)) for j in range(lens[b])])
                p_t = softmax([dot(part(x_t, i), part(x_t, j)) for j in range(lens[b])])
                total += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    return total / (heads * rows)


# ---------------------------------------------------------------------- one row per loss: inputs, transcription

def cases(padding):
    real, lens = real_mask(padding), lengths(padding)
    z_s, z_t, labels = rand(M, V), rand(M, V), torch.randint(0, V, (M,))
    e_s, e_t, wide = rand(B, S, D), rand(B, S, D), rand(B, S, 7)
    proj = torch.nn.Linear(7, D, bias=False, dtype=torch.float64)
    W = proj.weight.tolist()
    q_s, k_s, v_s = rand(B, N, S, H), rand(B, N, S, H), rand(B, N, S, H)
    q_t, k_t, v_t = rand(B, N, S, 2 * H), rand(B, N, S, 2 * H), rand(B, N, S, 2 * H)   # same heads, other width
    wide16 = rand(B, S, 16)
    slow = {name: x.tolist() for name, x in dict(z_s=z_s, z_t=z_t, labels=labels, e_s=e_s, e_t=e_t, wide=wide,
            q_s=q_s, k_s=k_s, v_s=v_s, q_t=q_t, k_t=k_t, v_t=v_t).items()}
    z, q = (slow["z_s"], slow["z_t"]), (slow["q_s"], slow["k_s"], slow["q_t"], slow["k_t"])
    return {
        "mlm": (kd.masked_lm_loss, [z_s, labels], slow_mlm(slow["z_s"], slow["labels"])),
        "soft_ce": (kd.soft_cross_entropy, [z_s, z_t, 1.0], slow_soft_ce(*z, 1.0)),
        "soft_ce_tau": (kd.soft_cross_entropy, [z_s, z_t, 2.5], slow_soft_ce(*z, 2.5)),
        "soft_ce_over_v": (kd.soft_cross_entropy_over_v, [z_s, z_t, 1.0], slow_as_released_soft_ce(*z)),
        "soft_kl": (kd.soft_kl, [z_s, z_t, 2.0], slow_soft_kl(*z, 2.0)),
        "cosine": (kd.cosine_loss, [e_s, e_t, real], slow_cosine(slow["e_s"], slow["e_t"], lens)),
        "hidden": (kd.hidden_mse, [e_s, e_t, None, real], slow_mse(slow["e_s"], slow["e_t"], None, lens)),
        "hidden_proj": (kd.hidden_mse, [wide, e_t, proj, real], slow_mse(slow["wide"], slow["e_t"], W, lens)),
        "embedding": (kd.embedding_mse, [e_s, e_t, None, real], slow_mse(slow["e_s"], slow["e_t"], None, lens)),
        "embedding_proj": (kd.embedding_mse, [wide, e_t, proj, real], slow_mse(slow["wide"], slow["e_t"], W, lens)),
        "sentence": (kd.sentence_mse, [e_s, e_t, real], slow_sentence_mse(slow["e_s"], slow["e_t"], lens, "mean")),
        "sentence_cls": (partial(kd.sentence_mse, pooling="cls"), [e_s, e_t, real], slow_sentence_mse(
            slow["e_s"], slow["e_t"], lens, "cls")),
        "fmt": (kd.feature_map_transfer, [e_s, e_t, None, real], slow_mse(
            slow_ln0(slow["e_s"]), slow_ln0(slow["e_t"]), None, lens)),
        "fmt_proj": (kd.feature_map_transfer, [wide, e_t, proj, real], slow_mse(
            slow_ln0(slow_project(slow["wide"], W)), slow_ln0(slow["e_t"]), None, lens)),
        "attention_mse": (kd.attention_mse, [q_s, k_s, q_t, k_t, real], slow_attention_mse(*q, lens)),
        "attention_kl": (kd.attention_kl, [q_s, k_s, q_t, k_t, real], slow_attention_kl(*q, lens)),
        "value_relation_kl": (kd.value_relation_kl, [v_s, v_t, real], slow_attention_kl(
            slow["v_s"], slow["v_s"], slow["v_t"], slow["v_t"], lens)),
        "relation_kl": (kd.relation_kl, [e_s, wide16, 4, real], slow_relation_kl(
            slow["e_s"], wide16.tolist(), 4, lens)),
    }


NAMES = list(cases(False))
ON_LOGITS = [name for name in NAMES if name.startswith(("mlm", "soft"))]
ON_POSITIONS = [name for name in NAMES if name not in ON_LOGITS]
ZERO_AT_TEACHER = [name for name in NAMES if name not in ON_LOGITS and "proj" not in name] + ["soft_kl"]


def student_and_teacher(name, args):
    """Where the student's and the teacher's tensors are among a loss's arguments."""
    n = 4 if name in ("attention_mse", "attention_kl") else 2
    return (slice(0, 1), slice(1, 1)) if name == "mlm" else (slice(0, n // 2), slice(n // 2, n))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_transcription(name, padding):
    torch.manual_seed(1)
    loss, args, expected = cases(padding)[name]
    assert loss(*args).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, precision", [(torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_transcription_in_lower_precision_and_under_autocast(name, dtype, precision, autocast):
    """A 16-bit input is rounded before the loss sees it: against the loss of the rounded values in float64, what is
    left is fp32's error, also inside an autocast region, where a matmul outside the loss would run in bf16."""
    torch.manual_seed(2)
    loss, args, _ = cases(True)[name]
    rounded = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    exact = loss(*(a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in rounded))
    rounded = [a.float() if isinstance(a, torch.nn.Module) else a for a in rounded]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = loss(*rounded)
    assert found.dtype == torch.float32 and found.item() == pytest.approx(exact.item(), rel=precision)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", ZERO_AT_TEACHER)
def test_is_zero_where_the_student_is_the_teacher(name, padding):
    torch.manual_seed(3)
    loss, args, other = cases(padding)[name]
    _, teacher = student_and_teacher(name, args)
    args[:teacher.stop - teacher.start] = args[teacher]
    assert abs(loss(*args).item()) < 1e-12 < other


@pytest.mark.parametrize("name", ["soft_ce", "soft_ce_tau", "soft_ce_over_v"])
def test_soft_cross_entropy_is_smallest_where_the_student_is_the_teacher(name):
    """Its minimum is the teacher's entropy; there the gradient vanishes."""
    torch.manual_seed(3)
    loss, (z_s, z_t, tau), other = cases(False)[name]
    z_s = z_t.clone().requires_grad_()
    at_minimum = loss(z_s, z_t, tau)
    at_minimum.backward()
    assert at_minimum.item() < other and z_s.grad.abs().max() < 1e-12
    for _ in range(20):
        assert loss(z_t + 0.1 * rand(M, V), z_t, tau) > at_minimum


@pytest.mark.parametrize("padding", [False, True])
def test_feature_map_transfer_sees_no_scale_and_no_shift_of_a_position(padding):
    torch.manual_seed(3)
    _, (h_s, h_t, _, real), expected = cases(padding)["fmt"]
    a, c = rand(2, B, S, 1).exp(), 5 * rand(2, B, S, 1)
    found = kd.feature_map_transfer(a[0] * h_s + c[0], a[1] * h_t + c[1], None, real)
    assert found.item() == pytest.approx(expected, rel=1e-9)
    assert kd.feature_map_transfer(-h_s, h_t, None, real).item() != pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ON_LOGITS)
def test_vocabulary_entries_of_zero_probability_change_nothing(name):
    torch.manual_seed(4)
    loss, args, expected = cases(False)[name]
    student, teacher = student_and_teacher(name, args)
    wide = [torch.cat([a, torch.full((M, 1000), -1e9, dtype=a.dtype)], 1) if a.is_floating_point() else a
            for a in args[:2]]
    true = dict(vocab_size=V) if name == "soft_ce_over_v" else {}       # the only one that V divides
    assert loss(*wide, *args[2:], **true).item() == pytest.approx(expected, rel=1e-12)


def test_the_released_soft_cross_entropy_is_v_times_smaller_exactly():
    torch.manual_seed(5)
    for vocabulary in (11, 30_522):
        z_s, z_t = rand(M, vocabulary), rand(M, vocabulary)
        for tau in (1.0, 2.0):
            ratio = kd.soft_cross_entropy(z_s, z_t, tau) / kd.soft_cross_entropy_over_v(z_s, z_t, tau)
            assert ratio.item() == pytest.approx(vocabulary, rel=1e-12)


def positions_axis(x):
    return 1 if x.ndim == 3 else 2      # (B, S, D) or (B, N, S, H)


@pytest.mark.parametrize("name", ON_POSITIONS)
def test_more_padding_and_other_padding_content_change_nothing(name):
    torch.manual_seed(6)
    loss, args, expected = cases(True)[name]
    real = args[-1]

    def pad(x, content):
        if not isinstance(x, torch.Tensor) or x is real:
            return x
        axis, x = positions_axis(x), x.clone()
        x.movedim(axis, 1)[~real] = content                             # rows of length 3 end in two of these
        more = list(x.shape)
        more[axis] = 4
        return torch.cat([x, torch.full(more, content, dtype=x.dtype)], axis)
    for content in (0.0, 1e4):
        longer = torch.cat([real, torch.zeros(B, 4, dtype=torch.bool)], 1)
        found = loss(*(pad(a, content) for a in args[:-1]), longer)
        assert found.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["attention_kl", "value_relation_kl", "relation_kl"])
def test_by_blocks_of_heads_loss_and_gradient_are_those_of_the_equation(name, monkeypatch):
    """6 or 8 heads in blocks of 4 at most; at this size attention_kl is else the equation itself."""
    torch.manual_seed(6)
    loss, args, expected = cases(False)[name]
    student, teacher = student_and_teacher(name, args)
    inputs = [a.requires_grad_() for a in args[student]]
    plain = loss(*args)
    gradients = torch.autograd.grad(3 * plain, inputs)
    monkeypatch.setattr(kd.AttentionKL, "at_once", 4 * S ** 2 // torch.get_num_threads())
    for a in args[teacher]:
        a.requires_grad_()
    found = loss(*args)
    assert found.grad_fn.name() == "AttentionKLBackward" != plain.grad_fn.name()
    assert found.item() == pytest.approx(expected, rel=1e-9)
    (3 * found).backward()
    for a, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(a.grad, gradient, rtol=1e-9, atol=1e-12)
    assert all(a.grad is None for a in args[teacher])
    rest = [a.detach() if isinstance(a, torch.Tensor) else a for a in args[student.stop:]]
    assert torch.autograd.gradcheck(lambda *xs: loss(*xs, *rest), inputs)
    with torch.no_grad():
        assert loss(*args).item() == found.item()


def test_by_blocks_where_it_pays_and_in_fp32_whatever_comes_in(monkeypatch):
    """From 2^18 scores on, on a CPU, without padding or a compiler; bf16 under autocast as exactly as fp32."""
    torch.manual_seed(6)
    x_s, x_t = (torch.randn(2, 128, 64, dtype=torch.bfloat16) for _ in range(2))            # 2 * 8 * 128^2 = 2^18
    one = torch.ones(2, 128)
    x_s.requires_grad_()

    def by_blocks(*args):
        return kd.relation_kl(*args).grad_fn.name() == "AttentionKLBackward"
    assert by_blocks(x_s, x_t, 8) and not by_blocks(x_s, x_t, 4) and not by_blocks(x_s[:, 1:], x_t[:, 1:], 8)
    assert not by_blocks(x_s, x_t, 8, one) and not by_blocks(x_s.to("meta"), x_t.to("meta"), 8)
    exact = x_s.detach().double().requires_grad_()
    kd.relation_kl(exact, x_t.double(), 8, one).backward()
    with torch.autocast("cpu", torch.bfloat16):
        for dtype, precision in (torch.float32, 1e-5), (torch.bfloat16, 4e-3):              # a bf16 gradient is rounded
            x = x_s.detach().to(dtype).requires_grad_()
            loss = kd.relation_kl(x, x_t, 8)
            loss.backward()
            assert loss.item() == pytest.approx(kd.relation_kl(exact, x_t.double(), 8, one).item(), rel=1e-5)
            assert loss.dtype == torch.float32 and x.grad.dtype == dtype
            assert (x.grad - exact.grad).norm() < precision * exact.grad.norm()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not by_blocks(x_s, x_t, 8)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name, padding):
    torch.manual_seed(7)
    loss, args, _ = cases(padding)[name]
    student, _ = student_and_teacher(name, args)
    inputs = [a.requires_grad_() for a in args[student]]
    rest = args[student.stop:]
    assert torch.autograd.gradcheck(lambda *xs: loss(*xs, *rest), inputs)


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_and_one_hot_teachers_stay_finite(name):
    torch.manual_seed(8)
    loss, args, _ = cases(True)[name]
    student, teacher = student_and_teacher(name, args)
    for sign in (1.0, -1.0):
        extreme = [a.float() if isinstance(a, torch.nn.Module) else a for a in args]
        for i in range(teacher.stop):
            if extreme[i].is_floating_point():
                x = torch.full_like(args[i], -1e4).float()
                x[..., 0] = 1e4                                         # a softmax over it is one-hot
                extreme[i] = (x * (sign if i in range(*student.indices(9)) else 1.0)).requires_grad_(i < student.stop)
        value = loss(*extreme)
        value.backward()
        assert value.isfinite() and all(a.grad.isfinite().all() for a in extreme[student])


# ------------------------------------------------------------------------------------------------------ strategies

def side(width, want):
    """Random outputs of a forward pass, under the names of `want`."""
    def of(kind):
        return (tuple(rand(B, N, S, width // N) for _ in range(3)) if kind == "qkv"
                else rand(M, V) if kind == "logits" else rand(B, S, width))
    return {need: of(need if isinstance(need, str) else need[0]) for need in want}


def leaves(value):
    return value if isinstance(value, tuple) else (value,)


EVERY = [*st.STRATEGIES.items(), *((f"{name} as released", s) for name, s in st.AS_RELEASED.items()),
         ("mobilebert stage", st.mobilebert_stage(1))]


@pytest.mark.parametrize("name, strategy", EVERY)
def test_gradient_reaches_what_a_strategy_asks_for_and_no_teacher(name, strategy):
    torch.manual_seed(0)
    strategy, width = strategy.for_depths(2, 4), 12 if strategy.same_width else 6
    s, t = side(width, strategy.want("student")), side(12, strategy.want("teacher"))
    for x in sum(map(leaves, (*s.values(), *t.values())), ()):
        x.requires_grad_()
    proj = st.projections(strategy, width, 12).double()
    context = st.Context(torch.randint(0, V, (M,)), strategy.tau, 3, proj)
    frozen = {need: tuple(x.detach() for x in v) if isinstance(v, tuple) else v.detach() for need, v in t.items()}
    total, terms = st.loss_terms(strategy, s, frozen, context)
    total.backward()
    assert total.item() == pytest.approx(sum(term.weight * terms[n].item() for n, term in strategy.terms.items()))
    reached = {need for need, value in s.items() if any(x.grad is not None for x in leaves(value))}
    assert reached == set(strategy._replace(as_released=False).want("student")) <= set(s)
    assert all(p.grad is not None for p in proj.parameters())
    assert all(x.grad is None for value in t.values() for x in leaves(value))


@pytest.mark.parametrize("name, expected", [
    ("no_kd", {"mlm": 1}), ("vanilla_kd", {"mlm": 1, "soft_ce": 1}),
    ("distilbert", {"soft_kl": 5, "mlm": 2, "cosine": 1}), ("tinybert", {"embd": 1, "attn": 1, "hidn": 1}),
    ("minilm", {"attn": 1, "value": 1}), ("minilmv2", {"qq": 1, "kk": 1, "vv": 1}),
    ("sentence", {"sentence": 1}),
    ("tinybert_layers", {"embd": 1, "attn": 1, "hidn": 1}), ("minilmv2_mlm", {"mlm": 1, "qq": 1, "kk": 1, "vv": 1})])
def test_the_terms_and_weights_of_each_strategy(name, expected):
    assert {n: term.weight for n, term in st.STRATEGIES[name].terms.items()} == expected


def test_a_strategy_computes_its_formula_from_the_outputs():
    """The terms pick the right tensors: each strategy's total against the losses called by hand, of the layers that
    its text or its released code names (in a real run: test_promises.py)."""
    torch.manual_seed(1)
    every = ["embedding", "logits", *((kind, i) for kind in ("qkv", "hidden") for i in range(4))]
    s, t, labels = side(12, every), side(12, every), torch.randint(0, V, (M,))
    for outputs, last in (s, 1), (t, 3):
        outputs |= {(kind, -1): outputs[kind, last] for kind in ("qkv", "hidden")}
    (q, k, v), (q0, k0, _), h, h0 = s["qkv", 1], s["qkv", 0], s["hidden", 1], s["hidden", 0]
    (qt, kt, vt), (q0t, k0t, _), ht, (q1t, k1t, _), h1t = (
        t["qkv", 3], t["qkv", 0], t["hidden", 3], t["qkv", 1], t["hidden", 1])
    flat = partial(torch.Tensor.transpose, dim0=1, dim1=2)
    relations = [kd.relation_kl(flat(a).flatten(2), flat(b).flatten(2), 3) for a, b in ((q, qt), (k, kt), (v, vt))]
    mlm, soft = kd.masked_lm_loss(s["logits"], labels), kd.soft_cross_entropy(s["logits"], t["logits"], 1.0)
    attention, hidden, cosine = kd.attention_mse(q, k, qt, kt), kd.hidden_mse(h, ht), kd.cosine_loss(h, ht)
    tinybert = kd.embedding_mse(s["embedding"], t["embedding"]) + attention + hidden
    for loss in (kd.soft_cross_entropy, kd.soft_kl, kd.soft_cross_entropy_over_v):   # tau is 1 unless given
        assert loss(s["logits"], t["logits"]) == loss(s["logits"], t["logits"], 1.0)
    by_hand = {
        "no_kd": mlm, "vanilla_kd": mlm + soft, "vanilla_kd as released": mlm + soft / V,
        "distilbert": 5 * kd.soft_kl(s["logits"], t["logits"], 2.0) + 2 * mlm + cosine,
        "tinybert": tinybert, "tinybert as released": kd.attention_mse(q0, k0, q0t, k0t) + attention + hidden,
        "tinybert_layers": tinybert + kd.attention_mse(q0, k0, q1t, k1t) + kd.hidden_mse(h0, h1t),
        "minilm": kd.attention_kl(q, k, qt, kt) + kd.value_relation_kl(v, vt),
        "minilmv2_mlm": mlm + sum(relations), "mobilebert stage": 100 * kd.feature_map_transfer(h, ht)
        + kd.attention_kl(q, k, qt, kt),
        "sentence": kd.sentence_mse(h, ht),
        **dict.fromkeys(("minilmv2", "minilm as released", "minilmv2 as released"), sum(relations))}
    assert set(by_hand) == {name for name, _ in EVERY}
    for name, strategy in EVERY:
        strategy = strategy.for_depths(2, 4)
        total, _ = st.loss_terms(strategy, s, t, st.Context(labels, strategy.tau, 3, torch.nn.ModuleDict()))
        assert total.item() == pytest.approx(by_hand[name].item(), rel=1e-12), name


@pytest.mark.parametrize("width_s, width_t, expected", [
    (768, 768, 48), (1024, 1024, 64), (768, 1024, 64), (312, 768, 24), (384, 768, 48), (128, 128, 8), (32, 48, 2),
    (7, 48, 1), (8, 8, 1)])
def test_relation_heads(width_s, width_t, expected):
    assert st.relation_head_count(width_s, width_t) == expected


def test_layer_maps_meet_at_the_last_layer_and_count_evenly():
    """TinyBERT's g(m) = 3 m for 4 of 12 layers (arXiv 1909.10351, section 4.2), here from 0."""
    assert st.uniform(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11)) and st.uniform(2, 3) == ((0, 1), (1, 2))
    for depth_s in range(1, 13):
        for depth_t in range(1, 25):
            pairs = st.uniform(depth_s, depth_t)
            assert [l_s for l_s, _ in pairs] == list(range(depth_s)) and pairs[-1][1] == depth_t - 1
            assert all(0 <= l_t and 0 <= l_t + 1 - (l_s + 1) * depth_t / depth_s < 1 for l_s, l_t in pairs)


def test_between_two_depths_every_pair_is_a_pair_of_numbers_and_says_so():
    of = {name: strategy.for_depths(2, 4) for name, strategy in EVERY}
    assert of["tinybert_layers"].want("teacher") == ("embedding", ("qkv", 1), ("qkv", 3), ("hidden", 1), ("hidden", 3))
    assert of["tinybert_layers"].want("student") == ("embedding", ("qkv", 0), ("qkv", 1), ("hidden", 0), ("hidden", 1))
    assert of["mobilebert stage"].want("teacher") == (("hidden", 3), ("qkv", 3))
    assert of["tinybert_layers"].terms["hidn"].about.endswith("layers 1-2 2-4")
    assert st.STRATEGIES["minilmv2"].for_depths(2, 24).want("teacher") == (("qkv", 20),)
    assert st.AS_RELEASED["minilm"].for_depths(2, 24).terms["qq"].layers == st.LAST


def test_a_strategy_is_added_as_the_docstring_says(tiny, narrow_teacher, monkeypatch, tmp_path):
    """Patient-KD (Sun 2019, arXiv 1908.09355, eq. 7): ||h_s / ||h_s|| - h_t / ||h_t||||^2 of [CLS] at inner layers."""
    @kd.at_least_fp32
    def patient_mse(h_s, h_t):
        h_s, h_t = (torch.nn.functional.normalize(h[:, 0], dim=-1) for h in (h_s, h_t))             # (B, D)
        return (h_s - h_t).square().sum(-1).mean()
    patient = st.Term(lambda s, t, c: patient_mse(s["hidden"], t["hidden"]), ("hidden",), ("hidden",),
                      "normalised [CLS], sum over inner layers; mean over B", weight=10.0,
                      layers=lambda depth_s, depth_t: st.uniform(depth_s, depth_t)[:-1])
    monkeypatch.setitem(st.STRATEGIES, "patient_kd", st.Strategy(
        {"mlm": st.MLM, "soft_ce": st.SOFT_CE, "patient": patient}, same_width=True))

    said, config = [], tiny(strategy="patient_kd", size="3L32", teacher=str(narrow_teacher))
    summary = train.train(config, say=said.append)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert set(summary["val"]) == {"mlm", "soft_ce", "patient"} and lines[19]["patient"] < 0.8 * lines[0]["patient"]
    assert any("10 x patient" in line and "layers 1-2 2-3" in line for line in said)
    # by hand, from the models themselves
    arm = make_arm(config, TokenDirectory(config.data))
    ids, masked, labels = arm.dummy()
    ids = torch.randint(0, 300, ids.shape)
    cls = [model.bert(ids, want=[("hidden", i) for i in inner]) for model, inner in (
        (arm.student, (0, 1)), (arm.teacher, (1, 2)))]
    expected = sum(2 - 2 * torch.cosine_similarity(a[:, 0], b[:, 0]).mean()
                   for a, b in zip(*(out.values() for out in cls), strict=True))
    assert arm.forward(ids, masked, labels)[1]["patient"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_term_may_look_at_every_position(tiny, monkeypatch):
    """Soft targets at all positions, as DistilBERT's own; the teacher's head is asked for and the student's trained."""
    soft = st.Term(lambda s, t, c: kd.soft_cross_entropy(s["all_logits"], t["all_logits"], c.tau), ("all_logits",),
                   ("all_logits",), "everywhere")
    monkeypatch.setitem(st.STRATEGIES, "everywhere", st.Strategy({"soft": soft, "mlm": st.MLM}))
    config = tiny(strategy="everywhere")
    assert st.Strategy({"soft": soft}).trains_lm_head and config.phases[0].strategy.needs_teachers_head
    arm = make_arm(config, TokenDirectory(config.data))
    ids, masked, labels = arm.dummy()
    total, terms = arm.forward(ids, masked, labels)
    z_s, z_t = arm.student(ids)["logits"].flatten(0, 1), arm.teacher(ids)["logits"].flatten(0, 1)
    assert terms["soft"].item() == pytest.approx(kd.soft_cross_entropy(z_s, z_t).item(), rel=1e-6)
    assert terms["mlm"].item() == pytest.approx(kd.masked_lm_loss(arm.student(ids, masked)["logits"], labels).item())
