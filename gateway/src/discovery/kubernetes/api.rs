//! Requests to the API server: lists and watches of the EndpointSlices of one service.

use std::time::Duration;

use http::{Request, StatusCode};
use kube::client::Body;
use serde::Deserialize;
use tokio::time::timeout;
use url::form_urlencoded::Serializer;

use super::KubernetesConfig;
use super::api_error::{ApiError, error_chain};
use super::client::ClientCache;
use super::lines::{ERROR_BYTES_MAX, PAGE_BYTES_MAX, WatchLines, read_all};
use super::metrics::{ApiResult, LISTS};
use super::slice::{Lenient, RawMetadata, RawObject};

/// Slices of one page of a list.
const PAGE_SLICES: &str = "100";
/// The label of the service that a slice belongs to.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// A service of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ServiceKey {
    pub(super) namespace: Box<str>,
    pub(super) name: Box<str>,
}

/// One page of a list.
pub(super) struct SlicePage {
    pub(super) items: Vec<Lenient<RawObject>>,
    /// The version of the whole list.
    pub(super) version: String,
    /// The begin of the next page; `None`: this is the last one.
    pub(super) next: Option<String>,
}

#[derive(Deserialize)]
struct RawList {
    metadata: RawMetadata,
    items: Option<Vec<Lenient<RawObject>>>,
}

#[derive(Deserialize)]
struct RawStatus {
    message: String,
}

/// The API server, for one thread.
pub(super) struct SliceApi {
    clients: ClientCache,
    pub(super) timeout: Duration,
    pub(super) watch_timeout: Duration,
}

impl SliceApi {
    pub(super) fn new(config: &KubernetesConfig) -> Self {
        SliceApi { clients: ClientCache::new(config), timeout: config.timeout, watch_timeout: config.watch_timeout }
    }

    /// One page of the slices of a service, from `next` of the page before. Cancel safe.
    pub(super) async fn list(&self, service: &ServiceKey, next: Option<&str>) -> Result<SlicePage, ApiError> {
        let result = self.list_page(service, next).await;
        LISTS.inc(result.as_ref().map_or_else(ApiError::result, |_| ApiResult::Ok));
        result
    }

    async fn list_page(&self, service: &ServiceKey, next: Option<&str>) -> Result<SlicePage, ApiError> {
        let mut query = vec![("limit", PAGE_SLICES)];
        query.extend(next.map(|next| ("continue", next)));
        let body = self.get(service, &query).await?;
        let text = match timeout(self.timeout, read_all(body, PAGE_BYTES_MAX)).await {
            Ok(text) => text.inspect_err(|_| self.clients.forget())?,
            Err(_) => {
                self.clients.forget();
                return Err(ApiError::Timeout);
            }
        };
        let malformed = |error: &dyn std::fmt::Display| ApiError::Malformed(error.to_string());
        let list: RawList = serde_json::from_slice(&text).map_err(|error| malformed(&error))?;
        let version = list.metadata.resource_version.ok_or_else(|| malformed(&"a list without a version"))?;
        let next = list.metadata.r#continue.filter(|next| !next.is_empty());
        Ok(SlicePage { items: list.items.unwrap_or_default(), version, next })
    }

    /// Watches the slices of a service for `seconds`, from `version` on. Cancel safe.
    pub(super) async fn watch(
        &self,
        service: &ServiceKey,
        version: &str,
        seconds: u64,
    ) -> Result<WatchLines, ApiError> {
        let seconds = seconds.max(1).to_string();
        let query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", &seconds),
        ];
        let body = self.get(service, &query).await?;
        Ok(WatchLines::new(body, self.watch_timeout + self.timeout))
    }

    /// The next request uses a new connection, and credentials that are read again.
    pub(super) fn forget_client(&self) {
        self.clients.forget();
    }

    /// Sends a request for the slices of a service. Returns the body of a response with status 200.
    async fn get(&self, service: &ServiceKey, query: &[(&str, &str)]) -> Result<Body, ApiError> {
        let result = self.get_once(service, query).await;
        match result {
            // The token may have been replaced since the client was made.
            Err(ApiError::Unauthorized(_)) => {
                self.clients.forget();
                self.get_once(service, query).await.inspect_err(|_| self.clients.forget())
            }
            Err(ApiError::Gone | ApiError::Status { .. }) | Ok(_) => result,
            Err(_) => {
                self.clients.forget();
                result
            }
        }
    }

    async fn get_once(&self, service: &ServiceKey, query: &[(&str, &str)]) -> Result<Body, ApiError> {
        let client = self.clients.client().await?;
        let selector = format!("{SERVICE_LABEL}={}", service.name);
        let query = Serializer::new(String::new()).append_pair("labelSelector", &selector).extend_pairs(query).finish();
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{}/endpointslices?{query}", service.namespace);
        let request = Request::get(path)
            .header("accept", "application/json")
            .header("user-agent", concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .body(Body::empty())
            .map_err(|error| ApiError::Access(error.to_string()))?;
        let response = match timeout(self.timeout, client.send(request)).await {
            Err(_) => return Err(ApiError::Timeout),
            Ok(Err(error @ kube::Error::Auth(_))) => return Err(ApiError::Access(error_chain(&error))),
            Ok(Err(error)) => return Err(ApiError::Unreachable(error_chain(&error))),
            Ok(Ok(response)) => response,
        };
        if response.status() == StatusCode::OK {
            return Ok(response.into_body());
        }
        let (head, body) = response.into_parts();
        let retry_after = head.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let text = timeout(self.timeout, read_all(body, ERROR_BYTES_MAX)).await;
        let text = text.unwrap_or(Ok(Vec::new())).unwrap_or_default();
        let message = serde_json::from_slice::<RawStatus>(&text).map(|status| status.message).unwrap_or_default();
        Err(ApiError::of_status(head.status.as_u16(), &message, retry_after.map(Duration::from_secs)))
    }
}
