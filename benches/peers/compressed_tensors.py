"""Loads compressed exports with the package compressed-tensors and compares them with the dense export.

    planish models export NAME --form compressed-tensors --type f16 --to PACKED
    planish models export NAME --form dense --type f32 --to DENSE
    python compressed_tensors.py PACKED DENSE

or, on small models with every kind of code,

    PLANISH_COMPRESSED_OUT=FOLDER cargo test --release --lib compressed_tensors::tests::files_for_the_peer
    python compressed_tensors.py FOLDER

Every matrix is decompressed by the package itself. `pack-quantized` is also loaded through transformers, whose
logits are compared with those of the dense folder rounded to the same type. `sparse-24-bitmask` needs the package in
version 0.14 or older; packed codes are read by all. Needs torch, transformers, safetensors and compressed-tensors; gguf for the files
beside small models, which are to unpack to the same values."""

import json
import sys
from pathlib import Path

# This file has the name of the package; the folder it lies in comes first.
sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import torch
from safetensors import safe_open


def tensors(folder):
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def matches(targets, module):
    """Whether a module, all of which are linear here, is named by its kind or by itself."""
    return "Linear" in targets or module in targets


def unpack(config, packed):
    """Values of the packed matrices by module, as the package gives them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(config)
    compressor = BaseCompressor.get_value_from_registry(settings.format)
    values = {}
    for module in sorted(n.removesuffix(".weight_packed") for n in packed if n.endswith(".weight_packed")):
        schemes = [s for s in settings.config_groups.values() if matches(s.targets, module)]
        assert len(schemes) == 1 and module not in settings.ignore, module
        scheme = schemes[0]
        names = ["weight_packed", "weight_scale", "weight_zero_point", "weight_shape"]
        parts = {n: packed[f"{module}.{n}"] for n in names if f"{module}.{n}" in packed}
        if hasattr(compressor, "compression_param_names") and callable(getattr(compressor, "decompress", None)):
            try:
                values[module] = compressor.decompress(dict(parts), scheme)["weight"]
                continue
            except TypeError:
                pass  # older versions work on instances
        values[module] = compressor(config=settings).decompress_weight(parts, quantization_args=scheme.weights)
    return values


def expand(config, sparse):
    """Values of the 2:4 matrices by module, as the package gives them."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.config import SparsityCompressionConfig

    settings = SparsityCompressionConfig.load_from_registry(config["format"], **config)
    compressor = BaseCompressor.load_from_registry(config["format"], config=settings)
    found = compressor.decompress_from_state_dict(dict(sparse))
    return {n.removesuffix(".weight"): v for n, v in found if n.removesuffix(".weight") + ".compressed" in sparse}


def compare(packed_folder, dense_folder):
    """Prints what differs; true where something differs that must not."""
    config = json.loads((packed_folder / "config.json").read_text())
    settings = config["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    packed, dense = tensors(packed_folder), tensors(dense_folder)
    dtype = getattr(torch, config["torch_dtype"])
    failed = False

    sparsity = settings.get("sparsity_config")
    try:
        values = expand(sparsity, packed) if sparsity else unpack(settings, packed)
    except KeyError as error:
        if not sparsity:
            raise
        print(f"left out: this version of the package reads no {sparsity['format']} ({error})")
        return False
    assert values, "nothing was compressed"
    worst, exact = 0.0, 0
    for module, value in values.items():
        want = dense.pop(f"{module}.weight").to(dtype)
        assert value.dtype == dtype and value.shape == want.shape, module
        difference = (value.float() - want.float()).abs().max().item()
        worst, exact = max(worst, difference), exact + (difference == 0)
    limit = 0.0
    if dtype == torch.bfloat16 and not sparsity:
        # Scales have 8 bits there, and so have products: a unit in the last of the largest value.
        limit = max(v.abs().max().item() for v in values.values()) / 128
    failed |= worst > limit
    print(f"{len(values)} matrices, {exact} exact, largest difference {worst:.3e} (at most {limit:.3e})")

    rest = [n for n in dense if not torch.equal(packed[n], dense[n].to(dtype))]
    failed |= bool(rest)
    print(f"{len(dense)} other tensors, {len(rest)} of them different {rest[:3]}")

    if not sparsity and config["model_type"] == "llama":
        zeros = any(n.endswith(".weight_zero_point") for n in packed)
        failed |= logits(packed_folder, dense_folder, config["vocab_size"], dtype, zeros)
    return failed


def logits(packed, dense, vocabulary, dtype, zeros):
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(f"transformers: left out ({error})")
        return False

    tokens = torch.arange(1, 33)[None] * 7 % vocabulary

    def run(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        with torch.no_grad():
            model(tokens)  # what is packed is unpacked by the first forward
            return model(tokens).logits.float()

    want = run(dense)
    try:
        got = run(packed)
    except ImportError as error:
        print(f"transformers: left out ({str(error).splitlines()[0]})")
        return False
    except RuntimeError as error:
        # compressed-tensors 0.20 makes room for zero points as they are before they are packed.
        if zeros and "mismatched_sizes" in str(error):
            print("transformers: left out (it has no room for packed zero points, whoever packed them)")
            return False
        raise
    difference = (want - got).abs().max().item() / want.abs().max().item()
    limit = 0.05 if dtype == torch.bfloat16 else 1e-4
    print(f"transformers: largest difference of logits {difference:.3e} of the largest logit (at most {limit:.0e})")
    return not difference <= limit


def compare_gguf(path, dense_folder):
    """The same for a GGUF file beside them, whose blocks the package gguf unpacks; nothing may differ."""
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        print(f"gguf: left out ({error})")
        return False
    config = json.loads((dense_folder / "config.json").read_text())
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    dense, kinds, different = tensors(dense_folder), {}, []
    for tensor in GGUFReader(path).tensors:
        module = tensor.name.removesuffix(".weight")
        if module in names:
            name = f"{names[module]}.weight"
        else:
            _, layer, module = module.split(".")
            name = f"model.layers.{layer}.{parts[module]}.weight"
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if module in heads:
            # Halves of rotated heads are interleaved in these files.
            value = value.reshape(heads[module], -1, 2, value.shape[-1]).transpose(1, 2)
        if not torch.equal(value.reshape(dense[name].shape), dense.pop(name)):
            different.append(name)
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    print(f"gguf: {kinds}; {len(different)} different {different[:3]}, {len(dense)} missing")
    return bool(different or dense)


def main():
    folders = [Path(p) for p in sys.argv[1:3]]
    if len(folders) == 2:
        sys.exit(compare(*folders))
    failed = []
    for folder in sorted(p.parent for p in folders[0].glob("*/packed")):
        print(f"== {folder.name}")
        if compare(folder / "packed", folder / "dense"):
            failed.append(folder.name)
        if (folder / "model.gguf").exists() and compare_gguf(folder / "model.gguf", folder / "dense"):
            failed.append(f"{folder.name}, gguf")
    print(f"failed: {failed}" if failed else "all are the same")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
