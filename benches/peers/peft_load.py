"""Loads adapters that planish wrote in the PEFT library and compares the logits.

    PLANISH_PEFT_OUT=FOLDER cargo test --release --lib adapt::tests::files_for_the_peer
    python peft_load.py FOLDER

Needs torch, transformers and peft."""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-3


def load(path):
    return torch.tensor(json.loads(Path(path).read_text()))


def main():
    out = Path(sys.argv[1])
    tokens = load(out / "tokens.json")[None]
    failed = False

    def compare(name, got, want):
        nonlocal failed
        error = (got.flatten() - want).abs().max().item()
        failed |= not error <= TOLERANCE
        print(f"{name:12} largest difference of logits {error:.2e} {'' if error <= TOLERANCE else 'TOO LARGE'}")

    def base():
        return AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()

    with torch.no_grad():
        compare("base", base()(tokens).logits, load(out / "base.json"))
        for folder in sorted(p.parent for p in out.glob("*/adapter_config.json")):
            model = PeftModel.from_pretrained(base(), folder).eval()
            compare(folder.name, model(tokens).logits, load(folder / "logits.json"))
            merged = model.merge_and_unload()
            compare("  merged", merged(tokens).logits, load(folder / "logits.json"))
            PeftModel.from_pretrained(base(), folder).save_pretrained(out / "saved" / folder.name)
    sys.exit(failed)


if __name__ == "__main__":
    main()
