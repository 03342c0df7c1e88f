"""Each loss against the slowest possible transcription of its formula, in Python floats and loops."""
import math

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


# ---------------------------------------------------------------------- one row per loss: inputs, transcription

def cases(padding):
    real, lens = real_mask(padding), lengths(padding)
    z_s, z_t, labels = rand(M, V), rand(M, V), torch.randint(0, V, (M,))
    e_s, e_t, wide = rand(B, S, D), rand(B, S, D), rand(B, S, 7)
    proj = torch.nn.Linear(7, D, bias=False, dtype=torch.float64)
    W = proj.weight.tolist()
    q_s, k_s, v_s = rand(B, N, S, H), rand(B, N, S, H), rand(B, N, S, H)
    q_t, k_t, v_t = rand(B, N, S, 2 * H), rand(B, N, S, 2 * H), rand(B, N, S, 2 * H)   # same heads, other width
    return {
        "mlm": (kd.masked_lm_loss, [z_s, labels], slow_mlm(z_s.tolist(), labels.tolist())),
        "soft_ce": (kd.soft_cross_entropy, [z_s, z_t, 1.0], slow_soft_ce(z_s.tolist(), z_t.tolist(), 1.0)),
        "soft_ce_tau2": (kd.soft_cross_entropy, [z_s, z_t, 2.0], slow_soft_ce(z_s.tolist(), z_t.tolist(), 2.0)),
        "hidden": (kd.hidden_mse, [e_s, e_t, None, real], slow_mse(e_s.tolist(), e_t.tolist(), None, lens)),
        "hidden_proj": (kd.hidden_mse, [wide, e_t, proj, real], slow_mse(wide.tolist(), e_t.tolist(), W, lens)),
        "embedding": (kd.embedding_mse, [e_s, e_t, None, real], slow_mse(e_s.tolist(), e_t.tolist(), None, lens)),
        "embedding_proj": (kd.embedding_mse, [wide, e_t, proj, real], slow_mse(wide.tolist(), e_t.tolist(), W, lens)),
        "attention_mse": (kd.attention_mse, [q_s, k_s, q_t, k_t, real],
                          slow_attention_mse(*(x.tolist() for x in (q_s, k_s, q_t, k_t)), lens)),
        "attention_kl": (kd.attention_kl, [q_s, k_s, q_t, k_t, real],
                         slow_attention_kl(*(x.tolist() for x in (q_s, k_s, q_t, k_t)), lens)),
        "value_relation_kl": (kd.value_relation_kl, [v_s, v_t, real],
                              slow_attention_kl(*(x.tolist() for x in (v_s, v_s, v_t, v_t)), lens)),
    }


NAMES = list(cases(False))


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_equals_its_transcription(name, padding):
    torch.manual_seed(1)
    loss, args, expected = cases(padding)[name]
    assert loss(*args).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("strategy", kd.STRATEGIES)
def test_gradient_reaches_every_projection_and_no_teacher(strategy):
    torch.manual_seed(0)
    strategy = kd.STRATEGIES[strategy]

    def side(width):
        heads = (B, N, S, width // N)
        return {"embedding": rand(B, S, width), "q": rand(*heads), "k": rand(*heads), "v": rand(*heads),
                "hidden": rand(B, S, width), "logits": rand(M, V)}
    s, t = ({k: v.requires_grad_() for k, v in side(width).items()} for width in (6, 12))
    proj = kd.projections(strategy, 6, 12).double()
    total, terms = kd.loss_terms(strategy, s, {k: v.detach() for k, v in t.items()},
                                 kd.Context(torch.randint(0, V, (M,)), 1.0, proj))
    total.backward()
    assert total.item() == pytest.approx(sum(term.weight * terms[name].item() for name, term in strategy.terms.items()))
    needed = {"qkv": ("q", "k", "v")}
    reached = {k for k, v in s.items() if v.grad is not None and v.grad.abs().sum() > 0}
    allowed = {k for need in strategy.student_needs for k in needed.get(need, (need,))}
    assert reached and reached <= allowed and all(p.grad.abs().sum() > 0 for p in proj.parameters())
