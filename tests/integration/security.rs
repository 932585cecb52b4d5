//! Credentials, encryption, limits, deadlines, and the end of the server.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use planish::config::{Config, Secret};
use planish::proto::v1;
use planish::proto::v1::model_service_client::ModelServiceClient;
use planish::server::Server;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::{PATIENCE, Service, assert_error, config, fields, reason};

const TOKEN: &str = "a-token-of-the-tests";

async fn list(channel: Channel, header: Option<&str>) -> Result<(), Status> {
    let mut request = Request::new(v1::ListModelsRequest::default());
    if let Some(header) = header {
        request.metadata_mut().insert("authorization", header.parse().unwrap());
    }
    ModelServiceClient::new(channel).list_models(request).await.map(|_| ())
}

#[tokio::test]
async fn tokens_are_asked_for() {
    let service = Service::start_with(|c| c.server.token = Some(Secret::new(TOKEN))).await;
    let unauthenticated = Code::Unauthenticated;
    let channel = || service.channel.clone();
    assert_error(list(channel(), None).await, unauthenticated, "UNAUTHENTICATED", "");
    let wrong = list(channel(), Some("Bearer a-token-of-the-testz")).await;
    assert_error(wrong, unauthenticated, "UNAUTHENTICATED", "");
    list(channel(), Some(&format!("Bearer {TOKEN}"))).await.unwrap();

    // Health is for balancers, which have no token; reflection is not.
    let mut health = HealthClient::new(channel());
    health.check(HealthCheckRequest::default()).await.unwrap();
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    let mut reflection = ServerReflectionClient::new(channel());
    let refused = reflection.server_reflection_info(futures::stream::empty()).await;
    assert_eq!(reason(&refused.unwrap_err()), "UNAUTHENTICATED");
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn unknown_methods_have_a_reason() {
    let service = Service::start().await;
    let mut client = tonic::client::Grpc::new(service.channel.clone());
    client.ready().await.unwrap();
    let path = "/planish.v1.ModelService/Frobnicate".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<v1::ListModelsRequest, v1::ListModelsResponse>::default();
    let answer = client.unary(Request::new(v1::ListModelsRequest::default()), path, codec).await;
    assert_error(answer, Code::Unimplemented, "UNSUPPORTED", "");
    service.running.stop().await.unwrap();
}

/// An authority, a certificate of the server and one of a client, as PEM files.
fn certificates(folder: &Path) -> Result<(), rcgen::Error> {
    let authority_key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = params.self_signed(&authority_key)?;
    fs::write(folder.join("ca.pem"), authority.pem()).unwrap();
    let issuer = Issuer::new(params, authority_key);
    for (name, usage) in [
        ("server", ExtendedKeyUsagePurpose::ServerAuth),
        ("client", ExtendedKeyUsagePurpose::ClientAuth),
    ] {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.extended_key_usages = vec![usage];
        let certificate = params.signed_by(&key, &issuer)?;
        fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    Ok(())
}

async fn connect(address: std::net::SocketAddr, tls: ClientTlsConfig) -> Result<Channel, String> {
    Endpoint::from_shared(format!("https://{address}"))
        .unwrap()
        .tls_config(tls.domain_name("localhost"))
        .unwrap()
        .timeout(PATIENCE)
        .connect()
        .await
        .map_err(|e| format!("{e:?}"))
}

#[tokio::test]
async fn connections_are_encrypted_and_clients_known() {
    let certs = tempfile::tempdir().unwrap();
    certificates(certs.path()).unwrap();
    let pem = |name: &str| fs::read(certs.path().join(name)).unwrap();
    let authority = Certificate::from_pem(pem("ca.pem"));
    let with_tls = |config: &mut Config| {
        config.server.tls.cert = Some(certs.path().join("server.pem"));
        config.server.tls.key = Some(certs.path().join("server.key"));
    };

    let service = Service::start_with(with_tls).await;
    let address = service.running.address();
    assert!(list(service.channel.clone(), None).await.is_err(), "plain text must not pass");
    let tls = ClientTlsConfig::new().ca_certificate(authority.clone());
    list(connect(address, tls.clone()).await.unwrap(), None).await.unwrap();
    assert!(connect(address, ClientTlsConfig::new()).await.is_err(), "an unknown authority");
    service.running.stop().await.unwrap();

    let service = Service::start_with(|config| {
        with_tls(config);
        config.server.tls.client_ca = Some(certs.path().join("ca.pem"));
    })
    .await;
    let address = service.running.address();
    // With TLS 1.3 the client learns of the refusal when it first uses the connection.
    let stranger = match connect(address, tls.clone()).await {
        Ok(channel) => list(channel, None).await.map_err(|e| e.to_string()),
        Err(error) => Err(error),
    };
    assert!(stranger.is_err(), "a client without a certificate");
    let identity = Identity::from_pem(pem("client.pem"), pem("client.key"));
    list(connect(address, tls.identity(identity)).await.unwrap(), None).await.unwrap();
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn bad_configurations_do_not_start() {
    let folder = tempfile::tempdir().unwrap();
    let start = async |change: &dyn Fn(&mut Config)| {
        let mut config = config(folder.path());
        change(&mut config);
        let error = Server::start(config).await.map(|r| r.address()).unwrap_err();
        assert_eq!(error.reason(), planish::error::Reason::InvalidConfig, "{error}");
        error.violations()[0].field.clone()
    };
    let key = start(&|c| c.server.listen = "0.0.0.0:0".parse().unwrap()).await;
    assert_eq!(key, "server.listen");
    let key = start(&|c| c.server.tokens_file = Some("/does/not/exist".into())).await;
    assert_eq!(key, "server.tokens_file");
    let garbage = folder.path().join("garbage.pem");
    fs::write(&garbage, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n").unwrap();
    let key = start(&|c| {
        c.server.tls.cert = Some(garbage.clone());
        c.server.tls.key = Some(garbage.clone());
    })
    .await;
    assert_eq!(key, "server.tls.cert");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let key = start(&|c| c.server.listen = taken.local_addr().unwrap()).await;
    assert_eq!(key, "server.listen");
}

#[tokio::test]
async fn messages_have_a_limit() {
    let service = Service::start_with(|c| c.limits.message_bytes = 64 << 10).await;
    let request = v1::TokenizeRequest {
        model: "models/a".into(),
        input: Some(v1::tokenize_request::Input::Text("x".repeat(65 << 10))),
        ..Default::default()
    };
    let refused = service.generation().tokenize(request).await;
    assert_error(refused, Code::ResourceExhausted, "TOO_LARGE", "");
    service.running.stop().await.unwrap();
}

/// A stream that stays open until it is dropped: an upload that sends its header and no more.
async fn open_upload(channel: Channel) -> tokio::sync::mpsc::Sender<v1::UploadFileRequest> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let header = v1::UploadHeader { size_bytes: 10, ..Default::default() };
    let part = Some(v1::upload_file_request::Part::Header(header));
    sender.send(v1::UploadFileRequest { part }).await.unwrap();
    tokio::spawn(async move {
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let _ = ModelServiceClient::new(channel).upload_file(stream).await;
    });
    sender
}

/// Repeats `attempt` until it passes.
async fn eventually(mut attempt: impl AsyncFnMut() -> bool) {
    let started = Instant::now();
    while !attempt().await {
        assert!(started.elapsed() < Duration::from_secs(10), "it never came true");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn requests_at_once_are_limited_over_all_connections() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    let service = Service::start_with(|c| c.limits.concurrent_requests = 2).await;
    let other = || {
        Endpoint::from_shared(format!("http://{}", service.running.address()))
            .unwrap()
            .connect_lazy()
    };
    // Streams that last as long as their questions; the headers say that they were let in.
    let open = async || {
        let (asking, questions) = tokio::sync::mpsc::channel(1);
        let questions = tokio_stream::wrappers::ReceiverStream::new(questions);
        let mut client = ServerReflectionClient::new(other());
        (asking, client.server_reflection_info(questions).await.unwrap())
    };
    let first = open().await;
    let second = open().await;
    let refused = list(other(), None).await;
    assert_error(refused, Code::ResourceExhausted, "LIMIT_REACHED", "");
    // Health must answer when all else is full.
    HealthClient::new(other()).check(HealthCheckRequest::default()).await.unwrap();
    drop(first);
    eventually(async || list(other(), None).await.is_ok()).await;
    drop(second);
    service.running.stop().await.unwrap();
}

#[tokio::test]
async fn stopping_ends_endless_streams_at_once() {
    let service = Service::start().await;
    let mut health = HealthClient::new(service.channel.clone());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    let started = Instant::now();
    service.running.stop().await.unwrap();
    assert!(started.elapsed() < Duration::from_secs(4), "the stream held the server");
    loop {
        match watch.message().await {
            // Reports from before the stop, and the news of it, may still come.
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without a reason"),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable);
                break;
            }
        }
    }
}

#[tokio::test]
async fn stopping_cuts_off_what_outlasts_the_deadline() {
    let service = Service::start_with(|c| c.shutdown.deadline_seconds = 1).await;
    let sender = open_upload(service.channel.clone()).await;
    list(service.channel.clone(), None).await.unwrap();
    let started = Instant::now();
    service.running.stop().await.unwrap();
    let elapsed = started.elapsed();
    assert!(elapsed >= Duration::from_secs(1), "the upload got no grace");
    assert!(elapsed < Duration::from_secs(4), "the upload held the server");
    drop(sender);
}

#[tokio::test]
async fn errors_do_not_grow_beyond_headers() {
    let service = Service::start().await;
    let name = format!("models/{}", "\u{e9}".repeat(30_000));
    let bad = service.models().get_model(v1::GetModelRequest { name }).await.unwrap_err();
    assert_eq!(reason(&bad), "INVALID_NAME");
    let stop = vec!["x".repeat(100_000)];
    let request = v1::GenerateRequest { stop, ..Default::default() };
    let bad = service.generation().generate(request).await.unwrap_err();
    assert_eq!(fields(&bad), ["stop[0]"]);
    service.running.stop().await.unwrap();
}
