//! Addresses from DNS (A, AAAA and SRV records) and from the file of hosts.
//!
//! Both families of a name are looked up at the same time. A family whose lookup fails keeps its
//! last addresses; a name without records of one family has none of it.
//!
//! A lookup with all its steps ends at the limit. An answer counts however late it comes until
//! then: queries stay open while the same server is asked again, and while others are asked. The
//! answers that have come by then are used, so that a family or a host without one does not cost
//! the others.

use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use hickory_resolver::Hosts;
use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::proto::op::Query;
use hickory_resolver::proto::rr::{Name, RData, RecordType};
use tokio::time::{Instant as TimerInstant, sleep_until};

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
/// How often each server is asked in one step of a lookup, the first time at its beginning and the
/// others evenly within its time. A query consists of up to three transmissions, a third of a
/// second apart, each of which holds a socket until there is an answer.
const QUERIES_PER_SERVER: u32 = 2;
/// The longest time after which the next server is asked too: that of a retransmission.
const NEXT_SERVER_DELAY: Duration = Duration::from_millis(333);
/// Time of a source on top of that of its lookup: the lookup ends by itself, with what it has.
const SOURCE_GRACE: Duration = Duration::from_secs(1);
/// Most servers of one service whose names are looked up.
const SERVICE_HOSTS_MAX: usize = 64;

/// Resolves names by the configured name servers, or by those of the system. A change of the
/// system's file takes effect with the next lookup.
pub(crate) struct NameResolver {
    config: DnsConfig,
    /// The resolvers, with the content of the file that they were built from.
    current: Mutex<Option<(String, Rc<[TokioResolver]>)>>,
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

    /// The resolvers in the order in which they are asked: one for each query of each server,
    /// because a resolver joins equal queries.
    fn resolvers(&self) -> Result<Rc<[TokioResolver]>, LookupError> {
        let file = if self.config.servers.is_empty() {
            std::fs::read_to_string(SYSTEM_FILE).unwrap_or_default()
        } else {
            String::new()
        };
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((built_from, resolvers)) = &*current
            && *built_from == file
        {
            return Ok(Rc::clone(resolvers));
        }
        let resolvers = self.build(&file).map_err(|error| LookupError::Config(error.to_string()))?;
        *current = Some((file, Rc::clone(&resolvers)));
        Ok(resolvers)
    }

    fn build(&self, file: &str) -> Result<Rc<[TokioResolver]>, NetError> {
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
        let search = parsed.get_last_search_or_domain().filter_map(|domain| Name::from_utf8(domain).ok());
        let search: Vec<_> = search.collect();
        let mut options = ResolverOpts::default();
        options.ndots = usize::try_from(parsed.ndots).unwrap_or(1);
        // A server is heard until the lookup ends, which ends its queries.
        options.timeout = self.config.timeout + SOURCE_GRACE;
        options.attempts = 1;
        // The sources ask when an answer has expired.
        options.cache_size = 0;
        options.use_hosts_file = ResolveHosts::Never;
        let resolver = |address: &SocketAddr| {
            let config = ResolverConfig::from_parts(None, search.clone(), vec![server(address)]);
            let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
            builder.with_options(options.clone()).build()
        };
        (0..QUERIES_PER_SERVER).flat_map(|_| servers.iter().map(resolver)).collect()
    }

    /// The records of one kind; `None` if the name has none. `started` is the start of the lookup
    /// that this is a step of.
    async fn records(&self, name: &Name, kind: RecordType, started: Instant) -> Result<Option<Lookup>, LookupError> {
        let resolvers = self.resolvers()?;
        let left = self.config.timeout.saturating_sub(started.elapsed());
        let schedule = QuerySchedule::new(resolvers.len(), left);
        let query = |at: usize| Box::pin(resolvers[at].lookup(name.clone(), kind));
        let mut open = vec![query(0)];
        let mut asked = 1;
        let mut failure = LookupError::Timeout;
        let mut alarm = pin!(sleep_until(schedule.next_at(asked)));
        poll_fn(|cx| {
            loop {
                let mut has_failed = false;
                let mut at = 0;
                while let Some(query) = open.get_mut(at) {
                    match query.as_mut().poll(cx) {
                        Poll::Pending => at += 1,
                        Poll::Ready(Ok(lookup)) => return Poll::Ready(Ok(Some(lookup))),
                        Poll::Ready(Err(error)) if error.is_no_records_found() => return Poll::Ready(Ok(None)),
                        Poll::Ready(Err(error)) => {
                            failure = server_error(error);
                            has_failed = true;
                            drop(open.swap_remove(at));
                        }
                    }
                }
                // No server is asked again because of a failure.
                let is_next_due = has_failed && asked < schedule.servers;
                if open.is_empty() && !is_next_due {
                    return Poll::Ready(Err(take_failure(&mut failure)));
                }
                if !is_next_due {
                    ready!(alarm.as_mut().poll(cx));
                    if asked == resolvers.len() {
                        return Poll::Ready(Err(take_failure(&mut failure)));
                    }
                }
                open.push(query(asked));
                asked += 1;
                alarm.as_mut().reset(schedule.next_at(asked));
            }
        })
        .await
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

/// When the queries of one step of a lookup begin, and when it ends.
struct QuerySchedule {
    servers: usize,
    queries: usize,
    started: TimerInstant,
    limit: Duration,
}

impl QuerySchedule {
    fn new(queries: usize, limit: Duration) -> Self {
        let servers = queries / QUERIES_PER_SERVER as usize;
        QuerySchedule { servers, queries, started: TimerInstant::now(), limit }
    }

    /// When the query of that number begins, or the step ends.
    fn next_at(&self, number: usize) -> TimerInstant {
        if number >= self.queries {
            return self.started + self.limit;
        }
        let round = self.limit / QUERIES_PER_SERVER;
        let part = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let delay = NEXT_SERVER_DELAY.min(round / part(self.servers));
        self.started + round * part(number / self.servers) + delay * part(number % self.servers)
    }
}

fn take_failure(failure: &mut LookupError) -> LookupError {
    std::mem::replace(failure, LookupError::Timeout)
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

    /// The longest time of one lookup.
    pub(super) fn limit(&self) -> Duration {
        self.resolver.config.timeout + SOURCE_GRACE
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
