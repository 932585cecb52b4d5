"""Memory of tuning a quantised base (EMEF of INT2.1), against full tuning and against LoRA over f32.

    python3 benches/peers/emef.py MODEL [--planish target/release/planish] [--steps 100]

Each way runs in a process of its own, `planish bench train` with one sequence of 256 tokens and AdamW, and
tells the most memory that it held. The bars are those of the system's card: full over EMEF at least 5.6, LoRA
over f32 without checkpointing over EMEF at least 2.5, and after the steps the loss over the codes within 0.03
of the loss over the numbers that they stand for.
"""

import argparse
import json
import subprocess
import sys

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


def measure(args, *options, steps):
    command = [args.planish, "--output", "json", "bench", "train", args.model, "--batch", "1"]
    command += ["--length", "256", "--rank", "8", "--targets", LINEARS, "--adam", "--no-limits"]
    command += ["--repetitions", str(steps), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--planish", default="target/release/planish")
    parser.add_argument("--steps", type=int, default=100, help="steps of the two runs whose losses are compared")
    args = parser.parse_args()
    ways = {
        "full, f32": (("--base", "dense", "--full"), 2),
        "LoRA over f32": (("--base", "dense"), 2),
        "LoRA over 4 bits": (("--base", "4"), 2),
        "EMEF, 4 bits": (("--base", "4", "--checkpoint"), args.steps),
        "EMEF, 2 bits": (("--base", "2", "--checkpoint"), 2),
        "the numbers of the 4 bits": (("--base", "decoded-4", "--checkpoint"), args.steps),
    }
    found = {name: measure(args, *options, steps=steps) for name, (options, steps) in ways.items()}
    print("| way | peak memory (MB) | seconds a step | loss |")
    print("|---|---:|---:|---:|")
    for name, result in found.items():
        peak, step = result["peak_bytes"] / 1e6, result["seconds_per_step"]["median"]
        print(f"| {name} | {peak:.0f} | {step:.2f} | {result['last_loss']:.4f} |")
    peak = {name: result["peak_bytes"] for name, result in found.items()}
    emef, decoded = found["EMEF, 4 bits"], found["the numbers of the 4 bits"]
    checks = [
        ("full over EMEF", peak["full, f32"] / peak["EMEF, 4 bits"], ">=", 5.6),
        ("LoRA over f32 over EMEF", peak["LoRA over f32"] / peak["EMEF, 4 bits"], ">=", 2.5),
        ("difference of the losses", abs(emef["last_loss"] - decoded["last_loss"]), "<=", 0.03),
    ]
    for name, value, sign, bar in checks:
        holds = value >= bar if sign == ">=" else value <= bar
        print(f"{name}: {value:.3f}, {'holds' if holds else 'fails'} {sign} {bar}")


if __name__ == "__main__":
    main()
