//! Sending files: read on a thread, sent as chunks, no faster than the client takes them.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::error::Result;

const CHUNK: usize = 1 << 20;

/// Chunks read ahead of the client.
const AHEAD: usize = 4;

/// Messages of an answer.
pub type Messages<M> = Pin<Box<dyn Stream<Item = Result<M, Status>> + Send>>;

/// A file to send, under the name that clients see.
pub struct Source {
    pub name: String,
    pub path: PathBuf,
}

/// What becomes a message.
pub enum Piece {
    File { name: String, size: u64 },
    Chunk(Bytes),
}

/// Sends `files` one after the other. The folder they lie in, if it is temporary, is removed when the
/// last chunk was read or the client went away.
pub fn stream<M: Send + 'static>(
    files: Vec<Source>,
    folder: Option<TempDir>,
    message: impl Fn(Piece) -> Option<M> + Send + 'static,
) -> Messages<M> {
    let (sender, receiver) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        let _folder = folder;
        let mut send = |piece| match message(piece) {
            None => true,
            Some(message) => sender.blocking_send(Ok(message)).is_ok(),
        };
        let sent = files.into_iter().try_for_each(|file| read(file, &mut send));
        if let Err(Stop::Failed(error)) = sent {
            // The receiver may be gone, then nobody wants to know.
            let _ = sender.blocking_send(Err(error.into()));
        }
    });
    Box::pin(ReceiverStream::new(receiver))
}

enum Stop {
    Failed(crate::error::Error),
    /// The client went away.
    Unwanted,
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.into())
    }
}

fn read(source: Source, send: &mut impl FnMut(Piece) -> bool) -> Result<(), Stop> {
    let file = File::open(&source.path)?;
    let size = file.metadata()?.len();
    let mut wanted = |piece| if send(piece) { Ok(()) } else { Err(Stop::Unwanted) };
    wanted(Piece::File { name: source.name, size })?;
    let mut left = file.take(size);
    loop {
        let mut chunk =
            Vec::with_capacity(CHUNK.min(usize::try_from(left.limit()).unwrap_or(CHUNK)));
        left.by_ref().take(CHUNK as u64).read_to_end(&mut chunk)?;
        if chunk.is_empty() {
            return Ok(());
        }
        wanted(Piece::Chunk(chunk.into()))?;
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn files_come_whole_and_the_folder_goes() {
        let folder = tempfile::tempdir().unwrap();
        let kept = folder.path().to_owned();
        let big = vec![7u8; CHUNK + 3];
        std::fs::write(kept.join("a"), &big).unwrap();
        std::fs::write(kept.join("b"), b"").unwrap();
        let files = ["a", "b"].map(|n| Source { name: n.into(), path: kept.join(n) }).into();
        let pieces: Vec<_> = stream(files, Some(folder), Some).collect().await;
        let mut text = String::new();
        for piece in pieces {
            match piece.unwrap() {
                Piece::File { name, size } => text += &format!("{name}={size};"),
                Piece::Chunk(chunk) => text += &format!("{};", chunk.len()),
            }
        }
        assert_eq!(text, format!("a={};{CHUNK};3;b=0;", CHUNK + 3));
        // The thread drops the folder before the channel closes or right after.
        for _ in 0..100 {
            if !kept.exists() {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("the folder is still there");
    }
}
