//! Upstreams whose endpoints are names: every address is used, changes are followed, and failures
//! of resolution cost no request.

mod support;

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use support::dns::{DnsAnswer, DnsRecord, DnsServer, section};
use support::{Gateway, Origin, ReceivedRequest, STEP_TIMEOUT, Script, free_address, wait_for};

const NAME: &str = "shop.test";

/// One upstream with one endpoint.
fn config(dns: &DnsServer, endpoint: &str, keys: &str) -> String {
    format!(
        "{}[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [\"{endpoint}\"]\n{keys}\n\
         [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n",
        dns.section()
    )
}

fn named(name: &'static str) -> impl Fn(&ReceivedRequest) -> Script + Send + Sync {
    move |_| Script::ok(&[], name)
}

/// Origins with the same port on several loopback addresses, each of which responds with its
/// number.
fn origins<const COUNT: usize>() -> ([Origin; COUNT], u16) {
    const NAMES: [&str; 4] = ["1", "2", "3", "4"];
    let first = Origin::start(named(NAMES[0]));
    let port = first.address.port();
    let mut first = Some(first);
    let origins = std::array::from_fn(|index| match first.take() {
        Some(first) => first,
        None => {
            let last = u8::try_from(index + 1).expect("a few origins");
            Origin::start_at(SocketAddr::from(([127, 0, 0, last], port)), named(NAMES[index]))
        }
    });
    (origins, port)
}

#[test]
fn every_address_of_a_name_is_used() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<3>();
    dns.set_addresses(NAME, &["127.0.0.1", "127.0.0.2", "127.0.0.3"]);
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), "balance = \"round-robin\""));
    (0..9).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert_eq!(origins.map(|origin| origin.count()), [3, 3, 3]);
}

#[test]
fn dead_address_costs_no_request() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<1>();
    // Nothing listens on the other ones, of which one is of the other family.
    dns.set_addresses(NAME, &["127.0.0.1", "127.0.0.2", "::1"]);
    for balance in ["round-robin", "least-request"] {
        let keys = format!("balance = \"{balance}\"");
        let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), &keys));
        for method in ["GET", "POST", "PUT", "DELETE"].repeat(5) {
            assert_eq!(gateway.request(method, "/", &[], b"body").status, 200, "{balance} {method}");
        }
    }
    assert_eq!(origins[0].count(), 40);
}

#[test]
fn silent_address_delays_a_request_by_a_quarter_of_a_second() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<1>();
    let silent = SocketAddr::from(([127, 0, 0, 2], port));
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
    socket.bind(&silent.into()).expect("a free address");
    socket.listen(0).expect("a listening socket");
    // These fill the backlog. The system then ignores further connection attempts.
    let connect = |_| TcpStream::connect_timeout(&silent, Duration::from_millis(50));
    let _held: Vec<_> = (0..4).map(connect).collect();
    dns.set_addresses(NAME, &["127.0.0.1", "127.0.0.2"]);
    let keys = "balance = \"round-robin\"\nconnect_timeout = \"30s\"\ntimeout = \"40s\"";
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), keys));
    let times = [(); 6].map(|()| {
        let start = Instant::now();
        assert_eq!(gateway.get("/", &[]).status, 200);
        start.elapsed()
    });
    assert!(times.iter().all(|time| *time < Duration::from_secs(2)), "{times:?}");
    let slow = times.iter().filter(|time| **time >= Duration::from_millis(240)).count();
    assert!(slow <= 1, "the address is tried last for a while: {times:?}");
    assert_eq!(origins[0].count(), 6);
}

#[test]
fn changed_addresses_are_followed_and_unchanged_ones_keep_their_connections() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<3>();
    dns.set_addresses(NAME, &["127.0.0.1", "127.0.0.2"]);
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), "balance = \"round-robin\""));
    let mut client = gateway.connect();
    (0..4).for_each(|_| assert_eq!(client.get("/", &[]).status, 200));
    dns.set_addresses(NAME, &["127.0.0.1", "127.0.0.3"]);
    wait_for(|| client.get("/", &[]).text() == "3", STEP_TIMEOUT);
    let before = origins[1].count();
    (0..4).for_each(|_| assert_eq!(client.get("/", &[]).status, 200));
    assert_eq!(origins[1].count(), before, "an address that is gone gets no request");
    assert_eq!(origins.map(|origin| origin.connections()), [1, 1, 1]);
    let events = gateway.process.stderr.events("endpoints_changed");
    let last = events.last().expect("the change is logged");
    assert_eq!(
        (last["added"].as_u64(), last["removed"].as_u64(), last["endpoints"].as_u64()),
        (Some(1), Some(1), Some(2))
    );
}

#[test]
fn failed_lookups_keep_the_last_addresses_and_are_logged() {
    for failure in [Some(DnsAnswer::ServerFailure), Some(DnsAnswer::Silence), Some(DnsAnswer::Records(1, Vec::new()))] {
        let dns = DnsServer::start();
        let (_origins, port) = origins::<2>();
        dns.set_addresses(NAME, &["127.0.0.1"]);
        let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), ""));
        assert_eq!(gateway.get("/", &[]).text(), "1");
        dns.set(NAME, failure.clone().expect("a failure"));
        let lines = &gateway.process.stderr;
        wait_for(|| !lines.events("lookup_failed").is_empty(), STEP_TIMEOUT);
        assert_eq!(
            (gateway.get("/", &[]).text().as_str(), lines.event("lookup_failed")["known"].as_u64()),
            ("1", Some(1))
        );
        dns.set_addresses(NAME, &["127.0.0.2"]);
        wait_for(|| gateway.get("/", &[]).text() == "2", STEP_TIMEOUT);
        assert_eq!(lines.events("lookup_recovered").len(), 1, "{failure:?}");
    }
}

/// The server answers the first transmission only, when further ones were sent.
#[test]
fn answer_counts_until_the_limit_of_a_lookup() {
    for (limit, delay) in [("1s", 800), ("3s", 2_200)] {
        let dns = DnsServer::start();
        let (origins, port) = origins::<1>();
        dns.set(NAME, DnsAnswer::Late(Duration::from_millis(delay), origins[0].address.ip()));
        let config = config(&dns, &format!("http://{NAME}:{port}"), "").replace("\"1s\"", &format!("\"{limit}\""));
        let gateway = Gateway::start(&config);
        let is_known = || gateway.get("/", &[]).status == 200;
        wait_for(|| is_known() || !gateway.process.stderr.events("lookup_failed").is_empty(), STEP_TIMEOUT);
        assert!(is_known(), "{limit}");
        assert!(dns.queries() >= 6, "both families are asked again meanwhile: {}", dns.queries());
    }
}

/// A server without a useful answer costs neither the answer of another one nor a slow answer.
#[test]
fn each_name_server_is_heard() {
    let (origins, port) = origins::<1>();
    let ip = origins[0].address.ip();
    let answer = DnsAnswer::Records(60, vec![DnsRecord::Address(ip)]);
    for others in [DnsAnswer::Silence, DnsAnswer::ServerFailure] {
        for useful in [answer.clone(), DnsAnswer::Late(Duration::from_millis(700), ip)] {
            for position in 0..4 {
                let servers = [(); 4].map(|()| DnsServer::start());
                servers.iter().for_each(|server| server.set(NAME, others.clone()));
                servers[position].set(NAME, useful.clone());
                let config = config(&servers[0], &format!("http://{NAME}:{port}"), "")
                    .replace(&servers[0].section(), &section(&servers.each_ref(), "1500ms"));
                let gateway = Gateway::start(&config);
                let is_known = || gateway.get("/", &[]).status == 200;
                wait_for(|| is_known() || !gateway.process.stderr.events("lookup_failed").is_empty(), STEP_TIMEOUT);
                assert!(is_known(), "{others:?} {useful:?} {position}");
            }
        }
    }
}

/// One lookup ends at its limit, and a new one begins a second later.
#[test]
fn lookup_without_an_answer_ends_at_its_limit() {
    let dns = DnsServer::start();
    dns.set(NAME, DnsAnswer::Silence);
    let started = Instant::now();
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:80"), ""));
    wait_for(|| !gateway.process.stderr.events("lookup_failed").is_empty(), STEP_TIMEOUT);
    let event = &gateway.process.stderr.event("lookup_failed");
    assert!(event.to_string().contains("no answer in time"), "{event}");
    assert!(started.elapsed() >= Duration::from_secs(1), "{:?}", started.elapsed());
    assert!((4..=20).contains(&dns.queries()), "{}", dns.queries());
}

#[test]
fn name_is_used_although_the_server_ignores_queries_for_one_family() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<1>();
    dns.set(NAME, DnsAnswer::OnlyRecords(1, vec![DnsRecord::Address(origins[0].address.ip())]));
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), ""));
    wait_for(|| gateway.get("/", &[]).status == 200, STEP_TIMEOUT);
    assert!(gateway.process.stderr.events("lookup_failed").is_empty());
}

#[test]
fn servers_of_a_service_keep_their_addresses_while_their_lookups_fail() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<3>();
    let hosts = ["a.test", "b.test", "c.test"];
    for (host, origin) in hosts.iter().zip(&origins) {
        dns.set_addresses(host, &[&origin.address.ip().to_string()]);
    }
    let service = |host: &&str| DnsRecord::Service { priority: 1, port, target: (*host).to_owned() };
    dns.set("_http._tcp.shop.test", DnsAnswer::Records(1, hosts.iter().map(service).collect()));
    let gateway = Gateway::start(&config(&dns, "srv://_http._tcp.shop.test", "balance = \"round-robin\""));
    assert_eq!(gateway.get("/", &[]).status, 200);
    // Two silent hosts after each other would take longer than the limit of one lookup.
    dns.set(hosts[0], DnsAnswer::Silence);
    dns.set(hosts[1], DnsAnswer::ServerFailure);
    // The third one moves: a lookup has ended after the others failed.
    dns.set_addresses(hosts[2], &["127.0.0.4"]);
    let _moved = Origin::start_at(SocketAddr::from(([127, 0, 0, 4], port)), named("4"));
    let responders = || {
        let mut texts: Vec<String> = (0..12).map(|_| gateway.get("/", &[]).text()).collect();
        texts.sort_unstable();
        texts.dedup();
        texts.concat()
    };
    wait_for(|| responders() == "124", STEP_TIMEOUT);
    assert!(gateway.process.stderr.events("lookup_failed").is_empty());
}

#[test]
fn upstream_without_addresses_fails_at_once_and_recovers() {
    let dns = DnsServer::start();
    let (_origins, port) = origins::<1>();
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), ""));
    let start = Instant::now();
    // More than the breaker needs to open; nothing was called, so that it has nothing to count.
    for _ in 0..30 {
        let response = gateway.get("/", &[]);
        assert_eq!((response.status, response.field("proxy-status")), (503, Some("tidegate; error=dns_error")));
    }
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    dns.set_addresses(NAME, &["127.0.0.1"]);
    wait_for(|| gateway.get("/", &[]).status == 200, STEP_TIMEOUT);
    (0..20).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert!(gateway.process.stderr.events("breaker_opened").is_empty());
}

#[test]
fn first_requests_wait_for_the_first_lookup() {
    let dns = DnsServer::start();
    let (_origins, port) = origins::<1>();
    dns.set(NAME, DnsAnswer::Silence);
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), "connect_timeout = \"8s\""));
    let mut client = gateway.connect();
    client.send_get("/", &[]);
    wait_for(|| dns.queries() > 0, STEP_TIMEOUT);
    dns.set_addresses(NAME, &["127.0.0.1"]);
    assert_eq!(client.read_response().status, 200);
}

/// A load balancer sends requests as soon as a new process is ready: none of them fails.
#[test]
fn process_is_ready_when_the_addresses_of_its_upstreams_are_known() {
    let dns = DnsServer::start();
    let (_origins, port) = origins::<1>();
    // The query of the first lookup is lost, and sent again.
    dns.set(NAME, DnsAnswer::Silence);
    let gateway = Gateway::start(&config(&dns, &format!("http://{NAME}:{port}"), ""));
    wait_for(|| dns.queries() > 0, STEP_TIMEOUT);
    let first = gateway.admin("/ready");
    let expected = format!("first lookup of shop http://{NAME}:{port}");
    assert!(first.status == 503 && first.text().contains(&expected), "{} {}", first.status, first.text());
    assert_eq!(gateway.admin("/live").status, 200);
    dns.set_addresses(NAME, &["127.0.0.1"]);
    wait_for(|| gateway.admin("/ready").status == 200, STEP_TIMEOUT);
    (0..20).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    // Later failures do not matter.
    dns.set(NAME, DnsAnswer::Silence);
    gateway.rewrite(&config(&dns, &format!("http://localhost:{port}\", \"http://other.test:{port}"), ""));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    assert_eq!(gateway.admin("/ready").status, 200);
}

/// Routes whose upstreams are known, and stored responses, are served nevertheless.
#[test]
fn unknown_name_delays_readiness_for_a_while() {
    let dns = DnsServer::start();
    let gateway = Gateway::start(&config(&dns, "http://missing.test:80", ""));
    let start = Instant::now();
    assert_eq!(gateway.admin("/ready").status, 503);
    wait_for(|| gateway.admin("/ready").status == 200, Duration::from_secs(15));
    assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
    let ready = gateway.admin("/ready").text();
    assert!(ready.contains("lookup shop http://missing.test:80") && !ready.contains("first lookup"), "{ready}");
}

#[test]
fn service_records_name_hosts_ports_and_priorities() {
    let dns = DnsServer::start();
    let [first, second, backup] = ["first", "second", "backup"].map(|name| Origin::start(named(name)));
    let service = |priority, origin: &Origin| DnsRecord::Service {
        priority,
        port: origin.address.port(),
        target: "host.test".to_owned(),
    };
    let records = vec![service(10, &first), service(20, &backup), service(10, &second)];
    dns.set("_http._tcp.shop.test", DnsAnswer::Records(60, records));
    dns.set_addresses("host.test", &["127.0.0.1"]);
    let gateway = Gateway::start(&config(&dns, "srv://_http._tcp.shop.test", "balance = \"round-robin\""));
    (0..8).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 200));
    assert_eq!([&first, &second, &backup].map(Origin::count), [4, 4, 0]);
    first.stop();
    second.stop();
    wait_for(|| gateway.get("/", &[]).text() == "backup", STEP_TIMEOUT);
}

#[test]
fn localhost_is_reached_where_only_one_family_listens() {
    let dns = DnsServer::start();
    let origin = Origin::start(named("v4"));
    let gateway = Gateway::start(&config(&dns, &format!("http://localhost:{}", origin.address.port()), ""));
    (0..10).for_each(|_| assert_eq!(gateway.get("/", &[]).text(), "v4"));
}

#[test]
fn reload_keeps_addresses_and_connections() {
    let dns = DnsServer::start();
    let (origins, port) = origins::<1>();
    dns.set(NAME, DnsAnswer::Records(3_600, vec![DnsRecord::Address(origins[0].address.ip())]));
    let endpoint = format!("http://{NAME}:{port}");
    let gateway = Gateway::start(&config(&dns, &endpoint, ""));
    assert_eq!(gateway.get("/", &[]).status, 200);
    dns.set(NAME, DnsAnswer::Silence);
    gateway.rewrite(&config(&dns, &endpoint, "timeout = \"7s\"\nbalance = \"round-robin\""));
    wait_for(|| !gateway.process.stderr.events("reloaded").is_empty(), STEP_TIMEOUT);
    let start = Instant::now();
    assert_eq!(gateway.get("/", &[]).status, 200);
    assert!(start.elapsed() < Duration::from_millis(500), "no wait for a lookup: {:?}", start.elapsed());
    assert_eq!(origins[0].connections(), 1);
}

#[test]
fn many_dead_endpoints_cost_no_request() {
    let origin = Origin::start(named("alive"));
    // One port on many addresses: a port that is free twice would be a duplicate.
    let port = free_address().port();
    let mut endpoints: Vec<String> = (1..=70).map(|last| format!("\"http://127.0.0.{last}:{port}\"")).collect();
    endpoints.push(format!("\"http://{}\"", origin.address));
    let upstream = |endpoints: &[String]| {
        format!(
            "[server]\nworkers = 1\n[upstreams.shop]\nendpoints = [{}]\n\
             [[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"shop\"\n",
            endpoints.join(", ")
        )
    };
    let gateway = Gateway::start(&upstream(&endpoints));
    (0..20).for_each(|_| assert_eq!(gateway.get("/", &[]).text(), "alive"));

    endpoints.pop();
    let gateway = Gateway::start(&upstream(&endpoints));
    let start = Instant::now();
    (0..5).for_each(|_| assert_eq!(gateway.get("/", &[]).status, 503));
    assert!(start.elapsed() < Duration::from_secs(3), "each is tried once: {:?}", start.elapsed());
}
