"""The tour: one sentence through teacher, student and every loss, with real numbers.  Run it after
tinybert_in_25_lines.py and before you read model.py: as a whole, or cell by cell in an editor that knows `# %%`.

    python exercises/tour.py

Each loss is computed twice: by kd_losses.py, and here by hand in a line or two.  The two must agree to ten
digits, or the tour stops.  It reads the teacher in teacher/, downloads nothing and takes seconds.
"""
import argparse
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__" and Path(sys.argv[0]).name == "tour.py":     # as a whole: no flags, and `| head` ends it
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    signal.signal(getattr(signal, "SIGPIPE", signal.SIGTERM), signal.SIG_DFL)

import numpy as np
import torch
from tokenizers import Tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import Blocks
from model import BertConfig, BertForMaskedLM
from plumbing.tokenizer import SPECIAL
from strategies import AS_RELEASED, STRATEGIES, Context, loss_terms, mobilebert_stage, relation_head_count

TEACHER = ROOT / "teacher"

# %% 1. A sentence becomes numbers.  The tokenizer cuts it into pieces, and each piece has a number, its id.
text = ("Returns a new tensor with the same shape as the input, "
        "filled with random numbers from a normal distribution.")
tokenizer = Tokenizer.from_file(str(TEACHER / "tokenizer.json"))
vocab = tokenizer.get_vocab()
pieces = tokenizer.encode(text, add_special_tokens=False)
print(f"{text}\n{len(pieces.ids)} pieces out of a vocabulary of V = {len(vocab):,}:")
print("  ".join(f"{piece} {i}" for piece, i in zip(pieces.tokens, pieces.ids, strict=True)))

# %% 2. A block is [CLS], ids, [SEP].  15% of its positions become questions.  Of these 80% show [MASK], 10%
# show a random piece and 10% show the right one.  The model cannot know which piece is wrong, so it must
# doubt each.
V, S = len(vocab), len(pieces.ids) + 2
directory = SimpleNamespace(path=TEACHER, split=lambda name: np.array(pieces.ids), vocab=vocab,
                            special={token: vocab[token] for token in SPECIAL})
ids, masked, labels = map(torch.from_numpy, Blocks(directory, "train", S, seed=11).batch(0, 1))
labels, M = labels.flatten(), masked.shape[1]
print(f"\nThe block, S = {S}, with M = {M} questions:")
print(" ".join(map(tokenizer.id_to_token, ids[0].tolist())))
for at, label in zip(masked[0].tolist(), labels.tolist(), strict=True):
    shown, answer = map(tokenizer.id_to_token, (ids[0, at].item(), label))
    print(f"  position {at:2} shows {shown:8} the answer is {answer}")

# %% 3. The teacher: 4 layers of width 128.  The student: 2 layers of width 64, as many heads, random weights.
# Numbers have 64 bits here, so that two ways of computing the same thing agree to many digits.
shape = {k: v for k, v in json.loads((TEACHER / "config.json").read_text("utf-8")).items() if hasattr(BertConfig, k)}
teacher = BertForMaskedLM(BertConfig(**shape)).double().eval().requires_grad_(False)
teacher.load_state_dict(torch.load(TEACHER / "pytorch_model.bin", weights_only=True))
torch.manual_seed(0)
student, wide = (BertForMaskedLM(BertConfig.of_size(size, heads=2, vocab_size=V)).double().eval()
                 for size in ("2L64", "2L128"))                     # `wide` is for what needs equal widths
W = torch.nn.ModuleDict({name: torch.nn.Linear(64, 128, bias=False)     # the student's width to the teacher's
                         for name in ("embedding", "hidden", "hidden1")}).double()

# %% 4. By hand.  All that the losses are made of are these few lines.
def softmax(z):
    return z.exp() / z.exp().sum(-1, keepdim=True)


def kl(p, q):       # how much worse q is than p: summed over the choices, averaged over everything else
    return (p * (p / q).log()).sum(-1).mean()


def mse(x, y):
    return ((x - y) ** 2).mean()


def raw_scores(q, k):   # who looks at whom, before the softmax
    return q @ k.mT / q.shape[-1] ** 0.5


def relation(x):    # heads put together, then cut into N_r new ones: each row says which positions are alike
    x = torch.stack(torch.cat(x.unbind(1), -1).chunk(N_r, -1), 1)                           # (B, N_r, S, H_r)
    return softmax(raw_scores(x, x))


def normal(h):      # mean 0 and deviation 1 at each position
    return (h - h.mean(-1, keepdim=True)) / h.std(-1, correction=0, keepdim=True)


def outputs(model):     # a forward pass leaves behind what it is asked for, and stops there
    return model(ids, masked, want=("embedding", "logits", "qkv", "hidden"))


def check(name, strategy, by_hand, model=student):
    """kd_losses' terms beside those by hand; training makes their weighted sum smaller."""
    strategy = strategy.for_depths(2, 4)
    s = model(ids, masked, want=strategy.want("student"))
    t = teacher(ids, masked, want=strategy.want("teacher"))
    _, terms = loss_terms(strategy, s, t, Context(labels, strategy.tau, N_r, W))
    assert terms.keys() == by_hand.keys(), (name, *terms)
    for term, value in terms.items():
        assert abs(value - by_hand[term]) <= 1e-10 * abs(value), (name, term, value, by_hand[term])
        weight = strategy.terms[term].weight
        print(f"{name:20}{weight:5g} x {term:8}{value:10.6f}   by hand {by_hand[term]:10.6f}")
    done.update(terms)


done, N_r = set(), relation_head_count(64, 128)
s, t = outputs(student), outputs(teacher)
z_s, z_t = s["logits"], t["logits"]                                                         # (M, V)
p_s, p_t = softmax(z_s), softmax(z_t)
(q_s, k_s, v_s), (q_t, k_t, v_t) = s["qkv"], t["qkv"]                                       # (B, N, S, H)
h_s, h_t = s["hidden"], t["hidden"]                                                         # (B, S, D)

# %% 5. Questions with one right answer: the masked language model.  An untrained student gives every piece
# about the same chance, 1 / V, so its loss is about ln V.
mlm = -p_s[range(M), labels].log().mean()
print(f"\nln V = {np.log(V):.3f}; the untrained student's loss is {mlm:.3f}")
check("no_kd", STRATEGIES["no_kd"], dict(mlm=mlm))

# %% 6. Soft targets: the teacher's whole opinion, not one right answer.  Here it is, at each question.
for at, label, p in zip(masked[0].tolist(), labels.tolist(), p_t, strict=True):
    print(f"  position {at:2}, {tokenizer.id_to_token(label)!r:9}: teacher says "
          + ", ".join(f"{tokenizer.id_to_token(i)} {p[i]:.0%}" for i in p.topk(4).indices.tolist()))
soft_ce = -(p_t * p_s.log()).sum(-1).mean()
check("vanilla_kd", STRATEGIES["vanilla_kd"], dict(mlm=mlm, soft_ce=soft_ce))
entropy = -(p_t * p_t.log()).sum(-1).mean()
assert abs(soft_ce - kl(p_t, p_s) - entropy) < 1e-12
print(f"cross-entropy {soft_ce:.4f} - KL {kl(p_t, p_s):.4f} = {entropy:.4f}, the teacher's entropy")

# So that entropy is the floor: no student gets lower.  Now a fault: the paper's released code takes a mean
# over V, too.  Its soft targets weigh V times less, which is next to nothing.
check("vanilla_kd released", AS_RELEASED["vanilla_kd"], dict(mlm=mlm, soft_ce=soft_ce / V))

# %% 7. DistilBERT: softer targets (tau = 2), the true answer, and the direction of the last hidden state.
w, tau = outputs(wide), 2
p_w, h_w = softmax(w["logits"]), w["hidden"]
cosine = (h_w * h_t).sum(-1) / (h_w.norm(dim=-1) * h_t.norm(dim=-1))                        # (B, S)
check("distilbert", STRATEGIES["distilbert"], dict(
    soft_kl=tau ** 2 * kl(softmax(z_t / tau), softmax(w["logits"] / tau)),
    mlm=-p_w[range(M), labels].log().mean(), cosine=(1 - cosine).mean()), wide)

# And one vector for the whole sentence, which is what a sentence encoder is for: its direction.
e_w, e_t = (h.mean(1) / h.mean(1).norm(dim=-1, keepdim=True) for h in (h_w, h_t))                 # (B, D)
check("sentence", STRATEGIES["sentence"], dict(sentence=((e_w - e_t) ** 2).sum(-1).mean()), wide)

# %% 8. TinyBERT: be equal inside.  W makes 128 numbers of the student's 64; it is trained, then thrown away.
check("tinybert", STRATEGIES["tinybert"], dict(
    embd=mse(s["embedding"] @ W["embedding"].weight.T, t["embedding"]),
    attn=mse(raw_scores(q_s, k_s), raw_scores(q_t, k_t)), hidn=mse(h_s @ W["hidden"].weight.T, h_t)))

# %% 9. MiniLM: look where the teacher looks.  Only distributions are compared, so no W is needed.
attn_kl = kl(softmax(raw_scores(q_t, k_t)), softmax(raw_scores(q_s, k_s)))
value = kl(softmax(raw_scores(v_t, v_t)), softmax(raw_scores(v_s, v_s)))
check("minilm", STRATEGIES["minilm"], dict(attn=attn_kl, value=value))
check("minilmv2", STRATEGIES["minilmv2"], {
    name: kl(relation(b), relation(a)) for name, a, b in (("qq", q_s, q_t), ("kk", k_s, k_t), ("vv", v_s, v_t))})

# %% 10. MobileBERT: one layer after another, here the last.
check("mobilebert layer 2", mobilebert_stage(1), dict(
    fmt=mse(normal(h_s @ W["hidden1"].weight.T), normal(h_t)), attn=attn_kl))
assert done > {term for strategy in STRATEGIES.values() for term in strategy.terms}, "the tour misses a loss"
