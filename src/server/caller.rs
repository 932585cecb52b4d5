//! Who asks, and until when.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Instant;

use tonic::Request;

/// When the client stops waiting; the gate puts it into the extensions of a request.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// What the engine has to know of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Stands for the client's certificate and token and the address it calls from: those who differ in
    /// any of them take turns.
    pub client: u64,
    pub deadline: Option<Instant>,
}

/// The caller of a request: the one that the extensions name, for what one service asks of another.
pub fn of<T>(request: &Request<T>) -> Caller {
    if let Some(caller) = request.extensions().get::<Caller>() {
        return *caller;
    }
    // A key for a table of this process only: nothing secret can be read from it.
    let mut hasher = DefaultHasher::new();
    request
        .peer_certs()
        .as_deref()
        .and_then(|certs| certs.first())
        .map(AsRef::as_ref)
        .hash(&mut hasher);
    request.metadata().get("authorization").map(|value| value.as_encoded_bytes()).hash(&mut hasher);
    // Not the port: a client may open many connections.
    request.remote_addr().map(|address| address.ip()).hash(&mut hasher);
    Caller {
        client: hasher.finish(),
        deadline: request.extensions().get::<Deadline>().map(|deadline| deadline.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_tell_callers_apart_and_deadlines_are_passed_on() {
        let with = |token: &'static str| {
            let mut request = Request::new(());
            request.metadata_mut().insert("authorization", token.parse().unwrap());
            request
        };
        assert_eq!(of(&with("Bearer a")), of(&with("Bearer a")));
        assert_ne!(of(&with("Bearer a")).client, of(&with("Bearer b")).client);
        assert_ne!(of(&with("Bearer a")).client, of(&Request::new(())).client);
        assert_eq!(of(&Request::new(())).deadline, None);
        let mut request = with("Bearer a");
        let deadline = Instant::now();
        request.extensions_mut().insert(Deadline(deadline));
        assert_eq!(of(&request).deadline, Some(deadline));
    }
}
