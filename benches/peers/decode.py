"""llama.cpp and planish on the same GGUF files, in alternation: decoding 128 tokens after 32, and 512 tokens
at once.

    sh benches/peers/setup.sh decode
    target/peers/venv/bin/python benches/peers/decode.py [--rounds N] [--threads N] [--cache f32|f16] [FILE ...]

Without files: SmolLM2-135M as Q4_1 (as it came), Q4_0, Q8_0 and Q4_K_M, and Gemma 3 270M as Q4_K_M. Each round
runs each program once, in turn first and second, in a process of its own, and takes the median of its
repetitions; the ratio is that of the two in the same round. llama.cpp runs twice, with weights laid out anew for
this processor (its default) and as in the file, and for each part the faster of the two is the peer. A run during which other programs took more than
a quarter of a core is made again (quiet.py). Everything is written to results/decode.json of the peers' folder.
`llama FILE THREADS REPETITIONS` as the arguments runs that side alone.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import PEERS, ROOT, SMOL
from prepare import GEMMA, QUANTIZED
from quiet import ALLOWED, shown, spread, undisturbed

PROMPT, DECODE, PREFILL = 32, 128, 512
PARTS = {"decode": DECODE, "prefill": PREFILL}
VARIANTS = {"llama.cpp": True, "llama.cpp as in the file": False}
PROGRAM = os.environ.get("PLANISH", str(ROOT / "target" / "release" / "planish"))


def llama_side(file, threads, repetitions):
    import llama_cpp as L
    import numpy as np
    quiet = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(quiet, ctypes.c_void_p(0))
    L.llama_backend_init()
    rates = {name: llama_rates(L, np, file, threads, repetitions, anew) for name, anew in VARIANTS.items()}
    print(json.dumps({"rates": rates, "system": L.llama_print_system_info().decode(),
                      "version": f"llama-cpp-python {L.__version__}"}))


def llama_rates(L, np, file, threads, repetitions, anew):
    model_settings = L.llama_model_default_params()
    model_settings.use_extra_bufts = anew
    model = L.llama_model_load_from_file(file.encode(), model_settings)
    settings = L.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
    settings.n_threads = settings.n_threads_batch = threads
    context = model and L.llama_init_from_model(model, settings)
    if not context:
        sys.exit(f"llama.cpp does not load {file}")
    vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    memory = L.llama_get_memory(context)
    tokens = [(i * 7919 + 13) % vocab for i in range(PREFILL)]

    def feed(ids):
        array = (L.llama_token * len(ids))(*ids)
        assert L.llama_decode(context, L.llama_batch_get_one(array, len(ids))) == 0

    def likeliest():
        return int(np.ctypeslib.as_array(L.llama_get_logits_ith(context, -1), shape=(vocab,)).argmax())

    def decode():
        L.llama_memory_clear(memory, True)
        feed(tokens[:PROMPT])
        token = likeliest()
        start = time.perf_counter()
        for _ in range(DECODE):
            feed([token])
            token = likeliest()
        return time.perf_counter() - start

    def prefill():
        L.llama_memory_clear(memory, True)
        start = time.perf_counter()
        feed(tokens)
        likeliest()
        return time.perf_counter() - start

    rates = {}
    for part, run in (("decode", decode), ("prefill", prefill)):
        run()
        rates[part] = spread([PARTS[part] / run() for _ in range(repetitions)])
    L.llama_free(context)
    L.llama_model_free(model)
    return rates


def run(words):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1] if "llama" in words else done.stdout)


def planish(part, file, options, *more):
    words = [PROGRAM, "--output", "json", "bench", part, file, "--tokens", PARTS[part],
             "--prompt", PROMPT if part == "decode" else 0, "--threads", options.threads,
             "--repetitions", options.repetitions, "--cache", options.cache]
    return run([*words, *more])


def compare(file, options):
    """Rates of all rounds and their ratio, by part; the cores that others took during each run."""
    rates = {part: {name: [] for name in ("planish", *VARIANTS)} for part in PARTS}
    others, about = [], {}

    def theirs():
        return run([sys.executable, __file__, "llama", file, options.threads, options.repetitions])

    def ours():
        found = {part: planish(part, file, options, "--no-limits")["tokens_per_second"] for part in PARTS}
        return {"rates": {"planish": found}}

    for number in range(options.rounds):
        for side in (theirs, ours) if number % 2 == 0 else (ours, theirs):
            found, busy = undisturbed(side)
            others.append(round(busy, 3))
            for name, by_part in found["rates"].items():
                for part, rate in by_part.items():
                    rates[part][name].append(rate["median"])
            about |= {key: found[key] for key in ("system", "version") if key in found}
    parts = {}
    for part, sides in rates.items():
        spreads = {name: spread(values) for name, values in sides.items()}
        peer = max(VARIANTS, key=lambda name: spreads[name]["median"])
        ratio = spread([a / b for a, b in zip(sides["planish"], sides[peer])])
        parts[part] = {"planish": spreads["planish"], "llama.cpp": spreads[peer], "variant": peer, "ratio": ratio,
                       "variants": {name: spreads[name] for name in VARIANTS}}
    return parts, others, about


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3, help="of each program in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", choices=["f32", "f16"], default="f32", help="planish's; llama.cpp's is f16")
    parser.add_argument("--out", type=Path, default=PEERS / "results" / "decode.json")
    options = parser.parse_args()
    if options.rounds < 1 or options.repetitions < 1:
        parser.error("at least one round and one repetition are needed")
    if not Path(PROGRAM).is_file():
        sys.exit(f"{PROGRAM} is missing: run `cargo build --release` first, or name it in PLANISH")
    files = options.files or [SMOL, *QUANTIZED.values(), GEMMA]
    for file in files:
        if not file.is_file():
            sys.exit(f"{file} is missing: run `sh benches/peers/setup.sh decode` first")
    report = {"rounds": options.rounds, "repetitions": options.repetitions, "threads": options.threads,
              "planish_cache": options.cache, "files": []}
    for file in files:
        first = planish("decode", file, options)
        report.setdefault("machine", first["machine"])
        parts, others, about = compare(file, options)
        report.update(about)
        disturbed = sum(busy > ALLOWED for busy in others)
        report["files"].append({
            "file": file.name, "bytes": file.stat().st_size, "weight_bytes_per_token": first["weight_bytes"],
            "limits": first["limits"], "planish_share": first["share"], "parts": parts,
            "cores_of_others": others, "disturbed": disturbed,
        })
        for part, found in parts.items():
            note = f"   {disturbed} of {len(others)} runs disturbed" if disturbed else ""
            print(f"{file.name:36} {part:8} llama.cpp {shown(found['llama.cpp']):28} planish "
                  f"{shown(found['planish']):28} tokens/s   ratio {shown(found['ratio'], 2)}{note}", flush=True)
        # After every file: an interrupted comparison keeps what it has.
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))
    print(f"written to {options.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["llama"]:
        llama_side(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
