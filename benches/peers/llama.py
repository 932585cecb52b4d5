"""Perplexity of the same file and tokens in llama.cpp and in planish, for the model as it came and for
every form planish exports it in.

    sh benches/peers/setup.sh [torch] && target/peers/venv/bin/python benches/peers/llama.py [GGUF]

Exits 1 when a pair is more than 0.5 % apart. The Hugging Face folder is loaded by llama.cpp through its
own converter, which needs the `torch` variant of the setup; without it that row is left out and said so.
"""

import subprocess
import sys
from pathlib import Path

from common import PEERS, SMOL, TOKENS, WINDOW, Llama, Planish, measurements, wikitext

source = Path(sys.argv[1]) if len(sys.argv) > 1 else SMOL
text = wikitext("valid")
planish = Planish()
valid = planish.folder / "valid.txt"
valid.write_text(text, encoding="utf-8")
planish.run("datasets", "import", valid, "--id", "valid")
rows = []


def ours(file, name):
    planish.run("models", "import", file, "--id", name)
    report = planish.run("evaluate", "--model", name, "--dataset", "valid",
                         "--context", WINDOW, "--max-tokens", TOKENS)
    return measurements(report)["perplexity"]


def row(name, mine, theirs):
    rows.append((name, mine, theirs))
    print(f"{name:24} planish {mine:9.4f}   llama.cpp {theirs:9.4f}   {100 * (mine / theirs - 1):+6.2f} %",
          flush=True)


row("as imported", ours(source, "base"), Llama(source).perplexity(text))

for kind in ("f16", "q8-0", "q4-0", "q4-1"):
    folder = planish.folder / kind
    planish.run("models", "export", "base", "--format", "gguf", "--type", kind, "--decode-grids", "--to", folder)
    file = next(folder.glob("*.gguf"))
    row(f"exported gguf {kind}", ours(file, kind), Llama(file).perplexity(text))

folder = planish.folder / "hugging-face"
planish.run("models", "export", "base", "--format", "hf", "--type", "f16", "--to", folder)
converter = next(PEERS.glob("sdist/llama_cpp_python-*/vendor/llama.cpp/convert_hf_to_gguf.py"), None)
if converter:
    file = planish.folder / "converted.gguf"
    subprocess.run([sys.executable, converter, folder, "--outfile", file, "--outtype", "f16"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    row("exported hugging face", ours(folder, "hugging-face"), Llama(file).perplexity(text))
else:
    print("exported hugging face    left out: llama.cpp's converter is not there (setup.sh torch)")

apart = [name for name, mine, theirs in rows if abs(mine / theirs - 1) > 0.005]
print("all within 0.5 %" if not apart else f"more than 0.5 % apart: {', '.join(apart)}")
sys.exit(bool(apart))
