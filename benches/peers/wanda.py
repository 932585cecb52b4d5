"""Wanda over all blocks of SmolLM2-135M in PyTorch and in planish, in alternation: seconds, perplexity,
peak memory.

    sh benches/peers/setup.sh torch && target/peers/venv/bin/python benches/peers/wanda.py [ROUNDS]

Both calibrate on the first 32 windows of 512 tokens of wikitext-2 train, prune half of every row of every
linear in the blocks, and are scored on the first 20,000 tokens of valid. Exits 1 when planish takes longer,
needs more than 2.5 GiB, or its perplexity is more than 2 % off PyTorch's. `torch` as the first argument
runs that side alone (it is how the script keeps its memory apart).
"""

import json
import os
import subprocess
import sys
import time

from common import SMOL, TOKENS, WINDOW, Planish, measurements, peak_mib, wikitext

CALIBRATION = 32
SHARE = 0.5


def torch_side():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(
        str(SMOL.parent), gguf_file=SMOL.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(SMOL.parent), gguf_file=SMOL.name)

    def windows(split, count):
        ids = tokenizer(wikitext(split)[: count * 8], add_special_tokens=False)["input_ids"][:count]
        return torch.tensor(ids[: count // WINDOW * WINDOW]).view(-1, WINDOW)

    @torch.inference_mode()
    def perplexity():
        losses = []
        for window in windows("valid", TOKENS):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).double().item())
        return float(torch.tensor(losses, dtype=torch.float64).mean().exp())

    @torch.inference_mode()
    def prune(calibration):
        core = model.model
        hidden = [core.embed_tokens(window[None]) for window in calibration]
        positions = torch.arange(WINDOW)[None]
        rope = core.rotary_emb(hidden[0], positions)

        def through(block, x):
            out = block(x, attention_mask=None, position_ids=positions, position_embeddings=rope,
                        use_cache=False)
            return out[0] if isinstance(out, tuple) else out

        for block in core.layers:
            linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
            squares = {m: torch.zeros(m.in_features) for m in linears}

            def note(module, inputs):
                squares[module] += inputs[0].flatten(0, -2).pow(2).sum(0)

            hooks = [m.register_forward_pre_hook(note) for m in linears]
            for x in hidden:
                through(block, x)
            for hook in hooks:
                hook.remove()
            for m in linears:
                score = m.weight.abs() * squares[m].sqrt()
                gone = score.argsort(dim=1, stable=True)[:, : int(m.in_features * SHARE)]
                m.weight.data.scatter_(1, gone, 0.0)
            hidden = [through(block, x) for x in hidden]

    calibration = windows("train", CALIBRATION * WINDOW)
    start = time.perf_counter()
    prune(calibration)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "perplexity": perplexity(), "mib": peak_mib()}))


def planish_side(round_number):
    planish = Planish()
    calibration, valid = planish.folder / "calibration.txt", planish.folder / "valid.txt"
    calibration.write_text(wikitext("train")[: CALIBRATION * WINDOW * 8], encoding="utf-8")
    valid.write_text(wikitext("valid"), encoding="utf-8")
    planish.run("datasets", "import", calibration, "--id", "calibration")
    planish.run("datasets", "import", valid, "--id", "valid")
    planish.run("models", "import", SMOL, "--id", "smol")
    recipe = planish.folder / "wanda.json"
    recipe.write_text(json.dumps({"steps": [{"wanda": {
        "sparsity": {"share": SHARE},
        "calibration": {"dataset": "datasets/calibration", "sequences": CALIBRATION,
                        "sequence_length": WINDOW, "sampling": "CALIBRATION_SAMPLING_FIRST"}}}]}))
    report = planish.run("run", recipe, "--model", "smol")
    seconds, mib = report["steps"][0]["seconds"], planish.peak_mib()
    scores = measurements(planish.run("evaluate", "--model", "smol", "--dataset", "valid",
                                      "--context", WINDOW, "--max-tokens", TOKENS))
    planish.stop()
    return {"seconds": seconds, "perplexity": scores["perplexity"], "mib": mib}


if sys.argv[1:] == ["torch"]:
    torch_side()
    sys.exit()

rounds, worst = int(sys.argv[1]) if len(sys.argv) > 1 else 2, []
results = {"torch": [], "planish": []}
for number in range(rounds):
    done = subprocess.run([sys.executable, __file__, "torch"], check=True, capture_output=True, text=True)
    results["torch"].append(json.loads(done.stdout.splitlines()[-1]))
    results["planish"].append(planish_side(number))
    for who in results:
        r = results[who][-1]
        print(f"round {number + 1} {who:8} {r['seconds']:7.1f} s   perplexity {r['perplexity']:8.3f}   "
              f"peak {r['mib']:6.0f} MiB", flush=True)


def median(who, what):
    return sorted(r[what] for r in results[who])[rounds // 2]


time_ratio = median("planish", "seconds") / median("torch", "seconds")
quality_ratio = median("planish", "perplexity") / median("torch", "perplexity")
peak = max(r["mib"] for r in results["planish"])
print(f"planish / torch: time {time_ratio:.2f}, perplexity {quality_ratio:.4f}; planish peak {peak:.0f} MiB")
sys.exit(not (time_ratio <= 1.0 and abs(quality_ratio - 1) <= 0.02 and peak <= 2560))
