//! `planish serve`: the service in the foreground.

use std::path::{Path, PathBuf};

use super::config::ConfigArgs;
use super::error::{CliError, Result};
use crate::server::Server;
use crate::telemetry;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
    /// Write the address here once the service answers (for port 0); removed at the end
    #[arg(long, value_name = "FILE")]
    address_file: Option<PathBuf>,
}

/// Runs the service until a signal or a failure ends it.
pub async fn run(args: Args) -> Result<()> {
    let config = args.config.load()?.config;
    let scheme = if config.server.tls.cert.is_some() { "https" } else { "http" };
    let guard = telemetry::init(&config.telemetry)?;
    // Listened to from the start, so that a signal during the start is not lost.
    let mut signals = Signals::new()?;
    let mut server = tokio::select! {
        server = Server::start(config) => server?,
        () = signals.next() => return Err(CliError::interrupted("interrupted while starting")),
    };
    let address = format!("{scheme}://{}", server.address());
    if let Some(file) = &args.address_file {
        write_whole(file, &address)
            .map_err(|e| CliError::file(&format!("writing {}", file.display()), &e))?;
    }
    let failed = tokio::select! {
        ended = server.wait() => Some(ended),
        () = signals.next() => None,
    };
    let result = match failed {
        Some(ended) => ended,
        None => {
            tracing::info!("stopping; a second signal stops at once");
            tokio::select! {
                stopped = server.stop() => stopped,
                () = signals.next() => {
                    tracing::warn!("stopped at once; jobs resume at the next start");
                    Ok(())
                }
            }
        }
    };
    if let Some(file) = &args.address_file {
        // Whoever waits for the address must not find that of a dead server; nothing depends on it.
        let _ = std::fs::remove_file(file);
    }
    guard.shutdown();
    Ok(result?)
}

/// Writes a file that is either absent or whole for those who poll for it.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let folder = path.parent().filter(|f| !f.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let partial = tempfile::NamedTempFile::new_in(folder)?;
    std::fs::write(partial.path(), text)?;
    partial.persist(path).map_err(|e| e.error)?;
    Ok(())
}

/// The signals that ask for an end: Ctrl-C and, on Unix, SIGTERM.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            let failed = |e| CliError::file("listening to signals", &e);
            Ok(Self {
                terminate: signal(SignalKind::terminate()).map_err(failed)?,
                interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            })
        }
        #[cfg(not(unix))]
        Ok(Self {})
    }

    async fn next(&mut self) {
        #[cfg(unix)]
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        #[cfg(not(unix))]
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
