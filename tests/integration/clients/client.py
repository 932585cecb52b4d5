"""A user's path with nothing but stubs generated from proto/: import, run a recipe, watch it, generate.

usage: client.py ENDPOINT STUBS MODEL_FOLDER
"""

import sys
from pathlib import Path

endpoint, stubs, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
sys.path.insert(0, stubs)

import grpc  # noqa: E402
from google.longrunning import operations_pb2, operations_pb2_grpc  # noqa: E402
from google.rpc import error_details_pb2  # noqa: E402
from grpc_status import rpc_status  # noqa: E402
from planish.v1 import (  # noqa: E402
    claim_pb2,
    claim_service_pb2,
    claim_service_pb2_grpc,
    comparison_pb2,
    compress_pb2,
    dataset_service_pb2,
    dataset_service_pb2_grpc,
    evaluation_pb2,
    generation_service_pb2,
    generation_service_pb2_grpc,
    job_service_pb2,
    job_service_pb2_grpc,
    model_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    recipe_pb2,
)

CHUNK = 1 << 20
channel = grpc.insecure_channel(endpoint)
models = model_service_pb2_grpc.ModelServiceStub(channel)
datasets = dataset_service_pb2_grpc.DatasetServiceStub(channel)
jobs = job_service_pb2_grpc.JobServiceStub(channel)
claims = claim_service_pb2_grpc.ClaimServiceStub(channel)
operations = operations_pb2_grpc.OperationsStub(channel)
generation = generation_service_pb2_grpc.GenerationServiceStub(channel)


def upload(path):
    def parts():
        header = model_service_pb2.UploadHeader(file_name=path.name, size_bytes=path.stat().st_size)
        yield model_service_pb2.UploadFileRequest(header=header)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                yield model_service_pb2.UploadFileRequest(chunk=chunk)

    stored = models.UploadFile(parts()).file
    return model_pb2.ModelFile(file_name=path.name, digest=stored.digest, size_bytes=stored.size_bytes)


def finish(operation, kind):
    """Watches an operation to its end and unpacks its response."""
    seen = 0
    for look in jobs.WatchOperation(job_service_pb2.WatchOperationRequest(name=operation.name)):
        assert look.event.sequence == 0 or look.event.sequence > seen, "events go backwards"
        seen = max(seen, look.event.sequence)
        operation = look.operation
    assert operation.done and not operation.HasField("error"), operation
    response = kind()
    assert operation.response.Unpack(response), operation.response.type_url
    return response


# Import by upload.
files = [upload(path) for path in sorted(folder.iterdir())]
operation = models.ImportModel(
    model_service_pb2.ImportModelRequest(
        model_id="python", uploaded=model_service_pb2.UploadedFiles(files=files), request_id="import-1"
    )
)
version = finish(operation, model_pb2.ModelVersion)
assert version.name == "models/python/versions/1", version.name
again = models.ImportModel(
    model_service_pb2.ImportModelRequest(
        model_id="python", uploaded=model_service_pb2.UploadedFiles(files=files), request_id="import-1"
    )
)
assert again.name == operation.name, "the same request id must give the same operation"

# A text to calibrate and measure on.
text = ("the quick brown fox jumps over the lazy dog. " * 400).encode()


def text_parts():
    yield dataset_service_pb2.ImportDatasetRequest(
        header=dataset_service_pb2.DatasetHeader(
            dataset_id="fox", file_name="fox.txt", size_bytes=len(text)
        )
    )
    yield dataset_service_pb2.ImportDatasetRequest(chunk=text)


dataset = datasets.ImportDataset(text_parts())
assert dataset.name == "datasets/fox" and dataset.size_bytes == len(text)

# A recipe: plan it, run it, watch it.
sparsity = compress_pb2.Sparsity(share=0.5)
calibration = compress_pb2.Calibration(dataset=dataset.name, sequences=4, sequence_length=32)
recipe = recipe_pb2.Recipe(
    seed=7,
    steps=[recipe_pb2.Step(wanda=compress_pb2.Wanda(sparsity=sparsity, calibration=calibration))],
    evaluation=evaluation_pb2.Evaluation(
        dataset=dataset.name, context=32, max_tokens=512, compare_with_base=True
    ),
)
planned = jobs.RunRecipe(
    job_service_pb2.RunRecipeRequest(model="models/python", recipe=recipe, validate_only=True)
)
plan = job_service_pb2.RecipePlan()
assert planned.done and planned.response.Unpack(plan)
assert 0 < plan.total.weight_bytes < version.weight_bytes
report = finish(
    jobs.RunRecipe(job_service_pb2.RunRecipeRequest(model="models/python", recipe=recipe)),
    evaluation_pb2.RecipeReport,
)
assert report.base == version.name and list(report.versions) == ["models/python/versions/2"]
assert abs(report.steps[0].zero_share - 0.5) < 0.01, report.steps[0]
metrics = {m.metric: m for m in report.after.measurements}
assert metrics["perplexity"].value > 1 and metrics["perplexity"].protocol
assert "kl_divergence" in metrics and "top1_agreement" in metrics
operations.DeleteOperation(operations_pb2.DeleteOperationRequest(name=operation.name))

# Arms side by side: plan, run, read, render.
def wanda(share):
    step = compress_pb2.Wanda(sparsity=compress_pb2.Sparsity(share=share), calibration=calibration)
    return recipe_pb2.Step(wanda=step)


comparison = comparison_pb2.Comparison(
    display_name="python compares",
    model=version.name,
    seeds=[0, 1],
    evaluation=recipe.evaluation,
    arms=[
        comparison_pb2.Arm(name="half", steps=[wanda(0.5)]),
        comparison_pb2.Arm(name="most", steps=[wanda(0.9)]),
    ],
    contrasts=[comparison_pb2.Contrast(metric="perplexity", arm="most", against="half")],
)
planned = jobs.Compare(job_service_pb2.CompareRequest(comparison=comparison, validate_only=True))
plan = comparison_pb2.ComparisonPlan()
assert planned.done and planned.response.Unpack(plan)
assert (plan.runs, plan.steps, plan.steps_shared) == (4, 4, 0), plan
compared = jobs.Compare(job_service_pb2.CompareRequest(comparison=comparison, request_id="compare-1"))
found = finish(compared, comparison_pb2.ComparisonReport)
assert found.complete and [len(arm.runs) for arm in found.arms] == [1, 2, 2], found
assert (found.shared.calibrations_made, found.shared.calibrations_shared) == (2, 2), found.shared
assert (found.shared.base_passes, found.shared.base_passes_shared) == (1, 4), found.shared
assert found.contrasts[0].HasField("ratio") and found.contrasts[0].ratio.HasField("low")
assert jobs.GetComparison(job_service_pb2.GetComparisonRequest(name=compared.name)) == found


def render(view, **source):
    request = job_service_pb2.RenderComparisonRequest(view=view, **source)
    return jobs.RenderComparison(request)


text = render(job_service_pb2.COMPARISON_VIEW_TEXT, name=compared.name).content.decode()
assert "perplexity" in text and "most" in text, text
csv = render(job_service_pb2.COMPARISON_VIEW_CSV, report=found).content.decode()
assert csv.startswith("arm,seed,") and csv.count("\n") > 20, csv
png = render(job_service_pb2.COMPARISON_VIEW_BYTES_PNG, report=found)
assert (png.media_type, png.content[:4]) == ("image/png", b"\x89PNG"), png.media_type
try:
    render(job_service_pb2.COMPARISON_VIEW_LATENCY_SVG, report=found)
    raise AssertionError("a picture without latencies was drawn")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error

# A claim: run it, check it, see an edit.
claim = claim_pb2.Claim(
    name="python-claim",
    system="Wanda, by a Python client",
    statement="more zeros, more perplexity",
    model_source="upload",
    model_digest=version.digest,
    data=[claim_pb2.ClaimData(dataset=dataset.name, file="fox.txt", digest=dataset.digest)],
    comparison=comparison_pb2.Comparison(
        seeds=[0, 1], evaluation=recipe.evaluation, arms=comparison.arms
    ),
    expectations=[
        claim_pb2.Expectation(
            effect="90 % of zeros are smaller than 50 %",
            metric="weight_bytes",
            arm="most",
            against="half",
            relation=claim_pb2.RELATION_RATIO_AT_MOST,
            bound=0.9,
            headline=True,
        )
    ],
)
result = finish(
    claims.RunClaim(claim_service_pb2.RunClaimRequest(claim=claim, model=version.name)),
    claim_pb2.ClaimResult,
)
assert result.verdict == claim_pb2.CLAIM_VERDICT_REPRODUCED, result.findings
assert result.seal.startswith("sha256:") and "wanda" in result.provenance.method_code


def check(result):
    return claims.CheckClaim(claim_service_pb2.CheckClaimRequest(claim=claim, result=result))


assert not check(result).problems, check(result)
edited = claim_pb2.ClaimResult()
edited.CopyFrom(result)
edited.report.arms[1].runs[0].measurements[0].value += 1
kinds = [problem.kind for problem in check(edited).problems]
assert claim_service_pb2.CLAIM_PROBLEM_KIND_EDITED in kinds, kinds
page = claims.RenderClaims(
    claim_service_pb2.RenderClaimsRequest(
        claims=[claim_service_pb2.MeasuredClaim(claim=claim, result=result)]
    )
).markdown
assert "python-claim" in page and "reproduced" in page, page
claim.model_digest = "sha256:" + "0" * 64
try:
    claims.RunClaim(claim_service_pb2.RunClaimRequest(claim=claim, model=version.name))
    raise AssertionError("a claim ran on another model")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, error

# Tokens, streamed.
request = generation_service_pb2.GenerateRequest(
    model="models/python",
    text="the quick",
    max_tokens=8,
    ignore_eos=True,
    logprobs=True,
    sampling=generation_service_pb2.SamplingOptions(temperature=0.0),
)
parts = list(generation.Generate(request))
tokens = [token for part in parts for token in part.tokens]
assert len(tokens) == 8 and all(token.logprob <= 0 for token in tokens)
assert parts[-1].finish_reason == generation_service_pb2.FINISH_REASON_LENGTH
assert parts[-1].usage.generated_tokens == 8
assert parts[0].model == report.versions[-1]

# An error that a program can act on.
try:
    bad = compress_pb2.Sparsity(share=1.5)
    recipe.steps[0].wanda.sparsity.CopyFrom(bad)
    jobs.RunRecipe(job_service_pb2.RunRecipeRequest(model="models/python", recipe=recipe))
    raise AssertionError("a share of 1.5 was taken")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    details = {d.type_url.rsplit("/", 1)[1]: d for d in rpc_status.from_call(error).details}
    info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert details["google.rpc.ErrorInfo"].Unpack(info)
    assert details["google.rpc.BadRequest"].Unpack(request)
    assert (info.reason, info.domain) == ("INVALID_OPTION", "planish"), info
    assert "sparsity.share" in request.field_violations[0].field, request
print("python client: ok")
