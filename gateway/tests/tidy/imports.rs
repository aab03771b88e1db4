//! Imports point one way: between crates, between the modules of a crate, and between files.
//!
//! The modules that a file declares stand in import order: code below one of them imports only
//! siblings that are declared above it. Files do not import each other in a circle.

use std::collections::{BTreeMap, BTreeSet};

use super::source::{SourceFile, assert_none, quoted, read, sources, word};

/// The paths of the modules of a crate, with the index of their file. The root's path is empty.
struct ModuleTree<'f> {
    files: &'f [SourceFile],
    codes: Vec<String>,
    by_path: BTreeMap<Vec<&'f str>, usize>,
    /// Re-exported names: the module, the name, and what it stands for.
    exports: BTreeMap<(Vec<&'f str>, String), Vec<String>>,
}

/// One import: the offset of its path, and the file it leads to.
struct Import {
    at: usize,
    target: usize,
    text: String,
}

impl<'f> ModuleTree<'f> {
    /// `files` are all files below the directory of a `lib.rs` or `main.rs`.
    fn new(files: &'f [SourceFile]) -> Self {
        // A binary beside a library is a crate of its own, which nothing imports.
        let has_lib = files.iter().any(|file| file.path.ends_with("src/lib.rs"));
        let root = files.iter().map(|file| file.path.rfind("src/").map_or(0, |at| at + 4)).next().unwrap_or(0);
        let codes = files.iter().map(SourceFile::product).collect();
        let path = |file: &'f SourceFile| {
            let inner = file.path[root..].trim_end_matches(".rs");
            let parts = inner.split('/').filter(|part| !matches!(*part, "mod" | "lib" | "main"));
            parts.collect::<Vec<&str>>()
        };
        let members = files.iter().enumerate().filter(|(_, file)| !(has_lib && file.path.ends_with("src/main.rs")));
        let by_path = members.map(|(index, file)| (path(file), index)).collect();
        let mut tree = ModuleTree { files, codes, by_path, exports: BTreeMap::new() };
        tree.exports = tree.find_exports();
        tree
    }

    fn find_exports(&self) -> BTreeMap<(Vec<&'f str>, String), Vec<String>> {
        let mut exports = BTreeMap::new();
        for (module, index) in &self.by_path {
            for (_, segments) in uses(&self.codes[*index], true) {
                if let Some(name) = segments.last() {
                    exports.insert((module.clone(), name.clone()), segments.clone());
                }
            }
        }
        exports
    }

    /// The file that a path written in `module` leads to; `None` for paths out of the crate.
    fn resolve(&self, module: &[&'f str], segments: &[String], depth: usize) -> Option<usize> {
        let mut at: Vec<&str> = module.to_vec();
        let mut rest = segments;
        match rest.first().map(String::as_str)? {
            "crate" => at.clear(),
            "self" => {}
            "super" => {
                at.pop()?;
            }
            child => {
                at.push(child);
                self.by_path.get(&at)?;
            }
        }
        rest = &rest[1..];
        while rest.first().is_some_and(|segment| segment == "super") {
            at.pop()?;
            rest = &rest[1..];
        }
        while let Some(segment) = rest.first() {
            at.push(segment);
            if !self.by_path.contains_key(&at) {
                at.pop();
                break;
            }
            rest = &rest[1..];
        }
        let (path, index) = self.by_path.get_key_value(&at)?;
        let export = rest.first().and_then(|name| self.exports.get(&(path.clone(), name.clone())));
        let exported = export.filter(|_| depth < 4).and_then(|target| self.resolve(path, target, depth + 1));
        Some(exported.unwrap_or(*index))
    }

    fn imports(&self, module: &[&'f str], index: usize) -> Vec<Import> {
        let code = &self.codes[index];
        let exported: BTreeSet<usize> = uses(code, true).iter().map(|(at, _)| *at).collect();
        let mut imports = Vec::new();
        for (at, segments) in uses(code, false).into_iter().chain(paths(code)) {
            if exported.contains(&at) {
                continue;
            }
            if let Some(target) = self.resolve(module, &segments, 0).filter(|target| *target != index) {
                imports.push(Import { at, target, text: segments.join("::") });
            }
        }
        imports
    }

    /// Imports that run against the order in which a file declares its modules.
    fn imports_against_order(&self) -> Vec<String> {
        let mut offences = Vec::new();
        for (module, index) in &self.by_path {
            for import in self.imports(module, *index) {
                if import.text.strip_prefix("crate::").is_some_and(|name| name.starts_with(char::is_uppercase)) {
                    let why = "the root's re-export hides the module";
                    offences.push(self.files[*index].offence(import.at, &format!("imports `{}`", import.text), why));
                    continue;
                }
                let target = self.by_path.iter().find(|(_, index)| **index == import.target);
                let Some((target, _)) = target else { continue };
                let shared = module.iter().zip(target).take_while(|(own, other)| own == other).count();
                let (Some(own), Some(other)) = (module.get(shared), target.get(shared)) else { continue };
                let Some(parent) = self.by_path.get(&module[..shared]) else { continue };
                let order = declared(&self.codes[*parent]);
                let place = |name: &str| order.iter().position(|module| *module == name);
                // A module that only tests have is not declared in the product.
                if place(own).is_some() && place(other) > place(own) {
                    let why = format!("{} declares `{other}` below `{own}`", self.files[*parent].path);
                    offences.push(self.files[*index].offence(import.at, &format!("imports `{}`", import.text), &why));
                }
            }
        }
        offences
    }

    /// The first circle of imports that each file is part of.
    fn circles(&self) -> Vec<String> {
        let mut edges: Vec<BTreeSet<usize>> = vec![BTreeSet::new(); self.files.len()];
        for (module, index) in &self.by_path {
            edges[*index] = self.imports(module, *index).iter().map(|import| import.target).collect();
        }
        let mut offences = BTreeSet::new();
        for start in 0..self.files.len() {
            let mut from: BTreeMap<usize, usize> = BTreeMap::new();
            let mut queue = vec![start];
            while let Some(at) = queue.pop() {
                for next in &edges[at] {
                    if from.contains_key(next) {
                        continue;
                    }
                    from.insert(*next, at);
                    queue.push(*next);
                }
            }
            if !from.contains_key(&start) {
                continue;
            }
            let (mut circle, mut at) = (vec![start], from[&start]);
            while at != start {
                circle.push(at);
                at = from[&at];
            }
            circle.reverse();
            let least = circle.iter().enumerate().min_by_key(|(_, file)| **file).map_or(0, |(at, _)| at);
            circle.rotate_left(least);
            let names: Vec<&str> = circle.iter().map(|file| self.files[*file].path.as_str()).collect();
            offences.insert(format!("{}: import each other in a circle", names.join(" -> ")));
        }
        offences.into_iter().collect()
    }
}

/// The modules that a file declares, in order.
fn declared(code: &str) -> Vec<&str> {
    let mut lines = code.lines().map(str::trim_start);
    let modules = lines.by_ref().filter_map(|line| {
        let line = line.strip_prefix("pub(crate) ").or(line.strip_prefix("pub(super) ")).unwrap_or(line);
        line.trim_start_matches("pub ").strip_prefix("mod ").filter(|rest| rest.trim_end().ends_with(';'))
    });
    modules.map(word).collect()
}

/// The paths of `use` declarations, one for each name, with their offsets; only re-exports where
/// `is_export`.
fn uses(code: &str, is_export: bool) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let line = code[..at].rsplit('\n').next().unwrap_or_default().trim_start();
        let is_public = line.starts_with("pub");
        if !(is_public || line.is_empty() && !is_export) {
            continue;
        }
        let end = code[at..].find(';').map_or(code.len(), |end| at + end);
        expand(&code[at + 4..end], at, &mut Vec::new(), &mut found);
    }
    found
}

/// Adds one path for each name of a `use` tree.
fn expand(tree: &str, at: usize, prefix: &mut Vec<String>, found: &mut Vec<(usize, Vec<String>)>) {
    let mut depth = 0;
    let mut begin = 0;
    let mut items = Vec::new();
    for (offset, it) in tree.char_indices() {
        depth += i32::from(it == '{') - i32::from(it == '}');
        if it == ',' && depth == 0 {
            items.push(&tree[begin..offset]);
            begin = offset + 1;
        }
    }
    items.push(&tree[begin..]);
    for item in items.into_iter().map(str::trim).filter(|item| !item.is_empty()) {
        let length = prefix.len();
        let (path, group) = item.split_once('{').map_or((item, None), |(path, group)| (path, Some(group)));
        prefix.extend(path.split("::").map(word).filter(|part| !part.is_empty()).map(str::to_owned));
        match group {
            Some(group) => expand(group.trim_end().trim_end_matches('}'), at, prefix, found),
            None => found.push((at, prefix.clone())),
        }
        prefix.truncate(length);
    }
}

/// Paths in expressions and types: `crate::a::b`, `super::a`, and `a::b` with a module `a` in
/// scope.
fn paths(code: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let bytes = code.as_bytes();
    for (at, _) in code.match_indices("::") {
        let begin = code[..at].rfind(|it: char| !it.is_alphanumeric() && it != '_').map_or(0, |begin| begin + 1);
        if begin == at || code[..begin].ends_with("::") || code[..begin].ends_with('$') {
            continue;
        }
        let line = code[..begin].rsplit('\n').next().unwrap_or_default();
        if line.contains("use ") {
            continue;
        }
        let length = code[begin..].find(|it: char| !it.is_alphanumeric() && !"_:".contains(it)).unwrap_or(0);
        let segments = code[begin..begin + length].split("::").map(str::to_owned).collect();
        if bytes[begin].is_ascii_lowercase() {
            found.push((begin, segments));
        }
    }
    found
}

const CRATES: [&str; 4] = ["limiter/src", "shard/src", "gateway/src", "loadtest/src"];

#[test]
fn modules_stand_in_import_order() {
    let file = |path: &str, text: &str| SourceFile::new(path, text);
    let found = |own: &str, text: &str| {
        let lib = "pub mod a;\nmod b;\n// mod e;\npub(crate) mod c;\npub use c::C;\n";
        let mut all = vec![file("x/src/lib.rs", lib), file("x/src/a.rs", "mod y;\nmod z;\n")];
        all.extend(
            ["x/src/a/y.rs", "x/src/a/z.rs", "x/src/b.rs", "x/src/c.rs", "x/src/c/d.rs"]
                .map(|path| file(path, if path == own { text } else { "" })),
        );
        ModuleTree::new(&all).imports_against_order().len()
    };
    for bad in [
        "use crate::c;",
        "use crate::{a,\n c::d};",
        "f(crate::c::d)",
        "use super::{c};",
        "use super::c::d::E;",
        "use crate::C;",
    ] {
        assert_eq!(found("x/src/b.rs", bad), 1, "{bad}");
    }
    assert_eq!((found("x/src/a/y.rs", "use super::z::A;"), found("x/src/a/z.rs", "use super::y::A;")), (1, 0));
    assert_eq!(found("x/src/a/y.rs", "use super::super::c;"), 1);
    for good in ["use crate::{a, a::{y, z}}; // crate::c", "use super::a; $crate::d!()", "#[cfg(test)] use crate::c;"] {
        assert_eq!(found("x/src/b.rs", good), 0, "{good}");
    }
    let offences = |path: &&str| ModuleTree::new(&sources(path)).imports_against_order();
    assert_none(CRATES.iter().flat_map(offences).collect());
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let circles = |texts: &[(&str, &str)]| {
        let files: Vec<_> = texts.iter().map(|(path, text)| SourceFile::new(path, *text)).collect();
        ModuleTree::new(&files).circles().len()
    };
    let lib = ("x/src/lib.rs", "mod a;\nmod b;");
    assert_eq!(circles(&[lib, ("x/src/a.rs", "use crate::b::B;"), ("x/src/b.rs", "use crate::a::A;")]), 1);
    assert_eq!(circles(&[lib, ("x/src/a.rs", ""), ("x/src/b.rs", "use crate::a::A;")]), 0);
    // A parent that uses its child, and a child that uses its parent.
    let child = ("x/src/a/c.rs", "use super::A;");
    assert_eq!(circles(&[lib, ("x/src/a.rs", "mod c;\nuse c::C;\nstruct A(C);"), child]), 1);
    assert_eq!(circles(&[lib, ("x/src/a.rs", "mod c;\nstruct A;"), child]), 0);
    // A name that the parent only re-exports belongs to its own file.
    let (d, user) = (("x/src/a/d.rs", ""), ("x/src/a/c.rs", "use super::D;"));
    assert_eq!(circles(&[lib, ("x/src/a.rs", "mod c;\nmod d;\npub use c::C;\npub use d::D;"), d, user]), 0);
    assert_none(CRATES.iter().flat_map(|path| ModuleTree::new(&sources(path)).circles()).collect());
}

/// Dependencies of any kind whose package's name begins with one of `refused`.
fn wrong_dependencies(manifest: &SourceFile, refused: &[&str]) -> Vec<String> {
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

/// An offence where a manifest lacks this line in this table.
fn lacks(manifest: &SourceFile, table: &str, line: &str) -> Option<String> {
    let (start, line) = (format!("{table}]"), format!("\n{line}"));
    let has = manifest.text.split("\n[").any(|table| table.starts_with(&start) && table.contains(&line));
    (!has).then(|| manifest.offence(0, &format!("no `[{start}{line}`"), "unsafe code is forbidden in all crates"))
}

#[test]
fn crates_depend_one_way_and_forbid_unsafe_code() {
    let found = |text: &str| wrong_dependencies(&SourceFile::new("Cargo.toml", text), &["redis", "http"]).len();
    for bad in ["dependencies]\nhttparse = 1", "dev-dependencies]\na = { package = \"redis\" }", "dependencies.http]"] {
        assert_eq!(found(&format!("[package]\nhttp = 1\n[{bad}\nhash = 1")), 1, "{bad}");
    }
    let lints = |text: &str| lacks(&SourceFile::new("Cargo.toml", text), "lints", "workspace = true");
    assert!(lints("[a]\n[lints]\nworkspace = true").is_none() && lints("[lints]\n[a]\nworkspace = true").is_some());
    let workspace = read("Cargo.toml");
    let members = quoted(&workspace.text, "members = [", "]", '"').into_iter();
    let members = members.map(|member| read(&format!("{member}/Cargo.toml")));
    let mut offences: Vec<String> = members.filter_map(|member| lacks(&member, "lints", "workspace = true")).collect();
    offences.extend(lacks(&workspace, "workspace.lints.rust", "unsafe_code = \"forbid\""));
    offences.extend(wrong_dependencies(&read("shard/Cargo.toml"), &["gateway", "http", "hyper"]));
    let refused = ["shard", "gateway", "redis", "http", "hyper"];
    offences.extend(wrong_dependencies(&read("limiter/Cargo.toml"), &refused));
    assert_none(offences);
}
