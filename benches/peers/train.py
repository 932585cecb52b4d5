"""Steps of LoRA on a frozen model under PyTorch with PEFT and in planish, in alternation.

    sh benches/peers/setup.sh torch
    target/peers/venv/bin/python benches/peers/train.py [--rounds N] [--threads N] [CASE ...]

Cases: f32, bf16 (SmolLM2-135M, rank 8 on q and v, 4 sequences of 256 tokens), forward-f32, forward-bf16 (the
loss alone), checkpoint (f32 with activation checkpointing on both sides), minilm (all-MiniLM-L6-v2, 32 texts
of 64 tokens into two classes, rank 8 on all linear layers). Both sides read the same file and the same tokens,
and take a step of plain gradient descent; the loss before the first step must agree. Peak memory is that of a
process of its own. Of planish it takes `planish bench train`. Runs disturbed by other programs are made again
(quiet.py). `peer CASE THREADS REPETITIONS` as the arguments runs the other side alone.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import PEERS, ROOT, SMOL, peak_mib
from prepare import MINILM
from quiet import ALLOWED, shown, spread, undisturbed

PROGRAM = os.environ.get("PLANISH", str(ROOT / "target" / "release" / "planish"))
RANK, ALPHA = 8, 16
CASES = {
    "f32": [],
    "bf16": ["--precision", "bf16"],
    "forward-f32": ["--forward-only"],
    "forward-bf16": ["--forward-only", "--precision", "bf16"],
    "checkpoint": ["--checkpoint"],
    "minilm": [],
}
LINEARS = ["query", "key", "value", "dense"]


def shape(case):
    return (32, 64) if case == "minilm" else (4, 256)


def tokens(batch, length, vocab):
    import torch
    rows, places = torch.arange(batch)[:, None], torch.arange(length)[None]
    return (rows * 7919 + places * 104_729 + 13) % vocab


def decoder(case):
    """A function that takes a step and gives its loss."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    model = AutoModelForCausalLM.from_pretrained(str(SMOL.parent), gguf_file=SMOL.name, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    if case == "checkpoint":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = tokens(*shape(case), model.config.vocab_size)
    return model, lambda: model(ids, labels=ids, use_cache=False).loss


def encoder(case):
    import peft
    import torch
    from transformers import AutoModel
    body = AutoModel.from_pretrained(str(MINILM), dtype=torch.float32, add_pooling_layer=False)
    body = peft.get_peft_model(body, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    model = torch.nn.ModuleDict({"body": body, "head": torch.nn.Linear(body.config.hidden_size, 2)})
    batch, length = shape(case)
    ids, classes = tokens(batch, length, body.config.vocab_size), torch.arange(batch) % 2

    def loss():
        states = body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return torch.nn.functional.cross_entropy(model["head"](states.mean(1)), classes)
    return model, loss


def peer_side(case, threads, repetitions):
    import torch
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, loss = (encoder if case == "minilm" else decoder)(case)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)

    def step():
        if case.startswith("forward"):
            with torch.inference_mode():
                return loss().item()
        optimizer.zero_grad(set_to_none=True)
        found = loss()
        found.backward()
        optimizer.step()
        return found.item()

    first, seconds = step(), []
    for _ in range(repetitions):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({
        "seconds": spread(seconds), "peak_mib": peak_mib(), "loss": first, "trained": sum(p.numel() for p in trained),
        "version": ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "peft")),
    }))


def run(words, **environment):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return json.loads(done.stdout[done.stdout.index("{"):])


def peer(case, options):
    threads = {v: str(options.threads) for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    words = [sys.executable, __file__, "peer", case, options.threads, options.repetitions]
    return run(words, HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", **threads)


def planish(case, options):
    batch, length = shape(case)
    model = MINILM if case == "minilm" else SMOL
    targets = LINEARS if case == "minilm" else ["q_proj", "v_proj"]
    found = run([PROGRAM, "--output", "json", "bench", "train", model, "--batch", batch, "--length", length, "--rank", RANK,
                 "--targets", ",".join(targets), "--threads", options.threads, "--repetitions",
                 options.repetitions, "--no-limits", *CASES[case]])
    return {"seconds": found["seconds_per_step"], "peak_mib": found["peak_bytes"] / 2**20, "loss": found["first_loss"],
            "trained": found["trained"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repetitions", type=int, default=3, help="of each program in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=PEERS / "results" / "train.json")
    options = parser.parse_args()
    if options.rounds < 1 or options.repetitions < 1:
        parser.error("at least one round and one repetition are needed")
    report = {"rounds": options.rounds, "repetitions": options.repetitions, "threads": options.threads, "cases": {}}
    for case in options.cases or CASES:
        seconds, peaks, others, last = {"peer": [], "planish": []}, {"peer": [], "planish": []}, [], {}
        for number in range(options.rounds):
            sides = [("peer", peer), ("planish", planish)]
            for side, measure in sides if number % 2 == 0 else sides[::-1]:
                found, busy = undisturbed(lambda: measure(case, options))
                others.append(round(busy, 3))
                seconds[side].append(found["seconds"]["median"])
                peaks[side].append(found["peak_mib"])
                last[side] = found
        losses = [last[side]["loss"] for side in ("peer", "planish")]
        ratio = spread([a / b for a, b in zip(seconds["planish"], seconds["peer"])])
        memory = spread([a / b for a, b in zip(peaks["planish"], peaks["peer"])])
        disturbed = sum(busy > ALLOWED for busy in others)
        report["cases"][case] = {
            "version": last["peer"]["version"], "trained": [last[s]["trained"] for s in ("peer", "planish")],
            "seconds": {side: spread(values) for side, values in seconds.items()}, "ratio": ratio,
            "peak_mib": {side: spread(values) for side, values in peaks.items()}, "memory_ratio": memory,
            "first_loss": losses, "cores_of_others": others, "disturbed": disturbed,
        }
        print(f"{case:14} peer {shown(spread(seconds['peer']), 2):24} planish {shown(spread(seconds['planish']), 2):24} s/step "
              f"ratio {shown(ratio, 2)}; memory {memory['median']:.2f} of {spread(peaks['peer'])['median']:.0f} MiB; "
              f"loss {losses[0]:.4f} and {losses[1]:.4f}" + (f"   {disturbed} of {len(others)} runs disturbed" if disturbed else ""),
              flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer_side(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
