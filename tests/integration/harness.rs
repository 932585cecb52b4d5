//! A server on a free port with a folder of its own, and clients for it.

use std::path::Path;
use std::time::Duration;

use planish::config::{Config, Data, Limits};
use planish::proto::google::longrunning as lro;
use planish::proto::google::longrunning::operations_client::OperationsClient;
use planish::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use planish::proto::v1;
use planish::proto::v1::dataset_service_client::DatasetServiceClient;
use planish::proto::v1::generation_service_client::GenerationServiceClient;
use planish::proto::v1::job_service_client::JobServiceClient;
use planish::proto::v1::method_service_client::MethodServiceClient;
use planish::proto::v1::model_service_client::ModelServiceClient;
use planish::proto::v1::retrieval_service_client::RetrievalServiceClient;
use planish::server::{Running, Server};
use prost::{Message, Name};
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Longest time anything here may take; a test that hangs fails.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Service {
    pub running: Running,
    pub channel: Channel,
    /// Removed when the test ends.
    pub folder: TempDir,
}

/// A configuration for tests: loopback, a free port, few threads, a short end.
pub fn config(folder: &Path) -> Config {
    let mut config = Config {
        data: Data { folder: folder.to_owned() },
        limits: Limits { models_bytes: 1 << 30, ..Limits::default() },
        ..Config::default()
    };
    config.server.listen = "127.0.0.1:0".parse().unwrap();
    config.shutdown.deadline_seconds = 5;
    config
}

impl Service {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = config(folder.path());
        change(&mut config);
        let running = Server::start(config).await.unwrap();
        let channel = Endpoint::from_shared(format!("http://{}", running.address()))
            .unwrap()
            .timeout(PATIENCE)
            .connect_lazy();
        Self { running, channel, folder }
    }

    pub fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone())
    }

    pub fn datasets(&self) -> DatasetServiceClient<Channel> {
        DatasetServiceClient::new(self.channel.clone())
    }

    pub fn methods(&self) -> MethodServiceClient<Channel> {
        MethodServiceClient::new(self.channel.clone())
    }

    pub fn jobs(&self) -> JobServiceClient<Channel> {
        JobServiceClient::new(self.channel.clone())
    }

    pub fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone())
    }

    pub fn generation(&self) -> GenerationServiceClient<Channel> {
        GenerationServiceClient::new(self.channel.clone())
    }

    pub fn inference(&self) -> GrpcInferenceServiceClient<Channel> {
        GrpcInferenceServiceClient::new(self.channel.clone())
    }

    pub fn retrieval(&self) -> RetrievalServiceClient<Channel> {
        RetrievalServiceClient::new(self.channel.clone())
    }

    /// Imports `text` as a data set.
    pub async fn dataset(&self, id: &str, text: &str) -> Result<v1::Dataset, Status> {
        let header = v1::DatasetHeader {
            dataset_id: id.into(),
            file_name: "text.txt".into(),
            size_bytes: text.len() as i64,
            ..Default::default()
        };
        import_dataset(self.datasets(), header, &[text.as_bytes()]).await
    }

    /// Uploads the files of a folder and imports them as a model; the finished version.
    pub async fn import(&self, id: &str, folder: &Path) -> v1::ModelVersion {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let bytes = std::fs::read(&path).unwrap();
            let mut file = upload(self.models(), &bytes).await.unwrap();
            file.file_name = name;
            files.push(file);
        }
        let request = v1::ImportModelRequest {
            model_id: id.into(),
            source: Some(v1::import_model_request::Source::Uploaded(v1::UploadedFiles { files })),
            ..Default::default()
        };
        let operation = self.models().import_model(request).await.unwrap().into_inner();
        response(self.finished(&operation.name).await)
    }

    /// The operation once it has ended.
    pub async fn finished(&self, name: &str) -> lro::Operation {
        let request = lro::WaitOperationRequest { name: name.into(), timeout: None };
        let operation = self.operations().wait_operation(request).await.unwrap().into_inner();
        assert!(operation.done, "{operation:?}");
        operation
    }
}

pub async fn import_dataset(
    mut client: DatasetServiceClient<Channel>,
    header: v1::DatasetHeader,
    chunks: &[&[u8]],
) -> Result<v1::Dataset, Status> {
    use v1::import_dataset_request::Part;
    let parts = std::iter::once(Part::Header(header))
        .chain(chunks.iter().map(|c| Part::Chunk(c.to_vec().into())))
        .map(|part| v1::ImportDatasetRequest { part: Some(part) });
    let stream = futures::stream::iter(parts.collect::<Vec<_>>());
    client.import_dataset(stream).await.map(tonic::Response::into_inner)
}

pub async fn upload(
    client: ModelServiceClient<Channel>,
    bytes: &[u8],
) -> Result<v1::ModelFile, Status> {
    let header = v1::UploadHeader {
        file_name: "file".into(),
        size_bytes: bytes.len() as i64,
        digest: digest(bytes),
    };
    upload_as(client, header, bytes).await
}

pub async fn upload_as(
    mut client: ModelServiceClient<Channel>,
    header: v1::UploadHeader,
    bytes: &[u8],
) -> Result<v1::ModelFile, Status> {
    use v1::upload_file_request::Part;
    let parts = std::iter::once(Part::Header(header))
        .chain(bytes.chunks(1 << 20).map(|c| Part::Chunk(c.to_vec().into())))
        .map(|part| v1::UploadFileRequest { part: Some(part) });
    let stream = futures::stream::iter(parts.collect::<Vec<_>>());
    client.upload_file(stream).await.map(|r| r.into_inner().file.unwrap())
}

pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// The response of an operation that succeeded.
pub fn response<M: Message + Name + Default>(operation: lro::Operation) -> M {
    match operation.result {
        Some(lro::operation::Result::Response(any)) => {
            assert_eq!(any.type_url, M::type_url());
            M::decode(any.value).unwrap()
        }
        other => panic!("no response: {other:?}"),
    }
}

pub fn metadata(operation: &lro::Operation) -> v1::OperationMetadata {
    let any = operation.metadata.clone().unwrap();
    assert_eq!(any.type_url, v1::OperationMetadata::type_url());
    v1::OperationMetadata::decode(any.value).unwrap()
}

/// The stable reason of an error; every error must have one.
pub fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "planish");
    info.reason.clone()
}

/// Paths of the fields that an error blames.
pub fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|b| b.field_violations.clone()).unwrap_or_default();
    violations.into_iter().map(|v| v.field).collect()
}

/// Checks code, reason and the first blamed field (empty: none) of an error.
#[track_caller]
pub fn assert_error<T: std::fmt::Debug>(
    result: Result<T, Status>,
    code: Code,
    expected: &str,
    field: &str,
) {
    let status = result.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (code, expected), "{status:?}");
    assert_eq!(fields(&status).first().map_or("", String::as_str), field, "{status:?}");
}
