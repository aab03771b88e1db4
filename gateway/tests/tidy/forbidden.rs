//! Every source file says what it owns, and shipped code holds nothing forbidden.

use super::source::{SourceFile, assert_none, read, sources};

/// Text that shipped code must not contain, why, and the files that may contain it.
const NEVER: [(&str, &str, &[&str]); 8] = [
    (".unwrap()", "`expect` states the proof; input from outside is handled", &[]),
    ("todo!", "unfinished code does not ship", &[]),
    ("unimplemented!", "unfinished code does not ship", &[]),
    ("dbg!", "events and the access log report", &[]),
    ("unsafe ", "nothing here needs it", &[]),
    ("map_err(|e| e.to_string())", "an error keeps its type", &[]),
    ("KnownField::KeepAlive", "hop.rs alone lists hop-by-hop fields", &HOP),
    ("KnownField::ProxyConnection", "hop.rs alone lists hop-by-hop fields", &HOP),
];

/// The list of hop-by-hop fields, and the table of all names.
const HOP: [&str; 2] = ["gateway/src/hop.rs", "gateway/src/http/fields.rs"];

fn bad_lines(file: &SourceFile) -> Vec<String> {
    let code = file.product();
    let opening = (!file.text.starts_with("//!")).then(|| file.offence(0, "no `//!`", "each file says what it owns"));
    let never = NEVER.iter().filter(|(_, _, except)| !except.contains(&&*file.path));
    let found = never.flat_map(|(text, why, _)| code.match_indices(text).map(|(at, text)| (at, text, *why)));
    opening.into_iter().chain(found.map(|(at, text, why)| file.offence(at, &format!("`{text}`"), why))).collect()
}

#[test]
fn sources_say_what_they_own_and_hold_nothing_forbidden() {
    let found = |path: &str, text: &str| bad_lines(&SourceFile::new(path, text)).len();
    for (never, _, _) in NEVER {
        assert_eq!(found("a.rs", &format!("//! A.\nfn b() {{ {never} }}")), 1, "{never}");
    }
    let text = "//! A.\n// .unwrap()\nfn a() { b.unwrap_or(\"dbg!\") }\n#[cfg(test)]\nmod b { fn c() { d.unwrap() } }";
    assert_eq!((found("a.rs", text), found("a/tests.rs", "//!\ndbg!()"), found("a.rs", "// A.")), (0, 0, 1));
    assert_eq!(found(HOP[0], "//!\n[KnownField::KeepAlive]"), 0);
    assert!(read(HOP[0]).product().contains("KnownField::KeepAlive"), "the list moved: adjust HOP");
    let files = ["limiter/src", "shard/src", "gateway/src", "loadtest/src"].into_iter().flat_map(sources);
    assert_none(files.flat_map(|file| bad_lines(&file)).collect());
}
