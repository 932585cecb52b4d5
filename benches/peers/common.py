"""What the peer scripts share: a running planish, its command line, the text, llama.cpp."""

import atexit
import ctypes
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(os.environ.get("PEERS_DIR", ROOT / "target" / "peers"))
DATA = Path(os.environ.get("PLANISH_DATA", ROOT.parent / "shared" / "data"))
SMOL = PEERS / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 512
TOKENS = 20_000


class Planish:
    """A server with a folder of its own, and the command line that talks to it."""

    def __init__(self, folder=None):
        self.program = os.environ.get("PLANISH", str(ROOT / "target" / "release" / "planish"))
        if not Path(self.program).is_file():
            sys.exit(f"{self.program} is missing: run `cargo build --release` first")
        self.temporary = tempfile.TemporaryDirectory(prefix="planish-peers-")
        self.folder = Path(folder or self.temporary.name)
        address = self.folder / "address"
        self.server = subprocess.Popen(
            [self.program, "serve", "--listen", "127.0.0.1:0", "--address-file", str(address),
             "--data", str(self.folder / "data")],
            stderr=(self.folder / "server.log").open("w"),
        )
        atexit.register(self.stop)
        for _ in range(300):
            if address.is_file() and address.read_text().strip():
                break
            time.sleep(0.1)
        else:
            sys.exit("the server did not start:\n" + (self.folder / "server.log").read_text())
        self.endpoint = "http://" + address.read_text().strip().removeprefix("http://")

    def run(self, *words):
        """Runs a command with JSON output and returns what it printed; of an operation, its response."""
        done = subprocess.run(
            [self.program, "--endpoint", self.endpoint, "--output", "json", *map(str, words)],
            capture_output=True, text=True,
        )
        if done.returncode:
            sys.exit(f"planish {' '.join(map(str, words))} failed:\n{done.stderr}")
        said = json.loads(done.stdout) if done.stdout.strip() else None
        return said["response"] if isinstance(said, dict) and said.get("done") else said

    def peak_mib(self):
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(next(l for l in status.splitlines() if l.startswith("VmHWM")).split()[1]) / 1024

    def stop(self):
        if self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(30)


def measurements(report):
    """metric -> value of an evaluation report."""
    return {m["metric"]: m["value"] for m in report["measurements"]}


def wikitext(split):
    import gzip
    plain = DATA / "wikitext-2" / f"{split}.txt"
    if plain.is_file():
        return plain.read_text(encoding="utf-8")
    return gzip.decompress(plain.with_suffix(".txt.gz").read_bytes()).decode("utf-8")


class Llama:
    """llama.cpp through its C interface: token ids and window perplexity."""

    def __init__(self, file, threads=2):
        import llama_cpp
        self.L = L = llama_cpp
        self.quiet = L.llama_log_callback(lambda *a: None)
        L.llama_log_set(self.quiet, ctypes.c_void_p(0))
        L.llama_backend_init()
        self.model = L.llama_model_load_from_file(str(file).encode(), L.llama_model_default_params())
        if not self.model:
            sys.exit(f"llama.cpp does not load {file}")
        params = L.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = WINDOW
        params.n_threads = params.n_threads_batch = threads
        self.context = L.llama_init_from_model(self.model, params)
        self.vocab = L.llama_model_get_vocab(self.model)

    def tokens(self, text, count):
        raw = text[: count * 8].encode()
        buffer = (self.L.llama_token * (len(raw) + 8))()
        got = self.L.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), False, False)
        assert got >= count, "the text is too short"
        return list(buffer[:count])

    def perplexity(self, text):
        import numpy as np
        L, ids = self.L, self.tokens(text, TOKENS)
        size = L.llama_vocab_n_tokens(self.vocab)
        bos = L.llama_vocab_bos(self.vocab) if L.llama_vocab_get_add_bos(self.vocab) else None
        memory, losses = L.llama_get_memory(self.context), []
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            window = ids[start:start + WINDOW]
            fed = window if bos is None else [bos] + window[1:]
            batch = L.llama_batch_init(WINDOW, 0, 1)
            batch.n_tokens = WINDOW
            for i, token in enumerate(fed):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
                batch.seq_id[i][0] = 0
            L.llama_memory_clear(memory, True)
            assert L.llama_decode(self.context, batch) == 0
            logits = np.ctypeslib.as_array(L.llama_get_logits(self.context), shape=(WINDOW, size))
            logits = logits[:-1].astype(np.float64)
            top = logits.max(1, keepdims=True)
            total = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
            losses.append((total - logits[np.arange(WINDOW - 1), window[1:]]).mean())
            L.llama_batch_free(batch)
        return math.exp(sum(losses) / len(losses))


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
