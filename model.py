"""The BERT encoder, its MLM head and its classification head, by hand.  Read it after tinybert_in_25_lines.py.

The module tree carries the tensor names of Hugging Face's BERT, so `state_dict()` is that format and nothing
has to be exported.  A forward pass computes what it is asked for (`want`) and stops there:

    "embedding"         the embedding block's output, after its LayerNorm, before dropout      (B, S, D)
    ("qkv", l)          queries, keys and values of layer l                                (B, N, S, H) each
    ("hidden", l)       the output of layer l, after its LayerNorm                             (B, S, D)
    "logits"            the MLM head's output, at the masked positions only                    (M, V)
    "all_logits"        the same at every position                                             (B, S, V)
                        on CUDA V is rounded up to a multiple of 64: surplus columns have probability 0

l counts from 0, or from -1 for the last layer; "qkv" and "hidden" alone are the last layer's.

Legend, for all files: B batch, S sequence, M masked positions, V vocabulary, N heads, H head size, D hidden size, L
layers; `_s` student, `_t` teacher; `tau` temperature.  `real` is a (B, S) mask of what is not padding, or None.

Sources: Devlin 2018 (arXiv 1810.04805); Vaswani 2017 (arXiv 1706.03762) for the post-LN layer.
"""
import math
import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LARGEST = 4e9               # parameters that --size can ask for
ACTIVATIONS = {"gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu}


@dataclass
class BertConfig:
    """The fields of Hugging Face's config.json that the computation depends on, with BERT-base's values."""
    vocab_size: int = 30522
    hidden_size: int = 768                      # D
    num_hidden_layers: int = 12                 # L
    num_attention_heads: int = 12               # N
    intermediate_size: int = 3072               # 4 D
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    @classmethod
    def of_size(cls, size, heads=None, **other):
        """'6L768' -> 6 layers of width 768; heads = width / 64 unless given; feed-forward 4 x width."""
        found = re.fullmatch(r"([1-9][0-9]{0,2})L([1-9][0-9]{0,4})", size)
        if not found:
            raise ValueError(f"size {size!r} is not LAYERSLWIDTH, such as 6L768")
        layers, width = map(int, found.groups())
        heads = heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of {heads} heads")
        c = cls(num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads,
                intermediate_size=4 * width, **other)
        if (count := width * (12 * layers * width + c.vocab_size)) > LARGEST:
            raise ValueError(f"size {size!r} has {count:.1e} parameters, and {LARGEST:.0e} are the most")
        return c

    @property
    def size(self):
        return f"{self.num_hidden_layers}L{self.hidden_size}"


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size, padding_idx=c.pad_token_id)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, ids, token_types=None):
        x = self.word_embeddings(ids) + self.position_embeddings.weight[:ids.shape[1]]     # (B, S, D)
        x = x + (self.token_type_embeddings.weight[0] if token_types is None
                 else self.token_type_embeddings(token_types))
        return self.LayerNorm(x)


class AddAndNorm(nn.Module):
    """The end of both residual branches: project back to D, drop out, add the branch's input, normalise."""
    def __init__(self, c, width_in):
        super().__init__()
        self.dense = nn.Linear(width_in, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.dropout = c.hidden_dropout_prob

    def forward(self, y, x):
        return self.LayerNorm(x + dropout(self.dense(y), self.dropout if self.training else 0.0))


def dropout(x, p):
    """Each element 0 with probability p, else divided by 1 - p."""
    if x.device.type != "cpu" or not 0 < p < 1 or torch.compiler.is_compiling():
        return F.dropout(x, p)
    # torch draws a whole random number for each element; 16 bits of one do, p rounded to a multiple of 2^-16
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2 ** 63, None).view(torch.int16)
    keep = bits[:x.numel()].view(x.shape) >= round(p * 2 ** 16) - 2 ** 15
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def on_gpu(x):
    """Where a product is laid out for a GPU: the same result in fewer and better aligned kernels."""
    return x.device.type == "cuda"


def attention(q, k, v, mask, p):
    """softmax(q k^T / sqrt(H)) v, all (B, N, S, H); `mask`, true where a query sees a key; dropout p."""
    if mask is not None and on_gpu(q):  # lengths vary: cuDNN, torch's first choice, builds a graph for each
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    if q.device.type != "cpu" or not (q.requires_grad or p):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    # torch's fused CPU kernel: 3 times these lines backwards, in bf16, and no dropout (docs/throughput.md)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                               # (B, N, S, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return dropout(scores.softmax(-1), p).to(v.dtype) @ v


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.heads, self.attention_dropout = c.num_attention_heads, c.attention_probs_dropout_prob
        self.act = ACTIVATIONS[c.hidden_act]
        qkv = {name: nn.Linear(D, D) for name in ("query", "key", "value")}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(qkv), "output": AddAndNorm(c, D)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, c.intermediate_size)})
        self.output = AddAndNorm(c, c.intermediate_size)

    def qkv(self, x):
        """Queries, keys and values with the heads split: three tensors (B, N, S, H)."""
        (B, S, D), parts = x.shape, [self.attention["self"][name] for name in ("query", "key", "value")]
        if on_gpu(x):                                                   # one product for the three
            weight, bias = (torch.cat([getattr(p, name) for p in parts]) for name in ("weight", "bias"))
            y = F.linear(x, weight, bias)                               # (B, S, 3 D)
            return y.view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return tuple(part(x).view(B, S, self.heads, D // self.heads).transpose(1, 2) for part in parts)

    def forward(self, x, qkv, mask):
        a = attention(*qkv, mask, self.attention_dropout if self.training else 0.0)         # (B, N, S, H)
        x = self.attention["output"](a.transpose(1, 2).flatten(2), x)                       # (B, S, D)
        return self.output(self.act(self.intermediate["dense"](x)), x)


class BertModel(nn.Module):
    """The encoder.  `pooler` (tanh(W h_[CLS] + b)) exists only where a classification head reads it."""
    def __init__(self, config, pooler=False):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.dropout = config.hidden_dropout_prob
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(config)
                                                            for _ in range(config.num_hidden_layers))})
        if pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        initialise(self, config)

    def forward(self, ids, real=None, token_types=None, want=("hidden",), causal=False):
        """ids (B, S) -> a dict with what `want` names (see above), under the names that it has there.

        causal: each position sees itself and those before it, and no other."""
        layers, found = self.encoder["layer"], {}
        places = [w if isinstance(w, tuple) else (w, -1) for w in want]
        places = [(kind, i % len(layers)) for kind, i in places]
        to_qkv, to_hidden = (max([-1, *(i for kind, i in places if kind == last)])
                             for last in ("qkv", "hidden"))
        mask = None if real is None else real[:, None, None, :].bool()                      # (B, 1, 1, S)
        if causal:
            seen = torch.ones(2 * ids.shape[1:], dtype=torch.bool, device=ids.device).tril()    # (S, S)
            mask = seen if mask is None else mask & seen

        x = self.embeddings(ids, token_types)                                               # (B, S, D)
        if "embedding" in want:
            found["embedding", len(layers) - 1] = x
        x = dropout(x, self.dropout if self.training else 0.0)
        for i, layer in enumerate(layers[:max(to_qkv, to_hidden) + 1]):
            qkv = layer.qkv(x)
            if ("qkv", i) in places:
                found["qkv", i] = qkv
            if i < to_qkv or i <= to_hidden:
                x = layer(x, qkv, mask)
            if ("hidden", i) in places:
                found["hidden", i] = x
        return {w: found[place] for w, place in zip(want, places, strict=True)}


class MLMHead(nn.Module):
    """Transform and decode.  The decoder is the word embedding: only its bias is a parameter here."""
    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.predictions = nn.ModuleDict({"transform": nn.ModuleDict({
            "dense": nn.Linear(c.hidden_size, c.hidden_size),
            "LayerNorm": nn.LayerNorm(c.hidden_size, c.layer_norm_eps)})})
        self.predictions.register_parameter("bias", nn.Parameter(torch.zeros(c.vocab_size)))

    def forward(self, h, decoder):
        transform = self.predictions["transform"]
        h, bias = transform["LayerNorm"](self.act(transform["dense"](h))), self.predictions.bias
        if on_gpu(h):       # rows of 30,522 logits are not aligned; columns of -1e4 get no probability
            more = -len(decoder) % 64
            decoder, bias = F.pad(decoder, (0, 0, 0, more)), F.pad(bias, (0, more), value=-1e4)
        return F.linear(h, decoder, bias)                                                   # (..., V)


class BertForMaskedLM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.cls = MLMHead(config)
        initialise(self.cls, config)

    def forward(self, ids, masked=None, real=None, token_types=None, want=("logits",), causal=False):
        """As BertModel, plus logits at `masked` (B, k): (M, V), M = B k; all (B, S, V) if None."""
        heads = [w for w in want if w in ("logits", "all_logits")]
        states = [w for w in want if w not in heads] + ["hidden"] * bool(heads)
        out = self.bert(ids, real, token_types, states, causal)
        decoder = self.bert.embeddings.word_embeddings.weight
        if "all_logits" in want:
            out["all_logits"] = self.cls(out["hidden"], decoder)
        if "logits" in want:
            x = out["all_logits" if "all_logits" in want else "hidden"]
            if masked is not None:
                at = masked[..., None].expand(-1, -1, x.shape[-1])
                x = x.gather(1, at).flatten(0, 1)                                           # (M, D) or (M, V)
            out["logits"] = x if "all_logits" in want else self.cls(x, decoder)
        return out


class BertForSequenceClassification(nn.Module):
    def __init__(self, config, num_labels):
        super().__init__()
        self.config = config
        self.bert = BertModel(config, pooler=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, num_labels)
        initialise(self.classifier, config)

    def forward(self, ids, real=None, token_types=None):
        """ids (B, S) -> logits (B, num_labels)."""
        h = self.bert(ids, real, token_types)["hidden"][:, 0]                               # (B, D): [CLS]
        return self.classifier(self.dropout(torch.tanh(self.bert.pooler["dense"](h))))


def initialise(module, config):
    """BERT's initialisation: N(0, 0.02) for weights and embeddings, 0 for biases and [PAD]."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Embedding):
            nn.init.normal_(m.weight, std=config.initializer_range)
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
        if isinstance(m, nn.Embedding) and m.padding_idx is not None:
            with torch.no_grad():
                m.weight[m.padding_idx].zero_()
