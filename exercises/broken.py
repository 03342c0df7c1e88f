"""Second session, part 4: five losses, each with one fault that a public repository has or had.  Repair them.

The docstrings say what is meant; arguments are as in kd_losses.py.  `python -m pytest exercises` checks."""
import torch.nn.functional as F


def loss_a(z_s, z_t, tau=1.0):
    """Soft targets: tau^2 * KL(p_t || p_s), mean over the M positions; z (M, V)."""
    return tau ** 2 * F.kl_div((z_s / tau).log_softmax(-1), (z_t / tau).softmax(-1), reduction="mean")


def loss_b(z_s, z_t, tau=1.0):
    """Soft cross-entropy whose gradient keeps its size when the temperature rises; z (M, V)."""
    return -((z_t / tau).softmax(-1) * (z_s / tau).log_softmax(-1)).sum(-1).mean()


def loss_c(q_s, k_s, q_t, k_t):
    """MiniLM's attention loss: KL(A_t || A_s), mean over heads and queries; q, k (B, N, S, H)."""
    a_s, a_t = ((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) for q, k in ((q_s, k_s), (q_t, k_t)))
    return F.kl_div(a_t.log(), a_s, reduction="none").sum(-1).mean()


def loss_d(x_s, x_t, relation_heads):
    """One relation of MiniLMv2: the widths (B, S, D) are split into relation heads (B, N_r, S, H_r)."""
    def relation(x):
        B, S, D = x.shape
        x = x.view(B, relation_heads, S, D // relation_heads)
        return (x @ x.mT / x.shape[-1] ** 0.5).log_softmax(-1)
    return F.kl_div(relation(x_s), relation(x_t), log_target=True, reduction="none").sum(-1).mean()


def loss_e(h_s, h_t, real):
    """TinyBERT's hidden-state loss: mean over real positions and D; h (B, S, D), real (B, S)."""
    return ((h_s - h_t) * real[..., None]).square().mean()
