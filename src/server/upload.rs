//! Receiving files: a header, then chunks, with limits and patience.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use tonic::Status;

use super::{check, convert};
use crate::error::{Error, Reason, Result};
use crate::proto::v1;
use crate::store::objects::{Object, Objects, check_digest};

const MAX_CHUNK: usize = 4 << 20;

/// A client that sends nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// A message of an upload, whichever RPC it belongs to.
pub enum Part<H> {
    Header(H),
    Chunk(Bytes),
}

/// The next message, if one comes; `part` takes a message apart.
pub async fn next<M, H>(
    stream: &mut (impl Stream<Item = Result<M, Status>> + Unpin),
    part: impl Fn(M) -> Option<Part<H>>,
) -> Result<Option<Part<H>>, Status> {
    match tokio::time::timeout(PATIENCE, stream.next()).await {
        Err(_) => Err(Error::new(
            Reason::DeadlineExceeded,
            "no chunk came for 60 seconds; start the upload again",
        )
        .into()),
        Ok(None) => Ok(None),
        Ok(Some(Err(status))) => Err(status),
        Ok(Some(Ok(message))) => match part(message) {
            Some(part) => Ok(Some(part)),
            None => Err(Error::field("part", "empty; send a header or a chunk").into()),
        },
    }
}

/// The header, which must come first.
pub async fn header<M, H>(
    stream: &mut (impl Stream<Item = Result<M, Status>> + Unpin),
    part: impl Fn(M) -> Option<Part<H>>,
) -> Result<H, Status> {
    match next(stream, part).await? {
        Some(Part::Header(header)) => Ok(header),
        _ => Err(Error::field("header", "missing; the first message must be the header").into()),
    }
}

/// Stores the chunks that follow the header. Exactly `size` bytes must come, with `digest` if given;
/// what is left unfinished leaves nothing.
pub async fn body<M, H>(
    stream: &mut (impl Stream<Item = Result<M, Status>> + Unpin),
    part: impl Fn(M) -> Option<Part<H>>,
    objects: &Objects,
    size: u64,
    digest: Option<&str>,
) -> Result<Object, Status> {
    let mut upload = objects.upload(size).await?;
    let mut received = 0u64;
    while let Some(part) = next(stream, &part).await? {
        let Part::Chunk(chunk) = part else {
            return Err(
                Error::field("header", "sent twice; only the first message holds it").into()
            );
        };
        if chunk.len() > MAX_CHUNK {
            return Err(Error::at(
                Reason::TooLarge,
                "chunk",
                "more than 4 MiB; send smaller chunks",
            )
            .into());
        }
        received = received.saturating_add(chunk.len() as u64);
        if received > size {
            return Err(Error::at(
                Reason::DigestMismatch,
                "chunk",
                format!("more bytes came than the {size} of the header; send the exact size"),
            )
            .into());
        }
        upload.write(&chunk).await?;
    }
    Ok(upload.finish(Some(size), digest).await?)
}

/// Checks the files that a request says were uploaded: at most `most`, each with a name of its own that stays
/// in its folder, there under its digest, and of the size that is named (0: not named). Errors blame the
/// fields of `uploaded`.
pub async fn check_files(objects: &Objects, files: &[v1::ModelFile], most: usize) -> Result<()> {
    if files.is_empty() || files.len() > most {
        return Err(Error::field("uploaded.files", format!("1 to {most} files are taken")));
    }
    let mut seen = BTreeSet::new();
    for (index, file) in files.iter().enumerate() {
        let at = |name: &str| format!("uploaded.files[{index}].{name}");
        check::file_name(&at("file_name"), &file.file_name)?;
        if !seen.insert(&file.file_name) {
            return Err(Error::field(at("file_name"), "two files have this name"));
        }
        check_digest(&file.digest).map_err(|e| Error::field(at("digest"), e.message()))?;
        let object = objects.find(&file.digest).await?.ok_or_else(|| {
            Error::at(
                Reason::ResourceNotFound,
                at("digest"),
                "no file with this digest was uploaded; send it with UploadFile",
            )
        })?;
        if file.size_bytes != 0 && file.size_bytes != convert::signed(object.size) {
            let problem = format!("the uploaded file has {} bytes", object.size);
            return Err(Error::at(Reason::DigestMismatch, at("size_bytes"), problem));
        }
    }
    Ok(())
}
