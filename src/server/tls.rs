//! TLS and mutual TLS.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tonic::transport::{Certificate, Identity, ServerTlsConfig};

use crate::config::Tls;
use crate::error::{Error, Reason, Result};

/// A client that has not finished its handshake by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Reads the certificates; nothing when TLS is not asked for.
pub fn load(tls: &Tls) -> Result<Option<ServerTlsConfig>> {
    let (Some(cert), Some(key)) = (&tls.cert, &tls.key) else { return Ok(None) };
    let identity = Identity::from_pem(read("server.tls.cert", cert)?, read("server.tls.key", key)?);
    let mut config = ServerTlsConfig::new().identity(identity).timeout(HANDSHAKE);
    if let Some(authority) = &tls.client_ca {
        let authority = read("server.tls.client_ca", authority)?;
        config = config.client_ca_root(Certificate::from_pem(authority));
    }
    Ok(Some(config))
}

fn read(key: &str, path: &Path) -> Result<Vec<u8>> {
    let pem = fs::read(path).map_err(|e| {
        let problem = format!("{} cannot be read: {e}; check path and rights", path.display());
        Error::at(Reason::InvalidConfig, key, problem)
    })?;
    // The library takes a file without any certificate for an empty chain and fails later, unseen.
    if !pem.windows(10).any(|w| w == b"-----BEGIN") {
        let problem = format!("{} holds no pem block", path.display());
        return Err(Error::at(Reason::InvalidConfig, key, problem));
    }
    Ok(pem)
}

/// The library's refusal of the certificates.
pub fn bad(key: &str, error: &dyn std::error::Error) -> Error {
    let cause = error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let problem = format!("the certificate, key or authority cannot be used: {cause}");
    Error::at(Reason::InvalidConfig, key, problem)
}
