//! Reflection, both versions: what the services are, for tools without our files.

use tonic_reflection::server::{Builder, v1, v1alpha};

use super::DESCRIPTORS;
use crate::error::{Error, Result};
use crate::proto::google::longrunning::operations_server;
use crate::proto::inference::grpc_inference_service_server;
use crate::proto::v1 as planish;

/// Services by name: the descriptors also describe messages of services that we do not offer.
const SERVICES: &[&str] = &[
    planish::model_service_server::SERVICE_NAME,
    planish::adapter_service_server::SERVICE_NAME,
    planish::dataset_service_server::SERVICE_NAME,
    planish::method_service_server::SERVICE_NAME,
    planish::job_service_server::SERVICE_NAME,
    planish::claim_service_server::SERVICE_NAME,
    planish::generation_service_server::SERVICE_NAME,
    grpc_inference_service_server::SERVICE_NAME,
    planish::prediction_service_server::SERVICE_NAME,
    planish::retrieval_service_server::SERVICE_NAME,
    operations_server::SERVICE_NAME,
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// Descriptors of everything served, for all who need to know the methods. The error details are in
/// it too, so that tools can print them.
pub fn descriptors() -> [&'static [u8]; 5] {
    [
        DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        tonic_types::pb::FILE_DESCRIPTOR_SET,
    ]
}

fn builder() -> Builder<'static> {
    let builder = Builder::configure().include_reflection_service(false);
    let builder = SERVICES.iter().fold(builder, |b, name| b.with_service_name(*name));
    descriptors().into_iter().fold(builder, Builder::register_encoded_file_descriptor_set)
}

/// The two services.
pub fn services() -> Result<(
    v1::ServerReflectionServer<impl v1::ServerReflection>,
    v1alpha::ServerReflectionServer<impl v1alpha::ServerReflection>,
)> {
    let broken = |e| Error::internal("the descriptors are broken").with_source(e);
    Ok((builder().build_v1().map_err(broken)?, builder().build_v1alpha().map_err(broken)?))
}
