"""Every loss: one function = one equation.  Read it after model.py.

Pure functions of tensors: student, teacher, a scalar out; held against slow transcriptions by tests/test_kd_losses.py.
First come losses on the logits, then on states, then on attention.
Letters, `_s`, `_t`, `tau` and `real` are those of model.py.

Two rules hold everywhere.  A *distribution* is summed (over V, or over the keys) and then averaged over positions and
heads; a *mean squared error* is averaged over every real element (of sentences summed over D).  (`reduction="mean"` on
a distribution divides by V as well: a factor of 30,522 that several public distillation codes carry.)  And a loss is
computed in at least fp32 with autocast off: under autocast even the matmul of two fp32 tensors runs in bf16.
"""
import contextlib
import functools
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def at_least_fp32(loss):
    """Decorator: autocast off, and 16-bit tensors promoted to fp32 (fp64 stays, so that gradcheck works)."""
    @functools.wraps(loss)
    def promoted(x, *args, **named):
        off = (contextlib.nullcontext() if x.device.type == "meta"         # FLOPs are counted there
               else torch.autocast(x.device.type, enabled=False))
        with off:
            return loss(promote(x), *map(promote, args), **{name: promote(a) for name, a in named.items()})
    return promoted


def promote(x):
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


@at_least_fp32
def masked_lm_loss(z_s, labels):
    """Masked language modelling (Devlin 2018, arXiv 1810.04805, section 3.1).

        mean over M of  -log softmax(z_s)[label]

    z_s (M, V), labels (M,).  Summed over V (one-hot), averaged over the masked positions."""
    return F.cross_entropy(z_s, labels)


@at_least_fp32
def soft_cross_entropy(z_s, z_t, tau=1.0):
    """Soft targets (Hinton 2015, arXiv 1503.02531, section 2): cross-entropy with the teacher's distribution.

        tau^2 * mean over M of  sum over V of  -softmax(z_t / tau) * log_softmax(z_s / tau)

    z_s, z_t (M, V).  Summed over V, averaged over the masked positions; tau^2 keeps the gradient's size."""
    p_t = (z_t / tau).softmax(-1)                                                           # (M, V)
    return -tau ** 2 * (p_t * (z_s / tau).log_softmax(-1)).sum(-1).mean()


@at_least_fp32
def soft_kl(z_s, z_t, tau=1.0):
    """DistilBERT's soft targets (Sanh 2019, arXiv 1910.01108, section 3): KL in place of the cross-entropy.

        tau^2 * mean over M of  sum over V of  p_t * (log p_t - log p_s),   p = softmax(z / tau)

    z_s, z_t (M, V).  Its gradient is soft_cross_entropy's; it is 0 where the student equals the teacher.
    Departure: the original takes all tokens, ours the masked positions."""
    log_s, log_t = (z_s / tau).log_softmax(-1), (z_t / tau).log_softmax(-1)                 # (M, V)
    return tau ** 2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


@at_least_fp32
def soft_cross_entropy_over_v(z_s, z_t, tau=1.0, vocab_size=None):
    """As released (code of arXiv 2404.19319): soft_cross_entropy, but a mean over V too: V times smaller.

    V is `vocab_size` where the logits are wider, with columns of probability 0."""
    surplus = z_s.shape[-1] / (vocab_size or z_s.shape[-1])
    return -tau ** 2 * ((z_t / tau).softmax(-1) * (z_s / tau).log_softmax(-1)).mean() * surplus


@at_least_fp32
def hidden_mse(h_s, h_t, proj=None, real=None):
    """TinyBERT's L_hidn = MSE(H_s W_h, H_t) (Jiao 2020, arXiv 1909.10351, section 3).

    h_s (B, S, D_s), h_t (B, S, D_t); W_h = `proj`, None for equal widths.  Mean over real positions and D_t."""
    error = ((h_s if proj is None else proj(h_s)) - h_t).square().mean(-1)                  # (B, S)
    return error.mean() if real is None else error.masked_select(real.bool()).mean()


def embedding_mse(e_s, e_t, proj=None, real=None):
    """TinyBERT's L_embd = MSE(E_s W_e, E_t) (arXiv 1909.10351, section 3), else as hidden_mse.

    Departure: the text says the embedding matrices; its code, like ours, the embedding block's output."""
    return hidden_mse(e_s, e_t, proj, real)


@at_least_fp32
def feature_map_transfer(h_s, h_t, proj=None, real=None):
    """MobileBERT's feature map transfer (Sun 2020, arXiv 2004.02984, "Training Objectives").

        MSE(LN0(h_s W), LN0(h_t)),   LN0 = LayerNorm without gain and bias

    h_s (B, S, D_s), h_t (B, S, D_t); W = `proj`, None for equal widths.  Mean over real positions and D_t."""
    normal = (F.layer_norm(h, h.shape[-1:], eps=1e-12) for h in (h_s if proj is None else proj(h_s), h_t))
    return hidden_mse(*normal, real=real)


@at_least_fp32
def cosine_loss(h_s, h_t, real=None):
    """DistilBERT's L_cos (arXiv 1910.01108, section 3): mean over real positions of 1 - cos(h_s, h_t).

    h_s, h_t (B, S, D), equal widths."""
    loss = 1 - F.cosine_similarity(h_s, h_t, dim=-1)                                        # (B, S)
    return loss.mean() if real is None else loss.masked_select(real.bool()).mean()


@at_least_fp32
def sentence_mse(h_s, h_t, real=None, pooling="mean"):
    """Distance of sentence embeddings (sentence-transformers' model distillation; LEAF, arXiv 2509.12539).

        mean over B of  || norm(pool(h_s)) - norm(pool(h_t)) ||^2  =  2 - 2 cos,   norm(e) = e / ||e||

    h_s, h_t (B, S, D), equal widths; pool: the mean over real positions, or with "cls" the first one.  Summed over D,
    averaged over sentences.  Departure: both take the embeddings as they are, ours their directions."""
    e_s, e_t = (F.normalize(pooled(h, real, pooling), dim=-1) for h in (h_s, h_t))          # (B, D)
    return (e_s - e_t).square().sum(-1).mean()


def pooled(h, real=None, pooling="mean"):
    """(B, D) of h (B, S, D): the mean over real positions, or with "cls" the first one."""
    if pooling == "cls":
        return h[:, 0]
    return h.mean(1) if real is None else (h * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def scores(q, k):
    """Attention scores before the softmax, q k^T / sqrt(H): (B, N, S, H) twice -> (B, N, S, S)."""
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


@at_least_fp32
def attention_mse(q_s, k_s, q_t, k_t, real=None):
    """TinyBERT's L_attn (arXiv 1909.10351, section 3).

        1/N * sum over heads of MSE(A_s, A_t),   A = q k^T / sqrt(H), before the softmax

    All (B, N, S, H), N equal on both sides.  Mean over heads and pairs of real query and real key."""
    error = (scores(q_s, k_s) - scores(q_t, k_t)).square().mean(1)                          # (B, S, S)
    if real is None:
        return error.mean()
    real = real.bool()
    return error.masked_select(real[:, :, None] & real[:, None, :]).mean()


@at_least_fp32
def attention_kl(q_s, k_s, q_t, k_t, real=None):
    """MiniLM's L_AT (Wang 2020, arXiv 2002.10957, section 3.1): divergence of attention distributions.

        1/(N * rows) * sum over heads, queries of  KL(A_t || A_s),   A = softmax(q k^T / sqrt(H))

    All (B, N, S, H), N equal on both sides (H may differ).  Summed over the real keys, averaged over heads
    and real queries (rows)."""
    if (real is None and q_s.device.type == "cpu" and not torch.compiler.is_compiling()
            and q_s[..., 0].numel() * q_s.shape[-2] >= AttentionKL.at_once):
        return AttentionKL.apply(q_s, k_s, q_t, k_t)
    a_s, a_t = scores(q_s, k_s), scores(q_t, k_t)                                           # (B, N, S, S)
    if real is not None:            # padding keys: a finite minimum, so that no inf - inf can arise
        padding = ~real.bool()[:, None, None, :]
        a_s, a_t = (a.masked_fill(padding, torch.finfo(a.dtype).min) for a in (a_s, a_t))
    log_s, log_t = a_s.log_softmax(-1), a_t.log_softmax(-1)
    kl = log_t.exp() * (log_t - log_s)
    if real is None:
        return kl.sum(-1).mean()
    rows = kl.masked_fill(padding, 0).sum(-1).mean(1)                                       # (B, S)
    return rows.masked_select(real.bool()).mean()


def value_relation_kl(v_s, v_t, real=None):
    """MiniLM's L_VR (arXiv 2002.10957, section 3.2): the same divergence of softmax(v v^T / sqrt(H)).

    v_s, v_t (B, N, S, H).  Sums and averages as attention_kl."""
    return attention_kl(v_s, v_s, v_t, v_t, real)


@at_least_fp32
def relation_kl(x_s, x_t, relation_heads, real=None):
    """One of MiniLMv2's three relations (Wang 2021, arXiv 2012.15828, section 3): queries, keys or values x.

        1/(N_r * rows) * sum over relation heads, rows of  KL(R_t || R_s),   R = softmax(x x^T / sqrt(H_r))

    x_s (B, S, D_s), x_t (B, S, D_t): the heads concatenated; both are split again into N_r = `relation_heads`
    heads of H_r = D / N_r, so widths and head counts may differ.  Sums and averages as attention_kl."""
    x_s, x_t = (x.unflatten(-1, (relation_heads, -1)).transpose(1, 2) for x in (x_s, x_t))  # (B, N_r, S, H_r)
    return attention_kl(x_s, x_s, x_t, x_t, real)


class AttentionKL(torch.autograd.Function):
    """attention_kl of full blocks on a CPU: loss and gradient in one pass over some heads at a time, whose scores
    A_s and A_t stay in the cache.  With respect to A_s the gradient is

        (softmax(A_s) - softmax(A_t)) / (N * rows)

    q_s, k_s, q_t, k_t (B, N, S, H).  No gradient to the teacher, no second derivative."""
    at_once = 2 ** 18           # scores for each thread, a MB; it pays from one such block on

    @staticmethod
    def forward(ctx, *qk):
        (*_, S, H), rows = qk[0].shape, qk[0][..., 0].numel()
        heads = max(1, AttentionKL.at_once * torch.get_num_threads() // S ** 2)
        loss, grads = 0.0, []
        for q_s, k_s, q_t, k_t in zip(*(x.flatten(0, 1).split(heads) for x in qk), strict=True):
            a_s, a_t = (q / math.sqrt(q.shape[-1]) @ k.mT for q, k in ((q_s, k_s), (q_t, k_t)))  # (heads, S, S)
            e_s, e_t = (a.sub_(a.amax(-1, keepdim=True)).exp() for a in (a_s, a_t))
            z_s, z_t = e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
            p_t = e_t.div_(z_t)
            loss += p_t.flatten().dot(a_t.sub_(a_s).flatten()) + (z_s / z_t).log().sum()
            if any(ctx.needs_input_grad):
                g = e_s.div_(z_s).sub_(p_t)
                grads.append((g @ k_s, g.mT @ q_s))
        ctx.save_for_backward(*(torch.cat(g).view_as(qk[0]) / (rows * math.sqrt(H)) for g in zip(*grads, strict=True)))
        return loss / rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *(grad * g for g in ctx.saved_tensors), None, None
