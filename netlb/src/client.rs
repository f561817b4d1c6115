//! The API's client: HTTP over the daemon's unix socket, one connection a request.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime::Runtime};

use crate::view::{ErrorBody, ErrorView};

/// Longer than the largest transaction takes.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A client that blocks.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("cannot reach netlb at {}: {}", socket.display(), plain(error))]
    Unreachable { socket: PathBuf, error: io::Error },
    #[error("{}", body.message)]
    Refused { status: u16, body: ErrorBody },
    #[error("no answer from netlb at {} after {} seconds", socket.display(), TIMEOUT.as_secs())]
    TimedOut { socket: PathBuf },
    #[error("the connection to netlb broke")]
    Connection(#[from] hyper::Error),
    #[error("netlb gave an answer that cannot be read: {0}")]
    Unreadable(String),
    #[error("cannot prepare the request: {0}")]
    Request(String),
}

/// What the operating system says, without "(os error 2)".
fn plain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
        _ => error.to_string(),
    }
}

impl Client {
    pub fn new(socket: &Path) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.to_owned(), runtime })
    }

    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Vec::new())
    }

    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::POST, path, json(body)?)
    }

    pub fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::PUT, path, json(body)?)
    }

    pub fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.call(Method::PATCH, path, json(body)?)
    }

    pub fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::DELETE, path, Vec::new())
    }

    /// Sends a request; an answer without a body reads as `()`.
    fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Vec<u8>) -> Result<T, ClientError> {
        let timed_out = || ClientError::TimedOut { socket: self.socket.clone() };
        let exchange =
            async { tokio::time::timeout(TIMEOUT, self.exchange(method, path, body)).await.map_err(|_| timed_out())? };
        let (status, body) = self.runtime.block_on(exchange)?;
        if status.is_success() {
            let text: &[u8] = if body.is_empty() { b"null" } else { &body };
            return serde_json::from_slice(text).map_err(|error| ClientError::Unreadable(error.to_string()));
        }
        let body = match serde_json::from_slice(&body) {
            Ok(ErrorView { error }) => error,
            Err(_) => ErrorBody {
                code: "unknown".to_owned(),
                message: format!("{status}: {}", String::from_utf8_lossy(&body).trim()),
                hint: None,
            },
        };
        Err(ClientError::Refused { status: status.as_u16(), body })
    }

    async fn exchange(&self, method: Method, path: &str, body: Vec<u8>) -> Result<(StatusCode, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| ClientError::Unreachable { socket: self.socket.clone(), error })?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Its error, if any, is also the request's.
        tokio::spawn(async move { drop(connection.await) });
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "netlb");
        if !body.is_empty() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request =
            request.body(Full::new(Bytes::from(body))).map_err(|error| ClientError::Request(error.to_string()))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>, ClientError> {
    serde_json::to_vec(body).map_err(|error| ClientError::Request(error.to_string()))
}

/// The path of a service, or of something below it.
#[must_use]
pub fn service_path(reference: &str) -> String {
    format!("/v1/services/{}", encode(reference))
}

/// A text as one segment of a path, or one value of a query.
#[must_use]
pub fn encode(text: &str) -> String {
    const KEEP: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b':');
    utf8_percent_encode(text, KEEP).to_string()
}
