"""Sentence embeddings of all-MiniLM-L6-v2 under several runtimes and in planish, in alternation.

    sh benches/peers/setup.sh embed
    target/peers/venv/bin/python benches/peers/embed.py [--rounds N] [--threads N] [ENGINE ...]

Engines: ort, ort-int8 (ONNX Runtime), openvino, openvino-bf16, ct2-int8 (CTranslate2). Everyone gets sentences
of the same numbers of tokens without padding, and ends with the mean over tokens, scaled to unit length.
Of planish it takes `planish bench embed MODEL --batch B --length L --threads T --repetitions R --no-limits`, whose
JSON must have {"sentences_per_second": {"median": ...}}; a program without that verb is left out. Runs
disturbed by other programs are made again (quiet.py). `peer ENGINE THREADS REPETITIONS` as the arguments runs
one engine alone.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from common import PEERS, ROOT
from prepare import MINILM, MODELS
from quiet import ALLOWED, shown, spread, undisturbed

PROGRAM = os.environ.get("PLANISH", str(ROOT / "target" / "release" / "planish"))
PLAIN, INT8, CT2 = MODELS / "minilm.onnx", MODELS / "minilm-int8.onnx", MODELS / "minilm-ct2"
ENGINES = {
    "ort": ("onnxruntime", PLAIN),
    "ort-int8": ("onnxruntime", INT8),
    "openvino": ("openvino", PLAIN),
    "openvino-bf16": ("openvino", PLAIN),
    "ct2-int8": ("ctranslate2", CT2),
}
# Sentences at once and tokens of each.
SHAPES = ((1, 32), (32, 32), (1, 128), (32, 128))
# Seconds that a repetition lasts at least.
LEAST = 0.3


def ids(batch, length):
    """[CLS], words, [SEP]: ids of BERT's vocabulary, spread over its whole words."""
    import numpy as np
    words = 1996 + np.arange(batch * (length - 2)) * 7919 % 20_000
    rows = words.reshape(batch, length - 2)
    edge = np.ones((batch, 1), np.int64)
    return np.concatenate([101 * edge, rows, 102 * edge], 1).astype(np.int64)


def pooled(states):
    import numpy as np
    means = np.asarray(states, np.float32).mean(1)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def engine(name, threads):
    """A function from token ids to embeddings."""
    import numpy as np
    package, file = ENGINES[name]
    if package == "onnxruntime":
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}

        def run(x):
            given = {"input_ids": x, "attention_mask": np.ones_like(x), "token_type_ids": np.zeros_like(x)}
            return pooled(session.run(None, {k: v for k, v in given.items() if k in wanted})[0])
    elif package == "openvino":
        import openvino
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(str(file)), "CPU", {
            "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if name.endswith("bf16") else "f32"})
        request = compiled.create_infer_request()
        wanted = [i.get_any_name() for i in compiled.inputs]

        def run(x):
            given = {"input_ids": x, "attention_mask": np.ones_like(x), "token_type_ids": np.zeros_like(x)}
            return pooled(request.infer({k: given[k] for k in wanted})[0])
    else:
        import ctranslate2
        encoder = ctranslate2.Encoder(str(file), device="cpu", compute_type="int8", inter_threads=1,
                                      intra_threads=threads)

        def run(x):
            return pooled(np.array(encoder.forward_batch(x.tolist()).last_hidden_state))
    return run


def peer_side(name, threads, repetitions):
    run = engine(name, threads)
    rates = {}
    for batch, length in SHAPES:
        x = ids(batch, length)
        run(x)
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < LEAST:
            run(x)
            calls += 1

        def once():
            start = time.perf_counter()
            for _ in range(calls):
                run(x)
            return batch * calls / (time.perf_counter() - start)

        rates[f"{batch}x{length}"] = spread([once() for _ in range(repetitions)])
    version = f"{ENGINES[name][0]} {importlib.metadata.version(ENGINES[name][0])}"
    print(json.dumps({"rates": rates, "version": version, "sample": run(ids(4, 32)).tolist()}))


def peer(name, options):
    words = [sys.executable, __file__, "peer", name, str(options.threads), str(options.repetitions)]
    threads = {v: str(options.threads) for v in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return json.loads(done.stdout.strip().splitlines()[-1])


def planish(options):
    rates = {}
    for batch, length in SHAPES:
        words = [PROGRAM, "--output", "json", "bench", "embed", MINILM, "--batch", batch, "--length", length, "--precision", options.precision,
                 "--threads", options.threads, "--repetitions", options.repetitions, "--no-limits"]
        done = subprocess.run([str(w) for w in words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        rates[f"{batch}x{length}"] = json.loads(done.stdout)["sentences_per_second"]
    return {"rates": rates}


def has_embed():
    if not Path(PROGRAM).is_file():
        print(f"{PROGRAM} is missing (run `cargo build --release`): only the peers are measured")
        return False
    if subprocess.run([PROGRAM, "bench", "embed", "--help"], capture_output=True).returncode:
        print(f"{PROGRAM} has no `bench embed`: only the peers are measured")
        return False
    return True


def agreement(sample, reference):
    """Smallest cosine between embeddings of the same sentences."""
    return min(sum(a * b for a, b in zip(x, y)) for x, y in zip(sample, reference))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("engines", nargs="*", choices=[*ENGINES, []], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=3, help="of each program in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=["f32", "bf16", "int8"], default="f32", help="of planish")
    parser.add_argument("--out", type=Path, default=PEERS / "results" / "embed.json")
    options = parser.parse_args()
    if options.rounds < 1 or options.repetitions < 1:
        parser.error("at least one round and one repetition are needed")
    ours = has_embed()
    report = {"rounds": options.rounds, "repetitions": options.repetitions, "threads": options.threads,
              "engines": {}}
    reference = None
    for name in options.engines or ENGINES:
        if not ENGINES[name][1].exists():
            print(f"{name}: left out, {ENGINES[name][1]} is missing (sh benches/peers/setup.sh embed)")
            continue
        rates = {f"{b}x{n}": {"peer": [], "planish": []} for b, n in SHAPES}
        others, about = [], {}
        try:
            for number in range(options.rounds):
                sides = [("peer", lambda: peer(name, options))]
                sides += [("planish", lambda: planish(options))] if ours else []
                for side, measure in sides if number % 2 == 0 else sides[::-1]:
                    found, busy = undisturbed(measure)
                    others.append(round(busy, 3))
                    for shape, rate in found["rates"].items():
                        rates[shape][side].append(rate["median"])
                    about = about | found if side == "peer" else about
        except RuntimeError as error:
            print(f"{name}: left out, {error}")
            continue
        reference = reference or about["sample"]
        disturbed = sum(busy > ALLOWED for busy in others)
        shapes = {}
        for shape, sides in rates.items():
            shapes[shape] = {side: spread(values) for side, values in sides.items() if values}
            line = f"{name:14} {shape:8} {shown(shapes[shape]['peer']):30}"
            if ours:
                ratio = spread([a / b for a, b in zip(sides["planish"], sides["peer"])])
                shapes[shape]["ratio"] = ratio
                line += f" planish {shown(shapes[shape]['planish']):30} ratio {shown(ratio, 2)}"
            print(f"{line} sentences/s" + (f"   {disturbed} of {len(others)} runs disturbed" if disturbed else ""),
                  flush=True)
        report["engines"][name] = {
            "version": about["version"], "shapes": shapes, "cores_of_others": others, "disturbed": disturbed,
            "least_cosine_to_first": round(agreement(about["sample"], reference), 5),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1))
    if not report["engines"]:
        sys.exit("no engine could be measured")
    print(f"written to {options.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        peer_side(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
