//! Addresses from DNS (A, AAAA and SRV records) and from the file of hosts.
//!
//! Both families of a name are looked up at the same time. A family whose lookup fails keeps its
//! last addresses; a name without records of one family has none of it. Each step of a lookup ends
//! before the limit, so that one family or server without an answer does not cost the others.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use hickory_resolver::Hosts;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use tokio::time::timeout;

use super::{EndpointSource, LookupError, SourceAnswer, TARGETS_MAX};
use crate::endpoint::{EndpointAddress, EndpointTarget};
use crate::tasks::TaskWait;

/// Configuration of name resolution (`[dns]`).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DnsConfig {
    /// The name servers; empty: those of the system.
    pub(crate) servers: Vec<SocketAddr>,
    /// Limit of one lookup, with all its queries.
    pub(crate) timeout: Duration,
}

impl Default for DnsConfig {
    fn default() -> Self {
        DnsConfig { servers: Vec::new(), timeout: Duration::from_secs(5) }
    }
}

/// The system's list of name servers and search domains.
const SYSTEM_FILE: &str = "/etc/resolv.conf";
/// How long addresses from the file of hosts are used before the file is read again.
const HOSTS_TTL: Duration = Duration::from_secs(5);
/// The part of the time left that one step of a lookup may take.
const STEP_SHARE: f64 = 0.6;
/// Most servers of one service whose names are looked up.
const SERVICE_HOSTS_MAX: usize = 64;

/// Resolves names by the configured name servers, or by those of the system. A change of the
/// system's file takes effect with the next lookup.
pub(crate) struct NameResolver {
    config: DnsConfig,
    /// The resolver, with the content of the file that it was built from.
    current: Mutex<Option<(String, TokioResolver)>>,
}

/// The addresses of one family, and for how long they are valid.
struct FamilyAnswer {
    ips: Vec<IpAddr>,
    valid_for: Duration,
}

type FamilyResult = Result<Option<FamilyAnswer>, LookupError>;

/// The result of the lookup of one host.
enum HostResult {
    /// Addresses from the file of hosts.
    Listed(Vec<IpAddr>),
    /// IPv6, then IPv4.
    Answered([FamilyResult; 2]),
}

impl NameResolver {
    pub(crate) fn new(config: DnsConfig) -> Self {
        NameResolver { config, current: Mutex::default() }
    }

    pub(crate) fn config(&self) -> &DnsConfig {
        &self.config
    }

    fn resolver(&self) -> Result<TokioResolver, LookupError> {
        let file = if self.config.servers.is_empty() {
            std::fs::read_to_string(SYSTEM_FILE).unwrap_or_default()
        } else {
            String::new()
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((built_from, resolver)) = &*current
            && *built_from == file
        {
            return Ok(resolver.clone());
        }
        let resolver = self.build(&file).map_err(|error| LookupError::Config(error.to_string()))?;
        *current = Some((file, resolver.clone()));
        Ok(resolver)
    }

    fn build(&self, file: &str) -> Result<TokioResolver, NetError> {
        let parsed = resolv_conf::Config::parse(file).map_err(|error| NetError::Msg(error.to_string()))?;
        let mut servers = self.config.servers.clone();
        if servers.is_empty() {
            servers.extend(parsed.nameservers.iter().map(|ip| SocketAddr::new(IpAddr::from(ip), 53)));
        }
        if servers.is_empty() {
            // As the C library does.
            servers.push(SocketAddr::from(([127, 0, 0, 1], 53)));
        }
        let server = |address: &SocketAddr| {
            let mut server = NameServerConfig::udp_and_tcp(address.ip());
            server.connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
            server.connections.iter_mut().for_each(|connection| connection.port = address.port());
            server
        };
        let search = parsed.get_last_search_or_domain().filter_map(|domain| Name::from_utf8(domain).ok()).collect();
        let config = ResolverConfig::from_parts(None, search, servers.iter().map(server).collect());
        let mut options = ResolverOpts::default();
        options.ndots = usize::try_from(parsed.ndots).unwrap_or(1);
        // Two attempts fit into the first step of a lookup.
        options.timeout = self.config.timeout.mul_f64(STEP_SHARE / 2.0);
        options.attempts = 1;
        // The sources ask when an answer has expired.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let provider = TokioRuntimeProvider::default();
        TokioResolver::builder_with_config(config, provider).with_options(options).build()
    }

    /// The records of one kind; `None` if the name has none. `started` is the start of the lookup
    /// that this is a step of.
    async fn records(&self, name: &Name, kind: RecordType, started: Instant) -> Result<Option<Lookup>, LookupError> {
        let step = self.config.timeout.saturating_sub(started.elapsed()).mul_f64(STEP_SHARE);
        match timeout(step, self.resolver()?.lookup(name.clone(), kind)).await {
            Ok(Ok(lookup)) => Ok(Some(lookup)),
            Ok(Err(error)) if error.is_no_records_found() => Ok(None),
            Ok(Err(error)) => Err(server_error(error)),
            Err(_) => Err(LookupError::Timeout),
        }
    }

    /// The addresses of one family; `None` if the name has none.
    async fn family(&self, name: &Name, family: RecordType, started: Instant) -> FamilyResult {
        match self.records(name, family, started).await? {
            Some(lookup) => {
                let ips: Vec<_> = lookup.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
                let valid_for = lookup.valid_until().saturating_duration_since(Instant::now());
                Ok((!ips.is_empty()).then_some(FamilyAnswer { ips, valid_for }))
            }
            None => Ok(None),
        }
    }

    /// Looks up a host in the file of hosts, and both of its families otherwise.
    async fn host(&self, name: &Name, started: Instant) -> HostResult {
        let listed = hosts_addresses(name).unwrap_or_default();
        if !listed.is_empty() {
            return HostResult::Listed(listed);
        }
        let family = |family| self.family(name, family, started);
        HostResult::Answered(tokio::join!(family(RecordType::AAAA), family(RecordType::A)).into())
    }

    /// The hosts, all at the same time.
    async fn hosts(&self, names: &[Name], started: Instant) -> Vec<HostResult> {
        type HostLookup<'n> = Pin<Box<dyn Future<Output = HostResult> + 'n>>;
        let mut lookups: Vec<HostLookup<'_>> = Vec::new();
        names.iter().for_each(|name| lookups.push(Box::pin(self.host(name, started))));
        let mut results: Vec<Option<HostResult>> = names.iter().map(|_| None).collect();
        poll_fn(|cx| {
            for (lookup, result) in lookups.iter_mut().zip(&mut results) {
                if result.is_none()
                    && let Poll::Ready(ended) = lookup.as_mut().poll(cx)
                {
                    *result = Some(ended);
                }
            }
            if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        results.into_iter().flatten().collect()
    }
}

fn server_error(error: NetError) -> LookupError {
    match error {
        NetError::Timeout => LookupError::Timeout,
        error => LookupError::Server(error.to_string()),
    }
}

/// The addresses of a name in the file of hosts.
fn hosts_addresses(name: &Name) -> io::Result<Vec<IpAddr>> {
    let hosts = Hosts::from_system()?;
    let of = |family| hosts.lookup_static_host(&Query::query(name.clone(), family));
    let lookups = [of(RecordType::AAAA), of(RecordType::A)].into_iter().flatten();
    Ok(lookups
        .flat_map(|lookup| lookup.answers().iter().filter_map(|r| r.data.ip_addr()).collect::<Vec<_>>())
        .collect())
}

/// One name, or one service, in DNS.
#[derive(Clone)]
pub(crate) struct DnsSource {
    resolver: Rc<NameResolver>,
    origin: EndpointAddress,
    hosts: HostAddresses,
}

/// The last addresses of the families of each name.
#[derive(Clone, Default)]
struct HostAddresses(Vec<(Name, [Vec<IpAddr>; 2])>);

impl DnsSource {
    pub(crate) fn new(resolver: Rc<NameResolver>, origin: EndpointAddress) -> Self {
        DnsSource { resolver, origin, hosts: HostAddresses::default() }
    }

    /// The limit of one lookup, with all its queries.
    pub(super) fn limit(&self) -> Duration {
        self.resolver.config.timeout
    }

    async fn service(&mut self, name: &Name) -> Result<SourceAnswer, LookupError> {
        let started = Instant::now();
        let lookup = self.resolver.records(name, RecordType::SRV, started).await?.ok_or(LookupError::NoRecords)?;
        let mut valid_for = lookup.valid_until().saturating_duration_since(Instant::now());
        let records = lookup.answers().iter().filter_map(|record| match &record.data {
            // A target of "." says that there is no such service (RFC 2782).
            RData::SRV(record) if !record.target.is_root() => Some(record.clone()),
            _ => None,
        });
        let mut records: Vec<_> = records.collect();
        records.sort_by_key(|record| record.priority);
        records.truncate(SERVICE_HOSTS_MAX);
        let mut names: Vec<Name> = records.iter().map(|record| record.target.clone()).collect();
        names.sort_unstable();
        names.dedup();
        self.hosts.0.retain(|(known, _)| names.contains(known));
        let results = self.resolver.hosts(&names, started).await;
        let mut failure = None;
        let mut addresses: Vec<(Name, Vec<IpAddr>)> = Vec::new();
        for (name, result) in names.into_iter().zip(results) {
            match self.hosts.take_over(&name, result) {
                Ok((ips, time)) => {
                    valid_for = valid_for.min(time);
                    addresses.push((name, ips));
                }
                Err(error) => {
                    // Its last addresses stay; there are none if it has no records any more.
                    let last = self.hosts.of(&name).concat();
                    addresses.push((name, last));
                    failure = Some(error);
                }
            }
        }
        let mut targets = Vec::new();
        for record in records {
            // 0 asks for a very small share (RFC 2782).
            let (priority, weight) = (record.priority, u32::from(record.weight).max(1));
            let target =
                |ip: &IpAddr| EndpointTarget { priority, weight, ..EndpointTarget::at((*ip, record.port).into()) };
            let of = addresses.iter().find(|(name, _)| *name == record.target);
            targets.extend(of.into_iter().flat_map(|(_, ips)| ips.iter().map(target)));
        }
        // Equal targets of records count once, whatever their order.
        targets.sort_unstable();
        targets.dedup();
        targets.truncate(TARGETS_MAX);
        match failure {
            Some(error) if targets.is_empty() => Err(error),
            _ if targets.is_empty() => Err(LookupError::NoRecords),
            // A server whose lookup failed is asked for again soon.
            Some(_) => Ok(SourceAnswer { targets, valid_for: Some(Duration::ZERO) }),
            None => Ok(SourceAnswer { targets, valid_for: Some(valid_for) }),
        }
    }
}

impl HostAddresses {
    /// All addresses of a host, IPv6 before IPv4 (RFC 8305 section 4), and for how long they are
    /// valid.
    fn take_over(&mut self, name: &Name, result: HostResult) -> Result<(Vec<IpAddr>, Duration), LookupError> {
        let families = match result {
            HostResult::Listed(listed) => return Ok((listed, HOSTS_TTL)),
            HostResult::Answered(families) => families,
        };
        let last = self.of(name);
        let mut valid_for = None::<Duration>;
        let mut failure = None;
        for (last, family) in last.iter_mut().zip(families) {
            match family {
                Ok(Some(answer)) => {
                    *last = answer.ips;
                    valid_for = Some(valid_for.map_or(answer.valid_for, |other| other.min(answer.valid_for)));
                }
                Ok(None) => last.clear(),
                // Its last addresses stay.
                Err(error) => failure = Some(error),
            }
        }
        match (valid_for, failure) {
            (Some(valid_for), None) => Ok((last.concat(), valid_for)),
            // The family that failed is asked again soon.
            (Some(_), Some(_)) => Ok((last.concat(), Duration::ZERO)),
            (None, Some(failure)) => Err(failure),
            (None, None) => Err(LookupError::NoRecords),
        }
    }

    fn of(&mut self, name: &Name) -> &mut [Vec<IpAddr>; 2] {
        let at = self.0.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
            if self.0.len() >= SERVICE_HOSTS_MAX {
                self.0.clear();
            }
            self.0.push((name.clone(), Default::default()));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }
}

impl EndpointSource for DnsSource {
    fn waits_for(&self) -> TaskWait {
        TaskWait::NameServer
    }

    async fn lookup(&mut self) -> Result<SourceAnswer, LookupError> {
        let name = Name::from_utf8(&self.origin.host).map_err(|_| LookupError::Name)?;
        if self.origin.scheme.is_service() {
            return self.service(&name).await;
        }
        let result = self.resolver.host(&name, Instant::now()).await;
        let (ips, valid_for) = self.hosts.take_over(&name, result)?;
        let port = self.origin.port;
        let target = |ip| EndpointTarget::at(SocketAddr::new(ip, port));
        Ok(SourceAnswer {
            targets: ips.into_iter().take(TARGETS_MAX).map(target).collect(),
            valid_for: Some(valid_for),
        })
    }
}
