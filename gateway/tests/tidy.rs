//! What must hold of the sources: imports point one way, files say what they own, documents agree with the code.
//!
//! Each check takes text and returns its offences, `file:line: what; why`, so that a test beside it can show it fail.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file of the repository, by its path from the root.
struct File {
    path: String,
    text: String,
}

impl File {
    fn new(path: &str, text: impl Into<String>) -> Self {
        File { path: path.to_owned(), text: text.into() }
    }

    fn read(path: &str) -> Self {
        let text = std::fs::read_to_string(root().join(path));
        File::new(path, text.unwrap_or_else(|error| panic!("{path}: {error}")))
    }

    /// `at` is an offset into the text.
    fn offence(&self, at: usize, what: &str, why: &str) -> String {
        let line = self.text.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("{}:{line}: {what}; {why}", self.path)
    }

    /// Its code that ships: comments, literals and what is under `#[cfg(test)]` are blanked, so that every offset stays.
    fn product(&self) -> String {
        const MARK: &str = "#[cfg(test)]";
        let is_test = self.path.split('/').any(|part| matches!(part, "tests" | "tests.rs"));
        let mut code = if is_test { String::new() } else { code(&self.text) };
        while let Some(begin) = code.find(MARK) {
            let mut depth = 0;
            let end = code.bytes().skip(begin + MARK.len()).position(|byte| {
                depth += i32::from(b"([{".contains(&byte)) - i32::from(b")]}".contains(&byte));
                depth < 0 || depth == 0 && matches!(byte, b';' | b'}')
            });
            let end = end.map_or(code.len(), |end| begin + MARK.len() + end + 1);
            code.replace_range(begin..end, &blank(&code[begin..end]));
        }
        code
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace around the crate").to_owned()
}

/// The sources below `directory`, in order.
fn files(directory: &str) -> Vec<File> {
    let entries = std::fs::read_dir(root().join(directory)).unwrap_or_else(|error| panic!("{directory}: {error}"));
    let names = entries.map(|entry| entry.expect("a readable directory").file_name());
    let paths: BTreeSet<_> = names.map(|name| format!("{directory}/{}", name.to_string_lossy())).collect();
    let (sources, rest): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.ends_with(".rs"));
    let below = rest.iter().filter(|path| root().join(path).is_dir()).flat_map(|path| files(path));
    sources.iter().map(|path| File::read(path)).chain(below).collect()
}

#[track_caller]
fn assert_none(offences: Vec<String>) {
    assert!(offences.is_empty(), "{} offences:\n{}", offences.len(), offences.join("\n"));
}

/// `text` with comments and literals blanked; every offset stays.
fn code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    while let Some(first) = text[out.len()..].chars().next() {
        let rest = &text[out.len()..];
        match literal(rest) {
            0 if first.is_ascii() => out.push(first),
            length => out.push_str(&blank(&rest[..length.max(first.len_utf8())])),
        }
    }
    out
}

fn blank(text: &str) -> String {
    text.bytes().map(|byte| if byte == b'\n' { '\n' } else { ' ' }).collect()
}

/// The bytes of the comment or literal that `rest` begins with; 0 where it begins with neither.
fn literal(rest: &str) -> usize {
    let upto = |from: usize, end: &str| rest[from..].find(end).map_or(rest.len(), |at| from + at + end.len());
    let hashes = rest.bytes().skip(1).take_while(|byte| *byte == b'#').count();
    match rest.as_bytes() {
        [b'/', b'/', ..] => rest.find('\n').unwrap_or(rest.len()),
        [b'/', b'*', ..] => upto(2, "*/"),
        [b'r', ..] if rest[1 + hashes..].starts_with('"') => upto(2 + hashes, &format!("\"{}", "#".repeat(hashes))),
        [b'"', bytes @ ..] => {
            let mut at = 0;
            while bytes.get(at).is_some_and(|byte| *byte != b'"') {
                at += 1 + usize::from(bytes[at] == b'\\');
            }
            (at + 2).min(rest.len())
        }
        [b'\'', b'\\', ..] => upto(3, "'"),
        // Without a closing quote it is a lifetime.
        [b'\'', ..] => rest.char_indices().nth(2).filter(|(_, it)| *it == '\'').map_or(0, |(at, _)| at + 1),
        _ => 0,
    }
}

/// The identifier that `text` begins with.
fn word(text: &str) -> &str {
    text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_').next().unwrap_or_default()
}

#[test]
fn comments_literals_and_tests_are_no_code() {
    let text = "a(\"x\\\"{\"); // b\nlet c = '\"'; /* é */ e::<'f>(r#\"g\"\"#, b'\\'', '{');\n#[cfg(test)]\nmod tests { }\nh\n\
                #[cfg(test)] use d;\n#[cfg(test)]\nfn e([u8; 2]) {}\ni";
    let product = File::new("a.rs", text).product();
    assert_eq!(product.split_whitespace().collect::<String>(), "a();letc=;e::<'f>(,b,);hi");
    assert_eq!(product.len(), text.len());
}

/// Names of the root with their offsets: `crate::a`, `crate::{a, b::c}`, and `super::a` in a file `depth` levels below.
fn root_names(code: &str, depth: usize) -> Vec<(usize, &str)> {
    let starts = ["crate::".to_owned(), "super::".repeat(depth)];
    let found = starts.iter().flat_map(|start| code.match_indices(start));
    let found = found.filter(|(at, _)| !code[..*at].ends_with(|it: char| it.is_alphanumeric() || "_:".contains(it)));
    let mut names = Vec::new();
    for (at, start) in found {
        let rest = &code[at + start.len()..];
        let mut depth = 0;
        for (offset, it) in rest.char_indices() {
            depth += i32::from(it == '{') - i32::from(it == '}');
            if offset == 0 || depth == 1 && it == ',' {
                let name = rest[offset..].trim_start_matches(|it: char| it.is_whitespace() || "{,".contains(it));
                names.push((code.len() - name.len(), word(name)));
            }
            if depth == 0 {
                break;
            }
        }
    }
    names
}

/// `lib` is the `lib.rs` beside `files`; it declares modules in import order.
fn imports_upward(lib: &File, files: &[File]) -> Vec<String> {
    let declared = lib.product();
    let modules = declared.lines().filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod "));
    let order: Vec<&str> = modules.map(word).collect();
    let place = |name: &str| order.iter().position(|module| *module == name);
    let directory = lib.path.trim_end_matches("lib.rs");
    let mut offences = Vec::new();
    for file in files {
        let inner = file.path.trim_start_matches(directory).trim_end_matches(".rs");
        let parts: Vec<&str> = inner.split('/').filter(|part| *part != "mod").collect();
        let Some(own) = place(parts[0]) else { continue };
        for (at, name) in root_names(&file.product(), parts.len()) {
            let why = match place(name) {
                Some(place) if place > own => "lib.rs declares it further down",
                None if name.starts_with(char::is_uppercase) => "the root's re-export hides the module it is from",
                _ => continue,
            };
            offences.push(file.offence(at, &format!("`{}` imports `{name}`", parts[0]), why));
        }
    }
    offences
}

#[test]
fn imports_run_one_way() {
    let lib = File::new("x/src/lib.rs", "pub mod a;\nmod b;\n// mod e;\npub mod c;\n");
    let found = |path: &str, text: &str| imports_upward(&lib, &[File::new(path, text)]);
    for bad in ["use crate::c;", "use crate::{a,\n c::d};", "f(crate::c::d)", "use super::{c};", "use crate::C;"] {
        assert_eq!(found("x/src/b.rs", bad).len(), 1, "{bad}");
    }
    assert!(found("x/src/b/f.rs", "\n\nuse super::super::c;")[0].starts_with("x/src/b/f.rs:3: `b` imports `c`; "));
    for good in ["use crate::{a, b::{d, c}}; // crate::c", "use super::b; $crate::d!()", "#[cfg(test)] use crate::c;"] {
        assert_eq!(found("x/src/b.rs", good), Vec::<String>::new(), "{good}");
    }
    assert!(found("x/src/b/f.rs", "use super::c;").is_empty() && found("x/src/b/tests.rs", "use crate::c;").is_empty());
    let offences = |path: &str| imports_upward(&File::read(&format!("{path}/lib.rs")), &files(path));
    assert_none(["limiter/src", "shard/src", "gateway/src"].into_iter().flat_map(offences).collect());
}

/// Dependencies of any kind whose package's name begins with one of `refused`.
fn wrong_dependencies(manifest: &File, refused: &[&str]) -> Vec<String> {
    let tables = manifest.text.split("\n[");
    let tables = tables.filter(|it| it.split_once(']').is_some_and(|(name, _)| name.contains("dependencies")));
    let mut offences = Vec::new();
    for line in tables.flat_map(str::lines) {
        let after = |mark: &str| line.split_once(mark).map(|(_, name)| name);
        let mut names = [Some(line), after("package = \""), after("dependencies.")].into_iter().flatten();
        if let Some(name) = names.find(|name| refused.iter().any(|refused| name.starts_with(refused))) {
            let at = line.as_ptr().addr() - manifest.text.as_ptr().addr();
            offences.push(manifest.offence(at, &format!("depends on `{}`", word(name)), "crates point one way"));
        }
    }
    offences
}

/// Says where a manifest is without this line in this table.
fn lacks(manifest: &File, table: &str, line: &str) -> Option<String> {
    let (start, line) = (format!("{table}]"), format!("\n{line}"));
    let has = manifest.text.split("\n[").any(|table| table.starts_with(&start) && table.contains(&line));
    (!has).then(|| manifest.offence(0, &format!("no `[{start}{line}`"), "unsafe code is forbidden in all crates"))
}

#[test]
fn crates_depend_one_way_and_forbid_unsafe_code() {
    let found = |text: &str| wrong_dependencies(&File::new("Cargo.toml", text), &["redis", "http"]).len();
    for bad in ["dependencies]\nhttparse = 1", "dev-dependencies]\na = { package = \"redis\" }", "dependencies.http]"] {
        assert_eq!(found(&format!("[package]\nhttp = 1\n[{bad}\nhash = 1")), 1, "{bad}");
    }
    let lints = |text: &str| lacks(&File::new("Cargo.toml", text), "lints", "workspace = true");
    assert!(lints("[a]\n[lints]\nworkspace = true").is_none() && lints("[lints]\n[a]\nworkspace = true").is_some());
    let workspace = File::read("Cargo.toml");
    let members = quoted(&workspace.text, "members = [", "]", '"').into_iter();
    let members = members.map(|member| File::read(&format!("{member}/Cargo.toml")));
    let mut offences: Vec<String> = members.filter_map(|member| lacks(&member, "lints", "workspace = true")).collect();
    offences.extend(lacks(&workspace, "workspace.lints.rust", "unsafe_code = \"forbid\""));
    offences.extend(wrong_dependencies(&File::read("shard/Cargo.toml"), &["gateway", "http", "hyper"]));
    let refused = ["shard", "gateway", "redis", "http", "hyper"];
    offences.extend(wrong_dependencies(&File::read("limiter/Cargo.toml"), &refused));
    assert_none(offences);
}

/// What no code that ships may contain, why, and where it may stand all the same.
const NEVER: [(&str, &str, &[&str]); 8] = [
    (".unwrap()", "`expect` states the proof; what comes from outside is handled", &[]),
    ("todo!", "what is not finished is not here", &[]),
    ("unimplemented!", "what is not finished is not here", &[]),
    ("dbg!", "events and the access log tell", &[]),
    ("unsafe ", "nothing here needs it", &[]),
    ("map_err(|e| e.to_string())", "an error keeps its type", &[]),
    ("Known::KeepAlive", "hop.rs alone lists hop-by-hop fields", &HOP),
    ("Known::ProxyConnection", "hop.rs alone lists hop-by-hop fields", &HOP),
];

/// The list of hop-by-hop fields, and the table of all names.
const HOP: [&str; 2] = ["gateway/src/hop.rs", "gateway/src/http/fields.rs"];

fn bad_lines(file: &File) -> Vec<String> {
    let code = file.product();
    let opening = (!file.text.starts_with("//!")).then(|| file.offence(0, "no `//!`", "a file says what it owns"));
    let never = NEVER.iter().filter(|(_, _, except)| !except.contains(&&*file.path));
    let found = never.flat_map(|(text, why, _)| code.match_indices(text).map(|(at, text)| (at, text, *why)));
    opening.into_iter().chain(found.map(|(at, text, why)| file.offence(at, &format!("`{text}`"), why))).collect()
}

#[test]
fn sources_say_what_they_own_and_hold_nothing_forbidden() {
    let found = |path: &str, text: &str| bad_lines(&File::new(path, text)).len();
    for (never, _, _) in NEVER {
        assert_eq!(found("a.rs", &format!("//! A.\nfn b() {{ {never} }}")), 1, "{never}");
    }
    let text = "//! A.\n// .unwrap()\nfn a() { b.unwrap_or(\"dbg!\") }\n#[cfg(test)]\nmod b { fn c() { d.unwrap() } }";
    assert_eq!((found("a.rs", text), found("a/tests.rs", "//!\ndbg!()"), found("a.rs", "// A.")), (0, 0, 1));
    assert_eq!(found(HOP[0], "//!\n[Known::KeepAlive]"), 0);
    assert!(File::read(HOP[0]).product().contains("Known::KeepAlive"), "the list is not where this test believes it");
    let sources = ["limiter/src", "shard/src", "gateway/src", "loadtest/src"].into_iter().flat_map(files);
    assert_none(sources.flat_map(|file| bad_lines(&file)).collect());
}

/// What only one of the two has.
fn differences(what: &str, documented: &BTreeSet<String>, real: &BTreeSet<String>) -> Vec<String> {
    let say = |name: &String, why: &str| format!("docs/metrics.md: {what} `{name}`; {why}");
    let missing = real.difference(documented).map(|name| say(name, "the code has it, the table does not"));
    missing.chain(documented.difference(real).map(|name| say(name, "the code does not have it"))).collect()
}

/// Name and type, from the table of all metrics.
fn documented_metrics(docs: &str) -> BTreeSet<String> {
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let is_type = |text: &str| matches!(word(text), "counter" | "gauge" | "histogram");
    rows.filter(|(_, rest)| is_type(rest)).map(|(name, rest)| format!("{name} {}", word(rest))).collect()
}

/// Likewise, from the calls that expose them.
fn exposed_metrics(file: &File) -> BTreeSet<String> {
    let code = file.product();
    let calls = code.match_indices("expose_").filter_map(|(at, start)| {
        let call = word(&code[at..]);
        let kind = word(call.strip_prefix(start)?).trim_end_matches("_with").trim_end_matches('s');
        let name = file.text[at + call.len()..].strip_prefix('(')?.trim_start().strip_prefix('"')?;
        Some(format!("{}{} {kind}", word(name), if kind == "counter" { "_total" } else { "" }))
    });
    calls.collect()
}

/// What stands between every two of `quote`, from `start` to `end`.
fn quoted(text: &str, start: &str, end: &str, quote: char) -> BTreeSet<String> {
    let part = text.split_once(start).and_then(|(_, rest)| rest.split_once(end)).map_or("", |(part, _)| part);
    part.split(quote).skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn metrics_are_documented_as_they_are() {
    let set = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<BTreeSet<String>>();
    assert_eq!(differences("event", &set(&["a", "b"]), &set(&["b", "c"])).len(), 2);
    assert_eq!(documented_metrics("| `a_total` | counter | `x` |\n| `b` | list |\n"), set(&["a_total counter"]));
    let code = "expose_counters(\n \"a\", h); m::expose_gauge_with(\"b\", h); // expose_histogram(\"c\")";
    assert_eq!(exposed_metrics(&File::new("a.rs", code)), set(&["a_total counter", "b gauge"]));
    assert_eq!(quoted("x\n`r`: 400 `a`,\n`b`. And `c`.", "\n`r`:", ".", '`'), set(&["a", "b"]));
    let docs = File::read("docs/metrics.md").text;
    let exposed: BTreeSet<String> = files("gateway/src").iter().flat_map(exposed_metrics).collect();
    let events = quoted(&File::read("gateway/src/event.rs").text, "Name, \"event\", {", "}", '"');
    let reasons = quoted(&File::read("gateway/src/http/h1/request.rs").text, "\nrefusals! {", "}", '"');
    assert!([&exposed, &events, &reasons].iter().all(|it| it.len() > 20), "they are not where this test believes them");
    let mut offences = differences("metric", &documented_metrics(&docs), &exposed);
    offences.extend(differences("event", &quoted(&docs, "\n`event`: ", ".", '`'), &events));
    offences.extend(differences("reason", &quoted(&docs, "\n`reason` of refused requests", ".", '`'), &reasons));
    assert_none(offences);
}

/// Commands `make X`, in backquotes or at the start of a line in a fence, without a target X.
fn unknown_targets(file: &File, makefile: &str) -> Vec<String> {
    let starts = ["\nmake ", "\n$ make ", "`make "].into_iter().flat_map(|start| file.text.match_indices(start));
    let is_fenced = |at: usize| file.text[..=at].matches("```").count() % 2 == 1;
    let commands = starts.filter(|(at, start)| start.starts_with('`') || is_fenced(*at));
    let names = commands.map(|(at, start)| (at + 1, word(&file.text[at + start.len()..])));
    let unknown = names.filter(|(_, name)| !makefile.contains(&format!("\n{name}:")));
    unknown.map(|(at, name)| file.offence(at, &format!("`make {name}`"), "the Makefile has no such target")).collect()
}

#[test]
fn the_readme_names_targets_that_exist() {
    let text = "`make x` and\n```\nmake test # y\n$ make z\n```\nmake sure";
    assert_eq!(unknown_targets(&File::new("README.md", text), ".PHONY: x\ntest: ## e\n").len(), 2);
    assert_none(unknown_targets(&File::read("README.md"), &File::read("Makefile").text));
}

/// Directories of the machines that this was written on.
const MACHINE: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ro", "ot/")];

fn machine_paths(file: &File) -> Vec<String> {
    let is_start = |at: usize| !file.text[..at].ends_with(|it: char| it.is_alphanumeric() || "._-~}".contains(it));
    let found = MACHINE.iter().flat_map(|path| file.text.match_indices(path)).filter(|(at, _)| is_start(*at));
    found.map(|(at, path)| file.offence(at, &format!("`{path}`"), "others have no such directory")).collect()
}

#[test]
fn no_file_names_a_directory_of_one_machine() {
    assert_eq!(machine_paths(&File::new("a", format!("b {}c\nhttps://d{0}", MACHINE[0]))).len(), 1);
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git runs");
    assert!(listed.status.success() || !root().join(".git").exists(), "{listed:?}");
    let names = String::from_utf8(listed.stdout).expect("paths in UTF-8");
    // One may be gone from the tree, or have no text.
    let read = |path: &str| Some(File::new(path, std::fs::read_to_string(root().join(path)).ok()?));
    assert_none(names.split('\0').filter_map(read).flat_map(|file| machine_paths(&file)).collect());
}
