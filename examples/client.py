# Ten lines of Python that talk to a running server. Once, for the stubs:
#   pip install grpcio grpcio-tools
#   python -m grpc_tools.protoc -I proto --python_out=. --grpc_python_out=. \
#     $(find proto -name '*.proto')
import sys
import grpc
from planish.v1 import generation_service_pb2 as pb
from planish.v1 import generation_service_pb2_grpc as rpc

with grpc.insecure_channel("127.0.0.1:50551") as channel:
    client = rpc.GenerationServiceStub(channel)
    request = pb.GenerateRequest(model=f"models/{sys.argv[1]}", text="The sea is", max_tokens=40)
    for part in client.Generate(request):
        print(part.text, end="", flush=True)
