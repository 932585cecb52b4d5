//! The gate every request passes: tracing and metrics, shutdown, credentials, the global limit, and
//! the client's deadline, which here covers streams to their last message.
//!
//! One layer instead of several, because all of these end together: when the last byte of the answer
//! is out, when the client goes away, when its deadline passes, or when the server stops.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tonic::body::Body;
use tonic::codegen::Bytes;
use tonic::{Code, Status};
use tracing::{Instrument as _, Span};

use super::auth::Tokens;
use super::caller::Deadline;
use super::status;
use crate::error::{Error, Reason, Result};

/// How far the server is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Serving,
    /// No new requests; streams without an end of their own are over.
    Draining,
    /// Everything is over.
    Closing,
}

/// What the gate knows of a method.
#[derive(Debug, Clone, Copy)]
struct Method {
    /// `/package.Service/Method`, leaked once at start: the label of spans and metrics.
    path: &'static str,
    /// A stream that ends only when the client wants it to.
    endless: bool,
    /// Health checks pass without credentials and do not count: they must work when all else is full.
    health: bool,
}

/// Requests to methods we do not have share one label, or clients could make labels without end.
const UNKNOWN: Method = Method { path: "unknown", endless: false, health: false };

/// The health checks of the Open Inference Protocol.
const PROBES: &[&str] =
    &["/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"];

const ENDLESS: &[&str] = &[
    "/planish.v1.JobService/WatchOperation",
    "/google.longrunning.Operations/WaitOperation",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The layer.
#[derive(Clone)]
pub struct Gate(Arc<Inner>);

struct Inner {
    methods: HashMap<&'static str, Method>,
    tokens: Tokens,
    permits: Arc<Semaphore>,
    phase: watch::Receiver<Phase>,
}

impl Gate {
    /// A gate for the methods of `descriptors` (encoded descriptor sets).
    pub fn new(
        descriptors: &[&[u8]],
        tokens: Tokens,
        concurrent: usize,
        phase: watch::Receiver<Phase>,
    ) -> Result<Self> {
        let mut methods = HashMap::new();
        for bytes in descriptors {
            let set = prost_types::FileDescriptorSet::decode(*bytes)
                .map_err(|e| Error::internal("the descriptors are broken").with_source(e))?;
            for file in &set.file {
                for service in &file.service {
                    for method in &service.method {
                        let path =
                            format!("/{}.{}/{}", file.package(), service.name(), method.name());
                        let path: &'static str = path.leak();
                        let method = Method {
                            path,
                            endless: ENDLESS.contains(&path),
                            health: path.starts_with("/grpc.health.v1.Health/")
                                || PROBES.contains(&path),
                        };
                        methods.insert(path, method);
                    }
                }
            }
        }
        let permits = Arc::new(Semaphore::new(concurrent.min(Semaphore::MAX_PERMITS)));
        Ok(Self(Arc::new(Inner { methods, tokens, permits, phase })))
    }
}

impl Inner {
    /// Lets a request in or says why not.
    fn admit(&self, method: Method, headers: &HeaderMap) -> Result<Option<OwnedSemaphorePermit>> {
        if method.health {
            return Ok(None);
        }
        self.tokens.check(headers.get(http::header::AUTHORIZATION).map(HeaderValue::as_bytes))?;
        if *self.phase.borrow() != Phase::Serving {
            return Err(stopping());
        }
        let permit = self.permits.clone().try_acquire_owned().map_err(|_| {
            Error::new(
                Reason::LimitReached,
                "too many requests are under way (limits.concurrent_requests); try again later",
            )
        })?;
        Ok(Some(permit))
    }
}

fn stopping() -> Error {
    Error::new(Reason::NotReady, "the server is stopping; try again when it is back")
}

impl<S> tower::Layer<S> for Gate {
    type Service = Gated<S>;

    fn layer(&self, service: S) -> Gated<S> {
        Gated { gate: self.clone(), service }
    }
}

/// A service behind the gate.
#[derive(Clone)]
pub struct Gated<S> {
    gate: Gate,
    service: S,
}

impl<S> tower::Service<Request<Body>> for Gated<S>
where
    S: tower::Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let inner = &self.gate.0;
        let method = inner.methods.get(request.uri().path()).copied().unwrap_or(UNKNOWN);
        let id = request_id(request.headers());
        let span = tracing::info_span!("request", method = method.path, request_id = %id);
        let record = Record::open(method, span.clone());
        let permit = match inner.admit(method, request.headers()) {
            Ok(permit) => permit,
            Err(error) => {
                let mut response = span.in_scope(|| Status::from(error)).into_http::<Body>();
                record.close_with(response.headers());
                mark(&mut response, &id);
                return Box::pin(std::future::ready(Ok(response)));
            }
        };
        let timeout = timeout(request.headers());
        if let Some(deadline) = timeout.and_then(|timeout| Instant::now().checked_add(timeout)) {
            request.extensions_mut().insert(Deadline(deadline));
        }
        let mut end = End::new(method, timeout, inner.phase.clone());
        let call = self.service.call(request);
        let work = async move {
            let mut call = pin!(call);
            let response = std::future::poll_fn(|cx| match call.as_mut().poll(cx) {
                Poll::Ready(response) => Poll::Ready(Ok(response)),
                Poll::Pending => end.poll(cx).map(Err),
            })
            .await;
            let mut response = match response {
                Err(over) => Status::from(over).into_http(),
                Ok(response) => {
                    let response = response?;
                    // Trailers in the headers: an error and nothing else.
                    match Status::from_header_map(response.headers()) {
                        Some(error) => status::explain(error).into_http(),
                        None => response,
                    }
                }
            };
            mark(&mut response, &id);
            if response.headers().contains_key(Status::GRPC_STATUS) {
                record.close_with(response.headers());
                return Ok(response);
            }
            Ok(response.map(|body| {
                Body::new(Guarded { body: Some(body), end, record: Some(record), _permit: permit })
            }))
        };
        Box::pin(work.instrument(span))
    }
}

/// The client's own id of the request if it is usable, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    headers
        .get("x-request-id")
        .and_then(|v| v.to_str().ok())
        .filter(|v| (1..=64).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_graphic()))
        .map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}

fn mark(response: &mut Response<Body>, id: &str) {
    if let Ok(value) = HeaderValue::from_str(id) {
        response.headers_mut().insert("x-request-id", value);
    }
}

/// The client's deadline: `grpc-timeout` is at most 8 digits and a unit.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// What ends a request from outside.
struct End {
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    over: Pin<Box<dyn Future<Output = ()> + Send>>,
}

impl End {
    fn new(method: Method, timeout: Option<Duration>, mut phase: watch::Receiver<Phase>) -> Self {
        let last = match method {
            Method { health: true, endless: false, .. } => None,
            Method { endless: true, .. } => Some(Phase::Draining),
            _ => Some(Phase::Closing),
        };
        let over = async move {
            match last {
                // An error means that the server's handle is gone without a word: closing as well.
                Some(last) => drop(phase.wait_for(|p| *p >= last).await),
                None => std::future::pending().await,
            }
        };
        Self { deadline: timeout.map(|t| Box::pin(tokio::time::sleep(t))), over: Box::pin(over) }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(cx).is_ready()
        {
            self.deadline = None;
            return Poll::Ready(Error::new(
                Reason::DeadlineExceeded,
                "the deadline of the request passed; allow more time",
            ));
        }
        self.over.as_mut().poll(cx).map(|()| stopping())
    }
}

/// An answer on its way out. Dropped early (the client went away), it drops the work behind it.
struct Guarded {
    body: Option<Body>,
    end: End,
    record: Option<Record>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl http_body::Body for Guarded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let _entered = this.record.as_ref().map(|r| r.span.clone().entered());
        let Some(body) = &mut this.body else { return Poll::Ready(None) };
        // The end comes first: a stream that is always ready must not outrun it.
        if let Poll::Ready(over) = this.end.poll(cx) {
            this.body = None;
            let mut trailers = HeaderMap::new();
            let status = Status::from(over);
            if let Some(record) = this.record.take() {
                record.close(status.code());
            }
            return Poll::Ready(Some(match status.add_header(&mut trailers) {
                Ok(()) => Ok(Frame::trailers(trailers)),
                Err(status) => Err(status),
            }));
        }
        let frame = std::task::ready!(Pin::new(body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_ref()
                    && let Some(record) = this.record.take()
                {
                    record.close_with(trailers);
                }
            }
            Some(Err(error)) => {
                if let Some(record) = this.record.take() {
                    record.close(error.code());
                }
            }
            None => this.body = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(Body::is_end_stream)
    }
}

/// The account of a request: written once, when it ends. Dropped unwritten, the client went away.
struct Record {
    method: Method,
    started: Instant,
    span: Span,
    closed: bool,
}

impl Record {
    fn open(method: Method, span: Span) -> Self {
        metrics::gauge!("planish_requests_in_flight").increment(1.0);
        Self { method, started: Instant::now(), span, closed: false }
    }

    fn close_with(self, headers: &HeaderMap) {
        let code =
            headers.get(Status::GRPC_STATUS).map_or(Code::Ok, |v| Code::from_bytes(v.as_bytes()));
        self.close(code);
    }

    fn close(mut self, code: Code) {
        self.write(code);
    }

    fn write(&mut self, code: Code) {
        if std::mem::replace(&mut self.closed, true) {
            return;
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let method = self.method.path;
        metrics::gauge!("planish_requests_in_flight").decrement(1.0);
        metrics::counter!("planish_requests_total", "method" => method, "code" => name(code))
            .increment(1);
        metrics::histogram!("planish_request_seconds", "method" => method).record(seconds);
        self.span.in_scope(|| {
            if self.method.health {
                tracing::debug!(code = name(code), seconds, "done");
            } else {
                tracing::info!(code = name(code), seconds, "done");
            }
        });
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.write(Code::Cancelled);
    }
}

/// The name of a code as the gRPC documents write it.
pub fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use tower::ServiceExt as _;

    use super::*;

    #[test]
    fn deadlines_are_parsed_strictly() {
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_str(text).unwrap());
            timeout(&headers)
        };
        assert_eq!(parse("100m"), Some(Duration::from_millis(100)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "100", "999999999S", "-1S", "1x", "+1S", "1 S"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn request_ids_are_taken_when_harmless() {
        let id = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-request-id", HeaderValue::from_str(text).unwrap());
            request_id(&headers)
        };
        assert_eq!(id("abc-1"), "abc-1");
        assert_eq!(id("has blank").len(), 32);
        assert_eq!(id(&"x".repeat(65)).len(), 32);
    }
    type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    /// Calls `path` through a gate before `service`, with a deadline of 20 ms.
    async fn call(
        path: &str,
        phase: watch::Receiver<Phase>,
        service: fn(Request<Body>) -> Answer,
    ) -> Response<Body> {
        let server = crate::config::Server::default();
        let tokens = Tokens::load(&server).unwrap();
        let gate = Gate::new(&[crate::proto::DESCRIPTORS], tokens, 1, phase).unwrap();
        let request = Request::builder().uri(path).header("grpc-timeout", "20m");
        let gated = tower::Layer::layer(&gate, tower::service_fn(service));
        gated.oneshot(request.body(Body::default()).unwrap()).await.unwrap()
    }

    /// The status in the trailers of an answer.
    async fn trailers(mut body: Body) -> Status {
        loop {
            let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
            if let Ok(trailers) = frame.unwrap().unwrap().into_trailers() {
                return Status::from_header_map(&trailers).unwrap();
            }
            // The clock of the runtime stands still while a task does not yield.
            tokio::task::yield_now().await;
        }
    }

    /// A body without an end.
    struct Endless;

    impl http_body::Body for Endless {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"more")))))
        }
    }

    const GET: &str = "/planish.v1.ModelService/GetModel";
    const WATCH: &str = "/planish.v1.JobService/WatchOperation";

    #[tokio::test]
    async fn deadlines_end_calls_and_streams() {
        let (_sender, phase) = watch::channel(Phase::Serving);
        let stuck = call(GET, phase.clone(), |_| Box::pin(std::future::pending())).await;
        let status = Status::from_header_map(stuck.headers()).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert!(!status.details().is_empty());

        let endless = |_| -> Answer { Box::pin(async { Ok(Response::new(Body::new(Endless))) }) };
        let streaming = call(GET, phase, endless).await;
        assert!(streaming.headers().contains_key("x-request-id"));
        assert_eq!(trailers(streaming.into_body()).await.code(), Code::DeadlineExceeded);
    }

    #[tokio::test]
    async fn draining_ends_endless_streams_and_refuses_new_calls() {
        let (sender, phase) = watch::channel(Phase::Serving);
        let quiet =
            |_| -> Answer { Box::pin(async { Ok(Response::new(Body::new(QuietForever))) }) };
        let watching = call(WATCH, phase.clone(), quiet).await;
        sender.send_replace(Phase::Draining);
        assert_eq!(trailers(watching.into_body()).await.code(), Code::Unavailable);
        let refused = call(GET, phase, quiet).await;
        let status = Status::from_header_map(refused.headers()).unwrap();
        assert_eq!(status.code(), Code::Unavailable);
    }

    struct QuietForever;

    impl http_body::Body for QuietForever {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Pending
        }
    }
}
