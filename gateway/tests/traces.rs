//! Traces: what a collector receives of sampled requests, what upstreams get as their parent, and
//! that a collector which fails is not felt.

mod support;

use std::io::Read as _;

use serde_json::Value;
use support::{Gateway, Origin, STEP_TIMEOUT, Script, free_address, one_route, wait_for};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// The fields of a request.
type Lines = Vec<(&'static str, String)>;

/// A collector: an HTTP server whose requests are kept.
fn collector() -> Origin {
    Origin::start(|_| Script::ok(&[("Content-Type", "application/json")], "{}"))
}

fn origin() -> Origin {
    Origin::start(|request| match request.target.as_str() {
        "/retry" if request.number.is_multiple_of(2) => Script::reply(503, &[], ""),
        "/fail" => Script::reply(500, &[("Cache-Control", "no-store")], ""),
        _ => Script::ok(&[("Cache-Control", "max-age=60")], "body"),
    })
}

fn start(origin: &Origin, collector: std::net::SocketAddr, keys: &str) -> Gateway {
    let tracing = format!("[tracing]\notlp = \"http://{collector}\"\n{keys}\n");
    let upstream = format!("[upstreams.origin]\nendpoints = [\"http://{}\"]\nretries = 1\n", origin.address);
    let route = "[[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"origin\"\n";
    // One worker: its requests are exported in their order.
    Gateway::start(&format!("[server]\nworkers = 1\n{upstream}{route}\n{tracing}"))
}

/// The keys by which the peers of this test may ask for sampling.
const TRUSTED: &str = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\n";

/// The spans that the collector has, once it has those of `count` requests.
#[track_caller]
fn spans(collector: &Origin, count: usize) -> Vec<Value> {
    let all = || -> Vec<Value> {
        let bodies = collector.requests().into_iter().map(|request| {
            assert_eq!((&*request.target, request.field("content-type")), ("/v1/traces", Some("application/json")));
            let body = match request.field("content-encoding") {
                None => request.body.clone(),
                Some(coding) => {
                    assert_eq!(coding, "gzip");
                    let mut body = Vec::new();
                    flate2::read::GzDecoder::new(&*request.body).read_to_end(&mut body).expect("gzip");
                    body
                }
            };
            serde_json::from_slice::<Value>(&body).expect("JSON")
        });
        let scopes = bodies.flat_map(|body| body["resourceSpans"].as_array().expect("resources").clone());
        let scopes = scopes.flat_map(|resource| resource["scopeSpans"].as_array().expect("scopes").clone());
        scopes.flat_map(|scope| scope["spans"].as_array().expect("spans").clone()).collect()
    };
    wait_for(|| all().iter().filter(|span| span["kind"] == 2).count() >= count, STEP_TIMEOUT);
    all()
}

fn attribute(span: &Value, key: &str) -> String {
    let attributes = span["attributes"].as_array().expect("attributes");
    let found = attributes.iter().find(|attribute| attribute["key"] == key);
    let value = found.map(|attribute| &attribute["value"]);
    value.and_then(|value| value["stringValue"].as_str().or(value["intValue"].as_str())).unwrap_or("-").to_owned()
}

fn named<'s>(spans: &'s [Value], name: &str) -> Vec<&'s Value> {
    spans.iter().filter(|span| span["name"] == name).collect()
}

/// The trace id, the parent and the flags of `traceparent`.
fn traceparent(value: Option<&str>) -> [String; 3] {
    let parts: Vec<_> = value.unwrap_or_default().split('-').map(str::to_owned).collect();
    parts[1..].to_vec().try_into().expect("four parts")
}

#[test]
fn exports_are_compressed_as_configured() {
    for (keys, coding) in [("", None), ("compression = \"none\"", None), ("compression = \"gzip\"", Some("gzip"))] {
        let (origin, collector) = (origin(), collector());
        let gateway = start(&origin, collector.address, keys);
        gateway.get("/a", &[]);
        assert!(!spans(&collector, 1).is_empty());
        assert_eq!(collector.requests()[0].field("content-encoding"), coding, "{keys}");
    }
}

#[test]
fn refused_heads_have_spans() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "");
    gateway.raw(b"GET /x HTTP/1.1\r\nHost: a\r\nBad Name: 1\r\n\r\n");
    let spans = spans(&collector, 1);
    let server = spans.iter().find(|span| span["kind"] == 2).expect("a span");
    let facts = ["url.path", "http.response.status_code", "tidegate.failure"].map(|key| attribute(server, key));
    assert_eq!(facts, ["/x", "400", "field_syntax"], "{server}");
    let line = gateway.access_log(1).remove(0);
    assert_eq!(line["trace_id"], server["traceId"]);
    // The id that the client may report is that of the trace.
    let id = line["request_id"].as_str().expect("an id").replace('-', "");
    assert_eq!(id, line["trace_id"].as_str().expect("a trace"), "{line}");
}

/// Only the body of such a request is refused: its fields count as those of each other request.
#[test]
fn refused_bodies_of_trusted_peers_keep_their_trace_and_their_id() {
    let (origin, collector) = (origin(), collector());
    for (keys, is_trusted) in [(TRUSTED, true), ("", false)] {
        let keys = format!("ratio = 0\n{keys}[limits_http]\nget_body = \"refuse\"\n");
        let gateway = start(&origin, collector.address, &keys);
        let fields = format!("Host: a\r\nX-Request-Id: mine-1\r\ntraceparent: 00-{TRACE}-{PARENT}-01\r\n");
        gateway.raw(format!("GET /x HTTP/1.1\r\n{fields}Content-Length: 1\r\n\r\nx").as_bytes());
        let line = gateway.access_log(1).remove(0);
        assert!(line["refused"].is_string(), "{line}");
        assert_eq!(line["request_id"] == "mine-1", is_trusted, "{line}");
        if is_trusted {
            let spans = spans(&collector, 1);
            let server = spans.iter().find(|span| span["kind"] == 2).expect("a span");
            assert_eq!((&server["traceId"], &server["parentSpanId"]), (&TRACE.into(), &PARENT.into()), "{server}");
        }
        drop_gracefully(gateway);
    }
    let servers = spans(&collector, 1).iter().filter(|span| span["kind"] == 2).count();
    assert_eq!(servers, 1, "strangers do not switch sampling on");
}

#[test]
fn sampling_that_is_not_followed_is_not_passed_on_by_b3() {
    let (origin, collector) = (origin(), collector());
    // No peer is trusted, and no request is sampled by itself.
    let gateway = start(&origin, collector.address, "ratio = 0.0");
    let ids = [("X-B3-TraceId", TRACE), ("X-B3-SpanId", PARENT)];
    let (asks, denies) = (format!("{TRACE}-{PARENT}-1"), format!("{TRACE}-{PARENT}-0"));
    for (path, fields, is_passed) in [
        ("/single", vec![("b3", &*asks)], false),
        ("/debug", vec![("b3", "d")], false),
        ("/multi", [&ids[..], &[("X-B3-Sampled", "1")]].concat(), false),
        ("/flags", [&ids[..], &[("X-B3-Flags", "1")]].concat(), false),
        ("/denied", vec![("b3", &*denies)], true),
        ("/undecided", ids.to_vec(), true),
    ] {
        assert_eq!(gateway.get(path, &fields).status, 200);
        let requests = origin.requests();
        let request = requests.iter().find(|request| request.target == path).expect("forwarded");
        let has_b3 = request.fields.iter().any(|(name, _)| name.to_ascii_lowercase().contains("b3"));
        assert_eq!(has_b3, is_passed, "{path}: {:?}", request.fields);
        assert_eq!(traceparent(request.field("traceparent"))[2], "00", "{path}");
    }
}

#[test]
fn a_sampled_request_has_a_span_for_each_phase() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "service_name = \"edge\"\nquery = true");
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let fields = [("traceparent", &*parent), ("tracestate", "a=1,b=2"), ("User-Agent", "probe")];
    assert_eq!(gateway.get("/item?q=1", &fields).status, 200);
    let spans = spans(&collector, 1);
    assert!(spans.iter().all(|span| span["traceId"] == TRACE), "{spans:#?}");
    let [server] = *named(&spans, "GET /*") else { panic!("{spans:#?}") };
    assert_eq!((&server["kind"], &server["parentSpanId"]), (&2.into(), &PARENT.into()));
    let expected = [
        ("http.request.method", "GET"),
        ("url.path", "/item"),
        ("url.query", "q=1"),
        ("url.scheme", "http"),
        ("http.route", "/*"),
        ("http.response.status_code", "200"),
        ("http.response.body.size", "4"),
        ("network.protocol.version", "1.1"),
        ("user_agent.original", "probe"),
        ("client.address", "127.0.0.1"),
        ("server.address", "gate.test"),
        ("tidegate.cache", "miss"),
        ("error.type", "-"),
    ];
    for (key, value) in expected {
        assert_eq!(attribute(server, key), value, "{key}");
    }
    for phase in ["admit", "lookup", "respond"] {
        let [span] = *named(&spans, phase) else { panic!("{phase}: {spans:#?}") };
        assert_eq!((&span["parentSpanId"], &span["kind"]), (&server["spanId"], &1.into()));
        let nanos = |span: &Value, key: &str| span[key].as_str().and_then(|text| text.parse::<u128>().ok()).expect(key);
        assert!(nanos(span, "startTimeUnixNano") >= nanos(server, "startTimeUnixNano"));
        assert!(nanos(span, "endTimeUnixNano") <= nanos(server, "endTimeUnixNano"));
    }
    let [call] = *named(&spans, "GET") else { panic!("{spans:#?}") };
    assert_eq!((&call["kind"], &call["parentSpanId"]), (&3.into(), &server["spanId"]));
    assert_eq!(attribute(call, "server.port"), origin.address.port().to_string());
    // The upstream continues the trace below the call, with flags and state.
    let sent = &origin.requests()[0];
    let expected = [TRACE.to_owned(), call["spanId"].as_str().expect("an id").to_owned(), "01".to_owned()];
    assert_eq!(traceparent(sent.field("traceparent")), expected);
    assert_eq!(sent.field("tracestate"), Some("a=1,b=2"));
    let body: Value = serde_json::from_slice(&collector.requests()[0].body).expect("JSON");
    let resource = body["resourceSpans"][0]["resource"].clone();
    assert_eq!(attribute(&resource, "service.name"), "edge");
    wait_for(|| gateway.metric("tidegate_trace_spans_exported_total") == 5.0, STEP_TIMEOUT);
}

#[test]
fn retries_and_hits_and_failures_are_told_apart() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "");
    assert_eq!(gateway.get("/retry", &[]).status, 200);
    assert!(gateway.get("/retry", &[]).is_hit());
    assert_eq!(gateway.get("/fail", &[]).status, 500);
    let spans = spans(&collector, 3);
    let [upstream] = *named(&spans, "upstream") else { panic!("one call with several attempts: {spans:#?}") };
    let attempts: Vec<&Value> =
        named(&spans, "GET").into_iter().filter(|span| span["parentSpanId"] == upstream["spanId"]).collect();
    let results: Vec<[String; 3]> = attempts
        .iter()
        .map(|span| {
            ["http.response.status_code", "http.request.resend_count", "error.type"].map(|key| attribute(span, key))
        })
        .collect();
    assert_eq!(results, [["503", "-", "503"], ["200", "1", "-"]], "{attempts:#?}");
    let servers = named(&spans, "GET /*");
    let cache: Vec<String> = servers.iter().map(|span| attribute(span, "tidegate.cache")).collect();
    assert_eq!(cache, ["miss", "hit", "miss"]);
    let of = |server: &Value| spans.iter().filter(|span| span["parentSpanId"] == server["spanId"]).count();
    assert_eq!(of(servers[1]), 3, "a hit is not sent to the upstream");
    assert_eq!((attribute(servers[2], "error.type"), &servers[2]["status"]["code"]), ("500".to_owned(), &2.into()));
}

#[test]
fn parents_decide_about_sampling_in_both_formats() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, &format!("ratio = 0\n{TRUSTED}"));
    let sent = |path: &str| {
        let requests = origin.requests();
        let request = requests.iter().find(|request| request.target == path).expect("it was forwarded").clone();
        (traceparent(request.field("traceparent")), request)
    };
    let short = "64fe8b2a57d3eff7";
    let padded = format!("{:0>32}", short);
    let unsampled = format!("00-{TRACE}-{PARENT}-00");
    let cases: [(&str, Lines, &str, &str); 6] = [
        ("/w3c", vec![("traceparent", unsampled)], TRACE, "00"),
        ("/b3", vec![("b3", format!("{TRACE}-{PARENT}-1"))], TRACE, "01"),
        ("/b3-no", vec![("b3", format!("{TRACE}-{PARENT}-0"))], TRACE, "00"),
        ("/b3-short", vec![("b3", format!("{short}-{PARENT}-1"))], &padded, "01"),
        (
            "/b3-multi",
            vec![("X-B3-TraceId", TRACE.into()), ("X-B3-SpanId", PARENT.into()), ("X-B3-Sampled", "1".into())],
            TRACE,
            "01",
        ),
        ("/b3-undecided", vec![("b3", format!("{TRACE}-{PARENT}"))], TRACE, "00"),
    ];
    for (path, fields, trace, flags) in &cases {
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (*name, &**value)).collect();
        assert_eq!(gateway.get(path, &fields).status, 200);
        let ([id, parent, sent_flags], _) = sent(path);
        assert_eq!((&*id, &*sent_flags), (*trace, *flags), "{path}");
        assert_eq!(parent == PARENT, *flags == "00", "{path}: a sampled one has a span of the gateway");
    }
    gateway.get("/new", &[]);
    let ([_, _, flags], _) = sent("/new");
    assert_eq!(flags, "00", "the ratio samples no new trace");
    let spans = spans(&collector, 3);
    let paths: Vec<String> = named(&spans, "GET /*").iter().map(|span| attribute(span, "url.path")).collect();
    assert_eq!(paths, ["/b3", "/b3-short", "/b3-multi"]);
}

/// A client could make each of its requests cost a span, and choose an id that the ratio samples.
#[test]
fn untrusted_peers_do_not_switch_sampling_on() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "ratio = 0");
    let zeros = format!("{:0<32}", "1");
    let cases: [(&str, Lines); 3] = [
        ("/w3c", vec![("traceparent", format!("00-{TRACE}-{PARENT}-01")), ("tracestate", "a=1".into())]),
        ("/zeros", vec![("traceparent", format!("00-{zeros}-{PARENT}-03"))]),
        ("/b3", vec![("b3", format!("{TRACE}-{PARENT}-1"))]),
    ];
    for (path, fields) in &cases {
        let fields: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (*name, &**value)).collect();
        assert_eq!(gateway.get(path, &fields).status, 200);
    }
    let sent = origin.requests();
    let parents = [0, 1, 2].map(|at: usize| traceparent(sent[at].field("traceparent")));
    // A changed flag needs another parent (W3C Trace Context section 3.3); that of B3 stays.
    assert_eq!(parents.each_ref().map(|[_, _, flags]| &**flags), ["00", "02", "00"]);
    assert_eq!(parents.each_ref().map(|[id, ..]| &**id), [TRACE, &*zeros, TRACE]);
    assert_eq!(parents.each_ref().map(|[_, parent, _]| parent == PARENT), [false, false, true]);
    assert_eq!(sent[0].field("tracestate"), Some("a=1"));
    // The end of the process exports all that is queued.
    drop_gracefully(gateway);
    assert_eq!(collector.count(), 0, "no span of them");
}

fn drop_gracefully(mut gateway: Gateway) {
    gateway.process.signal("TERM");
    assert!(gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
}

/// Queries carry tokens and signatures, and the collector may be another company's.
#[test]
fn queries_are_not_sent_by_default() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "");
    assert_eq!(gateway.get("/file?access_token=s3cret", &[]).status, 200);
    let spans = spans(&collector, 1);
    let [server] = *named(&spans, "GET /*") else { panic!("{spans:#?}") };
    assert_eq!((attribute(server, "url.path"), attribute(server, "url.query")), ("/file".to_owned(), "-".to_owned()));
    assert!(collector.requests().iter().all(|request| !String::from_utf8_lossy(&request.body).contains("s3cret")));
}

/// `b3: 0` has no ids, and is a decision all the same.
#[test]
fn decisions_of_b3_without_ids_count() {
    let (origin, collector) = (origin(), collector());
    let gateway = start(&origin, collector.address, "");
    for (path, name, value) in [("/single", "b3", "0"), ("/multi", "X-B3-Sampled", "false")] {
        assert_eq!(gateway.get(path, &[(name, value)]).status, 200);
    }
    let flags =
        origin.requests().iter().map(|sent| traceparent(sent.field("traceparent"))[2].clone()).collect::<Vec<_>>();
    assert_eq!(flags, ["00", "00"]);
}

#[test]
fn without_tracing_the_fields_pass_and_nothing_is_sent() {
    let origin = origin();
    let gateway = Gateway::start(&one_route(origin.address, "", "[tracing]\notlp = \"\"\n"));
    let parent = format!("00-{TRACE}-{PARENT}-00");
    gateway.get("/a", &[("traceparent", &parent), ("tracestate", "a=1"), ("b3", "0")]);
    let sent = &origin.requests()[0];
    let fields = ["traceparent", "tracestate", "b3"].map(|name| sent.field(name).unwrap_or_default().to_owned());
    assert_eq!(fields, [&*parent, "a=1", "0"]);
    assert_eq!(gateway.metric("tidegate_trace_spans_exported_total"), 0.0);
}

#[test]
fn a_collector_that_fails_is_not_felt() {
    let origin = origin();
    for refusing in [true, false] {
        let silent = Origin::start(|_| Script::new().hang());
        let address = if refusing { free_address() } else { silent.address };
        let gateway = start(&origin, address, "");
        let mut client = gateway.connect();
        // More than the queue holds: the exporter waits for the silent collector meanwhile.
        for _ in 0..4_000 {
            assert_eq!(client.get("/item", &[]).status, 200);
        }
        let dropped =
            |reason: &str| gateway.metric(&format!("tidegate_trace_spans_dropped_total{{reason=\"{reason}\"}}"));
        if refusing {
            wait_for(|| dropped("export_failed") > 0.0, STEP_TIMEOUT);
            // Its line may reach the test after the metric.
            let logged = || gateway.process.stderr.events("trace_export_failed").len();
            wait_for(|| logged() > 0, STEP_TIMEOUT);
            assert!(logged() < 20, "{}", logged());
        } else {
            assert!(dropped("queue_full") > 0.0);
        }
    }
}

#[test]
fn queued_spans_are_sent_at_the_end_of_the_process() {
    let (origin, collector) = (origin(), collector());
    let mut gateway = start(&origin, collector.address, "");
    assert_eq!(gateway.get("/item", &[]).status, 200);
    gateway.process.signal("TERM");
    assert!(gateway.process.wait(STEP_TIMEOUT).is_some_and(|status| status.success()));
    assert_eq!(named(&spans(&collector, 1), "GET /*").len(), 1);
}

/// Spans of work beside a request or after it, once the collector has one of that name.
#[track_caller]
fn spans_with(collector: &Origin, requests: usize, name: &str) -> Vec<Value> {
    wait_for(|| !named(&spans(collector, requests), name).is_empty(), STEP_TIMEOUT);
    spans(collector, requests)
}

/// The only span of that name below `parent`.
#[track_caller]
fn below<'s>(spans: &'s [Value], parent: &Value, name: &str) -> &'s Value {
    let found: Vec<_> =
        named(spans, name).into_iter().filter(|span| span["parentSpanId"] == parent["spanId"]).collect();
    let [span] = *found else { panic!("{name} below {parent}: {spans:#?}") };
    span
}

#[test]
fn a_mirrored_request_has_a_span_for_its_copy() {
    let (origin, mirror, collector) = (origin(), origin(), collector());
    let tracing = format!("[tracing]\notlp = \"http://{}\"\n", collector.address);
    let upstreams = format!("[upstreams.other]\nendpoints = [\"http://{}\"]\n", mirror.address);
    let route = "mirror = { upstream = \"other\" }\ncache = { mode = \"off\" }";
    let gateway = Gateway::start(&one_route(origin.address, route, &format!("{upstreams}{tracing}")));
    let parent = format!("00-{TRACE}-{PARENT}-01");
    assert_eq!(gateway.get("/fail", &[("traceparent", &parent)]).status, 500);
    let spans = spans_with(&collector, 1, "mirror");
    assert!(spans.iter().all(|span| span["traceId"] == TRACE), "{spans:#?}");
    let server = named(&spans, "GET /*")[0];
    let call = below(&spans, server, "GET");
    let copy = below(&spans, call, "mirror");
    assert_eq!(
        (&copy["kind"], attribute(copy, "url.path"), &copy["status"]),
        (&1.into(), "/fail".to_owned(), &Value::Object(Default::default()))
    );
    let sent = below(&spans, copy, "GET");
    let facts = ["http.response.status_code", "server.port"].map(|key| attribute(sent, key));
    assert_eq!((&sent["kind"], facts), (&3.into(), ["500".to_owned(), mirror.address.port().to_string()]));
    // Each upstream continues the trace below its own call.
    for (upstream, span) in [(&origin, call), (&mirror, sent)] {
        let [trace, parent, _] = traceparent(upstream.last().field("traceparent"));
        assert_eq!((&*trace, parent), (TRACE, span["spanId"].as_str().expect("an id").to_owned()));
    }
    // A request that is not sampled has none, and its copy neither.
    gateway.get("/fail", &[("traceparent", &format!("00-{TRACE}-{PARENT}-00"))]);
    mirror.wait_for_requests(2);
    gateway.get("/last", &[("traceparent", &parent)]);
    wait_for(|| named(&self::spans(&collector, 2), "mirror").len() == 2, STEP_TIMEOUT);
    let paths: Vec<_> =
        named(&self::spans(&collector, 2), "mirror").iter().map(|span| attribute(span, "url.path")).collect();
    assert_eq!(paths, ["/fail", "/last"]);
}

#[test]
fn a_background_validation_has_spans_below_the_request_that_began_it() {
    let origin = Origin::start(|request| match request.number {
        0 => Script::ok(&[("Cache-Control", "max-age=1, stale-while-revalidate=60"), ("ETag", "\"a\"")], "body"),
        _ => Script::reply(304, &[("Cache-Control", "max-age=60"), ("ETag", "\"a\"")], ""),
    });
    let collector = collector();
    let gateway = start(&origin, collector.address, "");
    assert_eq!(gateway.get("/item", &[]).status, 200);
    wait_for(|| gateway.get("/item", &[]).status == 200 && origin.count() == 2, STEP_TIMEOUT);
    let spans = spans_with(&collector, 2, "background_validation");
    let work = named(&spans, "background_validation")[0];
    let lookup = spans.iter().find(|span| span["spanId"] == work["parentSpanId"]).expect("its parent");
    assert_eq!((&lookup["name"], &lookup["traceId"]), (&"lookup".into(), &work["traceId"]));
    let server = spans.iter().find(|span| span["spanId"] == lookup["parentSpanId"]).expect("its request");
    assert_eq!(
        (attribute(server, "tidegate.cache"), attribute(work, "tidegate.cache")),
        ("stale".into(), "revalidated".into())
    );
    let call = below(&spans, work, "GET");
    assert_eq!(attribute(call, "http.response.status_code"), "304");
    let [trace, parent, _] = traceparent(origin.last().field("traceparent"));
    assert_eq!((call["traceId"].as_str(), call["spanId"].as_str()), (Some(&*trace), Some(&*parent)));
    let nanos = |span: &Value, key: &str| span[key].as_str().and_then(|text| text.parse::<u128>().ok()).expect(key);
    assert!(nanos(work, "endTimeUnixNano") >= nanos(call, "endTimeUnixNano"), "{work} {call}");
}

#[test]
fn a_fetch_that_goes_on_without_its_client_has_spans() {
    let gate = support::Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |_| {
        Script::new().wait(&opened).head(200, &[("Content-Length", "4"), ("Cache-Control", "max-age=60")]).send("body")
    });
    let collector = collector();
    let gateway = start(&origin, collector.address, "");
    let mut leading = gateway.connect();
    leading.send_get("/item", &[]);
    origin.wait_for_requests(1);
    let mut joined = gateway.connect();
    joined.send_get("/item", &[]);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    drop(leading);
    wait_for(|| gateway.metric("tidegate_tasks{kind=\"detached_fetch\"}") == 1.0, STEP_TIMEOUT);
    gate.open();
    assert_eq!(joined.read_response().status, 200);
    let spans = spans_with(&collector, 2, "detached_fetch");
    let work = named(&spans, "detached_fetch")[0];
    // The call began in the request, which has ended without it.
    let begun = spans.iter().find(|span| span["spanId"] == work["parentSpanId"]).expect("its parent");
    assert_eq!((&begun["name"], &begun["traceId"]), (&"upstream".into(), &work["traceId"]));
    let call = below(&spans, work, "GET");
    assert_eq!(attribute(call, "http.response.status_code"), "200");
    assert_eq!(traceparent(origin.last().field("traceparent"))[1], begun["spanId"].as_str().expect("an id"));
    assert_eq!((origin.count(), attribute(work, "error.type")), (1, "-".to_owned()));
}

#[test]
fn the_body_of_a_shared_fetch_has_a_span_that_outlives_its_client() {
    let gate = support::Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| {
        let head = Script::new().head(200, &[("Content-Length", "8000"), ("Cache-Control", "max-age=60")]);
        match request.target.as_str() {
            "/cut" => head.send([b'x'; 4_000]).wait(&opened).close(),
            _ => head.send([b'x'; 4_000]).wait(&opened).send([b'x'; 4_000]),
        }
    });
    let collector = collector();
    let gateway = start(&origin, collector.address, "");
    let mut clients: Vec<_> = ["/item", "/item", "/cut"]
        .into_iter()
        .map(|path| {
            let mut client = gateway.connect();
            client.send_get(path, &[]);
            client.read_head();
            client
        })
        .collect();
    drop(clients.remove(0));
    // The request of the client that has left is reported before the body has ended.
    wait_for(|| !named(&spans(&collector, 1), "GET /*").is_empty(), STEP_TIMEOUT);
    assert!(named(&spans(&collector, 1), "fill").is_empty());
    gate.open();
    wait_for(|| named(&spans(&collector, 3), "fill").len() == 2, STEP_TIMEOUT);
    let spans = spans(&collector, 3);
    let mut ends: Vec<_> = named(&spans, "fill")
        .iter()
        .map(|fill| {
            let call = spans.iter().find(|span| span["spanId"] == fill["parentSpanId"]).expect("its parent");
            assert_eq!((&call["name"], &call["kind"]), (&"GET".into(), &3.into()));
            ["url.path", "http.response.body.size", "error.type"].map(|key| attribute(fill, key))
        })
        .collect();
    ends.sort();
    assert_eq!(ends, [["/cut", "4000", "aborted"], ["/item", "8000", "-"]]);
}

/// A reader that falls behind a shared fetch requests the rest itself, in the trace of its request.
#[test]
fn the_range_request_of_a_slow_reader_has_spans() {
    // Above `cache.object_bytes`, and more than the sockets between client and gateway hold.
    const LENGTH: usize = 24 << 20;
    const FIRST: usize = 64 << 10;
    let gate = support::Gate::default();
    let opened = gate.clone();
    let origin = Origin::start(move |request| {
        let fields = [("ETag", "\"a\""), ("Accept-Ranges", "bytes"), ("Cache-Control", "max-age=60")];
        let Some(range) = request.field("range") else {
            let chunk = |length: usize| [format!("{length:x}\r\n").as_bytes(), &vec![b'x'; length], b"\r\n"].concat();
            let head = Script::new().head(200, &[&[("Transfer-Encoding", "chunked")], &fields[..]].concat());
            return head.send(chunk(FIRST)).wait(&opened).send(chunk(LENGTH - FIRST)).send(b"0\r\n\r\n");
        };
        let first = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
        let first: usize = first.expect("one open range").parse().expect("an offset");
        let part = format!("bytes {first}-{}/{LENGTH}", LENGTH - 1);
        Script::reply(206, &[&[("Content-Range", &*part)], &fields[..]].concat(), vec![b'x'; LENGTH - first])
    });
    let collector = collector();
    let gateway = start(&origin, collector.address, "");
    let mut slow = gateway.connect();
    slow.send_get("/item", &[]);
    let head = slow.read_head();
    let mut fast = gateway.connect();
    fast.send_get("/item", &[]);
    wait_for(|| gateway.metric("tidegate_requests_in_flight") == 2.0, STEP_TIMEOUT);
    gate.open();
    assert_eq!(fast.read_response().body.len(), LENGTH);
    assert_eq!(slow.read_body(head, "GET").body.len(), LENGTH);
    let spans = spans_with(&collector, 2, "continuation");
    let work = named(&spans, "continuation")[0];
    let sent = origin.requests().into_iter().find(|request| request.field("range").is_some()).expect("a range request");
    let first: usize = sent.field("range").unwrap_or_default()[6..].trim_end_matches('-').parse().expect("an offset");
    let facts = ["url.path", "http.response.body.size", "error.type"].map(|key| attribute(work, key));
    assert_eq!(facts, ["/item", &(LENGTH - first).to_string(), "-"]);
    let call = below(&spans, work, "GET");
    assert_eq!(attribute(call, "http.response.status_code"), "206");
    assert_eq!(traceparent(sent.field("traceparent"))[1], call["spanId"].as_str().expect("an id"));
    let parent = spans.iter().find(|span| span["spanId"] == work["parentSpanId"]).expect("its parent");
    assert_eq!(parent["traceId"], work["traceId"]);
}

#[test]
fn the_connections_that_an_attempt_tries_have_spans() {
    let (origin, collector) = (origin(), collector());
    let closed = free_address();
    let tracing = format!("[tracing]\notlp = \"http://{}\"\n", collector.address);
    let upstream = format!(
        "[upstreams.origin]\nendpoints = [\"http://{closed}\", \"http://{}\"]\nbalance = \"round-robin\"\n",
        origin.address
    );
    let route =
        "[[routes]]\nname = \"all\"\nmatch = { path = \"/*\" }\nupstream = \"origin\"\ncache = { mode = \"off\" }\n";
    let gateway = Gateway::start(&format!("[server]\nworkers = 1\n{upstream}{route}{tracing}"));
    for count in 1..=2 {
        assert_eq!(gateway.get("/item", &[]).status, 200);
        spans(&collector, count);
    }
    let spans = spans(&collector, 2);
    let connects = named(&spans, "connect");
    let [failed, open] = *connects else { panic!("{spans:#?}") };
    let facts = |span: &Value| {
        ["network.peer.address", "network.peer.port", "server.port", "network.transport", "error.type"]
            .map(|key| attribute(span, key))
    };
    let port = |address: std::net::SocketAddr| address.port().to_string();
    assert_eq!(facts(failed), ["127.0.0.1", &port(closed), &port(closed), "tcp", "connect"]);
    assert_eq!(facts(open), ["127.0.0.1", &port(origin.address), &port(origin.address), "tcp", "-"]);
    assert_eq!((&failed["status"]["code"], &failed["kind"]), (&2.into(), &1.into()));
    // Both belong to one call, which was sent once.
    let call = spans.iter().find(|span| span["spanId"] == failed["parentSpanId"]).expect("the call");
    assert_eq!((&call["name"], &open["parentSpanId"]), (&"GET".into(), &call["spanId"]));
    assert_eq!(attribute(call, "server.port"), port(origin.address));
}
