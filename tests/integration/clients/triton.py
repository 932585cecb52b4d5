"""The public client of the Open Inference Protocol against a server that holds one model with a tokenizer.

usage: triton.py ENDPOINT MODEL
"""

import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

endpoint, model = sys.argv[1], sys.argv[2]
client = triton.InferenceServerClient(endpoint)
assert client.is_server_live() and client.is_server_ready()
server = client.get_server_metadata()
assert server.name == "planish" and "model_repository" in server.extensions, server

# What there is.
index = client.get_model_repository_index(as_json=True)["models"]
assert [(m["name"], m["version"], m["state"]) for m in index] == [(model, "1", "UNAVAILABLE")], index
assert not client.is_model_ready(model)
client.load_model(model)
assert client.is_model_ready(model) and client.is_model_ready(model, "1")
index = client.get_model_repository_index()
assert index.models[0].state == "READY", index

# What it takes and gives.
metadata = client.get_model_metadata(model)
inputs = {t.name: (t.datatype, list(t.shape)) for t in metadata.inputs}
outputs = {t.name: (t.datatype, list(t.shape)) for t in metadata.outputs}
assert list(metadata.versions) == ["1"] and metadata.platform == "planish_decoder", metadata
assert inputs["text_input"] == ("BYTES", [1]) and inputs["input_ids"] == ("INT64", [1, -1]), inputs
assert outputs == {"text_output": ("BYTES", [1]), "logits": ("FP32", [1, -1, 257])}, outputs
config = client.get_model_config(model).config
assert config.backend == "planish" and config.model_transaction_policy.decoupled
assert {i.name for i in config.input if not i.optional} == set(), config.input
assert {i.name for i in config.input} == set(inputs)


def tensor(name, datatype, values):
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def text(prompt):
    return tensor("text_input", "BYTES", np.array([prompt.encode()], dtype=object))


# Text, the whole answer.
greedy = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
result = client.infer(model, [text("abc")], request_id="one", parameters=greedy)
answer = result.as_numpy("text_output")
response = result.get_response()
assert answer.shape == (1,) and (response.id, response.model_version) == ("one", "1"), response
assert response.parameters["finish_reason"].string_param == "length", response
assert response.parameters["generated_tokens"].int64_param == 12, response
# Options as tensors, and the output asked for by name.
again = client.infer(
    model,
    [
        text("abc"),
        tensor("max_tokens", "INT32", np.array([12], dtype=np.int32)),
        tensor("temperature", "FP32", np.array([0], dtype=np.float32)),
        tensor("ignore_eos", "BOOL", np.array([True])),
    ],
    model_version="1",
    outputs=[triton.InferRequestedOutput("text_output")],
)
assert again.as_numpy("text_output")[0] == answer[0]

# Tokens to logits.
ids = np.array([[97, 98, 99, 100]], dtype=np.int64)
logits = client.infer(model, [tensor("input_ids", "INT64", ids)]).as_numpy("logits")
assert logits.shape == (1, 4, 257) and logits.dtype == np.float32 and np.isfinite(logits).all()
last = client.infer(
    model,
    [tensor("input_ids", "INT32", ids.astype(np.int32))],
    parameters={"last_only": True},
).as_numpy("logits")
assert last.shape == (1, 1, 257) and np.allclose(last[0, 0], logits[0, 3], atol=1e-4)

# The first token of a greedy answer is the best after the prompt.
prompt = np.array([[97, 98, 99]], dtype=np.int64)
best = client.infer(model, [tensor("input_ids", "INT64", prompt)]).as_numpy("logits")[0, 2].argmax()
if best < 128:
    assert answer[0][0] == best, (answer, best)

# Text, piece by piece; a request that fails does not end the stream.
answers = queue.Queue()
client.start_stream(callback=lambda result, error: answers.put((result, error)))
client.async_stream_infer(model, [text("abc")], request_id="s", parameters=greedy)
pieces, final = [], False
while not final:
    result, error = answers.get(timeout=60)
    assert error is None, error
    response = result.get_response()
    assert response.id == "s"
    final = response.parameters["triton_final_response"].bool_param
    pieces.append(result.as_numpy("text_output")[0])
assert b"".join(pieces) == answer[0] and len(pieces) > 1, pieces
client.async_stream_infer(model, [tensor("input_ids", "INT64", ids)], parameters={"stop": "x"})
result, error = answers.get(timeout=60)
assert result is None and "'stop'" in error.message(), error
client.async_stream_infer(
    model, [tensor("input_ids", "INT64", ids)], enable_empty_final_response=True
)
result, error = answers.get(timeout=60)
assert error is None and np.allclose(result.as_numpy("logits"), logits, atol=1e-4)
client.stop_stream()

# What is refused, and says why.
for wrong, code, word in [
    (lambda: client.infer("none", [text("a")]), "NOT_FOUND", "models/none"),
    (lambda: client.infer(model, [text("a")], model_version="7"), "NOT_FOUND", "versions/7"),
    (lambda: client.infer(model, [tensor("ids", "INT64", ids)]), "INVALID_ARGUMENT", "'ids'"),
    (lambda: client.infer(model, [text("a")], priority=1), "INVALID_ARGUMENT", "priority"),
    (lambda: client.get_trace_settings(), "UNIMPLEMENTED", "method"),
    (lambda: client.get_system_shared_memory_status(), "UNIMPLEMENTED", "method"),
]:
    try:
        wrong()
        raise AssertionError(f"{word} was not refused")
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{code}" and word in error.message(), error

# The account: five whole answers and two on the stream; what failed on this version is counted apart.
stats = client.get_inference_statistics(model).model_stats
assert [(s.name, s.version) for s in stats] == [(model, "1")], stats
counted = stats[0].inference_stats
assert stats[0].inference_count == stats[0].execution_count == counted.success.count == 7, stats
assert counted.fail.count == 3 and counted.success.ns > counted.compute_infer.ns > 0, stats
assert counted.queue.count == counted.compute_input.count == counted.compute_output.count == 7
assert stats[0].last_inference > 1_600_000_000_000 and stats[0].memory_usage[0].byte_size > 0

client.unload_model(model)
assert not client.is_model_ready(model)
assert client.get_model_repository_index().models[0].state == "UNAVAILABLE"
print("triton client: ok")
