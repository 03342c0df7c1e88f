"""Distillation in 25 lines: TinyBERT, from the loss to the update.  Read it before everything else.

    python -m exercises.tinybert_in_25_lines

A small BERT, the student, learns to be equal inside to a large one, its teacher: in what the embeddings give, in
who looks at whom in the last layer, and in what that layer puts out.

    L = MSE(E_s, E_t) + MSE(A_s, A_t) + MSE(H_s, H_t),    A = Q K^T / sqrt(head size), before the softmax

It needs no labels, only text; random ids stand in for it here.  The rest of this repository is other losses at
other places, and the question whether what they bring is worth the teacher's time.

B blocks, S ids in each, N heads, D numbers for each id; _s is the student's, _t the teacher's.
Source: Jiao 2020 (arXiv 1909.10351), of whose layers arXiv 2404.19319 takes the last alone.
"""
import torch
from torch.nn.functional import mse_loss

from model import BertConfig, BertForMaskedLM


def attention_scores(q, k, v):
    return q @ k.mT / q.shape[-1] ** 0.5


def tinybert(student, teacher, ids):
    inside = ("embedding", "qkv", "hidden")                     # what a forward pass is to leave behind
    with torch.no_grad():                                       # the teacher is asked, and stays as it is
        t = teacher(ids, want=inside)
    s = student(ids, want=inside)
    return (mse_loss(s["embedding"], t["embedding"])            # (B, S, D)
            + mse_loss(attention_scores(*s["qkv"]), attention_scores(*t["qkv"]))        # (B, N, S, S)
            + mse_loss(s["hidden"], t["hidden"]))               # (B, S, D)


if __name__ == "__main__":
    teacher = BertForMaskedLM(BertConfig.of_size("4L128", heads=2, vocab_size=4096)).eval()
    student = BertForMaskedLM(BertConfig.of_size("2L128", heads=2, vocab_size=4096))
    teacher.load_state_dict(torch.load("teacher/pytorch_model.bin"))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(20):
        ids = torch.randint(5, 4096, (16, 32))                  # (B, S)
        loss = tinybert(student, teacher, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step:2}: loss {loss:.3f}")
