//! The id of a request: of a trusted proxy or new, the same for origin, client, log, page and
//! problem document; and the name of the user in fields for the origin.

mod support;

use std::collections::HashSet;

use support::{ClientResponse, Gateway, Origin, Script, TempDir, one_route};

fn echoing_origin() -> Origin {
    Origin::start(|request| {
        let id = request.all("x-request-id").join("|");
        Script::ok(&[("Cache-Control", "max-age=60"), ("X-Request-ID", "of-the-origin")], id)
    })
}

fn id_of(response: &ClientResponse) -> String {
    let [id] = response.all("x-request-id")[..] else { panic!("one id: {:?}", response.all("x-request-id")) };
    id.to_owned()
}

fn is_uuid_version_7(id: &str) -> bool {
    let bytes = id.as_bytes();
    let is_hex = |byte: &u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(byte);
    id.len() == 36
        && id.split('-').map(str::len).eq([8, 4, 4, 4, 12])
        && bytes.iter().filter(|byte| **byte != b'-').all(is_hex)
        && bytes[14] == b'7'
}

#[test]
fn origin_client_and_log_have_one_new_id() {
    let origin = echoing_origin();
    let gateway = Gateway::start(&one_route(origin.address, "", ""));
    let miss = gateway.get("/a", &[("X-Request-Id", "chosen-by-a-client")]);
    let id = id_of(&miss);
    assert!(is_uuid_version_7(&id), "{id}");
    assert_eq!(miss.text(), id);
    let hit = gateway.get("/a", &[]);
    assert!(hit.is_hit() && hit.text() == id);
    let hit_id = id_of(&hit);
    assert!(is_uuid_version_7(&hit_id) && hit_id != id && hit_id[..13] >= id[..13], "{id} {hit_id}: time comes first");
    // Each worker writes its own lines.
    let lines = gateway.access_log(2);
    let line_of = |id: &str| lines.iter().find(|line| line["request_id"] == id).unwrap_or_else(|| panic!("{lines:?}"));
    assert_eq!((line_of(&id)["cache"].as_str(), line_of(&hit_id)["cache"].as_str()), (Some("miss"), Some("hit")));
    assert_eq!(line_of(&id)["trace_id"].as_str(), Some(&*id.replace('-', "")), "a new trace has the id too");
}

#[test]
fn ids_of_trusted_proxies_are_kept_if_they_are_harmless() {
    let origin = echoing_origin();
    let config = "[identity]\ntrusted_proxies = [\"127.0.0.0/8\"]\n";
    let gateway = Gateway::start(&one_route(origin.address, "cache = { mode = \"off\" }\n", config));
    let traced =
        [("X-Request-Id", "edge-1/7:x=1"), ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")];
    let kept = gateway.get("/", &traced);
    assert_eq!((id_of(&kept), kept.text()), ("edge-1/7:x=1".to_owned(), "edge-1/7:x=1".to_owned()));
    assert_eq!(gateway.access_log(1)[0]["trace_id"].as_str(), Some("0af7651916cd43dd8448eb211c80319c"));
    for fields in [&[("X-Request-Id", "a b")][..], &[("X-Request-Id", "a"), ("X-Request-Id", "b")], &traced[1..]] {
        let response = gateway.get("/", fields);
        let id = id_of(&response);
        assert!(is_uuid_version_7(&id) && response.text() == id, "{fields:?}: {id}");
    }
}

#[test]
fn refusals_denials_and_pages_show_the_id() {
    let gateway = Gateway::start(
        "[identity]\ntrusted_proxies = [\"127.0.0.2\"]\n\
         [limits.node]\ntier = \"node\"\nrate = \"1/h\"\nburst = 1\n\
         [upstreams.dead]\nendpoints = [\"http://127.0.0.1:1\"]\n\
         [[routes]]\nname = \"limited\"\nmatch = { path = \"/limited\" }\nlimits = [\"node\"]\nrespond = {}\n\
         [[routes]]\nname = \"dead\"\nmatch = { path = \"/dead\" }\nupstream = \"dead\"\n",
    );
    assert_eq!(gateway.get("/limited", &[]).status, 200);
    let mut ids = HashSet::new();
    let html = [("Accept", "text/html")];
    let chinese = [("Accept", "text/html"), ("Accept-Language", "zh-CN,en;q=0.5")];
    let mut client = gateway.connect();
    for target in ["/limited", "/dead", "/absent"] {
        for fields in [&[][..], &html, &chinese] {
            // The second is the repeated head of a connection.
            for _ in 0..2 {
                let response = client.get(target, fields);
                let (id, text) = (id_of(&response), response.text());
                assert!(is_uuid_version_7(&id) && ids.insert(id.clone()), "{target}: {id}");
                assert_eq!(text.matches(&*id).count(), 1, "{target}: {text}");
                let expected = ["\"request_id\":\"", "lang=\"en\"", "lang=\"zh\""][fields.len()];
                assert!(text.contains(expected), "{target} {fields:?}: {text}");
            }
        }
    }
    let refused = gateway.raw(b"GET / HTTP/1.1\r\nHost: a\r\nbad name: x\r\n\r\n");
    let refused = String::from_utf8(refused).expect("ASCII");
    let id = refused.split("x-request-id: ").nth(1).and_then(|rest| rest.get(..36)).expect("an id");
    assert!(is_uuid_version_7(id) && refused.matches(id).count() == 2, "{refused}");
    let lines = gateway.access_log(20);
    let logged: Vec<&str> = lines.iter().filter_map(|line| line["request_id"].as_str()).collect();
    assert!(ids.iter().all(|known| logged.contains(&&**known)) && logged.contains(&id), "{logged:?}");

    // The id of a proxy has another length than the prebuilt denial has room for.
    let mut proxy = support::Client::connect_from([127, 0, 0, 2].into(), gateway.address);
    for (fields, expected) in [(&[][..], "\"request_id\":\"short\""), (&html, "<code>short</code>")] {
        let fields = [fields, &[("X-Request-Id", "short")]].concat();
        let denied = proxy.get("/limited", &fields);
        assert_eq!((denied.status, id_of(&denied)), (429, "short".to_owned()));
        assert!(denied.text().contains(expected) && denied.field("retry-after").is_some(), "{}", denied.text());
    }
}

#[test]
fn ids_can_be_switched_off() {
    let origin = echoing_origin();
    let gateway = Gateway::start(&one_route(origin.address, "", "[identity]\nrequest_id = false\n"));
    let response = gateway.get("/", &[("X-Request-Id", "passes")]);
    assert_eq!((id_of(&response), response.text()), ("of-the-origin".to_owned(), "passes".to_owned()));
    assert!(gateway.access_log(1)[0].get("request_id").is_none());
    assert!(!gateway.get("http://other.test/%zz", &[]).text().contains("request_id"));
}

#[test]
fn routes_write_the_user_and_the_id_into_fields() {
    let origin = Origin::start(|request| {
        let text = |name| request.field(name).unwrap_or("-").to_owned();
        Script::ok(&[], format!("user={} id={}", text("x-user"), text("x-correlation")))
    });
    let dir = TempDir::new();
    let key = api_key(&dir);
    let route = "headers.request.set = { x-user = \"{user}\", x-correlation = \"{request_id}\" }\n\
                 headers.response.set = { x-correlation = \"{request_id}\" }\ncache = { mode = \"off\" }\n";
    let more = format!(
        "[identity]\ntrusted_proxies = [\"127.0.0.2\"]\nuser = \"header:x-user-id\"\n\
         [[routes]]\nname = \"keys\"\nmatch = {{ path = \"/keys\" }}\nupstream = \"origin\"\n\
         auth = {{ api_keys = \"keys.txt\" }}\n{route}"
    );
    let gateway = Gateway::start_in(dir, &one_route(origin.address, route, &more));
    let anonymous = gateway.get("/", &[("X-User-Id", "forged"), ("X-User", "forged")]);
    let id = id_of(&anonymous);
    assert_eq!((anonymous.text(), anonymous.field("x-correlation")), (format!("user= id={id}"), Some(&*id)));
    let mut proxy = support::Client::connect_from([127, 0, 0, 2].into(), gateway.address);
    let user = proxy.get("/", &[("X-User-Id", "alice")]);
    assert!(user.text().starts_with("user=alice id="), "{}", user.text());
    let keyed = proxy.get("/keys", &[("X-User-Id", "alice"), ("X-Api-Key", &key)]);
    assert!(keyed.text().starts_with("user=bob id="), "the user that the route has authenticated: {}", keyed.text());
}

/// Writes `keys.txt` with a key of the user `bob`, and returns the key.
fn api_key(dir: &TempDir) -> String {
    let output = support::tidegate().args(["key", "bob"]).output().expect("tidegate runs");
    dir.write("keys.txt", &String::from_utf8_lossy(&output.stdout));
    let message = String::from_utf8_lossy(&output.stderr);
    message.split_whitespace().last().unwrap_or_else(|| panic!("no key: {output:?}")).to_owned()
}
