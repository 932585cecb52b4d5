//! The wire: one file per service; decode, check, convert, call, convert.

use std::net::SocketAddr;

use crate::config::Config;
use crate::error::Result;

/// The service; see [`Server::start`].
pub struct Server;

impl Server {
    /// Opens the store, starts the runner and listens. The address is bound (port 0 resolved) and health
    /// reports SERVING when this returns. Telemetry is set up by the caller ([`crate::telemetry::init`]).
    pub async fn start(_config: Config) -> Result<Running> {
        todo!()
    }
}

/// A server at work. Dropping it stops it without grace.
pub struct Running {
    address: SocketAddr,
}

impl Running {
    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns when the server ends by itself, which it does only on failure. Cancel-safe.
    pub async fn wait(&mut self) -> Result<()> {
        todo!()
    }

    /// Stops in order: no new requests, our own streams end, the rest and the jobs get until the
    /// configured deadline. Interrupted jobs resume at the next start.
    pub async fn stop(self) -> Result<()> {
        todo!()
    }
}
