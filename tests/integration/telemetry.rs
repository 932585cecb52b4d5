//! The Prometheus page.

use std::net::SocketAddr;
use std::time::Duration;

use planish::config::Telemetry;
use planish::telemetry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::harness::Service;

/// The only test that sets telemetry up: it can be done once in a process.
#[tokio::test]
async fn the_metrics_page_counts_requests() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let config =
        Telemetry { metrics_listen: Some(free), filter: "off".into(), ..Telemetry::default() };
    let guard = telemetry::init(&config).unwrap();
    assert!(telemetry::init(&Telemetry::default()).is_err(), "once in a process");

    let service = Service::start().await;
    let mut health = HealthClient::new(service.channel.clone());
    health.check(HealthCheckRequest::default()).await.unwrap();
    let path = "/nowhere.Nothing/Invented-1234".parse().unwrap();
    let mut client = tonic::client::Grpc::new(service.channel.clone());
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<pbjson_types::Empty, pbjson_types::Empty>::default();
    let request = tonic::Request::new(pbjson_types::Empty {});
    client.unary(request, path, codec).await.unwrap_err();
    // Gauges are set now and then: look until they are there.
    let mut page = String::new();
    for _ in 0..100 {
        page = read(free).await;
        if page.contains("planish_operations") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    service.running.stop().await.unwrap();
    for line in [
        r#"planish_requests_total{method="/grpc.health.v1.Health/Check",code="OK"}"#,
        r#"planish_requests_total{method="unknown",code="UNIMPLEMENTED"}"#,
        r#"planish_request_seconds_bucket{method="/grpc.health.v1.Health/Check",le="0.001"}"#,
        r#"planish_operations{state="queued"}"#,
        "planish_models_resident_bytes",
        "planish_healthy",
    ] {
        assert!(page.contains(line), "{line} is missing from {page}");
    }
    assert!(!page.contains("Invented"), "labels must not be the client's to make");
    guard.shutdown();
}

async fn read(address: SocketAddr) -> String {
    let mut page = String::new();
    let mut connection = TcpStream::connect(address).await.unwrap();
    let get = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    connection.write_all(get.as_bytes()).await.unwrap();
    connection.read_to_string(&mut page).await.unwrap();
    page
}
