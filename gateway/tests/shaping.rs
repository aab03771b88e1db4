//! Traffic shaping: canaries by caller and by header, and mirrors.

mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use support::{ClientResponse, Gate, Gateway, Origin, STEP_TIMEOUT, Script, wait_for};

const IDENTITY: &str = "[identity]\ndevice = [\"header:x-device-id\"]\nsecret = \"0123456789abcdef0123\"\n";

fn origin(name: &'static str) -> Origin {
    Origin::start(move |_| Script::ok(&[("Cache-Control", "max-age=60")], name))
}

/// A gateway with a route to `main`, whose keys are `route`, and a second upstream.
fn config(main: &Origin, other: &Origin, route: &str) -> String {
    format!(
        "{IDENTITY}[upstreams.main]\nendpoints = [\"http://{}\"]\n[upstreams.other]\nendpoints = [\"http://{}\"]\n\
         breaker = {{ minimum = 4 }}\n[[routes]]\nname = \"all\"\nmatch = {{ path = \"/*\" }}\nupstream = \"main\"\n{route}\n",
        main.address, other.address
    )
}

fn by_device(gateway: &Gateway, count: usize) -> BTreeMap<String, String> {
    let response = |index: usize| {
        let device = format!("device-{index}");
        let response = gateway.get("/", &[("x-device-id", &device)]);
        assert_eq!(response.status, 200);
        (device, response.text())
    };
    (0..count).map(response).collect()
}

fn count(responses: &BTreeMap<String, String>, body: &str) -> usize {
    responses.values().filter(|found| *found == body).count()
}

#[test]
fn callers_stay_with_their_upstream_and_a_larger_percentage_only_adds_callers() {
    let (main, canary) = (origin("main"), origin("canary"));
    let route =
        |percent| format!("canary = {{ upstream = \"other\", percent = {percent} }}\ncache = {{ mode = \"off\" }}");
    let gateway = Gateway::start(&config(&main, &canary, &route(30)));
    let first = by_device(&gateway, 200);
    assert!((35..=85).contains(&count(&first, "canary")), "{}", count(&first, "canary"));
    assert_eq!(by_device(&gateway, 200), first);
    for (reloads, percent) in [(1, 60), (2, 0), (3, 100)] {
        gateway.rewrite(&config(&main, &canary, &route(percent)));
        wait_for(|| gateway.process.stderr.events("reloaded").len() == reloads, STEP_TIMEOUT);
        let now = by_device(&gateway, 200);
        match percent {
            60 => {
                assert!(first.iter().all(|(device, body)| body == "main" || now[device] == "canary"));
                assert!((85..=155).contains(&count(&now, "canary")), "{}", count(&now, "canary"));
            }
            _ => assert_eq!(count(&now, "canary"), 2 * percent),
        }
    }
}

#[test]
fn header_selects_the_canary() {
    let (main, canary) = (origin("main"), origin("canary"));
    let route = "canary = { upstream = \"other\", header = { x-canary = \"1\" } }";
    let gateway = Gateway::start(&config(&main, &canary, route));
    for (value, body) in [("1", "canary"), ("0", "main"), ("1", "canary")] {
        assert_eq!(gateway.get("/", &[("x-canary", value)]).text(), body);
    }
    assert_eq!(gateway.get("/", &[]).text(), "main");
}

/// Both upstreams have the same URLs; a stored response of one is not for callers of the other.
#[test]
fn stored_responses_of_main_and_canary_are_kept_apart_and_invalidated_together() {
    let (main, canary) = (origin("main"), origin("canary"));
    let route = "canary = { upstream = \"other\", header = { x-canary = \"1\" } }";
    let gateway = Gateway::start(&config(&main, &canary, route));
    let get = |is_canary: bool| -> ClientResponse {
        let fields: &[(&str, &str)] = if is_canary { &[("x-canary", "1")] } else { &[] };
        gateway.get("/a", fields)
    };
    for is_hit in [false, true] {
        let (stable, new) = (get(false), get(true));
        assert_eq!((stable.text(), new.text()), ("main".to_owned(), "canary".to_owned()));
        assert_eq!((stable.is_hit(), new.is_hit()), (is_hit, is_hit));
    }
    assert_eq!(gateway.request("POST", "/a", &[], b"x").status, 200);
    assert!(!get(false).is_hit() && !get(true).is_hit());
}

#[test]
fn callers_of_a_failing_canary_get_the_main_upstream() {
    let main = origin("main");
    let canary = Origin::start(|_| Script::reply(500, &[], "broken"));
    let route = "canary = { upstream = \"other\", percent = 100 }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&config(&main, &canary, route));
    let statuses: Vec<u16> = (0..8).map(|_| gateway.get("/", &[]).status).collect();
    assert_eq!(statuses, [500, 500, 500, 500, 200, 200, 200, 200]);
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all canary\"}"), 2.0);
    assert_eq!(gateway.metric("tidegate_breaker_state{route=\"all\"}"), 0.0);
}

fn mirrored(gateway: &Gateway, result: &str) -> f64 {
    gateway.metric(&format!("tidegate_route_mirrored_total{{route=\"all\",result=\"{result}\"}}"))
}

#[test]
fn mirror_gets_its_share_of_the_requests_with_their_bodies() {
    let (main, copy) = (origin("main"), origin("copy"));
    let route = "mirror = { upstream = \"other\", percent = 50 }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&config(&main, &copy, route));
    let body = vec![b'x'; 60_000];
    for index in 0..20 {
        let response = gateway.request("PUT", &format!("/{index}"), &[("x-kind", "a")], &body);
        assert_eq!((response.status, response.text()), (200, "main".to_owned()));
    }
    copy.wait_for_requests(10);
    wait_for(|| mirrored(&gateway, "responded") == 10.0, STEP_TIMEOUT);
    assert_eq!((main.count(), copy.count()), (20, 10));
    let copied = copy.last();
    assert_eq!((copied.method.as_str(), copied.field("x-kind")), ("PUT", Some("a")));
    assert!(copied.body == body && main.last().body == body);
    // They are calls of their upstream.
    assert_eq!(gateway.metric("tidegate_upstream_requests_total{upstream=\"other\",result=\"2xx\"}"), 10.0);
    assert_eq!(gateway.metric("tidegate_upstream_request_duration_seconds_count{upstream=\"other\"}"), 10.0);
}

#[test]
fn requests_of_the_canary_are_not_mirrored() {
    let (main, other) = (origin("main"), origin("other"));
    let route = "canary = { upstream = \"other\", header = { x-canary = \"1\" } }\n\
                 mirror = { upstream = \"other\" }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&config(&main, &other, route));
    for _ in 0..5 {
        assert_eq!(gateway.get("/canary", &[("x-canary", "1")]).text(), "other");
    }
    assert_eq!(gateway.get("/plain", &[]).text(), "main");
    wait_for(|| mirrored(&gateway, "responded") == 1.0, STEP_TIMEOUT);
    assert_eq!((main.count(), other.count(), other.last().target.as_str()), (1, 6, "/plain"));
}

/// Bodies that are too large are forwarded whole, and not copied; so are those that wait for 100.
#[test]
fn large_bodies_are_forwarded_without_a_copy() {
    let (main, copy) = (origin("main"), origin("copy"));
    let route = "mirror = { upstream = \"other\" }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&config(&main, &copy, route));
    let body: Vec<u8> = (0..300_000_u32).map(|index| (index % 251) as u8).collect();
    assert_eq!(gateway.request("POST", "/large", &[], &body).status, 200);
    assert_eq!((main.last().body, mirrored(&gateway, "body")), (body, 1.0));
    assert_eq!(gateway.get("/small", &[]).status, 200);
    copy.wait_for_requests(1);
    assert_eq!(copy.last().target, "/small");
}

#[test]
fn client_that_is_slow_with_its_body_is_served_without_a_copy() {
    let (main, copy) = (origin("main"), origin("copy"));
    let route = "mirror = { upstream = \"other\" }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&config(&main, &copy, route));
    let mut client = gateway.connect();
    client.send("POST / HTTP/1.1\r\nHost: shop.example\r\nContent-Length: 10\r\n\r\n01234");
    // The request is sent after the gateway has waited for the rest.
    wait_for(|| mirrored(&gateway, "body") == 1.0, STEP_TIMEOUT);
    client.send("56789");
    assert_eq!(client.read_response_to("POST").status, 200);
    assert_eq!((main.last().body, copy.count()), (b"0123456789".to_vec(), 0));
}

/// A mirror that hangs delays no request, and has a bounded number of copies.
#[test]
fn mirror_that_hangs_delays_no_request() {
    let main = origin("main");
    let gate = Gate::default();
    let waits = gate.clone();
    let copy = Origin::start(move |_| Script::new().wait(&waits).head(200, &[("Content-Length", "0")]));
    let route = "mirror = { upstream = \"other\" }\ncache = { mode = \"off\" }";
    let workers = "[server]\nworkers = 1\n";
    let gateway = Gateway::start(&format!("{workers}{}", config(&main, &copy, route)));
    let mut client = gateway.connect();
    for _ in 0..80 {
        assert_eq!(client.get("/", &[]).text(), "main");
    }
    assert_eq!(mirrored(&gateway, "busy"), 16.0);
    wait_for(|| gateway.metric("tidegate_tasks{kind=\"mirror\"}") == 64.0, STEP_TIMEOUT);
    gate.open();
    wait_for(|| mirrored(&gateway, "responded") == 64.0, STEP_TIMEOUT);
    wait_for(|| gateway.metric("tidegate_tasks{kind=\"mirror\"}") == 0.0, Duration::from_secs(5));
}
