"""The birth of a student: its shape, its first weights, what it copies of its teacher.  Read it after step.py."""
import dataclasses
import math

import torch

from model import BertForMaskedLM


def student_shape(config, directory):
    """The BertConfig of a run's student."""
    std = config.of_recipe("init_std") or math.sqrt(0.4 / config.shape.hidden_size)
    return dataclasses.replace(
        config.shape, vocab_size=len(directory.vocab), pad_token_id=directory.special["[PAD]"],
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=max(512, config.seq_len), initializer_range=std)


def initial_student(config, directory):
    """The student before its first step: the same random weights in every arm of a seed, LM head included."""
    torch.manual_seed(config.seed)
    return BertForMaskedLM(student_shape(config, directory))


def evenly(deep, depth):
    """So many of `deep` layers: the first, the last and evenly between, halves rounded up; the first of one."""
    return [(2 * i * (deep - 1) + depth - 1) // max(1, 2 * (depth - 1)) for i in range(depth)]


def start_from(student, teacher, layers=(), head=True, whole=True):
    """Copies embeddings, LM head and these layers of the teacher, or its first, its last and between them evenly
    (12 to 6: 0, 2, 4, 7, 9, 11, as DistilBERT's released script); the embeddings alone if not `whole`.  Says what was
    copied.  `head`: whether the teacher has an LM head."""
    weights, prefix = teacher.state_dict(), "bert.encoder.layer."
    layers = layers or evenly(teacher.config.num_hidden_layers, student.config.num_hidden_layers)
    for name, p in student.state_dict().items():
        if not (name.startswith("bert.embeddings.") or whole and (head or name.startswith(prefix))):
            continue
        if name.startswith(prefix):
            layer, rest = name.removeprefix(prefix).split(".", 1)
            name = f"{prefix}{layers[int(layer)]}.{rest}"
        rows = min(len(p), len(weights[name]))                  # position embeddings may differ in number
        p[:rows].copy_(weights[name][:rows])
    if not whole:
        return "the teacher's embeddings and random layers"
    return (f"teacher weights (its layers {', '.join(map(str, layers))}, from 0)"
            + ("" if head else "; the LM head starts random: the teacher has none"))
