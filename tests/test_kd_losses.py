"""Each loss against the slowest possible transcription of its formula, in Python floats and loops."""
import math
from functools import partial

import pytest
import torch

import kd_losses as kd

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


def slow_mse(h_s, h_t, W, lens):
    total, count = 0.0, 0
    for b in range(B):
        for i in range(lens[b]):
            x = h_s[b][i] if W is None else [sum(h_s[b][i][a] * W[d][a] for a in range(len(h_s[b][i])))
                                             for d in range(len(W))]
            for d in range(len(h_t[b][i])):
                total, count = total + (x[d] - h_t[b][i][d]) ** 2, count + 1
    return total / count


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


@pytest.mark.parametrize("name", [n for n in ON_LOGITS if n != "soft_ce_over_v"])
def test_vocabulary_entries_of_zero_probability_change_nothing(name):
    torch.manual_seed(4)
    loss, args, expected = cases(False)[name]
    student, teacher = student_and_teacher(name, args)
    wide = [torch.cat([a, torch.full((M, 1000), -1e9, dtype=a.dtype)], 1) if a.is_floating_point() else a
            for a in args[:2]]
    assert loss(*wide, *args[2:]).item() == pytest.approx(expected, rel=1e-12)


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

def side(width, layers=2):
    heads = (B, N, S, width // N)
    return {"embedding": rand(B, S, width), "hidden": rand(B, S, width), "logits": rand(M, V),
            "qkv": [tuple(rand(*heads) for _ in range(3)) for _ in range(layers)]}


def leaves(out):
    return {"embedding": [out["embedding"]], "hidden": [out["hidden"]], "logits": [out["logits"]],
            "qkv": [x for qkv in out["qkv"] for x in qkv]}


EVERY = [*kd.STRATEGIES.items(), *((f"{name} as released", s) for name, s in kd.AS_RELEASED.items())]


@pytest.mark.parametrize("name, strategy", EVERY)
def test_gradient_reaches_what_a_strategy_asks_for_and_no_teacher(name, strategy):
    torch.manual_seed(0)
    s, t = side(12 if strategy.same_width else 6), side(12)
    for x in sum([*leaves(s).values(), *leaves(t).values()], []):
        x.requires_grad_()
    proj = kd.projections(strategy, 12 if strategy.same_width else 6, 12).double()
    context = kd.Context(torch.randint(0, V, (M,)), strategy.tau, 3, proj)
    with torch.no_grad():
        frozen = {k: [tuple(x.detach() for x in qkv) for qkv in v] if k == "qkv" else v.detach() for k, v in t.items()}
    total, terms = kd.loss_terms(strategy, s, frozen, context)
    total.backward()
    assert total.item() == pytest.approx(sum(term.weight * terms[n].item() for n, term in strategy.terms.items()))
    used = {need for term in strategy.terms.values() for need in term.student}
    reached = {need for need, xs in leaves(s).items() if any(x.grad is not None for x in xs)}
    assert reached == used <= set(strategy.needs("student")) and all(p.grad is not None for p in proj.parameters())
    assert all(x.grad is None for xs in leaves(t).values() for x in xs)


@pytest.mark.parametrize("name, expected", [
    ("no_kd", {"mlm": 1}), ("vanilla_kd", {"mlm": 1, "soft_ce": 1}),
    ("distilbert", {"soft_kl": 5, "mlm": 2, "cosine": 1}), ("tinybert", {"embd": 1, "attn": 1, "hidn": 1}),
    ("minilm", {"attn": 1, "value": 1}), ("minilmv2", {"qq": 1, "kk": 1, "vv": 1})])
def test_the_terms_and_weights_of_each_strategy(name, expected):
    assert {n: term.weight for n, term in kd.STRATEGIES[name].terms.items()} == expected


def test_a_strategy_computes_its_formula_from_the_outputs():
    """The terms pick the right tensors: each strategy's total against the losses called by hand, of the layers that
    its text or its released code names (in a real run: test_promises.py)."""
    assert {name: strategy.layers for name, strategy in EVERY} == dict.fromkeys(dict(EVERY), (-1,)) | {
        "tinybert as released": (-1, 0)}
    torch.manual_seed(1)
    s, t, labels = side(12), side(12), torch.randint(0, V, (M,))
    (q, k, v), (q0, k0, _) = s["qkv"]
    (qt, kt, vt), (q0t, k0t, _) = t["qkv"]
    flat = partial(torch.Tensor.transpose, dim0=1, dim1=2)
    relations = [kd.relation_kl(flat(a).flatten(2), flat(b).flatten(2), 3) for a, b in ((q, qt), (k, kt), (v, vt))]
    mlm, soft = kd.masked_lm_loss(s["logits"], labels), kd.soft_cross_entropy(s["logits"], t["logits"], 1.0)
    attention, hidden = kd.attention_mse(q, k, qt, kt), kd.hidden_mse(s["hidden"], t["hidden"])
    cosine = kd.cosine_loss(s["hidden"], t["hidden"])
    for loss in (kd.soft_cross_entropy, kd.soft_kl, kd.soft_cross_entropy_over_v):   # tau is 1 unless given
        assert loss(s["logits"], t["logits"]) == loss(s["logits"], t["logits"], 1.0)
    by_hand = {
        "no_kd": mlm, "vanilla_kd": mlm + soft, "vanilla_kd as released": mlm + soft / V,
        "distilbert": 5 * kd.soft_kl(s["logits"], t["logits"], 2.0) + 2 * mlm + cosine,
        "tinybert": kd.embedding_mse(s["embedding"], t["embedding"]) + attention + hidden,
        "tinybert as released": kd.attention_mse(q0, k0, q0t, k0t) + attention + hidden,
        "minilm": kd.attention_kl(q, k, qt, kt) + kd.value_relation_kl(v, vt),
        **dict.fromkeys(("minilmv2", "minilm as released", "minilmv2 as released"), sum(relations))}
    assert set(by_hand) == {name for name, _ in EVERY}
    for name, strategy in EVERY:
        total, _ = kd.loss_terms(strategy, s, t, kd.Context(labels, strategy.tau, 3, torch.nn.ModuleDict()))
        assert total.item() == pytest.approx(by_hand[name].item(), rel=1e-12), name


@pytest.mark.parametrize("width_s, width_t, expected", [
    (768, 768, 48), (1024, 1024, 64), (768, 1024, 64), (312, 768, 24), (384, 768, 48), (128, 128, 8), (32, 48, 2),
    (7, 48, 1), (8, 8, 1)])
def test_relation_heads(width_s, width_t, expected):
    assert kd.relation_head_count(width_s, width_t) == expected
