"""The results of decode.py and embed.py as Markdown rows, in the form of docs/performance.md.

    target/peers/venv/bin/python benches/peers/table.py
"""

import json

from common import PEERS


def cell(s, digits=1):
    return f"{s['median']:.{digits}f} ({s['min']:.{digits}f} to {s['max']:.{digits}f})"


def rows(name):
    file = PEERS / "results" / f"{name}.json"
    if not file.is_file():
        print(f"{file} is missing: run benches/peers/{name}.py first\n")
        return {}
    return json.loads(file.read_text())


def line(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


report = rows("decode")
for part in ("decode", "prefill") if report else ():
    print(f"{part}, {report['threads']} threads, {report['rounds']} rounds, {report['version']}\n")
    line("file", "planish", "llama.cpp", "ratio", *(["of memory", "of reread"] if part == "decode" else []))
    for found in report["files"]:
        sides, share = found["parts"][part], found["planish_share"]
        shares = [f"{share[k]:.0%}" for k in ("of_memory", "of_reread")] if part == "decode" else []
        line(found["file"].removesuffix(".gguf"), cell(sides["planish"]), cell(sides["llama.cpp"]),
             cell(sides["ratio"], 2), *shares)
    print()
report = rows("embed")
if report:
    print(f"embed, {report['threads']} threads, {report['rounds']} rounds\n")
    for name, found in report["engines"].items():
        for side in ("peer", "ratio"):
            cells = [cell(s[side], 1 if side == "peer" else 2) for s in found["shapes"].values() if side in s]
            if cells:
                label = found["version"] + (": planish over it" if side == "ratio" else f" ({name})")
                line(label, *cells, found["least_cosine_to_first"])
