//! A service of the command's own: for verbs that are to work without one running.

use std::path::{Path, PathBuf};

use super::Context;
use super::client::ConnectionOptions;
use super::error::{CliError, Result};
use crate::config::Config;
use crate::serve::engine::Engine;
use crate::server::{Running, Server};

/// A service in this process, on a free loopback port.
pub struct Own {
    server: Running,
    /// How verbs reach it.
    pub context: Context,
}

impl Own {
    /// Starts it with its data in `folder`, which is made if it is not there.
    pub async fn start(folder: &Path, outer: &Context) -> Result<Self> {
        std::fs::create_dir_all(folder)
            .map_err(|e| CliError::file(&format!("creating {}", folder.display()), &e))?;
        let mut config = Config::default();
        config.server.listen = ([127, 0, 0, 1], 0).into();
        config.data.folder = folder.to_owned();
        let server = Server::start(config).await?;
        let context = Context {
            output: outer.output,
            connection: ConnectionOptions {
                endpoint: Some(format!("http://{}", server.address())),
                timeout: outer.connection.timeout,
                ..ConnectionOptions::default()
            },
            farewell: std::sync::Mutex::default(),
        };
        Ok(Self { server, context })
    }

    /// The engine that answers for a model.
    pub async fn engine(&self, model: &str) -> Result<Engine> {
        Ok(self.server.engine(model).await?)
    }

    /// Does `work` while the service lives.
    pub async fn during<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            result = work => result,
            ended = self.server.wait() => match ended {
                Ok(()) => Err(CliError::failure("the service ended before its time")),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Waits until the service is stopped from outside.
    pub async fn wait(&mut self) -> Result<()> {
        Ok(self.server.wait().await?)
    }

    pub async fn stop(self) -> Result<()> {
        Ok(self.server.stop().await?)
    }
}

/// `planish/<name>` in the user's cache folder: where data goes that can be made again.
pub fn cache_folder(name: &str) -> Result<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("planish").join(name))
        .ok_or_else(|| CliError::usage("no home folder was found; give --folder"))
}
