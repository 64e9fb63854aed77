"""Train a byte-level BPE tokenizer and a small OPT, Llama, Arcee or Qwen3-MoE from scratch, with few active FFN weights.

    python scripts/get_corpus.py corpus
    python scripts/train_tiny_model.py --corpus corpus/bible.train.txt corpus/sotu.train.txt \\
        --valid corpus/bible.valid.txt corpus/sotu.valid.txt --out tiny-opt

examples/tiny-llama is made with `--architecture llama --hidden 192 --ffn 768 --layers 4 --heads 6`: a gated FFN
whose gate goes through ReLU, as ReluLLaMA's does, in 50 minutes on one thread with `--l1 0.003`. An Arcee has two matrices and
squared ReLU.

examples/tiny-moe is made with `--architecture qwen3_moe --hidden 128 --ffn 80 --layers 4 --heads 4`: a mixture of 16 experts a
layer, of which a token goes to 4. It saw 9.8 M tokens (2395 steps) on one thread with `--precision bf16 --minutes 45`. SiLU
leaves no neuron at zero: what is sparse is the choice of experts. The penalty is on their uneven use, in each layer by itself.

Sparse inference lives off FFN hidden layers that are mostly zero, as those of large ReLU models are. A
small model needs a push that way, so the loss carries a penalty on the hidden activations. The defaults are
the recipe of the model in examples/tiny-opt, which saw 12.9 M tokens (about 3150 steps) in 56 minutes on two
threads. A CPU without bf16 instructions gets through a fraction of that in the same time. The clock drives
the schedule, so a run is not repeatable to the bit.

The output folder holds fp16 safetensors, the tokenizer and train_log.json.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

# OPT's own ids. Its texts begin with </s>, which is also what ends them; <s> exists and is never used.
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]
PAD_ID, END_ID = 1, 2

WARMUP_STEPS = 30
HOLD_UNTIL = 0.4  # share of the run after which the learning rate falls
FLOOR = 0.02  # share of the learning rate that is left at the end
PENALTY_FULL_AT = 0.5  # share of the run over which the penalty grows to its weight
QUICK_WINDOWS = 32
EVAL_BATCH = 16
HEADS_PER_KEY = 3  # attention heads of all but OPT that share a key and a value
ROTARY = {
    "llama": (LlamaConfig, LlamaForCausalLM, "relu"),
    "arcee": (ArceeConfig, ArceeForCausalLM, "relu2"),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, "silu"),
}


@dataclass
class TextSet:
    """A tokenized text, with the size it had in bytes so that losses can be compared across tokenizers."""

    name: str
    tokens: Tensor
    bytes: int


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made nearly orthogonal, for weight matrices (Jordan et al. 2024).

    torch has one from 2.9 on, but it computes in bf16 always, which takes many times longer where the CPU can
    only emulate it. Steps have the size that AdamW's would have, so both optimizers can share a rate.
    """

    COEFFICIENTS = (3.4445, -4.775, 2.0315)  # of the quintic that pulls singular values to about 1
    ITERATIONS = 5

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float,
        dtype: torch.dtype,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    def orthogonalize(self, matrix: Tensor) -> Tensor:
        """Return a matrix with the singular vectors of ``matrix`` and singular values near 1."""
        linear, cubic, quintic = self.COEFFICIENTS
        tall = matrix.shape[0] > matrix.shape[1]
        x = (matrix.T if tall else matrix).to(self.dtype)
        x = x / x.norm().clamp(min=1e-7)
        for _ in range(self.ITERATIONS):
            gram = x @ x.T
            x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
        return x.T if tall else x

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
                average = self.state[weight]["average"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                direction = self.orthogonalize(weight.grad.lerp(average, group["momentum"]))
                size = group["lr"] * 0.2 * math.sqrt(max(weight.shape))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(direction.to(weight.dtype), alpha=-size)


class HiddenMonitor:
    """Watches what enters the second FFN matrix of every layer, which is the hidden layer after ReLU.

    In training mode it collects the activation penalty, in evaluation mode it counts zeros.
    """

    counts = "zeros_by_layer"

    def __init__(self, model: PreTrainedModel, weight: float) -> None:
        self.weight = weight
        if isinstance(model, OPTForCausalLM):
            down = [layer.fc2 for layer in model.model.decoder.layers]
        else:
            down = [layer.mlp.down_proj for layer in model.model.layers]
        self.costs: list[Tensor] = []
        self.zeros = [0] * len(down)
        self.seen = [0] * len(down)
        for index, matrix in enumerate(down):
            matrix.register_forward_pre_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(down: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0]
            if down.training:
                # A plain L1 norm falls when activations shrink and the second matrix grows, and nothing becomes zero.
                # With each neuron priced at the length of the column it multiplies, that trade gains nothing.
                price = down.weight.detach().norm(dim=0)
                self.costs.append((hidden.float().abs() * price).sum(dim=-1).mean())
            else:
                self.zeros[index] += int((hidden == 0).sum())
                self.seen[index] += hidden.numel()

        return observe

    def take_penalty(self, progress: float) -> Tensor:
        """Return the penalty of the last forward pass, averaged over layers, and forget it. It grows as the run goes on."""
        cost = torch.stack(self.costs).mean()
        self.costs.clear()
        return self.weight * min(1.0, progress / PENALTY_FULL_AT) * cost

    def take_shares(self) -> list[float]:
        """Return the share of zeros in each layer since the last call and start counting anew."""
        shares = [round(zeros / max(1, seen), 4) for zeros, seen in zip(self.zeros, self.seen, strict=True)]
        self.zeros, self.seen = [0] * len(shares), [0] * len(shares)
        return shares


class ExpertMonitor:
    """Watches the router of every layer of a mixture of experts.

    In training mode it collects the price of uneven use, in evaluation mode it counts the tokens of each expert.
    """

    counts = "least_and_most_used_expert_by_layer"

    def __init__(self, model: PreTrainedModel, weight: float) -> None:
        self.weight = weight
        routers = [layer.mlp.gate for layer in model.model.layers]
        self.costs: list[Tensor] = []
        self.per_token = model.config.num_experts_per_tok
        self.tokens = torch.zeros(len(routers), model.config.num_experts, dtype=torch.long)
        for index, router in enumerate(routers):
            router.register_forward_hook(self._hook(index))

    def _hook(self, index: int) -> Callable[[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...]], None]:
        def observe(router: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
            logits, _, chosen = outputs
            if router.training:
                # transformers adds up all layers before it compares experts; one layer at a time, each becomes even.
                self.costs.append(load_balancing_loss_func((logits,), self.tokens.shape[1], self.per_token))
            else:
                self.tokens[index] += torch.bincount(chosen.flatten(), minlength=self.tokens.shape[1]).cpu()

        return observe

    def take_penalty(self, progress: float) -> Tensor:
        """Return the penalty of the last forward pass, averaged over layers, and forget it. It is in force from the start."""
        cost = torch.stack(self.costs).mean()
        self.costs.clear()
        return self.weight * cost

    def take_shares(self) -> list[tuple[float, float]]:
        """Return the share of the tokens that the least and the most used expert of each layer got, and start anew."""
        shares = self.per_token * self.tokens / self.tokens.sum(dim=1, keepdim=True).clamp(min=1)
        self.tokens.zero_()
        return [(round(layer.min().item(), 4), round(layer.max().item(), 4)) for layer in shares]


Monitor = HiddenMonitor | ExpertMonitor


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level BPE tokenizer and a small, sparse OPT, Llama, Arcee or Qwen3-MoE from scratch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    text_help = "documents separated by a form feed"
    add("--corpus", nargs="+", type=Path, required=True, metavar="FILE", help=f"training text, {text_help}")
    add("--valid", nargs="+", type=Path, required=True, metavar="FILE", help=f"held-out text, {text_help}")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for model, tokenizer and log")
    add(
        "--architecture",
        choices=["opt", *ROTARY],
        default="opt",
        help="llama: ReLU on a gate; arcee: squared ReLU; qwen3_moe: experts",
    )
    add("--minutes", type=float, default=56.0, help="wall time for the training steps")
    add("--max-steps", type=int, default=None, help="end after this many steps if the time has not run out")
    add("--vocab", type=int, default=4096, help="size of the vocabulary")
    add("--hidden", type=int, default=256, help="width of the model")
    add("--ffn", type=int, default=1024, help="width of the FFN hidden layer, or of each expert's")
    add("--experts", type=int, default=16, help="experts per layer, of qwen3_moe")
    add("--experts-per-token", type=int, default=4, help="experts that a token goes to, of qwen3_moe")
    add("--layers", type=int, default=6, help="number of decoder layers")
    add("--heads", type=int, default=4, help="attention heads per layer")
    add("--context", type=int, default=256, help="tokens per training window, and the model's longest input")
    add("--batch", type=int, default=16, help="windows per step")
    add("--lr", type=float, default=3e-3, help="peak learning rate, for both optimizers")
    add("--l1", type=float, default=0.002, help="weight of the activation penalty; 0 trains a denser model")
    add("--balance", type=float, default=0.01, help="weight of the penalty on uneven use of experts, of qwen3_moe")
    add(
        "--precision",
        choices=["auto", "bf16", "fp32"],
        default="auto",
        help="arithmetic of the training steps; auto is bf16 unless this CPU is slower with it",
    )
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="torch device to train on")
    add("--seed", type=int, default=3, help="seed of the initial weights and of the order of the text")
    add("--log-every", type=int, default=50, metavar="STEPS", help="steps between two rows of the log")
    add("--prompt", default="And it came to pass", help="the sample printed at the end goes on from this")
    return parser.parse_args()


def faster_precision(device: str) -> str:
    """Return bf16, or fp32 on a CPU that is slower with bf16: without instructions for it, it is emulated."""
    if torch.device(device).type != "cpu":
        return "bf16"
    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        x = torch.ones(256, 1024, dtype=dtype)
        x @ x.T  # the first product of a kind also sets things up
        start = time.perf_counter()
        x @ x.T
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


def read_documents(path: Path) -> list[str]:
    """Return the documents of a file whose separator is a form feed."""
    return path.read_text(encoding="utf-8").split("\f")


def train_tokenizer(documents: list[str], vocab: int, context: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE with OPT's special ids which, like OPT's, puts </s> before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that no input is ever unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    end = SPECIAL_TOKENS[END_ID]
    bpe.post_processor = processors.TemplateProcessing(single=f"{end} $A", pair=f"{end} $A $B", special_tokens=[(end, END_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=end,
        eos_token=end,
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=context,
        padding_side="left",
    )


def tokenize(tokenizer: PreTrainedTokenizerFast, documents: list[str], name: str) -> TextSet:
    """Turn documents into one long row of ids; the </s> before each one is what separates them."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents)
    tokens = torch.tensor(list(chain.from_iterable(encoding.ids for encoding in encodings)), dtype=torch.long)
    return TextSet(name, tokens, sum(len(document.encode()) for document in documents))


def mixture(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the configuration of a mixture of experts adds to that of other models."""
    return {
        "head_dim": args.hidden // args.heads,
        "intermediate_size": args.ffn * args.experts_per_token,  # what is active; no layer is without experts
        "moe_intermediate_size": args.ffn,
        "num_experts": args.experts,
        "num_experts_per_tok": args.experts_per_token,
        "norm_topk_prob": True,
        "router_aux_loss_coef": args.balance,
    }


def build_model(args: argparse.Namespace, vocab: int) -> PreTrainedModel:
    """Make a model with fresh weights. There is no dropout: the run sees its text only a few times."""
    common = {
        "vocab_size": vocab,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": args.context,
        "pad_token_id": PAD_ID,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "tie_word_embeddings": True,
    }
    if args.architecture in ROTARY:
        config, model, activation = ROTARY[args.architecture]
        own = {
            "intermediate_size": args.ffn,
            "hidden_act": activation,
            "num_key_value_heads": max(1, args.heads // HEADS_PER_KEY),
        }
        own |= mixture(args) if args.architecture == "qwen3_moe" else {}
        return model(config(**common, **own)).to(args.device)
    own = {"ffn_dim": args.ffn, "word_embed_proj_dim": args.hidden, "activation_function": "relu"}
    own |= {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    return OPTForCausalLM(OPTConfig(**common, **own)).to(args.device)


def build_optimizers(model: PreTrainedModel, lr: float, precision: str) -> list[torch.optim.Optimizer]:
    """Give the weight matrices to Muon, which gets further in a short run, and all else to AdamW.

    The experts of a layer lie in parameters of three dimensions. In 60 steps AdamW got further with them than Muon, expert by
    expert: a held-out loss of 5.70 and not 5.99.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else others).append(parameter)
    muon = Muon(matrices, lr, dtype, momentum=0.95, weight_decay=0.1)
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def lr_factor(step: int, progress: float) -> float:
    """Return the share of the peak rate: warm-up by steps, then hold and linear decay by progress."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = 1.0 if progress < HOLD_UNTIL else max(FLOOR, (1.0 - progress) / (1.0 - HOLD_UNTIL))
    return warmup * decay


def windows(tokens: Tensor, context: int, shift: int = 0) -> Tensor:
    """View ``tokens`` as rows of ``context`` + 1, each of which ends with the first token of the next."""
    return tokens[shift:].unfold(0, context + 1, context)


def training_batches(tokens: Tensor, context: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield full batches without end. Each pass over the text cuts it elsewhere and shuffles the pieces."""
    generator = torch.Generator().manual_seed(seed)
    if len(windows(tokens, context, context - 1)) < batch:
        raise SystemExit("the corpus is too small for one batch: lower --batch or --context")
    while True:
        rows = windows(tokens, context, int(torch.randint(context, (1,), generator=generator)))
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            if len(chosen) == batch:
                yield rows[chosen]


def next_token_loss(model: PreTrainedModel, rows: Tensor, precision: str) -> Tensor:
    """Return the mean cross entropy of predicting each token of ``rows`` from those before it."""
    rows = rows.to(model.device)
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: Tensor, context: int, precision: str, limit: int | None = None) -> float:
    """Return the loss on held-out text, over all windows or over ``limit`` of them spread evenly."""
    rows = windows(tokens, context)
    if not len(rows):
        raise SystemExit("a held-out text is shorter than one window: lower --context")
    if limit is not None and limit < len(rows):
        rows = rows[torch.linspace(0, len(rows) - 1, limit).long()]
    was_training = model.training
    model.eval()
    total = sum(next_token_loss(model, part, precision).item() * len(part) for part in rows.split(EVAL_BATCH))
    model.train(was_training)
    return total / len(rows)


def train_step(
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    loss: Tensor,
    learning_rate: float,
) -> None:
    """Apply one update from ``loss`` to all parameters."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad()


def optimize(
    model: PreTrainedModel, monitor: Monitor, train: TextSet, valid: TextSet, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train until the time or the steps run out, and return the rows of the log."""
    optimizers = build_optimizers(model, args.lr, args.precision)
    batches = training_batches(train.tokens, args.context, args.batch, args.seed)
    limit = args.max_steps or math.inf
    rows: list[dict[str, Any]] = []
    steps, average, start = 0, math.nan, time.monotonic()
    model.train()
    while (progress := max((time.monotonic() - start) / (60 * args.minutes), steps / limit)) < 1:
        loss = next_token_loss(model, next(batches), args.precision)
        train_step(model, optimizers, loss + monitor.take_penalty(progress), args.lr * lr_factor(steps, progress))
        average = loss.item() if steps == 0 else 0.95 * average + 0.05 * loss.item()
        steps += 1
        if steps % args.log_every == 0:
            quick = evaluate(model, valid.tokens, args.context, args.precision, QUICK_WINDOWS)
            rows.append(
                {
                    "steps": steps,
                    "tokens": steps * args.batch * args.context,
                    "seconds": round(time.monotonic() - start, 1),
                    "train_loss": round(average, 4),
                    "valid_loss": round(quick, 4),
                    monitor.counts: monitor.take_shares(),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
        if not math.isfinite(average):
            raise SystemExit(f"the loss is no longer finite after {steps} steps: lower --lr")
    print(f"trained {steps} steps in {time.monotonic() - start:.0f} s", flush=True)
    return rows


def judge(model: PreTrainedModel, monitor: Monitor, texts: list[TextSet], context: int) -> dict[str, dict[str, Any]]:
    """Measure the finished model on the whole of every held-out text, in fp32 whatever the training used."""
    results: dict[str, dict[str, Any]] = {}
    for text in texts:
        monitor.take_shares()
        loss = evaluate(model, text.tokens, context, "fp32")
        results[text.name] = {
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 2),
            "bits_per_byte": round(loss * len(text.tokens) / text.bytes / math.log(2), 4),
            monitor.counts: monitor.take_shares(),
        }
        print(text.name, json.dumps(results[text.name]), flush=True)
    return results


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options for the log, with bare file names: where they lay says nothing to others."""
    names = {"corpus": [path.name for path in args.corpus], "valid": [path.name for path in args.valid]}
    return {key: value for key, value in vars(args).items() if key != "out"} | names


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, context: int) -> str:
    """Let the model go on from ``prompt``, as a glance at what it has learned."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = min(context, inputs["input_ids"].shape[1] + 60)
    output = model.generate(**inputs, max_length=length, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def main() -> None:
    """Train tokenizer and model, round the weights to fp16, judge what will be saved, and save it."""
    args = parse_args()
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.threads))  # the tokenizer's own threads
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.precision == "auto":
        args.precision = faster_precision(args.device)

    documents = [document for path in args.corpus for document in read_documents(path)]
    tokenizer = train_tokenizer(documents, args.vocab, args.context)
    train = tokenize(tokenizer, documents, "train")
    valid = [tokenize(tokenizer, read_documents(path), path.name) for path in args.valid]
    model = build_model(args, len(tokenizer))
    size = model.num_parameters()
    print(f"{len(train.tokens)} training tokens, {size / 1e6:.2f} M parameters, {args.precision}", flush=True)

    mixed = args.architecture == "qwen3_moe"
    monitor: Monitor = ExpertMonitor(model, args.balance) if mixed else HiddenMonitor(model, args.l1)
    history = optimize(model, monitor, train, valid[0], args)
    model.half().float().eval()
    results = judge(model, monitor, valid, args.context)
    print("sample:", sample(model, tokenizer, args.prompt, args.context))

    tokenizer.save_pretrained(args.out)
    model.half().save_pretrained(args.out)
    log = {"settings": settings(args), "parameters": size, "train_tokens": len(train.tokens)}
    log |= {"valid": results, "history": history}
    (args.out / "train_log.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
